"""Axis names and projections: the vocabulary of the whole package.

Sharding, importance, masks, the cut and the Hugging Face conversion all read
these names (docs/method.md).

Letters, used in every einsum and shape of the package:
  B batch          T query position   S key position   N tokens (B T flattened)
  D embed          V vocab            F mlp            r rank
  K kv_heads       G queries per KV head               H head_dim
  L layers in a stack                 U groups of one kind
  1 of size 1: a number that a whole axis shares
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

# What only reads names and sizes, such as a GGUF's, starts without JAX.
if TYPE_CHECKING:
  from jax import Array

AXIS_NAMES = {
  '1': 'shared',
  'B': 'batch',
  'D': 'embed',
  'F': 'mlp',
  'G': 'queries_per_kv',
  'H': 'head_dim',
  'K': 'kv_heads',
  'L': 'layers',
  'T': 'length',
  'V': 'vocab',
  'r': 'rank',
}
# The group of whole layers. Within a layer no tensor has the axis.
LAYERS = AXIS_NAMES['L']


# Each projection of a block: input, weight -> output.
PROJECTIONS = {
  'self_attn': {
    'q_proj': 'ND,DKGH->NKGH',
    'k_proj': 'ND,DKH->NKH',
    'v_proj': 'ND,DKH->NKH',
    'o_proj': 'NKGH,KGHD->ND',
  },
  'mlp': {
    'gate_proj': 'ND,DF->NF',
    'up_proj': 'ND,DF->NF',
    'down_proj': 'NF,FD->ND',
  },
}


SPECS = {n: spec for part in PROJECTIONS.values() for n, spec in part.items()}
LORA_TARGETS = tuple(SPECS)


class Axes(tuple):
  """The axis names of one tensor; a leaf, not a node, of a pytree."""

  @classmethod
  def of(cls, letters: str) -> Axes:
    """`of('DF')` is Axes(('embed', 'mlp'))."""
    return cls(AXIS_NAMES[letter] for letter in letters)


class ProjectionLetters(NamedTuple):
  """A projection's einsum taken apart."""

  weight: str
  inputs: str  # the weight's axes that are contracted with x
  outputs: str  # the rest

  @classmethod
  def of(cls, spec: str) -> ProjectionLetters:
    """`of('ND,DKH->NKH')` is weight DKH, inputs D, outputs KH."""
    x, weight = spec.split('->')[0].split(',')
    inputs = ''.join(c for c in weight if c in x)
    return cls(weight, inputs, weight[len(inputs) :])


def group_axes(group: str) -> tuple[str, ...]:
  """The axis names of a group; the last is the one that is pruned."""
  return tuple(group.split(','))


def member_axes(group: str) -> tuple[str, ...]:
  """The axes of a group's array in one layer: none, of whole layers."""
  return () if group == LAYERS else group_axes(group)


def carries(axes: tuple[str, ...], group: str) -> bool:
  """Whether a tensor belongs to a group: it has all of the group's axes."""
  return set(group_axes(group)) <= set(axes)


def align(values: Array, group: str, axes: tuple[str, ...]) -> Array:
  """Reshapes a group's array so that it broadcasts along a tensor's axes.

  The tensor's axes outside the group get size 1.
  """
  sizes = dict(zip(group_axes(group), values.shape, strict=True))
  return values.reshape([sizes.get(name, 1) for name in axes])


def along_first(values: Array, other: Array) -> Array:
  """Values for the first axes of `other`, which broadcast along the rest."""
  return values.reshape(values.shape + (1,) * (other.ndim - values.ndim))


def apply_masks(tree: Any, masks: Mapping[str, Array], axes: Any) -> Any:
  """Multiplies every tensor of a block by the masks of its groups.

  Args:
    tree: a block's parameters or adapters, one layer.
    masks: {group: array}, one layer.
    axes: the axis names of `tree`.
  """
  import jax

  def apply(x: Array, axes: tuple[str, ...]) -> Array:
    for group, mask in masks.items():
      if carries(axes, group):
        x = x * align(mask, group, axes).astype(x.dtype)
    return x

  with jax.named_scope('masks'):
    return jax.tree.map(apply, tree, axes)


def take_kept(tree: Any, axes: Any, kept: Mapping[str, Array]) -> Any:
  """One layer's tree with only the kept members of every group."""
  import jax
  import jax.numpy as jnp

  def take(x: Array, axes: tuple[str, ...]) -> Array:
    for group, indices in kept.items():
      if carries(axes, group):
        axis = axes.index(group_axes(group)[-1])
        x = jnp.take_along_axis(x, align(indices, group, axes), axis=axis)
    return x

  return jax.tree.map(take, tree, axes)


def put_kept(
  tree: Any, axes: Any, kept: Mapping[str, Array], sizes: Mapping[str, int]
) -> Any:
  """The inverse of `take_kept`: zeros where members were removed."""
  import jax
  import jax.numpy as jnp

  def put(x: Array, axes: tuple[str, ...]) -> Array:
    for group, indices in kept.items():
      if carries(axes, group):
        name = group_axes(group)[-1]
        # For each place of the full axis: is it kept, and where is it now?
        hits = indices[..., None, :] == jnp.arange(sizes[name])[:, None]
        place, alive = jnp.argmax(hits, axis=-1), jnp.any(hits, axis=-1)
        x = jnp.take_along_axis(
          x, align(place, group, axes), axis=axes.index(name)
        )
        x = x * align(alive, group, axes).astype(x.dtype)
    return x

  return jax.tree.map(put, tree, axes)
