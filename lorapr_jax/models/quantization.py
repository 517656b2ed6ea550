"""An int8 base: projections as int8 values, with a scale for each output.

W ~ values * scale, where the scale of an output channel is the largest |W| of
its inputs over 127.5, so that no weight is off by more than half of it.
Products are of the weight dequantised. A projection's weight is a
`qwix.QArray`, a node of the trees in which it stands, and so are its axes,
shapes and shardings: what goes by axis names knows values and scales.

In int4, which is measured and neither trained nor saved, a scale is of a block
of neighbouring inputs.
"""

import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from qwix import QArray, dequantize, quantize

from lorapr_jax.axes import SPECS, Axes, ProjectionLetters

# Of weights in int4 that share a scale; llama.cpp's have as many.
BLOCK = 32


def is_quantized(node: Any) -> bool:
  """Whether a node of a tree is a quantised weight, or stands for one."""
  return isinstance(node, QArray)


def quantized_axes(name: str) -> QArray:
  """The axis names of a projection's values and scales."""
  letters = ProjectionLetters.of(SPECS[name])
  shared = '1' * len(letters.inputs)
  values, scales = Axes.of(letters.weight), Axes.of(shared + letters.outputs)
  return QArray(values, scales, qtype=jnp.int8)


def quantized(weight: Array, name: str, qtype: Any = jnp.int8) -> QArray:
  """Quantises a projection's weight, of one layer or with layers in front.

  Args:
    weight: of the projection `name`.
    name: such as q_proj.
    qtype: int8: the inputs of an output share a scale, in float32. int4: at
      most BLOCK neighbours of the last axis of inputs do, in bfloat16.
  """
  letters = ProjectionLetters.of(SPECS[name])
  first = weight.ndim - len(letters.weight)
  inputs, blocks, scale = [*range(first, first + len(letters.inputs))], {}, None
  if qtype == jnp.int4:
    inputs, scale = inputs[-1:], jnp.bfloat16
    blocks = {inputs[0]: math.gcd(BLOCK, weight.shape[inputs[0]])}
  return quantize(
    weight.astype(jnp.float32),
    qtype,
    channelwise_axes=[i for i in range(weight.ndim) if i not in inputs],
    tiled_axes=blocks,
    scale_dtype=scale,
  )


def quantized_like(params: Any, like: Any, qtype: Any = jnp.int8) -> Any:
  """Quantises the weights that `like`, a tree of axes, says are quantised."""

  def quantize_one(path: Any, like: Any, weight: Array) -> Any:
    if not is_quantized(like):
      return weight
    return quantized(weight, path[-2].key, qtype)

  return jax.tree_util.tree_map_with_path(
    quantize_one, like, params, is_leaf=is_quantized
  )


@functools.partial(jax.jit, static_argnums=1)
def _dense(weight: QArray, dtype: Any) -> Array:
  return dequantize(weight).astype(dtype)


def dequantized(tree: Any, dtype: Any) -> Any:
  """A tree whose quantised weights are arrays; the others stay as they are.

  Args:
    tree: of weights.
    dtype: of what was quantised; computed in float32.
  """
  return jax.tree.map(
    lambda node: _dense(node, dtype) if is_quantized(node) else node,
    tree,
    is_leaf=is_quantized,
  )
