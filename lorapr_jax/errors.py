"""What commands turn into one line: a mistake of the user's, a stop."""

from collections.abc import Mapping
import json
from typing import Any


class UserError(Exception):
  """A mistake of the user's: says what is wrong, where, and what to do."""


class MeshError(UserError):
  """A size of the model or of a batch that the mesh does not divide."""


class TargetError(UserError):
  """A share of the parameters that no counts come to.

  Attributes:
    nearest: the share that they can come to, and lose.
  """

  def __init__(self, message: str, nearest: float):
    super().__init__(message)
    self.nearest = nearest


class Stopped(Exception):
  """Work that a signal stopped in good order: says where.

  Attributes:
    status: the exit status by the shells' convention, 128 plus the signal.
  """

  def __init__(self, message: str, signum: int):
    super().__init__(message)
    self.status = 128 + signum


def first_line(error: Exception) -> str:
  """What another library's exception says, for a message of one line."""
  line = str(error).strip().partition('\n')[0] or repr(error)
  return short(line, 400)


def short(text: str, most: int = 100) -> str:
  """A text that a message quotes; of a long one its beginning."""
  return text if len(text) <= most else f'{text[:most]}…'


def check_size(key: str, value: Any, most: int) -> int:
  """A value that a file gives, if it is an integer from 1 to `most`.

  Raises:
    UserError: naming the key.
  """
  if type(value) is not int or value < 1:
    found = short(json.dumps(value))
    raise UserError(f'{key} is {found}, not a positive integer')
  if value > most:
    raise UserError(
      f'{key} is {short(str(value))}; at most {most} is supported'
    )
  return value


def check_least(**arguments: tuple[int | None, int]) -> None:
  """Refuses arguments that are too small: name=(value, least); None passes.

  Raises:
    UserError: naming the first.
  """
  for name, (value, least) in arguments.items():
    if value is not None and value < least:
      raise UserError(f'{name} is {value}: it must be at least {least}')


def choose(
  key: str, value: Any, choices: Any, removed: Mapping[str, str] | None = None
) -> Any:
  """`value`, if it is one of the choices that the key has.

  Args:
    key: the setting, for the error.
    value: its value.
    choices: what it can be.
    removed: {a value that it could be in earlier versions: what to use now}.

  Raises:
    UserError: with the choices, or with what to use instead.
  """
  if removed and value in removed:
    raise UserError(f'{key}={value} was removed: use {removed[value]}')
  if value not in choices:
    raise UserError(
      f'{key} is {short(repr(value))}: choose from {", ".join(choices)}'
    )
  return value
