"""Reads pruning.json: what a cut kept, and of which model."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError, short
from lorapr_jax.hf.config import layers_from_hf
from lorapr_jax.models.config import LayerShape
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.shrink import Kept
from lorapr_jax.runtime.files import LARGE, read_json
from lorapr_jax.runtime.forms import SHARE, TEXT, Maybe, check_form

_SHARES = {'target': Maybe(SHARE), 'achieved': SHARE}
SPARSITY = {
  'heads': _SHARES,
  'channels': _SHARES,
  'params': _SHARES,
  'layers?': _SHARES,
}
_FORM = {
  'base': {'name': TEXT, 'sha256': Maybe(TEXT)},
  'sparsity': SPARSITY,
  # A layer that is gone is null. Of the indices, of which there may be
  # millions, `_indices` sees to.
  'kept': [Maybe({})],
}


class PruningFile(NamedTuple):
  """The contents of a pruning.json.

  Attributes:
    contents: all of it.
    layers: the sizes of each layer before the cut; () if an older version wrote
      the file, without them.
    kept: what the cut kept of these layers, with LAYERS if any is gone; () with
      them.
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
  return PruningFile(contents, layers, _kept(kept, layers, path))


def _kept(
  found: list[dict[str, Any] | None], layers: tuple[LayerShape, ...], path: Path
) -> Kept:
  """What the file says of each layer; `found` is [] or has all of them."""
  there = [i for i, layer in enumerate(found) if layer is not None]
  if found and not there:
    raise UserError(f'{path}: kept has no layer that is there')
  arrays: list[dict[str, np.ndarray]] = []
  for i, layer in enumerate(found):
    if layer is None:
      empty = (shape_of(group, layers[i]) for group in found[there[0]])
      nothing = [np.zeros((*shape[:-1], 0), int) for shape in empty]
      layer = dict(zip(found[there[0]], nothing, strict=True))
    elif layer.keys() != found[there[0]].keys():
      raise UserError(f'{path}: kept.{i} has other groups than kept.{there[0]}')
    else:
      where = f'{path}: kept.{i}'
      layer = {g: _indices(x, g, layers[i], where) for g, x in layer.items()}
    arrays.append(layer)
  if len(there) < len(found):
    for i, layer in enumerate(arrays):
      layer[LAYERS] = np.arange(int(i in there))
  return tuple(arrays)


def shape_of(group: str, layer: LayerShape) -> tuple[int, ...]:
  """The axes of a group's mask in a layer, () for a name that is no group."""
  return {
    KV_HEADS: (layer.num_kv_heads,),
    QUERIES: (layer.num_kv_heads, layer.queries_per_kv),
    CHANNELS: (layer.mlp_dim,),
    LAYERS: (1,),
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
