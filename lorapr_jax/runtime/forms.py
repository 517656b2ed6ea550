"""Checks what a JSON file holds against a form, before anything trusts it.

A form is one of

- a `Leaf`, such as TEXT or COUNT;
- {name: form}, for an object that has these names and may have others; a name
  that ends in ? may be absent;
- [form], for a list of any length;
- `Each(form)`, for an object with any names;
- `Maybe(form)`, where null is allowed as well.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lorapr_jax.errors import UserError, short


class Leaf(NamedTuple):
  """A value that is no object and no list: what it is, and how to tell."""

  what: str
  holds: Callable[[Any], bool]


class Each(NamedTuple):
  """The form of every value of an object."""

  form: Any


class Maybe(NamedTuple):
  """The form of what may be null."""

  form: Any


# Beyond it a number is no float, or no size of anything.
_MOST = 2**63


def _is_number(value: Any) -> bool:
  # True and false are integers to Python.
  whole = isinstance(value, int) and not isinstance(value, bool)
  return isinstance(value, float) or (whole and abs(value) < _MOST)


def _is_finite(value: Any) -> bool:
  return _is_number(value) and abs(value) < _MOST


def _is_index(value: Any) -> bool:
  return _is_finite(value) and isinstance(value, int) and value >= 0


TEXT = Leaf('text', lambda x: isinstance(x, str))
# Also NaN and infinity, which Python writes into JSON.
MEASURED = Leaf('a number', _is_number)
NUMBER = Leaf('a finite number', _is_finite)
SHARE = Leaf('a share from 0 to 1', lambda x: _is_number(x) and 0 <= x <= 1)
POSITIVE = Leaf('a number above 0', lambda x: _is_finite(x) and x > 0)
INDEX = Leaf('a whole number from 0', _is_index)
FLAG = Leaf('true or false', lambda x: isinstance(x, bool))
INTEGER = Leaf('a whole number', lambda x: _is_finite(x) and isinstance(x, int))
COUNT = Leaf('a whole number from 1', lambda x: _is_index(x) and x > 0)


def check_form(value: Any, form: Any, path: Path, at: str = '') -> None:
  """Refuses a value of a JSON file that does not have this form.

  `at` says where in the file the value is, such as `base.name`.

  Raises:
    UserError: naming the first place that is not as it must be.
  """
  if isinstance(form, Maybe):
    if value is not None:
      check_form(value, form.form, path, at)
  elif isinstance(form, Leaf):
    _check(form.holds(value), value, form.what, path, at)
  elif isinstance(form, list):
    _check(isinstance(value, list), value, 'a list', path, at)
    for i, x in enumerate(value):
      check_form(x, form[0], path, _inside(at, i))
  elif isinstance(form, Each):
    _check(isinstance(value, dict), value, 'an object', path, at)
    for key, x in value.items():
      check_form(x, form.form, path, _inside(at, key))
  else:
    _check(isinstance(value, dict), value, 'an object', path, at)
    for name, inner in form.items():
      key = name.removesuffix('?')
      if key in value:
        check_form(value[key], inner, path, _inside(at, key))
      elif key == name:
        raise UserError(f'{path} is none of ours: it has no {_inside(at, key)}')


def _check(fits: bool, value: Any, what: str, path: Path, at: str) -> None:
  if not fits:
    raise UserError(
      f'{path}: {at or "all"} is {short(repr(value))}, not {what}'
    )


def _inside(at: str, key: str | int) -> str:
  return f'{at}.{short(str(key))}' if at else short(str(key))
