"""Files and folders that are half written, and those that a dead process left.

What is half written has a hidden name, which says what it is to become and
which process of which host writes it: `.NAME.HOST-PROCESS-RANDOM`.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import os
from pathlib import Path
import re
import secrets
import shutil
import socket
import time

_NAME = re.compile(r'\..+\.([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{8}')
# Of another host, or from before a restart: what did not change for so long is
# of a dead process.
_SILENCE = 24 * 3600


def reach() -> str:
  """A name for where process ids mean the same processes as here.

  Another host, the same one after a restart, and a container have others.
  """
  parts = [socket.gethostname()]
  boot = Path('/proc/sys/kernel/random/boot_id')
  namespace = Path('/proc/self/ns/pid')
  if boot.exists() and namespace.exists():
    parts += [boot.read_text().strip(), str(namespace.stat().st_ino)]
  return ' '.join(parts)


def is_alive(process: int) -> bool:
  """Whether there is such a process here."""
  try:
    os.kill(process, 0)
    # One that has ended, and whose parent has not asked how, is a zombie.
    stat = Path(f'/proc/{process}/stat').read_text()
  except (ProcessLookupError, OverflowError):
    return False
  except OSError:  # It is another user's, or this system has no /proc.
    return True
  return stat.rpartition(')')[2].split()[0] != 'Z'


def _host() -> str:
  return hashlib.sha256(reach().encode()).hexdigest()[:8]


def half(path: Path) -> Path:
  """A name beside `path` for what becomes `path` once it is complete."""
  owner = f'{_host()}-{os.getpid()}-{secrets.token_hex(4)}'
  # Names have 255 bytes at most.
  return path.with_name(f'.{path.name[:50]}.{owner}')


def is_half(path: Path) -> bool:
  """Whether it is called as `half` calls it."""
  return _NAME.fullmatch(path.name) is not None


@contextlib.contextmanager
def half_folder(path: Path) -> Iterator[Path]:
  """A folder beside `path` for what becomes `path`; it goes in the end.

  What dead processes left there goes first.
  """
  sweep(path.parent)
  folder = half(path)
  folder.mkdir()
  try:
    yield folder
  finally:
    delete(folder)


def sweep(folder: Path) -> None:
  """Removes what dead processes left half written in a folder."""
  paths = []
  with contextlib.suppress(OSError):  # One may write where one may not list.
    paths = list(folder.iterdir())
  for path in paths:
    if (match := _NAME.fullmatch(path.name)) and _is_dead(
      path, *match.groups()
    ):
      delete(path)


def _is_dead(path: Path, host: str, process: str) -> bool:
  if host == _host():
    return not is_alive(int(process))
  changed = 0.0
  # Its process, or another that sweeps, may remove it meanwhile.
  with contextlib.suppress(OSError):
    for one in (path, *path.rglob('*')):
      changed = max(changed, one.lstat().st_mtime)
  return time.time() - changed > _SILENCE


def delete(path: Path) -> None:
  """Removes a file, a link or a folder, as far as it can be removed."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(OSError):
      path.unlink()
