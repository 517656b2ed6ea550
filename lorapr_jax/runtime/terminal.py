"""What people read: all of it goes through here, to a terminal or a file.

Names of files, models and columns, and what a model writes, come from others.
They are shown as they are, and nothing in them commands a terminal: a control
character is shown as Python writes it, such as \\x1b.
"""

from collections.abc import Callable
import io
import logging
import os
import re
import sys
from typing import Any

from rich.console import Console

# Those of C0, DEL and C1; what ends a line or turns its direction in Unicode;
# and the halves of characters that stand for bytes that are not UTF-8.
_CONTROLS = re.compile(
  '[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)


def show_all() -> None:
  """Lets standard output and error show any text.

  What the encoding of a stream does not have is written out, as Python would.
  """
  for stream in sys.stdout, sys.stderr:
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def visible(text: str) -> str:
  """The text with its control characters written out, but for LF and tab."""
  return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
  """As `visible`, with LF written out as well."""
  return visible(text).replace('\n', '\\n')


class _Lasting:
  """Standard error, where a run says what it does: no failure there ends it.

  Once its reader is gone, or the disk of its file is full, the rest goes
  nowhere.
  """

  def __init__(self, stream: Any):
    """None: there is no such stream."""
    self._stream = stream

  def write(self, text: str) -> int:
    self._attempt(lambda: self._stream.write(text))
    return len(text)

  def flush(self) -> None:
    self._attempt(lambda: self._stream.flush())

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _attempt(self, write: Callable[[], Any]) -> None:
    if self._stream is None:
      return
    try:
      write()
    except OSError:
      # Python writes what is left when it ends, and would fail then.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)


def say(*lines: str, error: bool = False) -> None:
  """Prints lines on standard output or standard error.

  A failure to write to standard error is none of the caller's.
  """
  stream = _Lasting(sys.stderr) if error else sys.stdout
  print(*map(one_line, lines), sep='\n', file=stream, flush=error)


def say_piece(piece: str) -> None:
  """Prints a piece of a text that goes on, on standard output."""
  print(visible(piece), end='', flush=True)


class PlainConsole(Console):
  """A console of rich without markup, emoji and highlights, for `visible`."""

  def __init__(self, **more: Any):
    """`more` goes to rich as it is."""
    if more.get('stderr'):
      more['file'] = _Lasting(sys.stderr)
    super().__init__(markup=False, emoji=False, highlight=False, **more)

  def render_str(self, text: str, **more: Any) -> Any:
    """Every text that is printed, a cell or a title is made here."""
    return super().render_str(visible(text), **more)


def show_warnings() -> None:
  """Makes logged warnings lines on standard error, where nothing else does."""
  handler = logging.StreamHandler()
  handler.setFormatter(_OneLine('warning: %(message)s'))
  logging.basicConfig(handlers=[handler])


class _OneLine(logging.Formatter):
  def formatMessage(self, record: logging.LogRecord) -> str:
    return one_line(super().formatMessage(record))
