"""Masks: which groups are alive. {group: array of 0 and 1}, by stack.

A group is named by its axes, joined by commas: see pruning/groups.py. Arrays
of a stack have `layers` in front of the group's axes, and of whole layers that
axis alone. `axes` trees come in as arguments; they hold the axis names of each
tensor, without `layers`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from lorapr_jax.axes import LAYERS, along_first, member_axes
from lorapr_jax.models.config import ModelConfig


def initial_masks(
  groups: tuple[str, ...], stacks: tuple[tuple[int, Mapping[str, int]], ...]
) -> tuple[dict[str, Array], ...]:
  """Everything alive. A stack is its number of layers and its axis sizes."""
  return tuple(
    {
      group: jnp.ones((layers, *(sizes[axis] for axis in member_axes(group))))
      for group in groups
    }
    for layers, sizes in stacks
  )


def select_masks(importance: Any, masks: Any, keep: Any) -> Any:
  """Masks the least important groups of every layer (eq. 12).

  A group once masked stays masked, and exactly `keep` stay alive: among the
  first `keep` survivors in order of importance, ties to the lower index.

  Args:
    importance: {group: (L, ...)}, ranked along the last axis; of one stack, or
      by stack.
    masks: {group: (L, ...)} likewise, the masks so far.
    keep: {group: (L,)} likewise, such as from `by_stack`: how many stay alive
      along the last axis. It must not exceed what is alive.
  """
  return jax.tree.map(select_mask, importance, masks, keep)


def select_mask(importance: Array, mask: Array, keep: Array) -> Array:
  """`select_masks` for one kind of group, of a layer or a stack of them."""
  alive_first = jnp.where(mask > 0, importance, -jnp.inf)
  order = jnp.argsort(alive_first, axis=-1, descending=True, stable=True)
  rank = jnp.argsort(order, axis=-1)
  return mask * (rank < along_first(keep, mask))


def gated(masks: Mapping[str, Array]) -> dict[str, Array]:
  """Masks in which nothing is alive of a layer that is gone.

  Args:
    masks: of one layer or of a stack.
  """
  if LAYERS not in masks:
    return dict(masks)
  layers = masks[LAYERS]
  return {
    group: mask if group == LAYERS else mask * along_first(layers, mask)
    for group, mask in masks.items()
  }


def without_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Of {group: ...}, all but whole layers."""
  return {group: x for group, x in tree.items() if group != LAYERS}


def staying(
  masks: Mapping[str, Array], keep: Mapping[str, Array]
) -> dict[str, Array]:
  """How many members stay: of a layer that is gone, as many as there are.

  Args:
    masks: of a stack.
    keep: {group: (L,)}: how many stay in a layer that is there.
  """
  keep = without_layers(keep)
  if LAYERS not in masks:
    return keep
  return {
    group: jnp.where(masks[LAYERS] > 0, counts, masks[group].shape[-1])
    for group, counts in keep.items()
  }


def of_layers(stacks: Sequence[Mapping[str, Array]]) -> Array:
  """What is known of whole layers, by layer of the model: (L,)."""
  return jnp.concatenate([stack[LAYERS] for stack in stacks])


def with_layers(
  stacks: Sequence[Mapping[str, Array]], values: Array
) -> tuple[dict[str, Array], ...]:
  """The stacks with another `of_layers`."""
  starts = np.cumsum([len(stack[LAYERS]) for stack in stacks])[:-1]
  parts = jnp.split(values, starts)
  return tuple(
    {**stack, LAYERS: part} for stack, part in zip(stacks, parts, strict=True)
  )


def alive_counts(
  masks: tuple[Mapping[str, Array], ...],
) -> dict[str, tuple[int, ...]]:
  """How many are alive along the pruned axis, {group: by layer of the model}.

  Copies the masks to the host.
  """
  counts: dict[str, tuple[int, ...]] = {}
  for stack in masks:
    for group, mask in stack.items():
      size = 1 if group == LAYERS else mask.shape[-1]
      rows = np.asarray(mask).reshape(len(mask), -1, size).sum(axis=-1)
      alive = tuple(int(count) for count in rows[:, 0])
      counts[group] = counts.get(group, ()) + alive
  return counts


def by_stack(
  keep: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> tuple[dict[str, np.ndarray], ...]:
  """Counts by layer, cut into the model's stacks."""
  return tuple(
    {
      group: np.asarray(counts[stack.start : stack.start + stack.size])
      for group, counts in keep.items()
    }
    for stack in config.stacks
  )
