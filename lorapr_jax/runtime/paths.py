"""Paths on the local disk and on any fsspec file system, such as gs://.

A path that is not local is a UPath, which has the methods of `pathlib.Path`.
Code that takes a path from the user calls only those methods. This module does
what a UPath cannot: local copies, new folders, and renaming what is complete.
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

from lorapr_jax.errors import UserError, first_line, short
from lorapr_jax.runtime.leftovers import delete, half, half_folder

# The files of a Hugging Face folder that a tokenizer may need.
_TOKENIZERS = ('*.json', '*.jinja', '*.txt', 'tokenizer.model*', 'tekken*')


def path_of(name: str | os.PathLike[str]) -> Path:
  """The path for a name that a user gave. Looks nothing up.

  ~ is the home folder, also where a shell leaves it, as behind an equals sign.
  file:// is local, and gcs:// means gs://. The fsspec package of a file system
  finds by itself what it needs, such as credentials. A Path or UPath stays as
  it is, with its own options; but orbax, which writes checkpoints, only has its
  name.

  Raises:
    UserError: if there is no such file system, if its package is missing, or
      if the name is not UTF-8, which the libraries that write need.
  """
  if getattr(name, 'protocol', 'file') not in ('file', 'local', 'gcs', ''):
    return name
  if isinstance(name, Path):
    return name
  name = str(name)
  try:
    name.encode()
  except UnicodeEncodeError:
    raise UserError(
      f'{short(repr(name))} is no name in UTF-8: rename it'
    ) from None
  if '://' not in name:
    return expanded(name)
  # Imported here because most paths are local.
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
  # It logs each request that fails, and then raises an error that says so.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  # Other machines write there too, so no listing may be remembered.
  options = fsspec.config.conf.setdefault(scheme, {})
  options.setdefault('use_listings_cache', False)
  path = upath.UPath(name)
  return Path(path.path) if scheme in ('file', 'local') else path


def expanded(name: str) -> Path:
  """The local path of a name, in which ~ stands for the home folder.

  Raises:
    UserError: if there is no home folder.
  """
  path = os.path.expanduser(name)
  if path.partition('/')[0] == '~':
    raise UserError(
      f'{name}: there is no home folder that ~ could stand for: write the path '
      'in full'
    )
  return Path(path)


def is_path(value: Any) -> bool:
  """Whether a value is a path of any kind, and not text."""
  return isinstance(value, os.PathLike) or hasattr(value, 'fs')


def is_local(path: Path) -> bool:
  """Whether a path from `path_of` is one of the operating system."""
  return isinstance(path, Path)


def is_folder(path: Path) -> bool:
  """Whether a path is a folder. If that cannot be known, an error is raised."""
  if is_local(path):
    return path.is_dir()
  try:
    return path.fs.info(path.path)['type'] == 'directory'
  except FileNotFoundError:
    return False


def version_of(path: Path) -> str:
  """A text that changes with the file: size and times, or what a store says."""
  if not is_local(path):
    return str(path.fs.info(path.path))
  stat = path.stat()
  return f'{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}'


def names_in(folder: Path, *patterns: str) -> list[Path]:
  """What in a folder has a name that matches one of the patterns, sorted."""
  if not is_folder(folder):
    return []
  return sorted(
    path
    for path in folder.iterdir()
    if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)
  )


def files_in(folder: Path, *patterns: str) -> list[Path]:
  """As `names_in`, but files alone."""
  return [path for path in names_in(folder, *patterns) if path.is_file()]


def tokenizer_folder(folder: Path) -> Path:
  """The folder if it is local, else a local copy of its tokenizer's files."""
  if is_local(folder):
    return folder
  found = files_in(folder, *_TOKENIZERS)
  return _copies(tuple((path, version_of(path)) for path in found))


def local_file(path: Path) -> Path:
  """The file if it is local, else a copy that lasts as long as the process."""
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
  """Copies the content of a file. Each of the two paths may be local or not."""
  with source.open('rb') as read, target.open('wb') as written:
    shutil.copyfileobj(read, written, 2**24)


def make_folder(folder: Path) -> None:
  """Makes a folder and its parents, unless they exist.

  In a store a folder exists once a file lies in it: there is nothing to make.
  """
  if is_local(folder):
    folder.mkdir(parents=True, exist_ok=True)


def move(source: Path, target: Path) -> None:
  """Renames a file or a folder. The new name must be free."""
  if is_local(source):
    source.rename(target)
    return
  for name in source.fs.find(source.path):
    source.fs.cp_file(name, target.path + name.removeprefix(source.path))
  remove(source)


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
  """Gives a path at which to write the file or folder `path`.

  If `path` is local, the given path is a temporary one, and is renamed when the
  block ends without an error. If it is not, renaming is slow: the given path is
  `path` itself, and what is there is removed if the block fails. A process that
  is killed can leave a part of it, so write a folder's essential files last.

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
      with half_folder(path) as temporary:
        partial = temporary / path.name
        yield partial
        os.replace(partial, path)
    else:
      with contextlib.ExitStack() as unless_complete:
        unless_complete.callback(remove, path)
        yield path
        unless_complete.pop_all()
  except OSError as error:
    reason = error.strerror or error
    raise UserError(
      f'{path} cannot be written ({reason}): make room, or choose another place'
    ) from error


def remove(path: Path) -> None:
  """Removes what is there. What is local loses its name at once."""
  if not path.exists():
    return
  if is_local(path):
    path.rename(unnamed := half(path))
    delete(unnamed)
  else:
    path.fs.rm(path.path, recursive=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
  """As `new_path`, and makes a folder at the given path.

  Raises:
    UserError: if `folder` exists or cannot be written.
  """
  with new_path(folder) as partial:
    make_folder(partial)
    yield partial


@contextlib.contextmanager
def written_locally(path: Path) -> Iterator[Path]:
  """Gives a local path, for code that can write to no other.

  It is `path` itself if that is local. Otherwise the file that the block wrote
  is copied to `path`.
  """
  if is_local(path):
    yield path
    return
  with tempfile.TemporaryDirectory(prefix='lorapr-') as temporary:
    local = Path(temporary) / path.name
    yield local
    copy_file(local, path)
