"""Reads JSON with clear errors, writes files whole, and keeps the cache."""

from collections.abc import Iterable, Iterator
import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.leftovers import delete, half, half_folder
from lorapr_jax.runtime.paths import expanded, is_local

# The most bytes of a file of settings, from which Python makes up to a
# gigabyte; and of one with what pruning kept of every layer.
SMALL, LARGE = 2**25, 2**28
_SEAL = 'sha256'
# More than this no file needs, and Python itself may not manage.
_DEEPEST = 100


def cache_dir() -> Path:
  """The folder for what is fetched or made only once. It may not exist yet.

  Raises:
    UserError: if there is no home folder for it.
  """
  cache = os.environ.get('LORAPR_CACHE') or '~/.cache/lorapr_jax'
  try:
    return expanded(cache)
  except UserError:
    raise UserError(
      'there is no home folder for the cache: set LORAPR_CACHE to a folder'
    ) from None


@contextlib.contextmanager
def new_in_cache(
  path: Path, what: str, *, again: bool = False
) -> Iterator[Path]:
  """Gives a path at which to make `path`, a file or a folder in the cache.

  It appears in the cache complete or not at all, after a loss of power too.
  Where another process has made it meanwhile, that one stays. With `again`,
  what is there is damaged, and goes.

  Raises:
    UserError: if the cache cannot hold it; the error calls it `what`.
  """
  above = path.parent, path.parent.parent
  made = [folder for folder in above if not folder.exists()]
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with half_folder(path) as temporary:
      partial = temporary / path.name
      if again:
        delete(path)
      yield partial
      for written in (partial, *partial.rglob('*')):
        _to_disk(written)
      try:
        os.replace(partial, path)
      except OSError:
        if not path.exists():
          raise
    _to_disk(path.parent)
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


def _to_disk(path: Path) -> None:
  """Waits until the disk has a file or the names in a folder."""
  opened = os.open(path, os.O_RDONLY)
  try:
    os.fsync(opened)
  finally:
    os.close(opened)


def check_file(path: Path) -> None:
  """Refuses what is no file, such as a link that leads nowhere or a pipe.

  Raises:
    UserError: saying what it is.
  """
  if path.is_file():
    return
  if is_local(path) and path.is_symlink() and not path.exists():
    raise UserError(
      f'{path} is a link to {path.readlink()}, which does not exist: fetch the '
      'model again'
    )
  what = 'is not a file' if path.exists() else 'does not exist'
  raise UserError(f'{path} {what}')


def read_bytes(path: Path, most: int) -> bytes:
  """The content of a file, of which no more is read than allowed.

  Raises:
    UserError: if it is no file, or has more than `most` bytes.
  """
  check_file(path)
  with path.open('rb') as file:
    content = file.read(most + 1)
  if len(content) > most:
    raise UserError(
      f'{path} has more than {most / 2**20:,.0f} MiB, the most that is read of '
      'such a file'
    )
  return content


def read_json(path: Path, most: int = SMALL) -> dict[str, Any]:
  """A JSON object from a file of at most `most` bytes.

  Raises:
    UserError: if there is no such file, or it is not a JSON object.
  """
  content = read_bytes(path, most)
  try:
    value = json.loads(content.decode())
  except RecursionError:
    raise _too_deep(path) from None
  # Also an integer of thousands of digits, with advice behind a semicolon.
  except ValueError as error:
    reason, _, _ = str(error).partition(';')
    raise UserError(f'{path} is not JSON: {reason}') from None
  if not isinstance(value, dict):
    raise UserError(f'{path} holds no JSON object')
  inner = [value]
  for _ in range(_DEEPEST):
    inner = [x for outer in inner for x in _inside(outer)]
    if not inner:
      return value
  raise _too_deep(path)


def _inside(value: Any) -> Iterable[Any]:
  """The lists and objects that a list or an object holds."""
  values = value.values() if isinstance(value, dict) else value
  return [x for x in values if isinstance(x, dict | list)]


def _too_deep(path: Path) -> UserError:
  return UserError(
    f'{path} has lists and objects more than {_DEEPEST} deep in each other'
  )


def write_json(path: Path, value: Any) -> None:
  """Writes JSON with a final line end."""
  write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def write_sealed(path: Path, value: dict[str, Any]) -> None:
  """Writes a JSON object with its own SHA-256 in it."""
  write_json(path, value | {_SEAL: _seal(value)})


def read_sealed(path: Path) -> dict[str, Any]:
  """What `write_sealed` wrote.

  Raises:
    UserError: if it is not there, or not as it was written.
  """
  value = read_json(path)
  if value.pop(_SEAL, None) != _seal(value):
    raise UserError(f'{path} is not as it was written')
  return value


def _seal(value: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """An error of the operating system in the `with` block names the path."""
  try:
    yield
  except OSError as error:
    error.filename, error.filename2 = str(path), None
    raise


def write_text(path: Path, text: str) -> None:
  """Writes a text file. An old one stays until the new one is complete."""
  # A file's name may hold bytes that are not UTF-8: half a character in Python.
  write_bytes(path, text.encode(errors='backslashreplace'))


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file. An old one stays until the new one is complete."""
  if not is_local(path):  # A store shows a file once it is complete.
    path.write_bytes(content)
    return
  partial = half(path)
  try:
    with naming(path):
      partial.write_bytes(content)
      os.replace(partial, path)
  except BaseException:
    delete(partial)
    raise
