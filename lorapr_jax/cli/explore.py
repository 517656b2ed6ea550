"""explore: every size of a model at a glance, before it is pruned to one."""

from typing import Any

from lorapr_jax.cli.arguments import (
  Parser,
  make_table,
  print_json,
  print_tables,
)
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.errors import UserError
from lorapr_jax.exploring.asked import ask
from lorapr_jax.exploring.results import PAGE_FILE
from lorapr_jax.exploring.run import explore
from lorapr_jax.report import units
from lorapr_jax.runtime.paths import path_of
from lorapr_jax.runtime.terminal import say
from lorapr_jax.settings.files import read_config

# What stands for a flag of the config.
_SHORT = {
  'model': 'model.path',
  'data': 'data.train',
  'eval': 'data.eval',
  'fit': 'prune.fit',
  'speedup': 'prune.speedup',
}
# What the command that prunes sets itself.
_OWN = (
  *('prune.target', 'prune.heads_target', 'prune.channels_target'),
  *('prune.layers_target', 'prune.unit', 'prune.fit', 'prune.speedup'),
  *('prune.rung_steps', 'export.ladder'),
)


def _parser() -> Parser:
  parser = Parser(
    'explore',
    'Measures every size of a model, untrained, before it is pruned to one. '
    'Settings are those of train: --config=NAME and --config.KEY=VALUE.',
    allow_abbrev=False,
  )
  parser.add_argument('--config', default='default', help='as of train')
  for name in 'model', 'data', 'eval':
    parser.add_argument(f'--{name}', help=f'for --config.{_SHORT[name]}')
  parser.add_argument(
    '--sizes',
    default='0.9,0.8,0.7,0.6,0.5',
    help='shares of the parameters that stay (default: %(default)s); with '
    '--fit or --speedup it may be empty',
  )
  parser.add_argument(
    '--fit', help='one size more: for --config.prune.fit, such as 8GB'
  )
  parser.add_argument(
    '--speedup', help='one size more: for --config.prune.speedup, such as 1.5'
  )
  parser.add_argument(
    '--ways',
    default='width,depth',
    help='ways to each size: width (heads and channels), depth (whole layers), '
    'both (default: %(default)s)',
  )
  parser.add_argument(
    '--tokens',
    type=int,
    help="to measure and repair on; default: those of the config's calibration",
  )
  parser.add_argument(
    '--context', type=int, help='tokens of the KV cache; default: up to 4096'
  )
  parser.add_argument(
    '--latency', action='store_true', help='time each size on this device'
  )
  parser.add_argument(
    '--workdir', help='a folder to go on in, and for the page'
  )
  parser.add_json()
  return parser


def main(argv: list[str]) -> None:
  """Measures each size without training, and prints them beside each other."""
  args, rest = _parser().parse_known_args(argv)
  given = [
    f'--config.{key}={value}'
    for name, key in _SHORT.items()
    if (value := getattr(args, name)) is not None
  ]
  flags = [f'--config={args.config}', *given, *rest]
  config, _ = parse_flags([*flags, '--workdir=none'], 'explore')
  asked = ask(
    config,
    args.ways.split(','),
    _shares(args.sizes),
    tokens=args.tokens,
    context=args.context,
    latency=args.latency,
  )
  workdir = path_of(args.workdir) if args.workdir else None
  result = explore(
    asked,
    workdir,
    command(flags, read_config(args.config), asked.settings.model.folder),
    lambda line: say(line, error=True),
  )
  if args.json:
    print_json(result)
    return
  show(result)
  if workdir:
    say(f'page: {workdir / PAGE_FILE}')


def _shares(text: str) -> list[float]:
  try:
    return [float(share) for share in text.split(',') if text]
  except ValueError:
    raise UserError(
      f'--sizes is {text!r}: it must be shares such as 0.9,0.7'
    ) from None


def command(flags: list[str], config: Any, folder: Any) -> list[str]:
  """A command that prunes as these flags say, without its sizes.

  What their config's file itself says of sizes is unset.
  """
  own = tuple(f'--config.{key}=' for key in _OWN)
  kept = [flag for flag in flags if not flag.startswith(own)]
  default, unset = read_config('default'), []
  for section, key in (own.split('.') for own in _OWN):
    value = default[section][key]
    if config[section][key] != value:
      unset.append(f'--config.{section}.{key}={value}')
  name = folder.name if folder else 'random'
  return ['python', 'train.py', *kept, f'--workdir=runs/{name}-pruned', *unset]


def show(result: dict[str, Any]) -> None:
  """Prints the result for people."""
  timed = result['timed_on']
  columns = ['parameters', 'weights', 'KV cache', 'perplexity']
  columns += ['prompt, ms', 'token, ms'] if timed else []
  table = make_table(('',), columns)
  for row in result['rows']:
    cells = [
      units.count(row['parameters']),
      units.size(row['bytes']),
      units.size(row['kv_cache_bytes']),
      f'{row["perplexity"]["value"]:.2f}',
    ]
    for phase in ('prefill', 'decode') if timed else ():
      cells.append(_time(row['latency'] and row['latency'][phase]))
    table.add_row(row['name'], *cells)
  say(result['model'])
  print_tables(table)
  on, repaired = result['measured_on'], result['repaired_on']
  say(
    f'perplexity: {on["data"]}, {on["windows"]} windows of {on["seq_len"]} '
    'tokens; nothing was trained',
    f'repaired on {repaired["tokens"]:,} tokens of {repaired["data"]}',
    f'weights and KV cache in {result["dtype"]}, the cache of '
    f'{result["context"]:,} tokens',
  )
  if timed:
    say(
      f'times on {timed["device"]}: of a prompt of {timed["prompt_tokens"]} '
      'tokens, and of a token that follows; x: faster than the dense model by'
    )
  if result['left_out']:
    names = ', '.join(result['left_out'])
    say(f'left out, as its way does not come to it: {names}')
  say(
    f'measured in {units.duration(result["seconds"])}',
    result['verdict'],
    f'to prune to {result["chosen"]}:',
    f'  {result["command"]}',
  )


def _time(times: dict[str, float] | None) -> str:
  if not times:
    return '–'
  faster = f' x {times["speedup"]:.2f}' if 'speedup' in times else ''
  return f'{1e3 * times["seconds"]:,.1f}{faster}'
