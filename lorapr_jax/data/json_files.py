"""Reads the objects of JSON lines, or of a list such as Alpaca's."""

from collections.abc import Iterable, Iterator
import itertools
import json
from pathlib import Path
import re
from typing import Any

from lorapr_jax.errors import UserError, first_line

# Where an object begins, FILE:LINE, and the object.
Found = tuple[str, dict[str, Any]]

# A string, which never goes on in another line, or a bracket.
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')


def read_lines(file: Path, lines: Iterable[str]) -> Iterator[Found]:
  """Yields the object in each line of the file that is not blank.

  Raises:
    UserError: naming a line that is no JSON object.
  """
  for number, line in enumerate(lines, 1):
    if line.strip():
      yield _object(file, number, line)


def read_list_or_lines(
  file: Path, lines: Iterator[str], most: int
) -> Iterator[Found]:
  """Yields the objects of a list, if the file begins as one, or of lines.

  An object of a list has `most` characters at most.

  Raises:
    UserError: naming the line where the text is not JSON or has no object.
  """
  head = []
  for line in lines:
    head.append(line)
    if line.strip():
      break
  text = itertools.chain(head, lines)
  if head and head[-1].lstrip().startswith('['):
    yield from _read_list(file, text, most)
  else:
    yield from read_lines(file, text)


def _read_list(file: Path, lines: Iterable[str], most: int) -> Iterator[Found]:
  """Finds each object by its brackets."""
  depth, size, number = 0, 0, 0
  first = 1  # The line in which the object begins.
  inside: list[str] = []  # The object, so far.
  between: list[str] = []  # What lies outside of objects, since the last one.
  expected = ('[',)  # There.
  for number, line in enumerate(lines, 1):
    start = 0
    for mark in _MARKS.finditer(line):
      if mark[0] in '[{':
        if depth == 1:
          between.append(line[start : mark.start()])
          _check_between(file, number, between, expected)
          between, expected = [], (',',)
          first, start, size = number, mark.start(), 0
        depth += 1
      elif mark[0] in ']}':
        depth -= 1
        if depth == 1:
          inside.append(line[start : mark.end()])
          yield _object(file, first, ''.join(inside))
          inside, start = [], mark.end()
    (inside if depth > 1 else between).append(line[start:])
    size += len(line)
    if size > most:
      raise UserError(
        f'{file}:{first}: the object that begins here has more than {most:,} '
        'bytes, which is the most allowed'
      )
  _check_between(file, number, between, (']', '[]'))


def _check_between(
  file: Path, line: int, between: list[str], expected: tuple[str, ...]
) -> None:
  found = ''.join(''.join(between).split())
  if found not in expected:
    raise UserError(
      f'{file}:{line} is no list of JSON objects: it has {found[:20]!r} in '
      f'place of {expected[0]!r}'
    )


def _object(file: Path, first: int, text: str) -> Found:
  """What is in a text that begins in the line `first` of a file."""
  where = f'{file}:{first}'
  try:
    value = json.loads(text)
    # An escape may stand for half a character, which no text can hold.
    if '\\u' in text:
      json.dumps(value, ensure_ascii=False).encode()
  except json.JSONDecodeError as error:
    raise UserError(
      f'{file}:{first + error.lineno - 1} is not JSON: column {error.colno}: '
      f'{error.msg}'
    ) from None
  # It is nested too deep, has a number of too many digits, or that half.
  except (RecursionError, ValueError) as error:
    raise UserError(f'{where}: {first_line(error)}') from None
  if not isinstance(value, dict):
    raise UserError(f'{where} is no JSON object')
  return where, value
