"""The one exception that commands turn into a one-line message."""


class UserError(Exception):
  """A mistake of the user's: says what is wrong, where, and what to do."""
