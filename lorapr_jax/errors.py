"""The one exception that commands turn into a one-line message."""


class UserError(Exception):
  """A mistake of the user's: says what is wrong, where, and what to do."""


def first_line(error: Exception) -> str:
  """What another library's exception says, for a message of one line."""
  return str(error).strip().partition('\n')[0] or repr(error)


def check_least(**arguments: tuple[int | None, int]) -> None:
  """Refuses arguments that are too small: name=(value, least); None passes.

  Raises:
    UserError: naming the first.
  """
  for name, (value, least) in arguments.items():
    if value is not None and value < least:
      raise UserError(f'{name} is {value}: it must be at least {least}')


class MeshError(UserError):
  """A size of the model or of a batch that the mesh does not divide."""
