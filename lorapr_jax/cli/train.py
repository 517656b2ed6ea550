"""train: flags to config, then lorapr_jax.train.run."""

from lorapr_jax import processes, train
from lorapr_jax.cli.arguments import print_json
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.report.summary import print_summary


def main(argv: list[str]) -> None:
  """Parses `argv`, trains, and prints the summary."""
  if '--help' in argv or '-h' in argv:
    print(
      'train --config=NAME|FILE.py --workdir=DIR [--config.KEY=VALUE ...] '
      '[--json]\n'
      '  [--coordinator_address=HOST:PORT --num_processes=N --process_id=I]\n'
      'configs/default.py lists every key; --config=default uses it.'
    )
    return
  as_json, own, others = '--json' in argv, [], {}
  for arg in argv:
    name, equals, value = arg.lstrip('-').partition('=')
    if name in processes.FLAGS and equals:
      others[name] = value
    elif arg != '--json':
      own.append(arg)
  config, workdir = parse_flags(own)
  processes.connect(**others)
  summary = train.run(config, workdir)
  if not processes.is_first():
    return
  if as_json:
    print_json(summary)
  else:
    print_summary(summary)
