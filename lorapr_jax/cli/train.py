"""train: flags to config, then lorapr_jax.train.run."""

from lorapr_jax import train
from lorapr_jax.cli.arguments import print_json
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.report.summary import print_summary


def main(argv: list[str]) -> None:
  """Parses `argv`, trains, and prints the summary."""
  if '--help' in argv or '-h' in argv:
    print(
      'train --config=NAME|FILE.py --workdir=DIR [--config.KEY=VALUE ...] '
      '[--json]\n'
      'configs/default.py lists every key; --config=default uses it.'
    )
    return
  as_json = '--json' in argv
  config, workdir = parse_flags([arg for arg in argv if arg != '--json'])
  summary = train.run(config, workdir)
  if as_json:
    print_json(summary)
  else:
    print_summary(summary)
