"""Signals that stop a run: the first asks the loop, the second ends it."""

from collections.abc import Callable
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax

from lorapr_jax.runtime import ending, processes

_SIGNALS = (signal.SIGINT, *ending.SIGNALS)


class StopSignals:
  """Notes the first signal in its `with` block, and does no more.

  The first one puts the old handlers back, so the second one has its usual
  effect: SIGINT raises KeyboardInterrupt, SIGTERM ends the process. But SIGHUP
  is ignored then: a terminal that is closed sends it twice. Python lets only
  the main thread set handlers; in another thread this class does nothing.

  Many processes must stop after the same step. There JAX handles SIGTERM, which
  announces that a machine will be taken away: it tells the other processes.
  SIGHUP becomes SIGTERM there, and Python handles SIGINT as usual.

  Attributes:
    signum: the signal that came; None before one comes.
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
        # A shell makes background jobs ignore SIGINT, and nohup SIGHUP: they
        # still do. None is a handler that Python did not set and cannot put
        # back.
        if signal.getsignal(signum) not in (signal.SIG_IGN, None):
          self._old[signum] = signal.signal(signum, self._handle)
    return self

  def __exit__(self, *_: Any) -> None:
    self._restore()

  def stops(self) -> bool:
    """Whether the loop must stop. All processes ask this after each step."""
    if processes.told_to_stop():
      self.signum = signal.SIGTERM
    return self.signum is not None

  def _handle(self, signum: int, _: FrameType | None) -> None:
    hangup = self._old.pop(signal.SIGHUP, None)
    self._restore()
    if hangup is not None:
      self._old[signal.SIGHUP] = hangup
      signal.signal(signal.SIGHUP, signal.SIG_IGN)
    self.signum = signum
    self._notify()

  def _restore(self) -> None:
    while self._old:
      signal.signal(*self._old.popitem())


def let_sigterm_end() -> None:
  """Lets SIGTERM end the process again; with many processes JAX takes it."""
  alone = processes.count() == 1
  if not alone and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def wait_for(array: jax.Array) -> None:
  """Waits until an array is computed, and lets signal handlers run meanwhile.

  Python runs no handler while it waits inside JAX, however often Ctrl-C comes.
  """
  while not array.is_ready():
    time.sleep(0.001)
