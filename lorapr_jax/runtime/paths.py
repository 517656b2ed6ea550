"""Paths of the local disk and of any fsspec file system, such as gs://.

What is not local is a UPath, which has the methods of `pathlib.Path`; code that
takes a path of the user's uses no others, and what only a local file can do is
here: a temporary copy, a new folder, one file in place of another.
"""

from collections.abc import Iterator
import contextlib
import fnmatch
import functools
import logging
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

from lorapr_jax.errors import UserError, first_line

# Of a Hugging Face folder, all that a tokenizer may be read from.
_TOKENIZERS = ('*.json', '*.jinja', '*.txt', 'tokenizer.model*', 'tekken*')


def path_of(name: str | os.PathLike[str]) -> Path:
  """The path of a name that a user gave; nothing is looked up.

  file:// is local, and gcs:// is gs://. What another file system needs to be
  reached, such as credentials, is taken from where fsspec's package looks. A
  UPath of it that is given stays as it is, with its own options; of a workdir
  orbax knows the name alone.

  Raises:
    UserError: if there is no such file system, or its package is missing.
  """
  if getattr(name, 'protocol', 'file') not in ('file', 'local', 'gcs', ''):
    return name
  name = str(name)
  if '://' not in name:
    return Path(name)
  # Here, since most paths are local.
  import fsspec
  import upath

  scheme, _, rest = name.partition('://')
  if scheme == 'gcs':
    scheme, name = 'gs', f'gs://{rest}'
  try:
    fsspec.get_filesystem_class(scheme)
  except (ImportError, ValueError) as error:
    raise UserError(
      f'{name}: the file system {scheme}:// cannot be used: {first_line(error)}'
    ) from None
  # It logs each request that fails, before it raises an error that says so.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  # Others write there too: no listing is remembered, here or by orbax.
  options = fsspec.config.conf.setdefault(scheme, {})
  options.setdefault('use_listings_cache', False)
  path = upath.UPath(name)
  return Path(path.path) if scheme in ('file', 'local') else path


def is_path(value: Any) -> bool:
  """Whether it is a path of any kind, and no text."""
  return isinstance(value, os.PathLike) or hasattr(value, 'fs')


def is_local(path: Path) -> bool:
  """Whether the operating system knows a path from `path_of`."""
  return isinstance(path, Path)


def is_folder(path: Path) -> bool:
  """Whether it is one; what keeps that from being known is an error."""
  if is_local(path):
    return path.is_dir()
  try:
    return path.fs.info(path.path)['type'] == 'directory'
  except FileNotFoundError:
    return False


def version_of(path: Path) -> str:
  """Changes when the file does: its size and time, or what a store says."""
  if not is_local(path):
    return str(path.fs.info(path.path))
  stat = path.stat()
  return f'{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}'


def files_in(folder: Path, *patterns: str) -> list[Path]:
  """The files of a folder whose names match one of these, by name."""
  if not is_folder(folder):
    return []
  return sorted(
    path
    for path in folder.iterdir()
    if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
    and path.is_file()
  )


def tokenizer_folder(folder: Path) -> Path:
  """The folder, or a local one with what a tokenizer may need of it."""
  if is_local(folder):
    return folder
  found = files_in(folder, *_TOKENIZERS)
  return _copies(tuple((path, version_of(path)) for path in found))


def local_file(path: Path) -> Path:
  """The file, or a copy of it that lasts as long as the process."""
  if is_local(path):
    return path
  return _copies(((path, version_of(path)),)) / path.name


@functools.cache
def _copies(versions: tuple[tuple[Path, str], ...]) -> Path:
  folder = Path(tempfile.mkdtemp(dir=_temporary().name))
  for path, _ in versions:
    copy_file(path, folder / path.name)
  return folder


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix='lorapr-')


def copy_file(source: Path, target: Path) -> None:
  """Copies what a file holds, wherever the two are."""
  with source.open('rb') as read, target.open('wb') as written:
    shutil.copyfileobj(read, written, 2**24)


def make_folder(folder: Path) -> None:
  """Makes a folder and those above it, if it is not there.

  What is not local has folders only where there are files in them.
  """
  if is_local(folder):
    folder.mkdir(parents=True, exist_ok=True)


def move(source: Path, target: Path) -> None:
  """Gives a file or a folder another name, which must be free."""
  if is_local(source):
    source.rename(target)
    return
  for name in source.fs.find(source.path):
    source.fs.cp_file(name, target.path + name.removeprefix(source.path))
  _remove(source)


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
  """A path to write to, a file's or a folder's, that must be free.

  A local one is temporary, and gets its name once what is there is complete.
  What is not local cannot be renamed as cheaply: it is written where it will
  lie, and removed if that fails. Those files of a folder should come last
  without which it is of no use.

  Raises:
    UserError: if `path` exists or cannot be written.
  """
  if path.exists():
    raise UserError(
      f'{path} exists already, and nothing is written over it: choose another '
      'name'
    )
  try:
    if is_local(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f'.{path.name}-'
      ) as temporary:
        partial = Path(temporary) / path.name
        yield partial
        os.replace(partial, path)
    else:
      with contextlib.ExitStack() as unless_complete:
        unless_complete.callback(_remove, path)
        yield path
        unless_complete.pop_all()
  except OSError as error:
    reason = error.strerror or error
    raise UserError(
      f'{path} cannot be written ({reason}): make room, or choose another place'
    ) from error


def _remove(path: Path) -> None:
  if path.exists():
    path.fs.rm(path.path, recursive=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """As `new_path`, with a folder there.

  Raises:
    UserError: if `folder` exists or cannot be written.
  """
  with new_path(folder) as partial:
    make_folder(partial)
    yield partial


@contextlib.contextmanager
def written_locally(path: Path) -> Iterator[Path]:
  """A local path, for what can write to no other; its file then gets to `path`.

  It is the same where `path` is local.
  """
  if is_local(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='lorapr-') as temporary:
    local = Path(temporary) / path.name
    yield local
    copy_file(local, path)
