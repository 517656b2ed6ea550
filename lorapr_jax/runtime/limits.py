"""Ends what a stranger's file makes us compute: too long, or too large."""

from collections.abc import Callable, Iterator
import contextlib
import gc
import os
import resource
import signal
import threading
from typing import TypeVar

# Of the computing time of the process, which does not run while it is stopped.
SECONDS = 10.0
# Beyond what the process holds already.
MEMORY_BYTES = 2**29
# Of one text.
CHARACTERS = 2**26

_T = TypeVar('_T')
_STATM = '/proc/self/statm'
# The bound of memory is one of the process: one thread at a time sets it.
_lock = threading.Lock()


def bounded(make: Callable[[], _T]) -> _T:
  """What `make` returns, within a bound of time and one of memory.

  Python takes signals in its main thread alone: in another one the time is not
  bounded. The memory is bounded where the system tells what a process holds.

  Raises:
    TimeoutError: after SECONDS.
    MemoryError: before memory is taken that would go beyond MEMORY_BYTES.
  """
  with _lock, _bounded_memory():
    if threading.current_thread() is threading.main_thread():
      return _in_time(make)
    return make()


def bounded_text(make: Callable[[], str]) -> str:
  """The text that `make` returns, as of a template.

  Raises:
    ValueError: if it has more than CHARACTERS.
    TimeoutError: as `bounded`.
    MemoryError: as `bounded`.
  """
  text = bounded(make)
  if len(text) > CHARACTERS:
    raise ValueError(f'it writes more than {CHARACTERS:,} characters')
  return text


class _TooLong(BaseException):
  """No Exception: a library that catches those would go on."""


def _in_time(make: Callable[[], _T]) -> _T:
  running = True

  def stop(*_):
    if running:
      raise _TooLong

  old = signal.signal(signal.SIGVTALRM, stop)
  # What is raised while garbage is collected is lost, and printed.
  collects = gc.isenabled()
  gc.disable()
  try:
    # Again and again, since the same holds for any destructor.
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 0.05)
    return make()
  except _TooLong:
    running = False
    raise TimeoutError(f'it takes more than {SECONDS:g} seconds') from None
  finally:
    running = False
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, old)
    if collects:
      gc.enable()


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
  if not os.path.exists(_STATM):
    yield
    return
  with open(_STATM, 'rb') as file:
    pages = int(file.read().split()[0])
  most = pages * resource.getpagesize() + MEMORY_BYTES
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  if soft != resource.RLIM_INFINITY:
    most = min(most, soft)
  resource.setrlimit(resource.RLIMIT_AS, (most, hard))
  try:
    yield
  except MemoryError:
    size = f'{MEMORY_BYTES >> 20} MiB'
    raise MemoryError(f'it takes more than {size} of memory') from None
  finally:
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
