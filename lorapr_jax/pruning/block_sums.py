"""lora-guided scores on a GPU: one pass over the weights, nothing dense.

A kernel of Pallas for each projection of a stack reads W once, and A, B and
their gradients once a tile, and writes what a tile's scores sum up to: in
float32 a 64th of the weights. XLA, given the same as a sum of outer products,
reads the factors for every element anew: three times as slow
(docs/performance.md).
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding
from jax.sharding import PartitionSpec as P

from lorapr_jax.models.lora import INPUTS, OUTPUTS, terms_of
from lorapr_jax.pruning.importance import Options, Signals
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


@dataclasses.dataclass(frozen=True)
class _Score:
  """How the elements of a projection are scored and summed.

  Attributes:
    over_inputs: whether D, over whose blocks is summed, is the input.
    terms: of the guided gradient; see models/lora.py.
    scale: s = alpha / r.
    square: whether squares are summed, or absolute values.
  """

  over_inputs: bool
  terms: str
  scale: float
  square: bool


def block_sums(
  signals: Signals,
  options: Options,
  axes: Any,
  *,
  mesh: Mesh | None = None,
  interpret: bool = False,
) -> dict[str, dict[str, dict[str, Array]]]:
  """Sums over blocks of the axis D of `importance.element_scores`.

  Args:
    signals: of a stack, with L in front of every array.
    options: of `element_scores`; the criterion is lora.
    axes: the axis names of one layer's trees: {'params': ..., 'lora': ...}.
    mesh: that the arrays lie on; None: one device.
    interpret: whether the kernel is interpreted, which any backend can.

  Returns:
    The tree of `signals.lora`, with {'weight': sums}. The sums have W's axes,
    but D counts blocks of rows or columns, as many on every device.
  """
  criterion = options.criterion
  sums: dict[str, dict[str, dict[str, Array]]] = {}
  for part, adapters in signals.lora.items():
    for name, adapter in adapters.items():
      names = axes['params'][part][name]['weight']
      score = _Score(
        over_inputs=names[0] == 'embed',
        terms=terms_of(criterion.lora_gradient, part, name),
        scale=options.scale,
        square=criterion.score == 'square',
      )
      run = functools.partial(_projection_sums, score, interpret)
      if mesh is not None:
        own = axes['lora'][part][name]
        weight, a, b = (
          P(None, *sharding(mesh, x).spec) for x in (names, own['a'], own['b'])
        )
        factors = {'a': a, 'b': b}
        run = jax.shard_map(
          run,
          mesh=mesh,
          in_specs=(weight, factors, factors),
          out_specs=weight,
          check_vma=False,  # The kernel does not say what varies.
        )
      weight = signals.params[part][name]['weight']
      found = run(weight, adapter, signals.lora_grads[part][name])
      sums.setdefault(part, {})[name] = {'weight': found}
  return sums


def _projection_sums(
  score: _Score,
  interpret: bool,
  weight: Array,
  factors: dict[str, Array],
  grads: dict[str, Array],
) -> Array:
  """The sums of one projection, on one device.

  The weight is (L, D, outputs...) or (L, inputs..., D); the factors, and their
  gradients, are 'a' (L, inputs..., r) and 'b' (L, r, outputs...).
  """
  # Imported where it is used: it needs Pallas's Triton part.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  layers, rank = weight.shape[0], factors['a'].shape[-1]
  left = factors['a'].reshape(layers, -1, rank)
  right = factors['b'].reshape(layers, rank, -1)
  inputs, outputs = left.shape[1], right.shape[2]
  blocks = pl.cdiv(inputs, TILE), pl.cdiv(outputs, TILE)
  if score.over_inputs:
    shape = layers, blocks[0], outputs
    result = layers, blocks[0], *weight.shape[2:]
  else:
    shape = layers, inputs, blocks[1]
    result = *weight.shape[:-1], blocks[1]
  sums = pl.pallas_call(
    functools.partial(_kernel, score),
    jax.ShapeDtypeStruct(shape, jnp.float32),
    grid=(blocks[1], blocks[0], layers),
    # Not of the backend for Hopper alone, which would be the default.
    compiler_params=triton.CompilerParams(num_warps=4),
    interpret=interpret,
  )(
    weight.reshape(layers, inputs, outputs),
    left,
    right,
    grads['a'].reshape(left.shape),
    grads['b'].reshape(right.shape),
  )
  return sums.reshape(result)


def _kernel(
  score: _Score,
  weight: Any,
  a: Any,
  b: Any,
  grad_a: Any,
  grad_b: Any,
  sums: Any,
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
    if score.terms == OUTPUTS:
      gradient += own_a * row_of(grad_b, k)
      continue
    if score.terms == INPUTS:
      gradient += column_of(grad_a, k) * own_b
      continue
    step_a, step_b = column_of(grad_a, k), row_of(grad_b, k)
    gradient += own_a * step_b + step_a * (own_b - step_b)
  place = weight.at[layer, rows, columns]
  frozen = triton.load(place, mask=in_rows & in_columns, other=0.0)
  term = gradient * (frozen.astype(jnp.float32) + score.scale * product)
  scores = term * term if score.square else jnp.abs(term)
  if score.over_inputs:
    place, mask = sums.at[layer, i, columns], in_columns[0]
  else:
    place, mask = sums.at[layer, rows, o], in_rows[:, 0]
  sums_of_tile = jnp.sum(scores, axis=0 if score.over_inputs else 1)
  triton.store(place, sums_of_tile, mask=mask)
