"""Tensors in Hugging Face's layout, as sharded arrays in ours."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lorapr_jax.hf.names import hf_name, letters_of, locate, read_slices
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.models.quantization import is_quantized, quantized
from lorapr_jax.models.trees import param_shapes


def place_params(
  tensor_of: Callable[[str], Any],
  config: LlamaConfig,
  shardings: Any,
  dtype: Any,
) -> Any:
  """Tensors under Hugging Face's names and layout, as sharded arrays of ours.

  Args:
    tensor_of: from a name to a tensor, which is read when it is indexed.
    config: the model's sizes, and which projections are quantised.
    shardings: a `Sharding` for every tensor.
    dtype: to convert to.
  """
  shapes = param_shapes(config, dtype)

  def place(key_path, shape, where):
    path, layers = locate(key_path, config.stacks)

    def read_one(index):
      return tensor_of(hf_name(path))[index].astype(dtype, copy=False)

    if layers is None:
      return jax.make_array_from_callback(shape.shape, where, read_one)

    int8 = is_quantized(shape)
    as_dtype = np.float32 if int8 else dtype
    whole, as_read = (x.qvalue if int8 else x for x in (shape, where))

    def read_layer(layer, index):
      tensor, letters = tensor_of(hf_name(path, layer)), letters_of(path)
      layer = read_slices(tensor, whole.shape[1:], index, letters)
      return layer.astype(as_dtype, copy=False)

    # Layer by layer: the host never holds a whole stack.
    stack = jax.tree.map(
      lambda place, x: _zeros(place)(x.shape, x.dtype), where, shape
    )
    for row, layer in enumerate(layers):
      one = jax.make_array_from_callback(
        whole.shape[1:],
        _of_a_layer(as_read),
        functools.partial(read_layer, layer),
      )
      if int8:
        one = _quantize(one, path[1])
      stack = jax.tree.map(
        lambda place, stack, x, row=row: _with_row(place)(stack, x, row),
        where,
        stack,
        one,
      )
      jax.block_until_ready(stack)
    return stack

  return jax.tree_util.tree_map_with_path(
    place, shapes, shardings, is_leaf=is_quantized
  )


_quantize = jax.jit(quantized, static_argnums=1)


def _of_a_layer(place: Sharding) -> Sharding:
  """The sharding of one layer of a stack that is sharded so."""
  if isinstance(place, NamedSharding):
    return NamedSharding(place.mesh, P(*place.spec[1:]))
  return place


@functools.cache
def _zeros(place: Sharding) -> Callable[..., jax.Array]:
  """The compiled function (shape, dtype) -> zeros."""
  return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=place)


@functools.cache
def _with_row(place: Sharding) -> Callable[..., jax.Array]:
  """The compiled function (stack, x, row) -> the stack with x as that row.

  The stack is donated.
  """
  return jax.jit(
    lambda stack, x, row: jax.lax.dynamic_update_index_in_dim(stack, x, row, 0),
    donate_argnums=0,
    out_shardings=place,
  )
