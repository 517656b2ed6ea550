"""Writes numbers as the report and the progress show them."""

import math

from lorapr_jax.runtime.sizes import scaled
from lorapr_jax.runtime.sizes import size as size


def operations(value: float) -> str:
  """Floating-point operations: 269 MFLOP."""
  return scaled(value, 'FLOP')


def count(value: float) -> str:
  """A whole number: 94,259,520."""
  return f'{value:,.0f}'


def parameters(value: float) -> str:
  """A count, with a word if it is large: 94.3 million."""
  for unit, name in ((1e9, 'billion'), (1e6, 'million')):
    if value >= unit:
      return f'{value / unit:#.3g}'.rstrip('.') + f' {name}'
  return count(value)


def milliseconds(value: float) -> str:
  """Seconds as milliseconds: 159.0 ms."""
  return f'{1e3 * value:.1f} ms' if value < 1e-1 else f'{1e3 * value:,.0f} ms'


def duration(value: float) -> str:
  """Seconds: 0.6 s, 42 s, 6 min 28 s, 2 h 5 min."""
  if value < 10:
    return f'{value:.1f} s'
  seconds = round(value)
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60} min {seconds % 60} s'
  return f'{seconds // 3600} h {seconds % 3600 // 60} min'


def share(value: float | None) -> str:
  """A share: 33.33%; a dash if there is none."""
  return '–' if value is None else f'{value:.2%}'


def change(before: float, after: float) -> str:
  """The change from one value to another: −29.9%."""
  if not before or not math.isfinite(before + after):
    return '–'
  if before == after:
    return '0%'
  return f'{after / before - 1:+z.1%}'.replace('-', '\N{MINUS SIGN}')
