"""The cut: masks to kept indices to smaller trees; and pad, its inverse.

`stacks` are tuples with a tree for each stack of a model: parameters, LoRA,
optimiser moments, masks or importance. `axes` are the axis names of one
layer's tree. `kept` has, for each layer of the model, {group: indices}. Of the
group `layers` they are [0] where the layer stays. A layer that goes keeps
nothing of any group.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from lorapr_jax.axes import LAYERS, put_kept, take_kept
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.groups import with_kept
from lorapr_jax.pruning.masks import gated

Kept = tuple[dict[str, np.ndarray], ...]


def kept_groups(masks: tuple[Mapping[str, Array], ...]) -> Kept:
  """The indices that are alive, by layer, in ascending order.

  For query heads (K, g): the indices within each KV head.

  Raises:
    ValueError: if KV heads of one layer keep different numbers of queries.
  """
  layers = []
  for stack in masks:
    arrays = gated({group: np.asarray(mask) for group, mask in stack.items()})
    size = len(next(iter(arrays.values())))
    layers += [
      {g: _indices(np.atleast_1d(mask[i])) for g, mask in arrays.items()}
      for i in range(size)
    ]
  return tuple(layers)


def _indices(mask: np.ndarray) -> np.ndarray:
  rows = mask.reshape(-1, mask.shape[-1])
  if len(set(rows.sum(axis=-1))) != 1:
    raise ValueError(f'rows keep different numbers: {rows.sum(axis=-1)}')
  indices = [np.flatnonzero(row) for row in rows]
  return np.stack(indices).reshape(*mask.shape[:-1], -1)


def shrunk_config(config: ModelConfig, kept: Kept) -> ModelConfig:
  """The sizes after the cut; the same where `kept` is empty."""
  groups = kept[0].keys() if kept else ()
  return with_kept(
    config, {g: tuple(layer[g].shape[-1] for layer in kept) for g in groups}
  )


def shrink(
  stacks: tuple[Any, ...],
  axes: Any,
  kept: Kept,
  config: ModelConfig,
) -> tuple[Any, ...]:
  """Cuts the masked groups out of every stack.

  `config` has the sizes before the cut.

  Returns:
    Trees of the stacks of `shrunk_config(config, kept)`: runs of layers that
    are equal after the cut.
  """
  return _restack(
    stacks,
    config,
    shrunk_config(config, kept),
    staying_layers(config, kept),
    # Layer by layer: on a mesh, taking along an axis that is split gathers it.
    lambda tree, layers, _: jax.lax.map(
      lambda layer: take_kept(layer[0], axes, layer[1]),
      (tree, _stacked(kept, layers)),
    ),
  )


def pad(
  stacks: tuple[Any, ...],
  axes: Any,
  kept: Kept,
  config: ModelConfig,
) -> tuple[Any, ...]:
  """The inverse of `shrink`: trees of `config`'s stacks, zeros where cut."""

  def widen(tree: Any, _: Sequence[int], layers: Sequence[int]) -> Any:
    sizes = config.sizes(config.layers[layers[0]])
    return jax.vmap(lambda t, k: put_kept(t, axes, k, sizes))(
      tree, _stacked(kept, layers)
    )

  there = {i: place for place, i in enumerate(staying_layers(config, kept))}
  places = [there.get(i) for i in range(len(config.layers))]
  return _restack(stacks, shrunk_config(config, kept), config, places, widen)


def staying_layers(config: ModelConfig, kept: Kept) -> list[int]:
  """The layers of `config` that are not cut as a whole."""
  layers = range(len(config.layers))
  kept_whole = [x.get(LAYERS, np.zeros(1)).size for x in kept]
  return [i for i in layers if not kept or kept_whole[i]]


def _stacked(kept: Kept, layers: Sequence[int]) -> dict[str, Array]:
  groups = kept[0].keys()
  return {g: jnp.asarray([kept[i][g] for i in layers]) for g in groups}


def _restack(
  stacks: tuple[Any, ...],
  old: ModelConfig,
  new: ModelConfig,
  places: Sequence[int | None],
  change: Callable[[Any, Sequence[int], Sequence[int]], Any],
) -> tuple[Any, ...]:
  """The layers of new stacks, made of those of old ones.

  Args:
    stacks: those of `old`.
    places: by layer of `new`, which of `old` it was; None: it is zeros.
    change: what layers of an old stack become, from their trees, their numbers
      in `old` and those in `new`.
  """
  of_layer = [
    i for i, stack in enumerate(old.stacks) for _ in range(stack.size)
  ]

  def stack_of(layer: int) -> int | None:
    place = places[layer]
    return None if place is None else of_layer[place]

  result = []
  for target in new.stacks:
    layers, pieces = range(target.start, target.start + target.size), []
    for stack, group in itertools.groupby(layers, stack_of):
      numbers = list(group)
      if stack is None:
        pieces.append(len(numbers))
        continue
      sources = [places[i] for i in numbers]
      rows = _rows([i - old.stacks[stack].start for i in sources])
      piece = jax.tree.map(lambda x, rows=rows: x[rows], stacks[stack])
      pieces.append(change(piece, sources, numbers))
    result.append(_joined(pieces))
  return tuple(result)


def _rows(indices: Sequence[int]) -> slice | np.ndarray:
  """The same rows: a slice where they are neighbours."""
  first, last = indices[0], indices[-1] + 1
  is_run = last - first == len(indices)
  return slice(first, last) if is_run else np.asarray(indices)


def _joined(pieces: Sequence[Any]) -> Any:
  """Trees of layers end to end; a number stands for so many layers of zeros."""
  like = next(piece for piece in pieces if not isinstance(piece, int))

  def tree_of(piece: Any) -> Any:
    if not isinstance(piece, int):
      return piece
    return jax.tree.map(
      lambda x: jnp.zeros((piece, *x.shape[1:]), x.dtype), like
    )

  whole = [tree_of(piece) for piece in pieces]
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *whole)
