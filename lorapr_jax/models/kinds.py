"""What tells a layer from others of its size: window and rotation.

Both are data of the scan over layers, so that layers of several kinds are one
stack. Letters: axes.py.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from jax import Array
import numpy as np

from lorapr_jax.models.config import ModelConfig, Stack


class Kind(NamedTuple):
  """A layer's, or those of L layers: (L,).

  Attributes:
    rope: which of the model's rotations turns; None: it has one alone.
    window: how many tokens each sees, with itself; None: all before it.
  """

  rope: Array | np.ndarray | None = None
  window: Array | np.ndarray | None = None


def windows_within(config: ModelConfig, length: int) -> tuple[int, ...]:
  """By layer, the window in texts of this length; empty: none bites."""
  windows = tuple(min(w or length, length) for w in config.windows)
  return windows if min(windows, default=length) < length else ()


def kinds(config: ModelConfig, stack: Stack, length: int) -> Kind:
  """The kinds of a stack's layers, for texts of this length."""

  def of_stack(values: tuple[int, ...]) -> np.ndarray | None:
    layers = values[stack.start : stack.start + stack.size]
    return np.asarray(layers, np.int32) if values else None

  return Kind(
    of_stack(config.rope_of_layer), of_stack(windows_within(config, length))
  )


def with_window(
  attend: Callable[..., Array], window: Array | None
) -> Callable[..., Array]:
  """`attend`, told of the layer's window if there is one."""
  return attend if window is None else functools.partial(attend, window=window)
