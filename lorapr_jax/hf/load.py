"""Reading a Hugging Face folder: config.json, and weights by slices."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.hf.names import (
  IGNORED,
  hf_name,
  hf_shapes,
  letters_of,
  locate,
  read_slices,
)
from lorapr_jax.hf.shards import DTYPES, Shards
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.models.quantization import is_quantized, quantized
from lorapr_jax.models.trees import param_shapes
from lorapr_jax.runtime.files import read_json
from lorapr_jax.runtime.paths import files_in, is_folder, path_of, version_of


def load_config(folder: str | Path) -> LlamaConfig:
  """The sizes in a folder's config.json.

  Raises:
    UserError: if there is no folder or its model is not supported.
  """
  folder = path_of(folder)
  if not is_folder(folder):
    raise UserError(
      f'{folder} is not a folder; a Hugging Face folder with '
      'config.json and *.safetensors is expected'
    )
  hf = read_json(folder / 'config.json')
  try:
    return LlamaConfig.from_hf(hf)
  except UserError as error:
    raise UserError(f'{folder}: {error}') from None


def check_tensors(shards: Shards, config: LlamaConfig) -> list[str]:
  """Compares the names and shapes of the files with what config.json says.

  Returns:
    The names of the tensors that make up the model.

  Raises:
    UserError: naming the tensors that are missing, unknown or of wrong size.
  """
  expected = hf_shapes(param_shapes(config, np.float32), config)
  missing = sorted(expected.keys() - shards.names)
  # A tied model's file may repeat the embeddings as lm_head.
  unknown = sorted(
    name
    for name in shards.names - expected.keys()
    if not IGNORED.fullmatch(name)
    and not (config.tie_embeddings and name == 'lm_head.weight')
  )
  for what, names in (('lacks', missing), ('has the unknown', unknown)):
    if names:
      raise UserError(
        f'{shards.folder} {what} tensor {names[0]}'
        + (f' and {len(names) - 1} more' if len(names) > 1 else '')
      )
  for name, shape in expected.items():
    tensor = shards.slice_of(name)
    if tensor.get_dtype() not in DTYPES:
      raise UserError(
        f'{shards.folder}: {name} is of type {tensor.get_dtype()}; only '
        f'{", ".join(DTYPES)} are supported: start from weights that are not '
        'quantised'
      )
    found = tuple(tensor.get_shape())
    if found != shape:
      raise UserError(
        f'{shards.folder}: {name} has shape {found}, but config.json says '
        f'{shape}'
      )
  return list(expected)


def load_params(
  folder: str | Path, config: LlamaConfig, shardings: Any, dtype: Any
) -> Any:
  """The weights of a folder, as sharded arrays.

  Each process reads only the slices of its own devices, one tensor of a layer
  at a time.

  Args:
    folder: with config.json and safetensors.
    config: `load_config(folder)`, or that with biases which are then zero.
    shardings: a `NamedSharding` for every tensor.
    dtype: to convert to.

  Raises:
    UserError: if the files do not hold what config.json says.
  """
  shards, held = Shards(folder), load_config(folder)
  there = set(check_tensors(shards, held))
  shapes = hf_shapes(param_shapes(config, np.float32), config)

  def tensor_of(name: str) -> Any:
    if name in there:
      return shards.slice_of(name)
    return np.zeros(shapes[name], np.float32)

  return place_params(tensor_of, config, shardings, dtype)


def place_params(
  tensor_of: Callable[[str], Any],
  config: LlamaConfig,
  shardings: Any,
  dtype: Any,
) -> Any:
  """Tensors under Hugging Face's names and layout, as sharded arrays of ours.

  Args:
    tensor_of: from a name to a tensor, which is read when it is indexed.
    config: the model's sizes.
    shardings: a `Sharding` for every tensor; where it is of a quantised
      weight, the tensor is quantised.
    dtype: to convert to.
  """
  shapes = param_shapes(config, dtype)

  def load(key_path, leaf, sharding):
    path, layers = locate(key_path, config.stacks)

    def read_one(index):
      return tensor_of(hf_name(path))[index].astype(dtype, copy=False)

    if layers is None:
      return jax.make_array_from_callback(leaf.shape, sharding, read_one)

    as_dtype = np.float32 if is_quantized(sharding) else dtype

    def read_layer(layer, index):
      tensor, letters = tensor_of(hf_name(path, layer)), letters_of(path)
      layer = read_slices(tensor, leaf.shape[1:], index, letters)
      return layer.astype(as_dtype, copy=False)

    if is_quantized(sharding):
      as_read = sharding.qvalue
      shape = jax.eval_shape(lambda x: quantized(x, path[1]), leaf)
    else:
      as_read, shape = sharding, leaf
    # On the host there is one layer at a time, on the devices nothing more.
    stack = jax.tree.map(
      lambda place, x: _zeros(place)(x.shape, x.dtype), sharding, shape
    )
    for row, layer in enumerate(layers):
      one = jax.make_array_from_callback(
        leaf.shape[1:],
        _of_a_layer(as_read),
        functools.partial(read_layer, layer),
      )
      if is_quantized(sharding):
        one = _quantize(one, path[1])
      stack = jax.tree.map(
        lambda place, stack, x, row=row: _with_row(place)(stack, x, row),
        sharding,
        stack,
        one,
      )
      jax.block_until_ready(stack)
    return stack

  return jax.tree_util.tree_map_with_path(load, shapes, shardings)


_quantize = jax.jit(quantized, static_argnums=1)


def _of_a_layer(place: Sharding) -> Sharding:
  """Of a stack's sharding, that of one of its layers."""
  if isinstance(place, NamedSharding):
    return NamedSharding(place.mesh, P(*place.spec[1:]))
  return place


@functools.cache
def _zeros(place: Sharding) -> Callable[..., jax.Array]:
  """The compiled shape, dtype -> zeros."""
  return jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=place)


@functools.cache
def _with_row(place: Sharding) -> Callable[..., jax.Array]:
  """The compiled (stack, x, row) -> the stack, with x as its row. Donates."""
  return jax.jit(
    lambda stack, x, row: jax.lax.dynamic_update_index_in_dim(stack, x, row, 0),
    donate_argnums=0,
    out_shardings=place,
  )


def content_hash(folder: Path) -> str:
  """The SHA-256 of a folder's config.json and weights.

  A process reads files that have not changed once.
  """
  paths = [folder / 'config.json', *files_in(folder, '*.safetensors')]
  return _hashed(tuple((path.absolute(), version_of(path)) for path in paths))


@functools.cache
def _hashed(versions: tuple[tuple[Path, str], ...]) -> str:
  def sha256(path: Path) -> bytes:
    with path.open('rb') as file:
      return hashlib.file_digest(file, 'sha256').digest()

  digest = hashlib.sha256()
  # A bucket gives each file at a pace of its own.
  with ThreadPoolExecutor() as pool:
    for each in pool.map(sha256, [path for path, _ in versions]):
      digest.update(each)
  return digest.hexdigest()
