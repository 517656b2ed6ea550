"""The base: the weights at one size, and where they lie on the mesh."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapr_jax.errors import MeshError
from lorapr_jax.hf.load import weight_places
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.trees import block_axes, param_shapes
from lorapr_jax.pruning.shrink import Kept, kept_groups, shrink, shrunk_config
from lorapr_jax.runtime import sharding


class Places(NamedTuple):
  """Where things lie on the mesh.

  Attributes:
    base: a sharding for every tensor of the base.
    batch: of (micro-batches, sequences, tokens).
    state: replicated: the state is small.
  """

  base: Any
  batch: NamedSharding
  state: NamedSharding

  @classmethod
  def of(
    cls,
    mesh: Mesh,
    config: ModelConfig,
    base_dtype: Any,
    micro_batch: tuple[int, int] | None = None,
  ) -> 'Places':
    """For a base, whose weights are `base_dtype` where they are not quantised.

    `micro_batch` is (sequences, tokens); None: no step will be taken.

    Raises:
      MeshError: naming the size that the mesh does not divide.
    """
    parts = sharding.parts(mesh, 'batch')
    if micro_batch and micro_batch[0] % parts:
      raise MeshError(
        f'train.micro_batch_size {micro_batch[0]} is not a multiple '
        f'of mesh.data * mesh.fsdp = {parts}'
      )
    return cls(
      base=weight_places(config, base_dtype, mesh),
      batch=sharding.sharding(
        mesh,
        ('accumulation', 'batch', 'length'),
        (1, *micro_batch) if micro_batch else None,
      ),
      state=NamedSharding(mesh, P()),
    )

  @property
  def mesh(self) -> Mesh:
    """That everything lies on."""
    return self.state.mesh


def weight_shapes(mesh: Mesh, config: ModelConfig, dtype: Any) -> Any:
  """A `jax.ShapeDtypeStruct` with its sharding for every weight."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    param_shapes(config, dtype),
    weight_places(config, dtype, mesh),
  )


class Base(NamedTuple):
  """The weights at one size.

  Attributes:
    params: the weights, of which a repair alone changes any.
    compute: what the functions of the loop are specialised to, with this size.
    places: where arrays of this size lie.
  """

  params: Any
  compute: Compute
  places: Places

  @property
  def dtype(self) -> Any:
    """Of the weights that are not quantised."""
    return self.params['norm']['weight'].dtype

  def cut(self, kept: Kept) -> 'Base':
    """With only what is kept; the larger weights are deleted."""
    config = shrunk_config(self.compute.config, kept)
    if config == self.compute.config:
      return self
    places = weight_places(config, self.dtype, self.places.mesh)
    params = cut_params(
      self.params, kept, self.compute.config, places, delete=True
    )
    compute = dataclasses.replace(self.compute, config=config)
    return Base(params, compute, self.places._replace(base=places))


def kept_of(masks: Any) -> Kept:
  """What the masks keep, by layer; empty where nothing is pruned."""
  return kept_groups(masks) if any(masks) else ()


def cut_params(
  params: Any,
  kept: Kept,
  config: ModelConfig,
  shardings: Any = None,
  *,
  delete: bool = False,
) -> Any:
  """Smaller weights, tensor by tensor.

  Args:
    params: the base.
    kept: from `kept_of`; empty: nothing is cut.
    config: the sizes before the cut.
    shardings: of the smaller base; None: as it comes.
    delete: whether each tensor makes room as soon as it has been cut, so that
      there is never a second copy of the model.
  """
  if not kept:
    return params
  axes, structure = jax.tree.flatten(block_axes(config)['params'])
  # From a tree for each stack to a tuple of stacks for each tensor, and back.
  tensors = zip(*map(structure.flatten_up_to, params['stacks']), strict=True)
  places: Any = [None] * len(axes)
  if shardings is not None:
    stacks = shardings['stacks']
    places = zip(*map(structure.flatten_up_to, stacks), strict=True)
  smaller = []
  for tensor, names, place in zip(tensors, axes, places, strict=True):
    smaller.append(_cut(names, config, place)(tensor, kept))
    if delete:
      jax.block_until_ready(smaller[-1])
      for stack in tensor:
        stack.delete()
  stacks = zip(*smaller, strict=True)
  return {**params, 'stacks': tuple(map(structure.unflatten, stacks))}


@functools.cache
def _cut(names: Any, config: ModelConfig, places: Any) -> Callable[..., Any]:
  """The compiled (stacks, kept) -> smaller stacks, of tensors of these axes."""
  return jax.jit(
    lambda stacks, kept: shrink(stacks, names, kept, config),
    out_shardings=places,
  )
