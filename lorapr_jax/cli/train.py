"""train: flags to config, then lorapr_jax.train.run."""

import difflib
import re
import sys

from absl import flags
from ml_collections import config_dict, config_flags

from configs import default
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
  if values.config is None or not values.workdir:
    raise UserError('train needs --config=configs/X.py and --workdir=DIR')
  _check_config(values.config, _config_flag(argv))
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
  except flags.Error as error:
    raise UserError(str(error).splitlines()[-1].strip()) from None
  except Exception as error:  # The file is a program: it may raise anything.
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    # The whole section, which ml_collections shows where a key is unknown.
    text = re.sub(r' Other fields present: .*', '', text)
    text = ' '.join(text.split()) or repr(error)
    raise UserError(f'{_config_flag(argv)} cannot be read: {text}') from error
  return values, rest[1:]


def _config_flag(argv: list[str]) -> str:
  found = (arg for arg in argv if arg.lstrip('-').startswith('config='))
  return next(found, '--config')


def _check_config(config: config_dict.ConfigDict, flag: str) -> None:
  """Refuses a config that has not the keys of configs/default.py."""
  if not isinstance(config, config_dict.ConfigDict):
    raise UserError(
      f'{flag}: get_config() returns a {type(config).__name__}, not a '
      'ConfigDict; start from configs/default.py, as configs/tiny.py does'
    )
  known, found = _keys(default.get_config()), _keys(config)
  for what, keys in (
    ('lacks', known - found),
    ('has the unknown', found - known),
  ):
    if keys:
      raise UserError(
        f'{flag} {what} {min(keys)}: start from configs/default.py, as '
        'configs/tiny.py does'
      )


def _keys(config: config_dict.ConfigDict) -> set[str]:
  return {
    f'{section}.{key}'
    for section, keys in config.items()
    for key in (keys if isinstance(keys, config_dict.ConfigDict) else ())
  }


def _check_key(config: config_dict.ConfigDict, flag: str) -> None:
  node, path = config, 'config'
  for name in flag.split('.')[1:]:
    if not isinstance(node, config_dict.ConfigDict) or name not in node:
      names = node.keys() if isinstance(node, config_dict.ConfigDict) else ()
      close = difflib.get_close_matches(name, names, 1)
      hint = (
        f'; did you mean {path}.{close[0]}?'
        if close
        else f'; {path} has {", ".join(names) or "no keys"}'
      )
      raise UserError(f'unknown setting --{flag}{hint}')
    node, path = node[name], f'{path}.{name}'
