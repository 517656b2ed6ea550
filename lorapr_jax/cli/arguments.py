"""What all commands share: the parser of arguments, and printing JSON."""

import argparse
import json
from typing import Any

from lorapr_jax.errors import UserError


class Parser(argparse.ArgumentParser):
  """Mistakes in arguments are one-line errors like any other."""

  def __init__(self, command: str, description: str, **more: Any):
    """`more` goes to argparse as it is."""
    super().__init__(
      prog=f'python -m lorapr_jax {command}', description=description, **more
    )

  def error(self, message: str):
    raise UserError(f'{message} ({self.prog} --help)')

  def add_dtype(self) -> None:
    """Adds --dtype, for commands that run a model."""
    self.add_argument(
      '--dtype',
      default='auto',
      choices=('auto', 'float32', 'bfloat16'),
      help='of weights and computation; auto: float32 on CPU, else bfloat16',
    )

  def add_json(self) -> None:
    """Adds --json."""
    self.add_argument(
      '--json', action='store_true', help='print one JSON object, nothing else'
    )


def print_json(value: Any) -> None:
  """Prints one JSON object on standard output."""
  print(json.dumps(value))
