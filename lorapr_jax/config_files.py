"""Configs by name, from files of the user's or from those that are shipped."""

import difflib
import importlib.util
from pathlib import Path

from ml_collections import config_dict

from lorapr_jax.errors import UserError

# Beside the package: in a checkout, and where a wheel was installed.
_SHIPPED = Path(__file__).parents[1] / 'configs'


def find_config(name: str) -> Path:
  """The file of a config.

  Args:
    name: a path, or where there is no such file a shipped config: `tiny` or
      `configs/tiny.py`.

  Raises:
    UserError: if there is neither, with the names of the shipped ones.
  """
  path = Path(name)
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

  Raises:
    UserError: if there is no such file.
  """
  path = find_config(name)
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def check_key(config: config_dict.ConfigDict, flag: str) -> None:
  """Refuses a key that a config does not have.

  Args:
    config: the config.
    flag: as the user wrote it: [--]config.SECTION.KEY.

  Raises:
    UserError: with the nearest key that there is.
  """
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
      raise UserError(f'unknown setting {flag}{hint}')
    node, path = node[name], f'{path}.{name}'
