"""What people read: all of it goes through here, to a terminal or a file.

Names of files, models and columns, and what a model writes, come from others.
They are shown as they are, and nothing in them commands a terminal: a control
character is shown as Python writes it, such as \\x1b.
"""

import logging
import re
import sys
from typing import Any

from rich.console import Console

# Those of C0, DEL and C1; what ends a line or turns its direction in Unicode;
# and the halves of characters that stand for bytes that are not UTF-8.
_CONTROLS = re.compile(
  '[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)


def visible(text: str) -> str:
  """The text with its control characters written out, but for LF and tab."""
  return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
  """As `visible`, with LF written out as well."""
  return visible(text).replace('\n', '\\n')


def say(*lines: str, error: bool = False) -> None:
  """Prints lines on standard output or standard error."""
  stream = sys.stderr if error else sys.stdout
  print(*map(one_line, lines), sep='\n', file=stream, flush=error)


def say_piece(piece: str) -> None:
  """Prints a piece of a text that goes on, on standard output."""
  print(visible(piece), end='', flush=True)


class PlainConsole(Console):
  """A console of rich without markup, emoji and highlights, for `visible`."""

  def __init__(self, **more: Any):
    """`more` goes to rich as it is."""
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
