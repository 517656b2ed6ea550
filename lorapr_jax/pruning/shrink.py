"""The cut: masks to kept indices to smaller trees; and pad, its inverse.

`stacks` are tuples with a tree for each stack of a model: parameters, LoRA,
optimiser moments, masks or importance. `axes` are the axis names of one
layer's tree. `kept` has, for each layer of the model, {group: indices}.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from lorapr_jax.axes import put_kept, take_kept
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.groups import with_kept

Kept = tuple[dict[str, np.ndarray], ...]


def kept_groups(masks: tuple[Mapping[str, Array], ...]) -> Kept:
  """The indices that are alive, by layer, in ascending order.

  For query heads (K, g): the indices within each KV head.

  Raises:
    ValueError: if KV heads of one layer keep different numbers of queries.
  """
  layers = []
  for stack in masks:
    arrays = {group: np.asarray(mask) for group, mask in stack.items()}
    size = len(next(iter(arrays.values())))
    layers += [
      {group: _indices(mask[i]) for group, mask in arrays.items()}
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
    # Layer by layer: on a mesh, taking along an axis that is split gathers it.
    lambda tree, layers: jax.lax.map(
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

  def widen(tree: Any, layers: range) -> Any:
    sizes = config.sizes(config.layers[layers[0]])
    return jax.vmap(lambda t, k: put_kept(t, axes, k, sizes))(
      tree, _stacked(kept, layers)
    )

  return _restack(stacks, shrunk_config(config, kept), config, widen)


def _stacked(kept: Kept, layers: range) -> dict[str, Array]:
  groups = kept[0].keys()
  return {g: jnp.asarray([kept[i][g] for i in layers]) for g in groups}


def _restack(stacks, old: ModelConfig, new: ModelConfig, change) -> tuple:
  """Applies change(slice of an old stack, its layers), in new stacks."""
  result = []
  for target in new.stacks:
    pieces = []
    for tree, source in zip(stacks, old.stacks, strict=True):
      start = max(source.start, target.start)
      stop = min(source.start + source.size, target.start + target.size)
      if start < stop:
        rows = slice(start - source.start, stop - source.start)
        piece = jax.tree.map(lambda x, rows=rows: x[rows], tree)
        pieces.append(change(piece, range(start, stop)))
    result.append(jax.tree.map(lambda *xs: jnp.concatenate(xs), *pieces))
  return tuple(result)
