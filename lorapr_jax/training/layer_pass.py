"""The pass of a pruning event: tokens go through the layers, which are pruned.

In every layer and part: measure, choose, repair, hand on. The weights of the
two projections that read pruned groups change, so they are in the checkpoints.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Sharding

from lorapr_jax.axes import (
  LAYERS,
  PROJECTIONS,
  along_first,
  apply_masks,
  carries,
)
from lorapr_jax.models import decoder
from lorapr_jax.models.attention import segment_positions
from lorapr_jax.models.block import AFTER, Block, added
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import LayerShape
from lorapr_jax.models.kernels import choose_attention
from lorapr_jax.models.kinds import Kind, windows_within
from lorapr_jax.models.layers import INPUTS, LoRAEinsum
from lorapr_jax.models.quantization import dequantized
from lorapr_jax.models.rotation import Rotation, rope_rotation
from lorapr_jax.models.trees import block_axes, masked
from lorapr_jax.pruning.compensation import REPAIRED, with_part
from lorapr_jax.pruning.importance import SQUARES
from lorapr_jax.runtime.sharding import mesh_of, parts
from lorapr_jax.training.prune_part import (
  Layer,
  PartPruning,
  projection_of,
  token_scale,
)


class Carry(NamedTuple):
  """What the pass hands from layer to layer.

  Attributes:
    x: the tokens, (M, N, D).
    weights: of the stack that are repaired, written in place.
  """

  x: Array
  weights: Any


def embedded(
  settings: Compute, place: Sharding, embeddings: Array, batch: Any
) -> tuple[Array, Rotation]:
  """The first layer's input, (M, N, D), and RoPE's rotation of its tokens."""
  tokens, segments = batch['tokens'], batch.get('segments')
  valid = None if segments is None else segments > 0
  x = decoder.embedded(
    embeddings, tokens, settings.config, settings.dtype, valid
  )
  if segments is None:
    positions = jnp.broadcast_to(
      jnp.arange(tokens.shape[2]), (tokens.shape[0], tokens.shape[2])
    )
  else:
    positions = jax.vmap(segment_positions)(segments)
  rotation = rope_rotation(settings.config, positions.astype(jnp.float32))
  if parts(mesh_of(place), 'length') == 1:  # Else B and T stay apart.
    x = x.reshape(x.shape[0], -1, x.shape[-1])
  return x, rotation


@dataclasses.dataclass(frozen=True, eq=False)
class LayerPass:
  """The layers of a stack, one after the other.

  Attributes:
    pruning: what becomes of a part.
    shape: of the layers.
    rotation: RoPE's, of the M micro-batches.
  """

  pruning: PartPruning
  shape: LayerShape
  rotation: Rotation

  def prune_layer(self, carry: Carry, layer: Layer) -> tuple[Carry, Any]:
    """The body of the scan over a stack.

    Gives its new masks, importance, and {group: errors of its repair}.
    """
    x, stacks = carry
    settings = self.pruning.settings
    axes = block_axes(settings.config.dequantized, settings.lora)
    weights = jax.tree.map(lambda stack: stack[layer.index], stacks)
    params = dequantized(with_part(layer.trees['params'], weights), x.dtype)
    trees = {'params': params, 'lora': layer.trees['lora']}
    shapes = settings.config, self.shape
    old = masked(trees, layer.masks, axes, *shapes)
    after, importance = dict(layer.masks), dict(layer.importance)
    errors = {}
    for part, name in REPAIRED.items():
      own, names = (projection_of(y, part, name) for y in (trees, axes))
      inputs = self.read(part, old, x, layer.kind)
      for group in layer.masks:
        if not carries(names['params']['weight'], group):
          continue
        scale = self.scale(part, old, x, inputs[name])
        chosen = self.pruning.prune(part, group, trees, inputs, scale, layer)
        after[group], importance[group] = chosen.mask, chosen.importance
        errors[group] = chosen.errors
        if self.pruning.repairs:
          own['params'] = own['params'] | {'weight': chosen.weight}
          stack = stacks[part][name]['weight']
          stack = stack.at[layer.index].set(chosen.weight)
          stacks = {**stacks, part: {name: {'weight': stack}}}
      if part == 'self_attn' and settings.config.qk_norm == 'heads':
        # What attends depends on which heads are alive.
        new = masked(trees, after, axes, *shapes)
        inputs = self.read(part, new, x, layer.kind)
      out = self.write(part, apply_masks(own, after, names), inputs[name])
      new = added(settings.config, part, params, out)
      if LAYERS in layer.masks:
        new *= layer.masks[LAYERS].astype(new.dtype)
      x += new
    return Carry(x, stacks), (after, importance, errors)

  def read(
    self, part: str, variables: Any, x: Array, kind: Kind
  ) -> dict[str, Array]:
    """What the projections of a part read, {name: (M, N, ...)}.

    One micro-batch at a time. Padding gives zero. Without a criterion that
    reads all of them, only REPAIRED[part] is there.
    """
    pruning, settings = self.pruning, self.pruning.settings
    rotations = self.rotation.of(kind.rope)
    wanted = [REPAIRED[part]]
    if pruning.criterion.statistic == SQUARES:
      wanted = list(PROJECTIONS[part])

    def of_one(inputs: Any) -> dict[str, Array]:
      x, rotation, segments = inputs
      T = rotation.cos.shape[-2]
      attend = choose_attention(
        settings.attention,
        seq_len=T,
        head_dim=settings.config.head_dim,
        cap=settings.config.attention_cap,
        dtype=settings.dtype,
        mesh=mesh_of(pruning.place),
        windows=windows_within(settings.config, T),
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
      _, found = block.apply(
        variables, x, rotation, (part,), kind.window, mutable=[INPUTS]
      )
      found = {n: found[INPUTS][part][n]['inputs'] for n in wanted}
      if segments is None:
        return found
      # Biases make something of padding.
      there = (segments > 0).reshape(x.shape[:-1])
      return {
        n: jnp.where(along_first(there, y), y, 0) for n, y in found.items()
      }

    return jax.lax.map(of_one, (x, rotations, pruning.segments))

  def scale(self, part: str, variables: Any, x: Array, seen: Array) -> Array:
    """How much the error of each token's output counts, (M, N).

    Of an output that a norm divides by its rms, an error is divided too.

    Args:
      part: of the block.
      variables: the block's, before the event.
      x: the stream, (M, N, D).
      seen: what REPAIRED[part] reads.
    """
    config = self.pruning.settings.config
    scale = token_scale(x, config.norm_eps)
    if AFTER[part] not in config.norms:
      return scale
    own = projection_of(variables, part, REPAIRED[part])
    return scale * token_scale(self.write(part, own, seen), config.norm_eps)

  def write(self, part: str, variables: Any, seen: Array) -> Array:
    """What REPAIRED[part] makes of what it reads: (M, N, D)."""
    settings = self.pruning.settings
    projection = LoRAEinsum(
      PROJECTIONS[part][REPAIRED[part]],
      variables['params']['weight'].shape,
      settings.lora if variables['lora'] else None,
      settings.matmul_dtype,
      REPAIRED[part] in settings.config.biases,
    )
    return jax.lax.map(lambda x: projection.apply(variables, x, x), seen)
