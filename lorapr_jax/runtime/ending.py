"""SIGTERM and SIGHUP outside the training loop: they end a command in order."""

from collections.abc import Iterator
import contextlib
import signal
import threading
from types import FrameType

# Something wants the process to end; its terminal or connection is gone.
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Ended(SystemExit):
  """A signal ended the command; its code is 128 plus the signal."""


@contextlib.contextmanager
def in_order() -> Iterator[None]:
  """The signals raise `Ended` in the `with` block, as Ctrl-C raises its error.

  So what is half written is removed, and people are told how to go on. A signal
  that is ignored, as nohup makes SIGHUP, stays so. Python lets only the main
  thread set handlers; in another thread nothing changes.
  """
  old = {}
  if threading.current_thread() is threading.main_thread():
    for signum in SIGNALS:
      if signal.getsignal(signum) is signal.SIG_DFL:
        old[signum] = signal.signal(signum, _end)
  try:
    yield
  finally:
    for signum, handler in old.items():
      signal.signal(signum, handler)


def _end(signum: int, _: FrameType | None) -> None:
  # A terminal that is closed sends SIGHUP twice.
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  raise Ended(128 + signum)
