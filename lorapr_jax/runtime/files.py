"""Reads JSON with clear errors, writes files whole, and keeps the cache."""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path
import tempfile
from typing import Any

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.paths import is_local


def cache_dir() -> Path:
  """The folder for what is fetched or made only once. It may not exist yet."""
  cache = os.environ.get('LORAPR_CACHE') or '~/.cache/lorapr_jax'
  return Path(cache).expanduser()


@contextlib.contextmanager
def new_in_cache(path: Path, what: str) -> Iterator[Path]:
  """Gives a path at which to make `path`, a file or a folder in the cache.

  It appears in the cache complete or not at all. Where another process has made
  it meanwhile, that one stays.

  Raises:
    UserError: if the cache cannot hold `what`.
  """
  above = path.parent, path.parent.parent
  made = [folder for folder in above if not folder.exists()]
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
      partial = Path(temporary) / path.name
      yield partial
      try:
        os.replace(partial, path)
      except OSError:
        if not path.exists():
          raise
  except OSError as error:
    raise UserError(
      f'{path.parent} cannot hold {what} ({error.strerror or error}): set '
      'LORAPR_CACHE to a folder with room'
    ) from error
  finally:
    # After a failure the folders that were made are empty: remove them.
    with contextlib.suppress(OSError):
      for folder in made:
        folder.rmdir()


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
  # A file's name may hold bytes that are not UTF-8: half a character in Python.
  write_bytes(path, text.encode(errors='backslashreplace'))


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file. An old one stays until the new one is complete."""
  if not is_local(path):  # A store shows a file once it is complete.
    path.write_bytes(content)
    return
  partial = path.with_name(path.name + '.partial')
  partial.write_bytes(content)
  os.replace(partial, path)
