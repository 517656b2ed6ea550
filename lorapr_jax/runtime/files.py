"""Reads JSON with clear errors, writes files whole, and names the cache."""

import json
import os
from pathlib import Path
from typing import Any

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.paths import is_local


def cache_dir() -> Path:
  """The folder for what is fetched or made only once. It may not exist yet."""
  cache = os.environ.get('LORAPR_CACHE') or '~/.cache/lorapr_jax'
  return Path(cache).expanduser()


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    UserError: if the file is missing or is not a JSON object.
  """
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError(f'{path} does not exist') from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f'{path} is not JSON: {error}') from None
  if not isinstance(value, dict):
    raise UserError(f'{path} holds no JSON object')
  return value


def write_json(path: Path, value: Any) -> None:
  """Writes JSON with a final line end."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def write_text(path: Path, text: str) -> None:
  """Writes a text file. An old one stays until the new one is complete."""
  write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file. An old one stays until the new one is complete."""
  if not is_local(path):  # A store shows a file once it is complete.
    path.write_bytes(content)
    return
  partial = path.with_name(path.name + '.partial')
  partial.write_bytes(content)
  os.replace(partial, path)
