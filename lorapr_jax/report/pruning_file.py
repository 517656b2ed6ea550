"""Reads pruning.json: what a cut kept, and of which model."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorapr_jax.errors import UserError, short
from lorapr_jax.hf.config import layers_from_hf
from lorapr_jax.models.config import LayerShape
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.shrink import Kept
from lorapr_jax.runtime.files import LARGE, read_json
from lorapr_jax.runtime.forms import SHARE, TEXT, Maybe, check_form

_SHARES = {'target': Maybe(SHARE), 'achieved': SHARE}
SPARSITY = {'heads': _SHARES, 'channels': _SHARES, 'params': _SHARES}
_FORM = {
  'base': {'name': TEXT, 'sha256': Maybe(TEXT)},
  'sparsity': SPARSITY,
  # Of the indices, of which there may be millions, `_indices` sees to.
  'kept': [{}],
}


class PruningFile(NamedTuple):
  """The contents of a pruning.json.

  Attributes:
    contents: all of it.
    layers: the sizes of each layer before the cut; () if an older version wrote
      the file, without them.
    kept: what the cut kept of these layers; () with them.
  """

  contents: dict[str, Any]
  layers: tuple[LayerShape, ...]
  kept: Kept


def read_pruning(path: Path) -> PruningFile:
  """Reads a pruning.json.

  Raises:
    UserError: if it is not as an export writes it.
  """
  contents = read_json(path, LARGE)
  check_form(contents, _FORM, path)
  sizes, kept = contents['base'].get('config'), contents['kept']
  if sizes is None:
    return PruningFile(contents, (), ())
  check_form(sizes, {}, path, 'base.config')
  try:
    layers = layers_from_hf(sizes)
  except UserError as error:
    raise UserError(f'{path}: base.{error}') from None
  if kept and len(kept) != len(layers):
    raise UserError(
      f'{path}: kept has {len(kept)} layers, and base.config {len(layers)}'
    )
  arrays = tuple(
    {
      group: _indices(indices, group, shape, f'{path}: kept.{i}')
      for group, indices in layer.items()
    }
    for i, (layer, shape) in enumerate(zip(kept, layers, strict=False))
  )
  for i, layer in enumerate(arrays):
    if layer.keys() != arrays[0].keys():
      raise UserError(f'{path}: kept.{i} has other groups than kept.0')
  return PruningFile(contents, layers, arrays)


def shape_of(group: str, layer: LayerShape) -> tuple[int, ...]:
  """The axes of a group's mask in a layer, () for a name that is no group."""
  return {
    KV_HEADS: (layer.num_kv_heads,),
    QUERIES: (layer.num_kv_heads, layer.queries_per_kv),
    CHANNELS: (layer.mlp_dim,),
  }.get(group, ())


def _indices(
  found: Any, group: str, layer: LayerShape, where: str
) -> np.ndarray:
  """The indices of a group that a layer kept, in ascending order."""
  shape = shape_of(group, layer)
  if not shape:
    raise UserError(f'{where} has {short(group)}, which is no group')
  try:
    indices = np.asarray(found)
  except ValueError:  # Lists of different lengths.
    indices = np.asarray(None)
  fits = (
    indices.dtype.kind == 'i'
    and indices.ndim == len(shape)
    and indices.shape[:-1] == shape[:-1]
    and 0 <= indices.min(initial=0) <= indices.max(initial=0) < shape[-1]
    and (np.diff(indices) > 0).all()
  )
  if not fits:
    raise UserError(
      f'{where}.{group} is {short(repr(found))}, not ascending indices of the '
      f'last axis of {shape}'
    )
  return indices
