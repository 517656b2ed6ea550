"""Reads bent files under limits, in a process of its own.

  python -m tests.errors.survive FOLDER KIND ...

prints a line of JSON for every file: its kind, what was done to it, what is
wrong with the answer, and the answer. Nothing is wrong where the exit status is
1 with one line of error and nothing written. A file that is too slow ends the
process.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
import contextlib
import dataclasses
import json
import os
from pathlib import Path
import resource
import shutil
import signal
import sys
import tempfile
import traceback

from lorapr_jax.errors import UserError
from tests.errors.bend import Bent

ACCEPTED = 'it was accepted'
_SECONDS = 60
_BYTES = 10**9
# Of a line that a person reads.
_LETTERS = 1000


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of file that is bent.

  Attributes:
    make: makes what is good in an empty folder, which is the current one too;
      returns the file to bend.
    bend: what is in the good file -> what is in the bent ones.
    read: reads the files of that folder: returns the exit status, or raises a
      UserError.
    accepts: what may be done to a file and leaves it good, in the patterns of
      a shell.
  """

  make: Callable[[Path], Path]
  bend: Callable[[bytes], Iterable[Bent]]
  read: Callable[[Path], int | None]
  accepts: Collection[str] = ()


def survive(kind: Kind, folder: Path) -> Iterator[tuple[str, str, str]]:
  """Of every bent file: what was done, what is wrong, what was answered."""
  folder.mkdir(parents=True)
  os.chdir(folder)
  path = kind.make(folder)
  good, before = path.read_bytes(), _contents(folder)
  status, said = _answer(kind, folder)
  if status:
    yield 'nothing', f'status {status}', said
  _restore(folder, before)
  with _limits():
    for bent in kind.bend(good):
      path.write_bytes(bent.content)
      status, said = _answer(kind, folder)
      path.write_bytes(good)
      wrong = _wrong(status, said)
      if status == 1 and _contents(folder) != before:
        wrong = 'something was written'
      _restore(folder, before)
      yield bent.did, wrong, said[-2 * _LETTERS :]


def _answer(kind: Kind, folder: Path) -> tuple[int, str]:
  """The exit status, and all that went to the two streams."""
  with tempfile.TemporaryFile('w+', errors='replace') as stream:
    with _into(stream.fileno()):
      signal.alarm(_SECONDS)
      try:
        status = kind.read(folder) or 0
      except UserError as error:
        status = 1
        print(f'error: {error}')
      # Whatever it is, it is what is looked for.
      except BaseException:
        status = 2
        traceback.print_exc()
      signal.alarm(0)
    stream.seek(0)
    return status, stream.read()


def _wrong(status: int, said: str) -> str:
  if status == 0:
    return ACCEPTED
  lines = said.splitlines()
  if status != 1 or len(lines) != 1 or not said.startswith('error: '):
    return f'status {status}, {len(lines)} lines'
  return 'a long line' if len(said) > _LETTERS else ''


@contextlib.contextmanager
def _into(file: int) -> Iterator[None]:
  """Both streams, also of what is no Python, lead into an open file."""
  with contextlib.ExitStack() as restored:
    for stream in (sys.stdout, sys.stderr):
      number = stream.fileno()
      old = os.dup(number)
      restored.callback(os.close, old)
      restored.callback(os.dup2, old, number)
      restored.callback(stream.flush)
      stream.flush()
      os.dup2(file, number)
    yield


@contextlib.contextmanager
def _limits() -> Iterator[None]:
  """What is there may grow by `_BYTES` of memory."""
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  most = pages * resource.getpagesize() + _BYTES
  resource.setrlimit(resource.RLIMIT_AS, (most, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _contents(folder: Path) -> dict[Path, bytes]:
  return {
    path: path.read_bytes() if path.is_file() else b''
    for path in folder.rglob('*')
  }


def _restore(folder: Path, before: dict[Path, bytes]) -> None:
  """Removes what is new."""
  for path in folder.rglob('*'):
    if path not in before and path.is_dir():
      shutil.rmtree(path)
    elif path not in before:
      path.unlink()


def main(argv: list[str]) -> None:
  """Prints what became of every file of some kinds."""
  from tests.errors.kinds import KINDS

  folder, *names = argv
  for name in names:
    for result in survive(KINDS[name], Path(folder, name)):
      print(json.dumps([name, *result]), flush=True)


if __name__ == '__main__':
  main(sys.argv[1:])
