"""lora-guided scores on a GPU: one pass over the weights, nothing dense.

A kernel of Pallas for each projection of a stack reads W once, and A, B and
their gradients once a tile, and writes what a tile's scores sum up to: in
float32 a 64th of the weights. XLA, given the same as a sum of outer products,
reads the factors for every element anew: three times as slow
(docs/performance.md).
"""

import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
from jax.sharding import PartitionSpec as P

from lorapr_jax.models.lora import INPUTS, OUTPUTS, terms_of
from lorapr_jax.runtime.sharding import compute_capability, sharding

# Rows and columns of a tile.
TILE = 64


def runs_on(place: Sharding) -> bool:
  """Whether the kernel does: on NVIDIA GPUs from Ampere on, if JAX can."""
  device = next(iter(place.device_set))
  return (compute_capability(device) or (0, 0)) >= (8, 0) and has_triton()


def has_triton() -> bool:
  """Whether JAX has Pallas for Triton: 0.11 says that a later one will not."""
  try:
    from jax.experimental.pallas.triton import CompilerParams, load, store
  except ImportError:
    return False
  return all((CompilerParams, load, store))


def block_sums(
  params: Any,
  lora: Any,
  lora_grads: Any,
  axes: Any,
  *,
  scale: float,
  square: bool,
  lora_gradient: str,
  mesh: Mesh | None = None,
  interpret: bool = False,
) -> dict[str, dict[str, dict[str, Array]]]:
  """Sums over blocks of the axis D of `importance.element_scores`.

  Args:
    params: of a stack: {part: {projection: {'weight': W}}}, with L in front.
    lora: {part: {projection: {'a': A, 'b': B}}}, for the targets.
    lora_grads: the gradients of `lora`.
    axes: the axis names of one layer's: {'params': ..., 'lora': ...}.
    scale: s = alpha / r.
    square: the terms' squares are summed; else their absolute values.
    lora_gradient: as of `importance.Criterion`.
    mesh: that the arrays lie on; None: one device.
    interpret: whether the kernel is interpreted, which any backend can.

  Returns:
    The tree of `lora`, with {'weight': sums}: as W, but that D counts blocks
    of rows or columns, as many on every device.
  """
  sums: dict[str, dict[str, dict[str, Array]]] = {}
  for part, adapters in lora.items():
    for name, adapter in adapters.items():
      names = axes['params'][part][name]['weight']
      run = functools.partial(
        _projection_sums,
        over_inputs=names[0] == 'embed',
        scale=scale,
        square=square,
        terms=terms_of(lora_gradient, part, name),
        interpret=interpret,
      )
      if mesh is not None:
        own = axes['lora'][part][name]
        weight, a, b = (
          P(None, *sharding(mesh, x).spec) for x in (names, own['a'], own['b'])
        )
        run = jax.shard_map(
          run,
          mesh=mesh,
          in_specs=(weight, a, b, a, b),
          out_specs=weight,
          check_vma=False,  # The kernel does not say what varies.
        )
      grads = lora_grads[part][name]
      sums.setdefault(part, {})[name] = {
        'weight': run(
          params[part][name]['weight'],
          adapter['a'],
          adapter['b'],
          grads['a'],
          grads['b'],
        )
      }
  return sums


def _projection_sums(
  weight: Array,
  a: Array,
  b: Array,
  grad_a: Array,
  grad_b: Array,
  *,
  over_inputs: bool,
  interpret: bool,
  **options: Any,
) -> Array:
  """Of one projection, on one device.

  Args:
    weight: (L, D, outputs...) or (L, inputs..., D).
    a: (L, inputs..., r).
    b: (L, r, outputs...).
    grad_a: as a.
    grad_b: as b.
    over_inputs: whether D is the input.
    interpret: see `block_sums`.
    **options: of `_kernel`.
  """
  # Imported where it is used: it needs Pallas's Triton part.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  layers, rank = weight.shape[0], a.shape[-1]
  left, right = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
  inputs, outputs = left.shape[1], right.shape[2]
  blocks = pl.cdiv(inputs, TILE), pl.cdiv(outputs, TILE)
  if over_inputs:
    shape = layers, blocks[0], outputs
    result = layers, blocks[0], *weight.shape[2:]
  else:
    shape = layers, inputs, blocks[1]
    result = *weight.shape[:-1], blocks[1]
  sums = pl.pallas_call(
    functools.partial(_kernel, over_inputs=over_inputs, **options),
    jax.ShapeDtypeStruct(shape, jnp.float32),
    grid=(blocks[1], blocks[0], layers),
    # Not of the backend for Hopper alone, which would be the default.
    compiler_params=triton.CompilerParams(num_warps=4),
    interpret=interpret,
  )(
    weight.reshape(layers, inputs, outputs),
    left,
    right,
    grad_a.reshape(left.shape),
    grad_b.reshape(right.shape),
  )
  return sums.reshape(result)


def _kernel(
  weight: Any,
  a: Any,
  b: Any,
  grad_a: Any,
  grad_b: Any,
  sums: Any,
  *,
  over_inputs: bool,
  scale: float,
  square: bool,
  terms: str,
) -> None:
  """The sums of one tile, of arrays in the GPU's memory.

  (L, I, O), (L, I, r) and (L, r, O) are W, A and B as matrices; the sums are
  (L, blocks, O) or (L, I, blocks).
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  o, i, layer = (pl.program_id(axis) for axis in range(3))
  rows, columns = pl.ds(i * TILE, TILE), pl.ds(o * TILE, TILE)
  index = jnp.arange(TILE)
  in_rows = (i * TILE + index < weight.shape[1])[:, None]
  in_columns = (o * TILE + index < weight.shape[2])[None, :]

  def column_of(matrix, k):
    place = matrix.at[layer, rows, pl.ds(k, 1)]
    return triton.load(place, mask=in_rows, other=0.0)

  def row_of(matrix, k):
    place = matrix.at[layer, pl.ds(k, 1), columns]
    return triton.load(place, mask=in_columns, other=0.0)

  product = gradient = jnp.zeros((TILE, TILE), jnp.float32)
  for k in range(a.shape[2]):
    own_a, own_b = column_of(a, k), row_of(b, k)
    product += own_a * own_b
    if terms == OUTPUTS:
      gradient += own_a * row_of(grad_b, k)
      continue
    if terms == INPUTS:
      gradient += column_of(grad_a, k) * own_b
      continue
    step_a, step_b = column_of(grad_a, k), row_of(grad_b, k)
    gradient += own_a * step_b + step_a * (own_b - step_b)
  place = weight.at[layer, rows, columns]
  frozen = triton.load(place, mask=in_rows & in_columns, other=0.0)
  term = gradient * (frozen.astype(jnp.float32) + scale * product)
  scores = term * term if square else jnp.abs(term)
  if over_inputs:
    place, mask = sums.at[layer, i, columns], in_columns[0]
  else:
    place, mask = sums.at[layer, rows, o], in_rows[:, 0]
  triton.store(place, jnp.sum(scores, axis=0 if over_inputs else 1), mask=mask)
