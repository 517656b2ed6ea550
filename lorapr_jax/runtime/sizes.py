"""Sizes in bytes, as people write them and as they are shown."""

import math
import re

from lorapr_jax.errors import UserError

_UNITS = {
  **{'B': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9},
  **{'KiB': 2**10, 'MiB': 2**20, 'GiB': 2**30},
}


def parse_size(key: str, text: str) -> int:
  """Bytes: '300MB' is 300,000,000, '1.5GiB' is 1,610,612,736.

  Args:
    key: the setting that the text belongs to, for the error.
    text: a number and a unit.

  Raises:
    UserError: if it is no size, or less than one byte.
  """
  match = re.fullmatch(r'(\d+(?:\.\d+)?) ?(\w+)', text.strip())
  number, unit = match.groups() if match else (0, '')
  size = int(float(number) * _UNITS.get(unit, 0))
  if size < 1:
    raise UserError(
      f'{key} is {text!r}: a number and one of {", ".join(_UNITS)} is '
      'expected, such as 5GB'
    )
  return size


def scaled(value: float, unit: str) -> str:
  """Three digits, and the unit with a prefix: 538 MB."""
  power = min(int(math.log10(max(value, 1)) // 3), 5)
  number = f'{value / 1000**power:{"#.3g" if power else ".0f"}}'.rstrip('.')
  return f'{number} {" kMGTP"[power].strip()}{unit}'


def size(value: float) -> str:
  """Bytes: 538 MB."""
  return scaled(value, 'B')
