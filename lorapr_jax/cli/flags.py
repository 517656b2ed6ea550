"""--config=NAME|FILE.py and --config.KEY=VALUE: a run's config."""

import ast
from pathlib import Path
import re
import sys

from absl import flags
from ml_collections import config_dict, config_flags

from lorapr_jax.errors import UserError
from lorapr_jax.settings.files import (
  check_config,
  check_key,
  find_config,
  find_removed,
  read_config,
)


def parse_flags(
  argv: list[str], command: str = 'train'
) -> tuple[config_dict.ConfigDict, str]:
  """The config with its overrides, and the workdir, from a command's flags.

  A setting that is unset by default is unset again by KEY=None. In a flag of
  data.template or data.response, which a shell passes on as it is written, \\n
  is a line end and \\t a tab; after a backslash they are not.

  Raises:
    UserError: for an unknown flag or key, a value of a wrong type, or a config
      that is not there.
  """
  argv = _with_config_found(argv)
  overrides = [arg for arg in argv if arg.startswith(('--config.', '-config.'))]
  values, _ = _parse([arg for arg in argv if arg not in overrides])
  if values.config is None or not values.workdir:
    raise UserError('train needs --config=configs/X.py and --workdir=DIR')
  check_config(values.config, _config_flag(argv))
  for arg in overrides:
    check_key(values.config, _name(arg))
  unset = [arg for arg in overrides if _unsets(arg)]
  values, rest = _parse([arg for arg in argv if arg not in unset])
  if rest:
    raise UserError(f'{command} takes flags only, not {rest[0]!r}')
  for arg in unset:
    _, section, key = _name(arg).split('.')
    values.config[section][key] = None
  for key in ('template', 'response'):
    if f'--config.data.{key}' in map(_name, overrides):
      values.config.data[key] = _unescaped(values.config.data[key])
  return values.config, values.workdir


def _name(flag: str) -> str:
  """--config.KEY of --config.KEY=VALUE; one dash is as good as two."""
  return '--' + flag.lstrip('-').partition('=')[0]


def _unsets(flag: str) -> bool:
  """Whether it is KEY=None, of a setting that is unset by default."""
  _, section, *keys = _name(flag).split('.')
  defaults = read_config('default')[section]
  found = len(keys) == 1 and defaults.get(keys[0], '') is None
  return found and flag.endswith('=None')


def _unescaped(text: str) -> str:
  ends = {'n': '\n', 't': '\t'}
  return re.sub(r'(?<!\\)\\([nt])', lambda match: ends[match[1]], text)


def _with_config_found(argv: list[str]) -> list[str]:
  """The arguments, with a config's path in place of its name."""
  found, rest = [], iter(argv)
  for arg in rest:
    flag, equals, name = arg.partition('=')
    if flag in ('--config', '-config'):
      # What follows a colon is for the file's get_config().
      name, *more = (name if equals else next(rest, '')).split(':', 1)
      path = find_config(name)
      _check_syntax(path, name)
      arg = '--config=' + ':'.join([str(path), *more])
    found.append(arg)
  return found


def _check_syntax(path: Path, name: str) -> None:
  # Of a file that is not Python, what reads it tells one thing or another.
  try:
    ast.parse(path.read_bytes(), path.name)
  except (SyntaxError, ValueError) as error:
    raise UserError(f'--config={name} cannot be read: {error}') from None


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
    first, *more = str(error).strip().splitlines()
    if more:  # The traceback of a config's file.
      first = f'{_config_flag(argv)} cannot be read: {more[-1]}'
    raise UserError(first) from None
  except Exception as error:  # The file is a program: it may raise anything.
    while isinstance(error, AttributeError | KeyError) and error.args:
      error = error.args[0]  # Which may be an exception again.
    # ml_collections shows the whole section where it lacks a key.
    text = re.sub(r' Other fields present: .*', '', str(error))
    text = ' '.join(text.split()) or repr(error)
    if removed := find_removed(text):
      raise UserError(f'{_config_flag(argv)}: {removed}') from None
    raise UserError(f'{_config_flag(argv)} cannot be read: {text}') from None
  return values, rest[1:]


def _config_flag(argv: list[str]) -> str:
  return next(arg for arg in argv if arg.lstrip('-').startswith('config='))
