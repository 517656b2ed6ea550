"""Tensors in Hugging Face's layout, as sharded arrays in ours."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.hf.names import hf_name, letters_of, locate, read_slices
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.quantization import is_quantized, quantized
from lorapr_jax.models.trees import param_shapes


def place_params(
  tensor_of: Callable[[str], Any],
  config: ModelConfig,
  shardings: Any,
  dtype: Any,
) -> Any:
  """Tensors under Hugging Face's names and layout, as sharded arrays of ours.

  Args:
    tensor_of: from a name to a tensor, which is read when it is indexed.
    config: the model's sizes, and which projections are quantised.
    shardings: a `Sharding` for every tensor.
    dtype: to convert to.

  Raises:
    UserError: naming a tensor that holds NaN or infinity.
  """
  shapes = param_shapes(config, dtype)

  def place(key_path, shape, where):
    path, layers = locate(key_path, config.stacks)

    def read_one(index):
      return _cast(tensor_of(hf_name(path))[index], dtype)

    if layers is None:
      x = jax.make_array_from_callback(shape.shape, where, read_one)
      _check(_is_finite(where)(x), hf_name(path), dtype)
      return x

    int8 = is_quantized(shape)
    as_dtype = np.float32 if int8 else dtype
    whole, as_read = (x.qvalue if int8 else x for x in (shape, where))

    def read_layer(layer, index):
      tensor, letters = tensor_of(hf_name(path, layer)), letters_of(path)
      layer = read_slices(tensor, whole.shape[1:], index, letters)
      return _cast(layer, as_dtype)

    # Layer by layer: the host never holds a whole stack.
    leaves, structure = jax.tree.flatten(where)
    places = tuple(leaves)
    stack = [
      _zeros(place)(x.shape, x.dtype)
      for place, x in zip(places, jax.tree.leaves(shape), strict=True)
    ]
    for row, layer in enumerate(layers):
      one = jax.make_array_from_callback(
        whole.shape[1:],
        _of_a_layer(as_read),
        functools.partial(read_layer, layer),
      )
      if int8:
        finite = _is_finite(_of_a_layer(as_read))(one)
        _check(finite, hf_name(path, layer), as_dtype)
        one = _quantize(one, path[1])
      stack, finite = _with_row(places)(stack, jax.tree.leaves(one), row)
      _check(finite, hf_name(path, layer), as_dtype)  # It waits for the row.
    return jax.tree.unflatten(structure, stack)

  return jax.tree_util.tree_map_with_path(
    place, shapes, shardings, is_leaf=is_quantized
  )


def _cast(x: np.ndarray, dtype: Any) -> np.ndarray:
  with np.errstate(over='ignore'):  # What was too large is found as infinity.
    return x.astype(dtype, copy=False)


def _check(finite: jax.Array, name: str, dtype: Any) -> None:
  if not finite:
    raise UserError(
      f'{name} holds NaN or infinity as {np.dtype(dtype).name}: fetch the '
      'model again, or choose a wider dtype'
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
def _is_finite(place: Sharding) -> Callable[..., jax.Array]:
  """The compiled function x -> whether all of it is finite."""
  return jax.jit(_all_finite, out_shardings=_on_all(place))


def _all_finite(x: Any) -> jax.Array:
  """Of one array or of several."""
  finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(x)]
  return jnp.stack(finite).all()


def _on_all(place: Sharding) -> Sharding:
  """That of a number which every device of `place` holds."""
  return NamedSharding(place.mesh, P()) if hasattr(place, 'mesh') else place


@functools.cache
def _with_row(places: tuple[Sharding, ...]) -> Callable[..., Any]:
  """The compiled (stack, x, row) -> the stack with x as that row, and a flag.

  `stack` and `x` are lists of arrays, each with its place; the stack is
  donated. The flag says whether x is finite: it is looked at on its way.
  """

  def write(stack, x, row):
    update = functools.partial(
      jax.lax.dynamic_update_index_in_dim, index=row, axis=0
    )
    written = [update(*pair) for pair in zip(stack, x, strict=True)]
    return written, _all_finite(x)

  return jax.jit(
    write,
    donate_argnums=0,
    out_shardings=(list(places), _on_all(places[0])),
  )
