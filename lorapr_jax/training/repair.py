"""Compensation of a whole model, layer by layer: the event of a pruning step.

Two projections of a layer are repaired, those that read what is masked: their
weights, or their biases alone. These change, so they are checkpointed.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from lorapr_jax.axes import (
  PROJECTIONS,
  Axes,
  ProjectionLetters,
  apply_masks,
)
from lorapr_jax.models.attention import segment_positions
from lorapr_jax.models.block import Block
from lorapr_jax.models.compute import (
  Compute,
  compiler_options,
)
from lorapr_jax.models.config import LayerShape
from lorapr_jax.models.kernels import choose_attention
from lorapr_jax.models.layers import INPUTS, LoRAEinsum, Rotation, rope_rotation
from lorapr_jax.models.lora import lora_product
from lorapr_jax.models.quantization import dequantized
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.compensation import (
  REPAIRED,
  RIDGE,
  Compensation,
  bias_update,
  ridge_update,
)
from lorapr_jax.pruning.solve import solve, solve_in_blocks, spread
from lorapr_jax.runtime.sharding import mesh_of, parts, platform


def repaired_part(block: Any, leaf: str) -> Any:
  """Of a tree like a block's, REPAIRED's weights or the biases that it has."""
  return {
    part: {name: {leaf: block[part][name][leaf]}}
    for part, name in REPAIRED.items()
    if leaf in block[part][name]
  }


def _with_part(block: Any, new: Any) -> Any:
  if not isinstance(block, dict):  # Here the leaf was.
    return new
  return block | {key: _with_part(block.get(key), x) for key, x in new.items()}


def _without_part(block: Any, leaf: str) -> Any:
  for part, name in REPAIRED.items():
    leaves = {k: x for k, x in block[part][name].items() if k != leaf}
    block = block | {part: block[part] | {name: leaves}}
  return block


def repaired_of(params: Any, leaf: str) -> tuple[Any, ...]:
  """Of a tree like the base's, what is repaired; by stack.

  Args:
    params: the tree.
    leaf: of REPAIRED: `Compensation.leaf`.
  """
  return tuple(repaired_part(block, leaf) for block in params['stacks'])


def with_repaired(params: Any, repaired: Sequence[Any]) -> Any:
  """The tree with these in their places."""
  pairs = zip(params['stacks'], repaired, strict=True)
  return {**params, 'stacks': tuple(_with_part(*pair) for pair in pairs)}


def make_compensate(
  settings: Compute,
  compensation: Compensation,
  base_sharding: Any,
  out_sharding: Sharding,
) -> Callable[..., tuple[Any, Array]]:
  """The event: (params, lora, before, after, batches) -> (params, failed).

  The batches' tokens go through the layers in order. Each part of a layer runs
  with the masks from before the event, up to the inputs X of its last
  projection; `ridge_update` repairs that, or `bias_update`, where W + s A B is
  what the rows that go contributed; and its output with the masks from after
  the event is what the next part sees. So each repair knows of all before it,
  and one layer's X^T X exists at a time. Padding does not count in X.

  What is repaired is donated, the rest comes back as it is.
  `failed` counts the projections whose repair was not finite: they stay.

  Args:
    settings: of the run.
    compensation: how.
    base_sharding: of the base.
    out_sharding: of `failed`.
  """
  mesh, leaf = mesh_of(out_sharding), compensation.leaf
  repair = functools.partial(_repair, settings, compensation, out_sharding)

  def compensate(repaired, rest, lora, before, after, batches):
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    tokens, segments = batch['tokens'], batch.get('segments')
    x = rest['embed_tokens']['weight'][tokens].astype(settings.dtype)
    if segments is None:
      positions = jnp.broadcast_to(
        jnp.arange(tokens.shape[2]), (tokens.shape[0], tokens.shape[2])
      )
    else:
      positions = jax.vmap(segment_positions)(segments)
      x = jnp.where((segments > 0)[..., None], x, 0)
    rotation = rope_rotation(settings.config, positions.astype(jnp.float32))
    if parts(mesh, 'length') == 1:  # Else B and T stay apart.
      x = x.reshape(x.shape[0], -1, x.shape[-1])
    count = tokens.size if segments is None else jnp.sum(segments > 0)
    stacks, failed = [], jnp.int32(0)
    for i, stack in enumerate(settings.config.stacks):
      layer = functools.partial(
        _repair_layer,
        settings,
        compensation.leaf,
        functools.partial(repair, count),
        _reader(settings, stack.shape, rotation, segments, mesh),
      )
      trees = {'params': rest['stacks'][i], 'lora': lora[i]}
      (x, new, failed), _ = jax.lax.scan(
        layer,
        (x, repaired[i], failed),
        (jnp.arange(stack.size), trees, before[i], after[i]),
      )
      stacks.append(new)
    return tuple(stacks), failed

  compiled = jax.jit(
    compensate,
    donate_argnums=0,
    out_shardings=(repaired_of(base_sharding, leaf), out_sharding),
    compiler_options=compiler_options(out_sharding),
  )

  def split(params):
    stacks = tuple(_without_part(block, leaf) for block in params['stacks'])
    return repaired_of(params, leaf), {**params, 'stacks': stacks}

  def event(params, *arguments):
    repaired, rest = split(params)
    repaired, failed = compiled(repaired, rest, *arguments)
    return with_repaired(rest, repaired), failed

  # As of what jax.jit returns.
  event.lower = lambda params, *arguments: compiled.lower(
    *split(params), *arguments
  )
  return event


def _reader(
  settings: Compute,
  shape: LayerShape,
  rotation: Rotation,
  segments: Array | None,
  mesh: Mesh | None,
) -> Callable[..., Array]:
  """(part, a layer's variables, x (M, N, D)) -> what REPAIRED[part] reads.

  One of the M micro-batches at a time; all in the result, (M, N, ...), zero
  where there is padding. As in all of this file B and T are two axes in the
  place of N on a mesh that cuts T.
  """

  def read(part: str, variables: Any, x: Array) -> Array:
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
        settings.config, shape, settings.lora, settings.matmul_dtype, attend
      )
      _, seen = block.apply(
        variables, x, rotation, parts=(part,), mutable=[INPUTS]
      )
      seen = seen[INPUTS][part][REPAIRED[part]]['inputs']
      if segments is None:
        return seen
      # Of padding only biases make anything.
      tokens = (*x.shape[:-1], *(1 for _ in seen.shape[x.ndim - 1 :]))
      return jnp.where((segments > 0).reshape(tokens), seen, 0)

    return jax.lax.map(of_one, (x, rotation, segments))

  return read


def _repair_layer(settings, leaf, repair, read, carry, layer):
  """The body of the scan over a stack.

  The carry is x (M, N, D), what is repaired of the stack, written in place, and
  how many repairs failed.
  """
  x, repaired, failed = carry
  i, trees, before, after = layer
  biased = settings.config.biased
  axes = block_axes(settings.config.dequantized, settings.lora)
  weights = jax.tree.map(lambda stack: stack[i], repaired)
  params = dequantized(_with_part(trees['params'], weights), x.dtype)
  trees = {'params': params, 'lora': trees['lora']}
  old, new = (
    {name: apply_masks(tree, masks, axes[name]) for name, tree in trees.items()}
    for masks in (before, after)
  )
  for part, name in REPAIRED.items():
    spec, params_of = PROJECTIONS[part][name], params[part][name]
    seen = read(part, old, x)
    inputs = Axes.of(ProjectionLetters.of(spec).inputs)
    there, stays = (
      apply_masks(jnp.ones(seen.shape[-len(inputs) :]), masks, inputs).ravel()
      for masks in (before, after)
    )
    adapter = trees['lora'].get(part, {}).get(name)
    if part in repaired:
      mended, bad = repair(params_of, adapter, seen, there, stays)
      failed += bad
      stack = repaired[part][name][leaf].at[i].set(mended)
      repaired = {**repaired, part: {name: {leaf: stack}}}
      params_of = params_of | {leaf: mended}
    projection = LoRAEinsum(
      spec,
      params_of['weight'].shape,
      adapter and settings.lora,
      settings.matmul_dtype,
      part in biased,
    )
    variables = {
      'params': apply_masks(params_of, after, axes['params'][part][name]),
      'lora': new['lora'].get(part, {}).get(name, {}),
    }
    x += jax.lax.map(
      lambda seen, p=projection, v=variables: p.apply(v, seen, seen), seen
    )
  return (x, repaired, failed), None


def _repair(
  settings, compensation, place, count, params, adapter, inputs, there, stays
):
  """The leaf that makes up for the rows that go, and 1 if there is none."""
  rows, gone, weight = stays.size, there - stays, params['weight']
  old, mesh = params[compensation.leaf], mesh_of(place)
  solver = solve
  if platform(place) == 'tpu':
    solver = functools.partial(solve_in_blocks, mesh=mesh)

  def repair():
    matrix = weight.reshape(rows, -1).astype(jnp.float32)
    effective = matrix
    if adapter is not None:
      product = lora_product(adapter['a'], adapter['b'])
      effective += settings.lora.scale * product.reshape(matrix.shape)
    # Micro-batches stay apart: their tokens lie on all devices.
    axes = tuple(range(1 + inputs.ndim - weight.ndim))
    x = inputs.reshape(*inputs.shape[: len(axes)], rows)
    if compensation.kind == RIDGE:
      x = x.astype(settings.matmul_dtype or x.dtype)
      gram = jax.lax.dot_general(
        x,
        x,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
      )
      update = ridge_update(
        effective,
        spread(gram, mesh, 0),
        gone,
        stays,
        compensation.damping,
        solver,
      )
    else:
      mean = jnp.sum(x.astype(jnp.float32), axis=axes) / count
      update = bias_update(effective, mean, gone)
    good = jnp.all(jnp.isfinite(update))
    new = old.astype(jnp.float32) + jnp.where(
      good, update.reshape(old.shape), 0
    )
    bad = 1 - good.astype(jnp.int32)
    return new.astype(old.dtype), bad

  return jax.lax.cond(jnp.any(gone > 0), repair, lambda: (old, jnp.int32(0)))
