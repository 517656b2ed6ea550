"""JSON files, read with clear errors and written whole; and the cache."""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import tempfile
from typing import Any

from safetensors import SafetensorError

from lorapr_jax.errors import UserError


def cache_dir() -> Path:
  """The folder for what is fetched or made once; it may not exist yet."""
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
  """Writes a text file, in place of the old one once it is complete."""
  partial = path.with_name(path.name + '.partial')
  partial.write_text(text, encoding='utf-8')
  os.replace(partial, path)


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
  """A temporary path, which gets this name once what is there is complete.

  Raises:
    UserError: if `path` exists or cannot be written.
  """
  if path.exists():
    raise UserError(
      f'{path} exists already, and nothing is written over it: choose another '
      'name'
    )
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      dir=path.parent, prefix=f'.{path.name}-'
    ) as temporary:
      partial = Path(temporary) / path.name
      yield partial
      os.replace(partial, path)
  except (OSError, SafetensorError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{path} cannot be written ({reason}): make room, or choose another place'
    ) from error
