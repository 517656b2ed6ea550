"""One process at a time writes to a workdir: it holds the workdir's lock.

The lock is a file that can be made only where there is none. It says which
process made it, and that process touches it every BEAT seconds. The lock of a
process that is dead is free: at once on that process's own host, elsewhere
after SILENCE seconds without a touch.
"""

from collections.abc import Callable, Iterator
import contextlib
import datetime
import json
import os
from pathlib import Path
import secrets
import socket
import threading
import time
from typing import Any

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import write_bytes
from lorapr_jax.runtime.leftovers import is_alive, reach, sweep
from lorapr_jax.runtime.paths import is_local, version_of

LOCK_FILE = 'run.lock'
# Who finds a lock waits for as long as it takes to see a touch, and refuses
# then.
BEAT = 5.0
# Longer than any call during which Python's other threads stand still.
SILENCE = 120.0
# Two processes may take over the lock of a dead one at the same time. After
# this pause the one that wrote last has it.
SETTLE = 0.5


@contextlib.contextmanager
def holding(
  workdir: Path, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
  """Holds the lock of a workdir in the `with` block.

  The workdir is made if need be, and what dead processes left half written in
  it goes. If it is empty in the end, it goes again. `say` prints a line
  while a process of another host may still be alive.

  Yields:
    What checks that this process has not lost the lock. It may have if it was
    stopped, or its machine asleep, for SILENCE seconds. It raises a UserError
    then.

  Raises:
    UserError: if the process that holds the lock is alive.
  """
  made = []
  try:
    if is_local(workdir):
      chain = workdir, *workdir.parents
      made = [folder for folder in chain if not folder.exists()]
      workdir.mkdir(parents=True, exist_ok=True)
    lock = _Lock(workdir)
    while not lock.taken(say):
      pass
    if is_local(workdir):
      sweep(workdir)
    with lock.touched():
      yield lock.check
  finally:
    with contextlib.suppress(OSError):  # They are not empty.
      for folder in made:
        folder.rmdir()


class _Lock:
  def __init__(self, workdir: Path):
    now = datetime.datetime.now().astimezone()
    self._workdir, self._path = workdir, workdir / LOCK_FILE
    self._content = json.dumps(
      {
        'since': now.isoformat(' ', 'seconds'),
        'process': os.getpid(),
        'host': socket.gethostname(),
        'reach': reach(),
        'id': secrets.token_hex(8),
      }
    ).encode()

  def check(self) -> None:
    if self._read() != self._content:
      raise UserError(
        f'{self._path} is not of this process any more, which was silent for '
        f'more than {SILENCE:.0f} s: run the same command again to go on from '
        'the last checkpoint'
      )

  def taken(self, say: Callable[[str], None]) -> bool:
    """Makes the lock, or waits for what becomes of the one that is there."""
    with contextlib.suppress(FileExistsError):
      _make(self._path, self._content)
      return True
    held = self._read()
    if held is None or not self._is_of_the_dead(held, say):
      return False
    write_bytes(self._path, self._content)
    time.sleep(SETTLE)
    return self._read() == self._content

  def _is_of_the_dead(self, held: bytes, say: Callable[[str], None]) -> bool:
    """Whether a lock is free as it is; False if it has changed meanwhile."""
    holder = _holder(held)
    process = holder.get('process')
    here = holder.get('reach') == reach() and isinstance(process, int)
    if here and process > 0 and not is_alive(process):
      return True
    who = f'process {process} on {holder.get("host")}'
    version, begin, said = version_of(self._path), time.monotonic(), False
    while (waited := time.monotonic() - begin) < SILENCE:
      time.sleep(BEAT / 10)
      now = self._read()
      if now != held:
        return False
      if version_of(self._path) != version:
        raise UserError(
          f'another process is running in {self._workdir} since '
          f'{holder.get("since")} ({who}): wait until it has ended, or choose '
          'another --workdir'
        )
      if waited > 2 * BEAT and not said:
        said = True
        say(
          f'waiting up to {SILENCE:.0f} s for a sign of {who}, which was '
          f'running in {self._workdir}'
        )
    return True

  def _read(self) -> bytes | None:
    try:
      return self._path.read_bytes()
    except FileNotFoundError:
      return None

  @contextlib.contextmanager
  def touched(self) -> Iterator[None]:
    """Touches the lock in a thread; gives it up at the end."""
    ended = threading.Event()

    def beat() -> None:
      while not ended.wait(BEAT):
        # What fails now may succeed next time: no reason to end a run.
        with contextlib.suppress(Exception):
          if self._read() == self._content:
            _touch(self._path, self._content)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
      yield
    finally:
      ended.set()
      thread.join()
      if self._read() == self._content:
        self._path.unlink()


def _make(path: Path, content: bytes) -> None:
  """Makes a file where there is none; else raises a FileExistsError."""
  if not is_local(path):
    # Google's store makes it on the condition that there is none.
    path.fs.pipe_file(path.path, content, mode='create')
    return
  with path.open('xb', buffering=0) as file:
    try:
      file.write(content)
    except OSError:
      path.unlink()
      raise


def _touch(path: Path, content: bytes) -> None:
  if is_local(path):
    os.utime(path)
  else:
    path.write_bytes(content)


def _holder(held: bytes) -> dict[str, Any]:
  """What a lock says; {} if it is cut short, or no lock."""
  try:
    holder = json.loads(held)
  except ValueError:
    return {}
  return holder if isinstance(holder, dict) else {}
