"""Low-rank algebra on LoRA factors: product, guided gradient, merge.

A is (inputs..., r) and B is (r, outputs...), so that every product below has
the axes of the weight that it belongs to.
"""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.axes import PROJECTIONS, ProjectionLetters
from lorapr_jax.models.quantization import dequantized

# Which terms of A gB + gA B - gA gB are taken for the gradient of A B.
OUTPUTS, INPUTS = 'outputs', 'inputs'  # A gB alone; gA B alone.
FIRST_ORDER, FULL = 'first_order', 'full'  # Without the last; all.
# By a projection: OUTPUTS where its groups are outputs, else INPUTS.
OWN = 'own'


def lora_product(a: Array, b: Array, *, fused: bool = False) -> Array:
  """A B, in the shape of the weight; in full float32 on every backend.

  Args:
    a: (inputs..., r).
    b: (r, outputs...).
    fused: as a sum of r outer products. A compiler that fuses elementwise
      operations then makes no dense array of what is summed or read next.
  """
  if not fused:
    return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
  columns = a.reshape(*a.shape[:-1], *(1,) * (b.ndim - 1), a.shape[-1])
  return sum(columns[..., i] * b[i] for i in range(b.shape[0]))


def terms_of(lora_gradient: str, part: str, name: str) -> str:
  """OWN as what it is for a projection; the others are themselves."""
  if lora_gradient != OWN:
    return lora_gradient
  letters = ProjectionLetters.of(PROJECTIONS[part][name])
  return OUTPUTS if letters.inputs == 'D' else INPUTS


def lora_guided_gradient(
  a: Array,
  b: Array,
  grad_a: Array,
  grad_b: Array,
  *,
  terms: str = FULL,
  fused: bool = False,
) -> Array:
  """The gradient of A B, estimated from those of A and B.

  A gB + gA B - gA gB (arXiv 2305.18403, eqs. 8-10), that is the step that A B
  takes when A and B take a gradient step of size one:
  A B - (A - gA)(B - gB). As one product of rank 2r, so that no second dense
  array is made. Or only some of its terms: with the true gradient G, gB is
  s A^T G and gA is s G B^T, so that A gB mixes the rows of G at random and
  keeps its columns apart, and gA B mixes its columns and keeps its rows.

  Args:
    a, grad_a: (inputs..., r).
    b, grad_b: (r, outputs...).
    terms: OUTPUTS, INPUTS, FIRST_ORDER or FULL.
    fused: see `lora_product`.
  """
  if terms == OUTPUTS:
    return lora_product(a, grad_b, fused=fused)
  if terms == INPUTS:
    return lora_product(grad_a, b, fused=fused)
  right = b - grad_b if terms == FULL else b
  return lora_product(
    jnp.concatenate([a, grad_a], axis=-1),
    jnp.concatenate([grad_b, right], axis=0),
    fused=fused,
  )


def merge_lora(
  stack: Any, lora: Any, scale: float, dtype: Any = jnp.float32
) -> Any:
  """W + s A B for every projection of a stack that has an adapter; b stays.

  Summed in float32 and cast once to the weight's dtype, layer by layer.

  Args:
    stack: a block's `params`, with `layers` in front.
    lora: the adapters of the same stack.
    scale: s = alpha / r.
    dtype: in which weights come out that are quantised.
  """

  def merge_layer(trees):
    params, lora = trees
    merged = dequantized(params, dtype)
    for part, adapters in lora.items():
      for name, adapter in adapters.items():
        weight = dequantized(params[part][name]['weight'], jnp.float32)
        update = scale * lora_product(adapter['a'], adapter['b'])
        total = weight.astype(jnp.float32) + update
        as_before = merged[part][name]['weight'].dtype
        merged[part][name]['weight'] = total.astype(as_before)
    return merged

  return jax.lax.map(merge_layer, (stack, lora))


def merge_adapters(params: Any, lora: Any, scale: float) -> Any:
  """`params` with every stack merged with its adapters.

  What is quantised comes out in the dtype of the norms.
  """
  merge = jax.jit(merge_lora, static_argnums=(2, 3))
  dtype = params['norm']['weight'].dtype
  stacks = zip(params['stacks'], lora, strict=True)
  return {
    **params,
    'stacks': tuple(
      merge(stack, adapters, scale, dtype) for stack, adapters in stacks
    ),
  }
