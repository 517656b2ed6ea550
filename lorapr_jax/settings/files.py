"""Configs by name, from files of the user's or from those that are shipped."""

import difflib
import importlib.util
from pathlib import Path
import re
from typing import Any

from ml_collections import config_dict

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import LARGE, read_json
from lorapr_jax.runtime.forms import (
  FLAG,
  INDEX,
  INTEGER,
  NUMBER,
  TEXT,
  Each,
  Leaf,
  Maybe,
  check_form,
)
from lorapr_jax.runtime.paths import expanded

_PACKAGE = Path(__file__).parents[1]
# Beside the package in a checkout; in it where a wheel was installed.
_SHIPPED = next(
  folder
  for folder in (_PACKAGE / 'configs', _PACKAGE.parent / 'configs')
  if folder.is_dir()
)
# Settings that the releases before this one had, and what to do instead.
REMOVED = {
  'prune.scope': 'leave it out; prune.layer_profile takes more from some '
  'layers than from others',
  'prune.blocks': 'leave it out; it belonged to prune.scope, which was '
  'removed too',
  'prune.compensate_damping': 'leave it out; each repair chooses its own',
}


_DTYPES = 'float32', 'bfloat16', 'float16'
_RESOLVED = {
  'base_dtype': Leaf('a dtype', lambda x: x in _DTYPES),
  'model': {},
  'keep': Each([INDEX]),
}


def find_config(name: str) -> Path:
  """The file at a path, or where there is none a shipped config.

  A shipped config is named `tiny` or `configs/tiny.py`.

  Raises:
    UserError: if there is neither, with the names of the shipped ones.
  """
  path = expanded(name)
  if path.is_file():
    return path
  shipped = {file.stem: file for file in sorted(_SHIPPED.glob('*.py'))}
  if name in shipped:
    return shipped[name]
  if path.parent == Path('configs') and path.stem in shipped:
    return shipped[path.stem]
  raise UserError(
    f'there is no config {name!r}: give the path of a file, or one of '
    + ', '.join(shipped)
  )


def read_config(name: str) -> config_dict.ConfigDict:
  """What `get_config()` of a config's file returns.

  The name is as of `find_config`, with what `get_config` is given behind a
  colon.

  Raises:
    UserError: if there is no such file, or it sets a removed key.
  """
  name, *argument = name.split(':', 1)
  path = find_config(name)
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    return module.get_config(*argument)
  except (AttributeError, KeyError) as error:
    if removed := find_removed(str(error)):
      raise UserError(f'{name}: {removed}') from None
    raise


def find_removed(error: str) -> str | None:
  """What to do about a removed key that a config's file sets.

  `error` is what ml_collections says when a key is set that it does not know;
  it does not name the section. None if that is about something else.
  """
  unknown = re.search(r'Key "(\w+)" does not exist', error)
  for setting in REMOVED:
    if unknown and unknown[1] == setting.split('.')[-1]:
      return _removed(f'config.{setting}')
  return None


def _removed(flag: str) -> str | None:
  """The advice about [--]config.SECTION.KEY, if that is a removed setting."""
  advice = REMOVED.get(flag.partition('.')[-1])
  return advice and f'{flag} was removed: {advice}'


# What a setting is in JSON, by the type of its default; of another type it may
# be anything.
_LEAVES = {
  str: TEXT,
  int: INTEGER,
  float: NUMBER,
  bool: FLAG,
  type(None): Maybe(NUMBER),
}


def read_run_json(path: Path) -> dict[str, Any]:
  """A workdir's run.json. A run that is older than a key does not have it.

  Raises:
    UserError: if it is not as a run writes it.
  """
  config = {
    f'{section}?': {
      f'{key}?': leaf
      for key, value in keys.items()
      if (leaf := _LEAVES.get(type(value)))
    }
    for section, keys in read_config('default').items()
  }
  run = read_json(path, LARGE)
  form = {'config': config, 'resolved': _RESOLVED, 'inputs?': {}}
  check_form(run, form, path)
  return run


def check_config(config: Any, name: str) -> None:
  """Refuses what is no config with the keys of configs/default.py.

  Raises:
    UserError: naming a key that is missing, unknown or removed.
  """
  advice = 'start from configs/default.py, as configs/tiny.py does'
  if not isinstance(config, config_dict.ConfigDict):
    raise UserError(
      f'{name}: get_config() returns a {type(config).__name__}, not a '
      f'ConfigDict; {advice}'
    )
  known, found = _keys(read_config('default')), _keys(config)
  for key in sorted(found - known):
    if removed := _removed(f'config.{key}'):
      raise UserError(f'{name}: {removed}')
  for what, keys in (
    ('lacks', known - found),
    ('has the unknown', found - known),
  ):
    if keys:
      raise UserError(f'{name} {what} config.{min(keys)}: {advice}')


def _keys(config: config_dict.ConfigDict) -> set[str]:
  return {
    f'{section}.{key}'
    for section, keys in config.items()
    for key in (keys if isinstance(keys, config_dict.ConfigDict) else ())
  }


def check_key(config: config_dict.ConfigDict, flag: str) -> None:
  """Refuses a key that a config does not have: [--]config.SECTION.KEY.

  Raises:
    UserError: with the nearest key that there is, or what to use instead of
      a removed one.
  """
  node, path = config, 'config'
  for name in flag.split('.')[1:]:
    if not isinstance(node, config_dict.ConfigDict) or name not in node:
      if removed := _removed(flag):
        raise UserError(removed)
      names = node.keys() if isinstance(node, config_dict.ConfigDict) else ()
      close = difflib.get_close_matches(name, names, 1)
      hint = (
        f'; did you mean {path}.{close[0]}?'
        if close
        else f'; {path} has {", ".join(names) or "no keys"}'
      )
      raise UserError(f'unknown setting {flag}{hint}')
    node, path = node[name], f'{path}.{name}'
