"""Ctrl-C and SIGTERM: the first asks the loop to stop, the second insists."""

from collections.abc import Callable
import signal
import threading
import time
from types import FrameType
from typing import Any, Protocol

from lorapr_jax.runtime import processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
  """In its `with` block, the first SIGINT or SIGTERM is only noted.

  With the first, the old handlers come back, so that the second does what it
  always does: SIGINT raises KeyboardInterrupt, SIGTERM ends the process. Python
  lets the main thread alone set handlers; in another thread nothing changes.

  Many processes must stop after the same step: there SIGTERM, which announces
  that a machine will be taken away, is left to JAX, which tells the others, and
  SIGINT to Python.

  Attributes:
    signum: of the signal that came; None so far.
  """

  def __init__(self, notify: Callable[[], None]):
    """`notify` is called in the handler: it must not print or lock."""
    self.signum: int | None = None
    self._notify = notify
    self._old: dict[int, Any] = {}

  def __enter__(self) -> 'StopSignals':
    alone = processes.count() == 1
    if alone and threading.current_thread() is threading.main_thread():
      for signum in _SIGNALS:
        # Shells let background jobs ignore SIGINT: that stays. None is a
        # handler that Python did not set and could not put back.
        if signal.getsignal(signum) not in (signal.SIG_IGN, None):
          self._old[signum] = signal.signal(signum, self._handle)
    return self

  def __exit__(self, *_: Any) -> None:
    self._restore()

  def stops(self) -> bool:
    """Whether the loop is to stop; asked after each step, on all processes."""
    if processes.told_to_stop():
      self.signum = signal.SIGTERM
    return self.signum is not None

  def _handle(self, signum: int, _: FrameType | None) -> None:
    self._restore()
    self.signum = signum
    self._notify()

  def _restore(self) -> None:
    while self._old:
      signal.signal(*self._old.popitem())


def let_sigterm_end() -> None:
  """Gives SIGTERM its own meaning back, which JAX takes from many processes."""
  alone = processes.count() == 1
  if not alone and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Array(Protocol):
  def is_ready(self) -> bool: ...


def wait_for(array: _Array) -> None:
  """Waits until an array is computed, and lets signal handlers run meanwhile.

  While Python waits inside JAX they cannot, however often Ctrl-C is pressed.
  """
  while not array.is_ready():
    time.sleep(0.001)
