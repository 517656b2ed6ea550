"""Groups: what is pruned together, and what it costs.

A pruning group is named by its axes. A tensor belongs to a group if it has all
of the group's axes:
  kv_heads                 a KV head with all its query heads
  kv_heads,queries_per_kv  one query head; every KV head keeps as many
  mlp                      a channel of the feed-forward network
Whole layers are the group `layers`: its members are the layers of the model,
and what goes with one is all of its tensors.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

import jax

from lorapr_jax.axes import LAYERS, carries, group_axes
from lorapr_jax.models.config import LayerShape, ModelConfig

KV_HEADS, QUERIES, CHANNELS = 'kv_heads', 'kv_heads,queries_per_kv', 'mlp'
HEAD_GROUPS = {'kv_groups': KV_HEADS, 'queries': QUERIES, 'none': None}


# The values of the `prune.*` keys that are words.
CHOICES = {
  'unit': ('groups', 'params'),
  'heads': tuple(HEAD_GROUPS),
  'protect': ('reference', 'none'),
  'speedup_of': ('decode', 'prefill'),
}


def kind(group: str) -> str:
  """'heads', 'channels' or 'layers'."""
  return {CHANNELS: 'channels', LAYERS: 'layers'}.get(group, 'heads')


def group_size(config: ModelConfig, shape: LayerShape, group: str) -> int:
  """How many members a layer has that are ranked against each other.

  Whole layers are ranked against each other: each is the one of its own.
  """
  return 1 if group == LAYERS else config.sizes(shape)[group_axes(group)[-1]]


def protected_layers(num_layers: int, protect: str) -> frozenset[int]:
  """The layers that are never pruned: the first int(0.1 L) and the last."""
  if protect == 'none':
    return frozenset()
  return frozenset((*range(int(0.1 * num_layers)), num_layers - 1))


def with_kept(
  config: ModelConfig, keep: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
  """The model once every layer has only `keep` of each group.

  A layer that keeps 0 of `layers` is gone.
  """
  fields = {
    KV_HEADS: 'num_kv_heads',
    QUERIES: 'queries_per_kv',
    CHANNELS: 'mlp_dim',
  }
  counts = {field: keep[g] for g, field in fields.items() if g in keep}
  layers = tuple(
    dataclasses.replace(shape, **{f: int(n[i]) for f, n in counts.items()})
    for i, shape in enumerate(config.layers)
  )
  smaller = dataclasses.replace(config, layers=layers)
  if LAYERS not in keep:
    return smaller
  return smaller.of_layers([i for i, stays in enumerate(keep[LAYERS]) if stays])


def member_parameters(
  config: ModelConfig, shape: LayerShape, group: str
) -> int:
  """The parameters of a layer that go with one member less."""
  if group == LAYERS:
    return config.layer_parameters(shape)
  size = group_size(config, shape, group)
  smaller = with_kept(
    dataclasses.replace(config, layers=(shape,)), {group: (size - 1,)}
  )
  return config.layer_parameters(shape) - smaller.layer_parameters(
    smaller.layers[0]
  )


def couplings(axes: Any, group: str) -> Iterator[tuple[str, tuple[str, ...]]]:
  """The tensors that lose something with a member of the group, with axes.

  `axes` are the axis names of a block's tensors.
  """
  for path, names in jax.tree_util.tree_leaves_with_path(axes):
    if group == LAYERS or carries(names, group):
      yield jax.tree_util.keystr(path, simple=True, separator='.'), names
