"""SHA-256 of files: tells what a file holds, wherever and whenever it lies.

A file whose size and times are as they were is not read again: the process
remembers the hash, and of large files on the disk the cache does.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
import contextlib
import hashlib
from pathlib import Path
import re
import threading
import time

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import cache_dir, write_text
from lorapr_jax.runtime.paths import is_local, version_of

# A file that was changed so recently may change again with the same times.
_SETTLED_NS = 2 * 10**9
# Smaller files are read about as fast as what is remembered of them.
_LARGE = 2**26
# Bytes read at a time.
_PIECE = 2**22

# {(path, its version): hash}, of this process.
_known: dict[tuple[str, str], str] = {}


def sha256_of(path: Path, stop: threading.Event | None = None) -> str:
  """The SHA-256 of a file, in hexadecimal.

  Once `stop` is set, the work ends with a CancelledError.

  Raises:
    UserError: if the file cannot be read.
  """
  try:
    return _sha256_of(path, stop or threading.Event())
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'{path} cannot be read: {reason}') from None


def _sha256_of(path: Path, stop: threading.Event) -> str:
  key = str(path.absolute()), version_of(path)
  if key in _known:
    return _known[key]
  if not is_local(path):
    _known[key] = _read(path, stop)
    return _known[key]
  stat = path.stat()
  changed = max(stat.st_mtime_ns, stat.st_ctime_ns)
  if time.time_ns() - changed < _SETTLED_NS:
    return _read(path, stop)
  if stat.st_size < _LARGE:
    _known[key] = _read(path, stop)
  else:
    name = hashlib.sha256('\0'.join(key).encode()).hexdigest()
    _known[key] = _remembered(cache_dir() / 'hashes' / name, path, stop)
  return _known[key]


def _remembered(entry: Path, path: Path, stop: threading.Event) -> str:
  """The hash in an entry of the cache; without one it is made."""
  with contextlib.suppress(OSError, UnicodeDecodeError):
    found = entry.read_text(encoding='ascii')
    if re.fullmatch('[0-9a-f]{64}', found):
      return found
  found = _read(path, stop)
  # The cache may be full: then the file is read again next time.
  with contextlib.suppress(OSError):
    entry.parent.mkdir(parents=True, exist_ok=True)
    write_text(entry, found)
  return found


def _read(path: Path, stop: threading.Event) -> str:
  digest = hashlib.sha256()
  with path.open('rb') as file:
    while piece := file.read(_PIECE):
      if stop.is_set():
        raise CancelledError
      digest.update(piece)
  return digest.hexdigest()


@contextlib.contextmanager
def hashing(paths: Iterable[Path]) -> Iterator[Callable[[], dict[str, str]]]:
  """Hashes files in threads while the block runs.

  Gives a function that waits for all, and returns {path: SHA-256} in order; it
  raises what `sha256_of` does. What is not done when the block ends is left.
  """
  stop = threading.Event()
  # All files at once: a bucket limits the speed of each.
  with ThreadPoolExecutor() as pool:
    work = {str(path): pool.submit(sha256_of, path, stop) for path in paths}
    try:
      yield lambda: {path: hash_.result() for path, hash_ in work.items()}
    finally:
      stop.set()
      pool.shutdown(cancel_futures=True)


def combined(hashes: Iterable[str]) -> str:
  """One SHA-256 of several, in order."""
  return hashlib.sha256(b''.join(map(bytes.fromhex, hashes))).hexdigest()
