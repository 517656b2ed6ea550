"""benchmark: how fast a model reads a prompt and continues it."""

from typing import Any

from lorapr_jax.cli.arguments import (
  Parser,
  make_table,
  print_json,
  print_tables,
)
from lorapr_jax.errors import UserError, check_least
from lorapr_jax.eval.benchmark import (
  NEW_TOKENS,
  PROMPT_TOKENS,
  REPEATS,
  benchmark,
)
from lorapr_jax.hf.load import load_config
from lorapr_jax.runtime.terminal import say


def main(argv: list[str]) -> None:
  """Times the folders in turns, and prints the figures."""
  parser = Parser('benchmark', __doc__)
  parser.add_argument('--model', required=True, help='a Hugging Face folder')
  parser.add_argument('--against', help='another, which takes turns with it')
  parser.add_argument(
    '--batch_sizes', default='1,4', help='sequences, comma-separated'
  )
  parser.add_argument('--prompt_tokens', type=int, default=PROMPT_TOKENS)
  parser.add_argument('--new_tokens', type=int, default=NEW_TOKENS)
  parser.add_argument(
    '--repeats', type=int, default=REPEATS, help='timed turns'
  )
  parser.add_dtype()
  parser.add_json()
  args = parser.parse_args(argv)
  folders = {'model': args.model} | (
    {'against': args.against} if args.against else {}
  )
  batch_sizes = check(args, folders)
  report = benchmark(
    folders,
    batch_sizes,
    prompt_tokens=args.prompt_tokens,
    new_tokens=args.new_tokens,
    repeats=args.repeats,
    dtype=args.dtype,
  )
  if args.json:
    print_json(report)
  else:
    show(report)


def check(args: Any, folders: dict[str, str]) -> list[int]:
  """The batch sizes, once all arguments have been checked.

  Raises:
    UserError: for figures that make no sense, or that a model has no room for.
  """
  try:
    batch_sizes = [int(size) for size in args.batch_sizes.split(',')]
  except ValueError:
    raise UserError(
      f'--batch_sizes is {args.batch_sizes!r}: it must be numbers such as 1,4'
    ) from None
  check_least(
    batch_sizes=(min(batch_sizes), 1),
    prompt_tokens=(args.prompt_tokens, 1),
    new_tokens=(args.new_tokens, 2),
    repeats=(args.repeats, 1),
  )
  tokens = args.prompt_tokens + args.new_tokens
  for folder in folders.values():
    positions = load_config(folder).longest
    if tokens > positions:
      raise UserError(
        f'--prompt_tokens and --new_tokens are {tokens} tokens, more than the '
        f'{positions} positions (max_position_embeddings) of {folder}'
      )
  return batch_sizes


def show(report: dict[str, Any]) -> None:
  """Prints the report as a table."""
  names = [name for name in ('model', 'against') if name in report]
  columns = [f'{name}, {unit}' for name in names for unit in ('ms', 'tokens/s')]
  if 'against' in report:
    columns += ['faster by', 'fewer FLOPs']
  table = make_table(('batch', 'phase'), columns)
  for row in report['results']:
    cells = []
    for name in names:
      cells += [
        f'{1e3 * row[name]["seconds"]:,.1f}',
        f'{row[name]["tokens_per_second"]:,.0f}',
      ]
    if 'against' in report:
      cells += [f'x {row["speedup"]:.2f}', f'x {row["flops_ratio"]:.2f}']
    table.add_row(str(row['batch_size']), row['phase'], *cells)
  print_tables(table)
  say(
    f'prompts of {report["prompt_tokens"]} tokens, {report["new_tokens"]} new '
    f'ones; medians of {report["repeats"]} turns'
  )
  for name in names:
    model = report[name]
    say(
      f'{name}: {model["folder"]}, {model["dtype"]}, '
      f'{model["params"]:,} parameters, {model["weights_bytes"] / 1e9:.2f} GB, '
      f'KV cache {model["kv_cache_bytes_per_token"]:,} bytes a token'
    )
