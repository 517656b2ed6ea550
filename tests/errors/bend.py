"""Bends good files, one place at a time, as strangers and faults do.

The same seed gives the same files.
"""

from collections.abc import Iterator
import json
import random
from typing import Any, NamedTuple

# What is put in the place of a value of a JSON file, as text. Each has a name.
VALUES = {
  'null': 'null',
  'true': 'true',
  '-1': '-1',
  '0': '0',
  '2.5': '2.5',
  '32.0': '32.0',
  'NaN': 'NaN',
  '1e999': '1e999',
  '2**31': str(2**31),
  '10**18': str(10**18),
  '400 digits': '9' * 400,
  '5,000 digits': '9' * 5000,
  'empty text': '""',
  'text': '"²"',
  'text with escapes': r'"\u001b[2J\ud800\n[/bold]"',
  'a long text': json.dumps('x' * 100_000),
  '[]': '[]',
  '{}': '{}',
  'a list of objects': '[{"a": 1}, [null]]',
  'an object of lists': '{"²": [], "-1": {"0": 1.5}}',
  '900 lists in lists': '[' * 900 + ']' * 900,
  '100,000 lists in lists': '[' * 100_000 + ']' * 100_000,
}
_PLACE = '@bent@'


class Bent(NamedTuple):
  """A file that was bent: what was done to it, and what it holds now."""

  did: str
  content: bytes


def bent_json(
  good: Any,
  number: int,
  *,
  seed: int = 0,
  values: dict[str, str] | None = None,
) -> Iterator[Bent]:
  """Files of a JSON value, of which one place has another value or is gone.

  Args:
    good: the value.
    number: of files.
    seed: of the choice.
    values: {what it is: JSON}; by default `VALUES`.
  """
  values = VALUES if values is None else values
  choices = [(place, what) for place in _places(good) for what in values]
  choices += [(place, '') for place in _places(good) if place]
  for place, what in random.Random(seed).sample(choices, number):
    name = '.'.join(map(str, place)) or 'the file'
    text = json.dumps(_with(good, place, dropped=not what))
    yield Bent(
      f'{name} is {what}' if what else f'{name} is gone',
      text.replace(json.dumps(_PLACE), values.get(what, '')).encode(),
    )


def bent_bytes(good: bytes, number: int, *, seed: int = 0) -> Iterator[Bent]:
  """Files that are empty or cut short, and files with one bit turned.

  Args:
    good: what a good file holds; more than `number` bytes.
    number: of files.
    seed: of the choice.
  """
  draw = random.Random(seed)
  yield Bent('empty', b'')
  for end in draw.sample(range(1, len(good)), number // 2 - 1):
    yield Bent(f'cut at byte {end}', good[:end])
  for bit in draw.sample(range(8 * len(good)), number - number // 2):
    content = bytearray(good)
    content[bit // 8] ^= 1 << bit % 8
    yield Bent(f'bit {bit} turned', bytes(content))


def _places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
  """The keys and indices that lead to each value in a value."""
  inner = {}
  if isinstance(value, dict):
    inner = value
  elif isinstance(value, list):
    inner = dict(enumerate(value))
  found = [above]
  for key, x in inner.items():
    found += _places(x, (*above, key))
  return found


def _with(value: Any, place: tuple[Any, ...], dropped: bool) -> Any:
  """A copy with a mark in this place, or without what is in it."""
  if not place:
    return _PLACE
  key, *rest = place
  changed = value.copy()
  if dropped and not rest:
    del changed[key]
  else:
    changed[key] = _with(value[key], tuple(rest), dropped)
  return changed
