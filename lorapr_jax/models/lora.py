"""Low-rank algebra on LoRA's factors: product, guided gradient, merge.

A is (inputs..., r) and B is (r, outputs...). Every product below has the axes
of the weight that it belongs to.
"""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.axes import PROJECTIONS, ProjectionLetters
from lorapr_jax.models.quantization import dequantized

# The terms of A gB + gA B - gA gB that estimate the gradient of A B.
FULL = 'full'  # All three.
OUTPUTS = 'outputs'  # A gB alone.
INPUTS = 'inputs'  # gA B alone.
# A setting: OUTPUTS for a projection whose outputs are the groups, else INPUTS.
OWN = 'own'


def lora_product(a: Array, b: Array, *, fused: bool = False) -> Array:
  """A B, in the shape of the weight; in full float32 on every backend.

  Args:
    a: (inputs..., r).
    b: (r, outputs...).
    fused: whether it is computed as a sum of r outer products. A compiler that
      fuses elementwise operations then writes no dense array where the product
      is summed or read at once.
  """
  if not fused:
    return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
  columns = a.reshape(*a.shape[:-1], *(1,) * (b.ndim - 1), a.shape[-1])
  return sum(columns[..., i] * b[i] for i in range(b.shape[0]))


def terms_of(lora_gradient: str, part: str, name: str) -> str:
  """The terms for one projection: FULL, OUTPUTS or INPUTS.

  Args:
    lora_gradient: OWN or FULL.
    part: of a block, such as 'mlp'.
    name: of the projection, such as 'up_proj'.
  """
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

  FULL: A gB + gA B - gA gB (arXiv 2305.18403, eqs. 8-10). This is the step that
  A B takes when A and B take a gradient step of size one:
  A B - (A - gA)(B - gB). It is computed as one product of rank 2r, so that no
  second dense array is made.

  OUTPUTS or INPUTS: one of its terms. With the true gradient G, gB is s A^T G
  and gA is s G B^T. So A gB mixes the rows of G at random and keeps its columns
  apart, and gA B mixes its columns and keeps its rows apart.

  Args:
    a, grad_a: (inputs..., r).
    b, grad_b: (r, outputs...).
    terms: OUTPUTS, INPUTS or FULL.
    fused: see `lora_product`.
  """
  if terms == OUTPUTS:
    return lora_product(a, grad_b, fused=fused)
  if terms == INPUTS:
    return lora_product(grad_a, b, fused=fused)
  return lora_product(
    jnp.concatenate([a, grad_a], axis=-1),
    jnp.concatenate([grad_b, b - grad_b], axis=0),
    fused=fused,
  )


def merge_lora(
  stack: Any, lora: Any, scale: float, dtype: Any = jnp.float32
) -> Any:
  """W + s A B for every projection of a stack that has an adapter.

  The sum is made in float32, layer by layer, and cast once to the weight's
  dtype. Biases stay as they are.

  Args:
    stack: a block's `params`, with `layers` in front.
    lora: the adapters of the same stack.
    scale: s = alpha / r.
    dtype: of the merged weights whose projection was quantised.
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

  Projections that were quantised get the dtype of the norms.
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
