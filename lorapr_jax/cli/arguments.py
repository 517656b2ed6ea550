"""What commands share: the parser of arguments, printing JSON and tables."""

import argparse
from collections.abc import Sequence
import json
import math
from typing import Any

from rich import box
from rich.table import Table

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.terminal import PlainConsole, say


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
  """Prints one JSON object on standard output.

  What is infinite or no number is null: JSON has no other name for it.
  """
  say(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def make_table(left: Sequence[str], right: Sequence[str]) -> Table:
  """A table with columns of text at its left, of figures at its right."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
  for column in left:
    table.add_column(column, overflow='fold')
  for column in right:
    table.add_column(column, justify='right', no_wrap=True)
  return table


def print_tables(*tables: Table) -> None:
  """Prints tables, whose cells are shown as they are."""
  PlainConsole().print(*tables)
