"""Compensation of a whole model, layer by layer: the event of a pruning step.

In every layer the two projections that read pruned groups are repaired. Their
weights change, so they are in the checkpoints.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Sharding

from lorapr_jax.axes import PROJECTIONS, Axes, ProjectionLetters, apply_masks
from lorapr_jax.models.attention import segment_positions
from lorapr_jax.models.block import Block
from lorapr_jax.models.compute import Compute, compiler_options
from lorapr_jax.models.config import LayerShape
from lorapr_jax.models.kernels import choose_attention
from lorapr_jax.models.layers import INPUTS, LoRAEinsum, Rotation, rope_rotation
from lorapr_jax.models.lora import lora_product
from lorapr_jax.models.quantization import dequantized
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.compensation import (
  REPAIRED,
  Compensation,
  repaired_of,
  ridge_update,
  with_part,
  with_repaired,
  without_repaired,
)
from lorapr_jax.pruning.solve import solve, solve_in_blocks, spread
from lorapr_jax.runtime.sharding import mesh_of, parts, platform


def make_compensate(
  settings: Compute,
  compensation: Compensation,
  base_sharding: Any,
  out_sharding: Sharding,
) -> Callable[..., tuple[Any, Array]]:
  """The event: (params, lora, before, after, batches) -> (params, failed).

  The batches' tokens go through the layers in order. Each part of a layer runs
  with the masks from before the event, up to the inputs X of its last
  projection. `ridge_update` repairs the weight W of that, where W + s A B is
  what the rows that go contributed. The next part sees its output with the
  masks from after the event. So each repair knows of all before it, and one
  layer's X^T X exists at a time. Padding does not count in X.

  What is repaired is donated, the rest comes back as it is.
  `failed` counts the projections whose repair was not finite: they stay.

  Args:
    settings: of the run.
    compensation: how.
    base_sharding: of the base.
    out_sharding: of `failed`.
  """

  def compensate(repaired, rest, lora, masks, batches):
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    embeddings, segments = rest['embed_tokens']['weight'], batch.get('segments')
    x, rotation = _embedded(settings, out_sharding, embeddings, batch)
    stacks, failed = [], jnp.int32(0)
    for i, stack in enumerate(settings.config.stacks):
      repair = _StackRepair(
        settings,
        compensation.damping,
        out_sharding,
        stack.shape,
        rotation,
        segments,
      )
      trees = {'params': rest['stacks'][i], 'lora': lora[i]}
      before, after = masks
      (x, new, failed), _ = jax.lax.scan(
        repair.repair_layer,
        (x, repaired[i], failed),
        (jnp.arange(stack.size), trees, before[i], after[i]),
      )
      stacks.append(new)
    return tuple(stacks), failed

  compiled = jax.jit(
    compensate,
    donate_argnums=0,
    out_shardings=(repaired_of(base_sharding), out_sharding),
    compiler_options=compiler_options(out_sharding),
  )

  def arguments(params, lora, before, after, batches):
    rest = without_repaired(params)
    return repaired_of(params), rest, lora, (before, after), batches

  def event(params, *more):
    repaired, failed = compiled(*arguments(params, *more))
    return with_repaired(params, repaired), failed

  # As of what jax.jit returns.
  event.lower = lambda *given: compiled.lower(*arguments(*given))
  return event


def _embedded(
  settings: Compute, place: Sharding, embeddings: Array, batch: Any
) -> tuple[Array, Rotation]:
  """The first layer's input, (M, N, D), and RoPE's rotation of its tokens."""
  tokens, segments = batch['tokens'], batch.get('segments')
  x = embeddings[tokens].astype(settings.dtype)
  if segments is None:
    positions = jnp.broadcast_to(
      jnp.arange(tokens.shape[2]), (tokens.shape[0], tokens.shape[2])
    )
  else:
    positions = jax.vmap(segment_positions)(segments)
    x = jnp.where((segments > 0)[..., None], x, 0)
  rotation = rope_rotation(settings.config, positions.astype(jnp.float32))
  if parts(mesh_of(place), 'length') == 1:  # Else B and T stay apart.
    x = x.reshape(x.shape[0], -1, x.shape[-1])
  return x, rotation


@dataclasses.dataclass(frozen=True, eq=False)
class _StackRepair:
  """How the layers of a stack are repaired.

  Tokens are (M, N): M micro-batches of N tokens. On a mesh that cuts T, B and T
  are two axes in the place of N.

  Attributes:
    settings: of the run.
    damping: of `ridge_update`.
    place: of small arrays; it has the mesh.
    shape: of the layers.
    rotation: RoPE's, of the M micro-batches.
    segments: (M, B, T), as of `run_model`; None: a window is one text.
  """

  settings: Compute
  damping: float
  place: Sharding
  shape: LayerShape
  rotation: Rotation
  segments: Array | None

  def repair_layer(self, carry: Any, layer: Any) -> tuple[Any, None]:
    """The body of the scan over the stack.

    Args:
      carry: x (M, N, D); the weights of the stack that are repaired, which are
        written in place; and how many repairs failed.
      layer: the layer's number, its trees, its masks before and after.
    """
    x, repaired, failed = carry
    i, trees, before, after = layer
    settings = self.settings
    axes = block_axes(settings.config.dequantized, settings.lora)
    weights = jax.tree.map(lambda stack: stack[i], repaired)
    params = dequantized(with_part(trees['params'], weights), x.dtype)
    trees = {'params': params, 'lora': trees['lora']}
    old = {k: apply_masks(tree, before, axes[k]) for k, tree in trees.items()}
    for part, name in REPAIRED.items():
      seen = self.read(part, old, x)
      inputs = Axes.of(ProjectionLetters.of(PROJECTIONS[part][name]).inputs)
      there, stays = (
        apply_masks(jnp.ones(seen.shape[-len(inputs) :]), masks, inputs).ravel()
        for masks in (before, after)
      )
      own, names = (_projection(x, part, name) for x in (trees, axes))
      weight, bad = self.repair(own, seen, there, stays)
      failed += bad
      stack = repaired[part][name]['weight'].at[i].set(weight)
      repaired = {**repaired, part: {name: {'weight': stack}}}
      own['params'] = own['params'] | {'weight': weight}
      x += self.write(part, apply_masks(own, after, names), seen)
    return (x, repaired, failed), None

  def read(self, part: str, variables: Any, x: Array) -> Array:
    """What REPAIRED[part] reads of x (M, N, D): (M, N, ...).

    One micro-batch at a time. Padding gives zero.
    """
    settings, mesh = self.settings, mesh_of(self.place)

    def of_one(inputs: Any) -> Array:
      x, rotation, segments = inputs
      attend = choose_attention(
        settings.attention,
        seq_len=rotation.cos.shape[-2],
        head_dim=settings.config.head_dim,
        dtype=settings.dtype,
        mesh=mesh,
      )
      if segments is not None:
        attend = functools.partial(attend, segments=segments)
      block = Block(
        settings.config,
        self.shape,
        settings.lora,
        settings.matmul_dtype,
        attend,
      )
      _, seen = block.apply(
        variables, x, rotation, parts=(part,), mutable=[INPUTS]
      )
      seen = seen[INPUTS][part][REPAIRED[part]]['inputs']
      if segments is None:
        return seen
      # Biases make something of padding.
      tokens = (*x.shape[:-1], *(1 for _ in seen.shape[x.ndim - 1 :]))
      return jnp.where((segments > 0).reshape(tokens), seen, 0)

    return jax.lax.map(of_one, (x, self.rotation, self.segments))

  def repair(
    self, own: Any, seen: Array, there: Array, stays: Array
  ) -> tuple[Array, Array]:
    """The repaired weight, and 1 where the repair was not finite.

    Args:
      own: the projection's variables.
      seen: what it reads, (M, N, ...).
      there: 1 for a row of its weight, as a matrix, before the event.
      stays: 1 for a row after it.
    """
    weight, gone = own['params']['weight'], there - stays
    mesh, solver = mesh_of(self.place), solve
    if platform(self.place) == 'tpu':
      solver = functools.partial(solve_in_blocks, mesh=mesh)

    def repaired():
      effective = weight.reshape(stays.size, -1).astype(jnp.float32)
      if own['lora']:
        product = lora_product(own['lora']['a'], own['lora']['b'])
        effective += self.settings.lora.scale * product.reshape(effective.shape)
      gram = spread(self.gram(seen, weight.ndim - 1), mesh, 0)
      update = ridge_update(
        effective, gram, gone, stays, self.damping, solver
      ).reshape(weight.shape)
      good = jnp.all(jnp.isfinite(update))
      new = weight.astype(jnp.float32) + jnp.where(good, update, 0)
      return new.astype(weight.dtype), 1 - good.astype(jnp.int32)

    return jax.lax.cond(
      jnp.any(gone > 0), repaired, lambda: (weight, jnp.int32(0))
    )

  def gram(self, seen: Array, inputs: int) -> Array:
    """X^T X over tokens, in float32; the last `inputs` axes of X are as one."""
    # Micro-batches stay apart: their tokens lie on all devices.
    tokens = seen.shape[:-inputs]
    x = seen.reshape(*tokens, -1)
    x = x.astype(self.settings.matmul_dtype or x.dtype)
    axes = tuple(range(len(tokens)))
    return jax.lax.dot_general(
      x,
      x,
      ((axes, axes), ((), ())),
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )

  def write(self, part: str, variables: Any, seen: Array) -> Array:
    """What REPAIRED[part] makes of what it reads: (M, N, D)."""
    projection = LoRAEinsum(
      PROJECTIONS[part][REPAIRED[part]],
      variables['params']['weight'].shape,
      self.settings.lora if variables['lora'] else None,
      self.settings.matmul_dtype,
      part in self.settings.config.biased,
    )
    return jax.lax.map(lambda x: projection.apply(variables, x, x), seen)


def _projection(trees: Any, part: str, name: str) -> dict[str, Any]:
  """One projection of a block's {'params', 'lora'}: {} without an adapter."""
  return {key: tree.get(part, {}).get(name, {}) for key, tree in trees.items()}
