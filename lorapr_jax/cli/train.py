"""train: reads the config from flags, and runs lorapr_jax.train.run."""

from lorapr_jax import train
from lorapr_jax.cli.arguments import Parser, print_json
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.report.summary import print_summary
from lorapr_jax.runtime import processes


def main(argv: list[str]) -> None:
  """Parses `argv`, trains, and prints the summary."""
  parser = Parser(
    'train',
    'Prunes a model by a config. configs/default.py lists every key; '
    '--config=default uses it.',
    usage='%(prog)s --config=NAME|FILE.py --workdir=DIR\n'
    '  [--config.KEY=VALUE ...] [--json]\n'
    '  [--coordinator_address=HOST:PORT --num_processes=N --process_id=I]',
    allow_abbrev=False,
  )
  parser.add_json()
  parser.add_argument(
    '--coordinator_address',
    metavar='HOST:PORT',
    help='of the first process, where JAX does not find it by itself',
  )
  parser.add_argument(
    '--num_processes', metavar='N', type=int, help='how many there are'
  )
  parser.add_argument(
    '--process_id', metavar='I', type=int, help='of this one, from 0'
  )
  args, flags = parser.parse_known_args(argv)
  config, workdir = parse_flags(flags)
  processes.connect(
    args.coordinator_address, args.num_processes, args.process_id
  )
  summary = train.run(config, workdir)
  if not processes.is_first():
    return
  if args.json:
    print_json(summary)
  else:
    print_summary(summary)
