"""evaluate: perplexities of a folder, or its scores in lm_eval's tasks."""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any

from lorapr_jax import api
from lorapr_jax.cli.arguments import (
  Parser,
  make_table,
  print_json,
  print_tables,
)
from lorapr_jax.errors import UserError
from lorapr_jax.eval import suite, zero_shot
from lorapr_jax.runtime.terminal import say

# The flags that only one of the three uses.
_ONLY = {
  'suite': ('max_windows', 'seq_len', *suite.PAPER_TEXTS),
  'data': ('max_windows', 'seq_len'),
  'tasks': ('include_path', 'limit', 'num_fewshot', 'apply_chat_template'),
}


def main(argv: list[str]) -> None:
  """Evaluates, and prints the figures with all that they depend on."""
  args = parse(argv)
  common = {'batch_size': args.batch_size, 'dtype': args.dtype}
  if args.tasks is not None:
    names = [name for name in args.tasks.split(',') if name]
    scores = zero_shot.evaluate_tasks(
      args.model,
      names,
      include_path=args.include_path,
      limit=args.limit,
      num_fewshot=args.num_fewshot,
      chat=args.apply_chat_template,
      **common,
    )
    show_tasks(scores, args)
  elif args.suite is not None:
    texts = {name: getattr(args, name) for name in suite.PAPER_TEXTS}
    results = suite.evaluate_suite(
      args.model,
      texts,
      seq_len=args.seq_len,
      max_windows=args.max_windows,
      **common,
    )
    show_suite(results, args)
  else:
    result = api.evaluate(
      args.model,
      args.data,
      args.seq_len,
      max_windows=args.max_windows,
      **common,
    )
    if args.json:
      print_json({**dataclasses.asdict(result), 'model': args.model})
    else:
      say(
        f'perplexity {result.perplexity:.4f} on {result.data}: '
        f'{result.windows} windows of {result.seq_len} tokens, '
        f'{result.tokens_per_second:,.0f} tokens/s'
      )


def parse(argv: list[str]) -> Any:
  """The arguments.

  Raises:
    UserError: for flags that do not go together.
  """
  parser = Parser('evaluate', __doc__)
  parser.add_argument('--model', required=True, help='a Hugging Face folder')
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument('--data', help='a data spec, with --seq_len')
  what.add_argument(
    '--suite',
    choices=('paper',),
    help='WikiText2 and PTB at 128, 512 and 2048 tokens',
  )
  what.add_argument(
    '--tasks',
    help="names of lm_eval's, comma-separated; the papers' are "
    + ','.join(zero_shot.PAPER_TASKS),
  )
  parser.add_argument('--seq_len', type=int, help='with --suite: it alone')
  parser.add_argument('--max_windows', type=int, help='default: all')
  for name, spec in suite.PAPER_TEXTS.items():
    parser.add_argument(
      f'--{name}', metavar='SPEC', default=spec, help=f'default: {spec}'
    )
  parser.add_argument('--include_path', help='a folder of more tasks')
  parser.add_argument('--limit', type=int, help='questions a task; default all')
  parser.add_argument('--num_fewshot', type=int, help="default: the task's own")
  parser.add_argument(
    '--apply_chat_template',
    action='store_true',
    help="put questions as a user's message",
  )
  parser.add_argument(
    '--batch_size', type=int, default=8, help='windows or rows at a time'
  )
  parser.add_dtype()
  parser.add_json()
  args = parser.parse_args(argv)
  mode = next(name for name in _ONLY if getattr(args, name) is not None)
  for name in sorted(set(sum(_ONLY.values(), ())) - set(_ONLY[mode])):
    if getattr(args, name) != parser.get_default(name):
      raise UserError(f'--{name} has no meaning with --{mode}')
  if mode == 'data' and args.seq_len is None:
    raise UserError('--data needs --seq_len, tokens a window')
  return args


def show_suite(
  results: Iterable[suite.TextPerplexity | suite.Skipped], args: Any
) -> None:
  """Prints a table, or one object; what is skipped is said meanwhile."""
  measured, skipped = [], []
  for result in results:
    if isinstance(result, suite.TextPerplexity):
      measured.append(result)
      continue
    skipped.append(result)
    say(
      f'skipped: {result.name} at {result.seq_len}: {result.reason}',
      error=True,
    )
  if args.json:
    print_json(
      {
        'model': args.model,
        'suite': args.suite,
        'results': [
          {
            'name': result.name,
            'left_out': result.left_out,
            **dataclasses.asdict(result.measured),
          }
          for result in measured
        ],
        'skipped': [dataclasses.asdict(result) for result in skipped],
      }
    )
    return
  table = make_table(
    ('text',),
    ('seq_len', 'windows', 'left out', 'perplexity', 'tokens/s'),
  )
  for result in measured:
    figures = result.measured
    table.add_row(
      *(result.name, str(figures.seq_len)),
      *(f'{figures.windows:,}', f'{result.left_out:,}'),
      f'{figures.perplexity:.2f}',
      f'{figures.tokens_per_second:,.0f}',
    )
  print_tables(table)
  say('left out: tokens in no window that was measured')
  for name, spec in {r.name: r.measured.data for r in measured}.items():
    say(f'{name}: {spec}')


def show_tasks(scores: Sequence[zero_shot.TaskScore], args: Any) -> None:
  """Prints a table with every metric, or one object."""
  means = zero_shot.mean_accuracies(scores)
  if args.json:
    print_json(
      {
        'model': args.model,
        'tasks': [dataclasses.asdict(score) for score in scores],
        'mean': means,
      }
    )
    return
  table = make_table(('task',), ('shots', 'questions', 'metric', 'value', '±'))
  for score in scores:
    for metric, value in score.metrics.items():
      error = score.errors.get(metric)
      table.add_row(
        *(score.task, str(score.shots), f'{score.documents:,}', metric),
        f'{value:.4f}',
        '–' if error is None else f'{error:.4f}',
      )
  if len(scores) > 1:
    for metric, value in means.items():
      table.add_row('mean', '', '', metric, f'{value:.4f}', '')
  print_tables(table)
  if len(scores) > 1 and means:
    say("the mean of acc_norm takes a task's acc where it has no acc_norm")
