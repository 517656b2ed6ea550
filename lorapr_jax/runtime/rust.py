"""What a library in Rust gives up with, as one kind of exception.

It raises plain `Exception`, or it panics: PyO3 makes of that what no `except
Exception` catches, after Rust has printed lines of its own.
"""

from collections.abc import Iterator
import contextlib
import os
import tempfile
import threading

from lorapr_jax.errors import first_line

_STDERR = 2
_lock = threading.Lock()


class RustError(Exception):
  """A library in Rust gave up: says what it says."""


@contextlib.contextmanager
def rust_errors() -> Iterator[None]:
  """Raises what a library in Rust gives up with in the block as a `RustError`.

  Standard error is held back meanwhile, and written when the block ends, but
  for what is printed by a panic: keep the block short.
  """
  panicked = False
  with _lock, tempfile.TemporaryFile() as held:
    try:
      stderr = os.dup(_STDERR)
    except OSError:  # It is closed: nothing can be printed.
      stderr = None
    else:
      os.dup2(held.fileno(), _STDERR)
    try:
      yield
    except BaseException as error:
      panicked = type(error).__name__ == 'PanicException'
      if not panicked and type(error) is not Exception:
        raise
      raise RustError(first_line(error)) from None
    finally:
      if stderr is not None:
        os.dup2(stderr, _STDERR)
        os.close(stderr)
        held.seek(0)
        text = held.read()
        if text and not panicked:
          os.write(_STDERR, text)
