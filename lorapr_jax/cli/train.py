"""train: flags to config, then lorapr_jax.train.run."""

import difflib
import sys

from absl import flags
from ml_collections import config_dict, config_flags

from lorapr_jax import train
from lorapr_jax.cli.arguments import print_json
from lorapr_jax.errors import UserError
from lorapr_jax.report.summary import print_summary


def main(argv: list[str]) -> None:
  """Parses `argv`, trains, and prints the summary."""
  if '--help' in argv or '-h' in argv:
    print(
      'train --config=configs/X.py --workdir=DIR [--config.KEY=VALUE ...] '
      '[--json]\n'
      'configs/default.py lists every key.'
    )
    return
  as_json = '--json' in argv
  config, workdir = parse_flags([arg for arg in argv if arg != '--json'])
  summary = train.run(config, workdir)
  if as_json:
    print_json(summary)
  else:
    print_summary(summary)


def parse_flags(argv: list[str]) -> tuple[config_dict.ConfigDict, str]:
  """The config with its overrides, and the workdir.

  Raises:
    UserError: for an unknown flag or key, a value of a wrong type, or a config
      that is not there.
  """
  overrides = [arg for arg in argv if arg.startswith(('--config.', '-config.'))]
  values, _ = _parse([arg for arg in argv if arg not in overrides])
  if values.config is None or values.workdir is None:
    raise UserError('train needs --config=configs/X.py and --workdir=DIR')
  for arg in overrides:
    _check_key(values.config, arg.lstrip('-').partition('=')[0])
  values, rest = _parse(argv)
  if rest:
    raise UserError(f'train takes flags only, not {rest[0]!r}')
  return values.config, values.workdir


def _parse(argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
  values = flags.FlagValues()
  # Left alone, it would look for overrides in sys.argv.
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  flags.DEFINE_string('workdir', None, 'a new folder', flag_values=values)
  try:
    rest = values([sys.argv[0], *argv])
    # A file that cannot be read raises only now.
    getattr(values.config, 'to_dict', None)
  except (
    *(flags.Error, OSError, TypeError, ValueError),
    *(AttributeError, KeyError, ImportError, SyntaxError),
  ) as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise UserError(lines[-1] if lines else repr(error)) from None
  return values, rest[1:]


def _check_key(config: config_dict.ConfigDict, flag: str) -> None:
  node, path = config, 'config'
  for name in flag.split('.')[1:]:
    if not isinstance(node, config_dict.ConfigDict) or name not in node:
      names = node.keys() if isinstance(node, config_dict.ConfigDict) else ()
      close = difflib.get_close_matches(name, names, 1)
      hint = (
        f'; did you mean {path}.{close[0]}?'
        if close
        else (f'; {path} has {", ".join(names)}' if names else '')
      )
      raise UserError(f'unknown setting --{flag}{hint}')
    node, path = node[name], f'{path}.{name}'
