"""Reading a Hugging Face folder: config.json, and weights by slices."""

from collections.abc import Callable
import dataclasses
import functools
import logging
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.files import has_weights, weight_files
from lorapr_jax.hf.names import IGNORED, hf_shapes
from lorapr_jax.hf.place import place_params
from lorapr_jax.hf.shards import DTYPES, Shards
from lorapr_jax.hf.stored import Rows, our_tensors, stored_shapes
from lorapr_jax.models.compute import resolve_dtype
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.families import row_of
from lorapr_jax.models.trees import init_params, logical_axes, param_shapes
from lorapr_jax.runtime import sharding
from lorapr_jax.runtime.files import read_json
from lorapr_jax.runtime.paths import is_folder, path_of, version_of

_EMBEDDINGS, _HEAD = 'model.embed_tokens.weight', 'lm_head.weight'

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model in memory, on all devices of the machine.

  Attributes:
    params: its weights, a tree of arrays.
    config: its sizes.
    folder: where it was read, and its tokenizer lies.
    dtype: of the weights, and of computation with them.
  """

  params: Any = dataclasses.field(repr=False)
  config: ModelConfig
  folder: Path
  dtype: Any


def load(folder: str | Path, dtype: str = 'auto') -> Model:
  """Reads a model from a Hugging Face folder, in parts, onto all devices.

  Each device holds a part of every matrix (`fsdp`) where the width of the
  embeddings can be divided so, and works on a part of every batch.

  Args:
    folder: a model of one of FAMILIES in safetensors, or an export.
    dtype: float32, bfloat16, or auto: float32 on CPU, bfloat16 elsewhere.

  Raises:
    UserError: if there is no such folder or its model is not supported.
  """
  config = load_config(folder)
  resolved = resolve_dtype('dtype', dtype)
  places = weight_places(config, resolved)
  params = load_params(folder, config, places, resolved)
  return Model(params, config, path_of(folder), resolved)


def folder_and_config(model: Model | str | Path) -> tuple[Path, ModelConfig]:
  """Where a model lies, and its sizes; no weights are read.

  Raises:
    UserError: if there is no such folder or its model is not supported.
  """
  if isinstance(model, Model):
    return model.folder, model.config
  config = load_config(model)
  check_tensors(Shards(model), config)
  return path_of(model), config


def in_memory(model: Model | str | Path, dtype: str) -> Model:
  """The model itself, or that of its folder."""
  return model if isinstance(model, Model) else load(model, dtype)


def load_config(folder: str | Path) -> ModelConfig:
  """The sizes in a folder's config.json.

  A model whose embeddings are tied by config.json, and whose files hold another
  lm_head all the same, is not tied: as in transformers, a warning says so.

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
    config = config_from_hf(hf)
  except UserError as error:
    raise UserError(f'{folder}: {error}') from None
  if config.tie_embeddings and has_weights(folder):
    versions = ((path, version_of(path)) for path in weight_files(folder))
    own_head = _has_own_head(folder, tuple(versions))
    config = dataclasses.replace(config, tie_embeddings=not own_head)
  return config


@functools.lru_cache(4)
def _has_own_head(folder: Path, versions: tuple[tuple[Path, str], ...]) -> bool:
  """Whether the files hold an lm_head that differs from the embeddings.

  `versions` of the files tell when to look again.
  """
  shards = Shards(folder)
  if not {_EMBEDDINGS, _HEAD} <= shards.names:
    return False
  if _are_equal(shards.slice_of(_EMBEDDINGS), shards.slice_of(_HEAD)):
    return False
  _log.warning(
    '%s: config.json ties the embeddings, but the files hold another lm_head: '
    'it is used, and the model is not tied',
    folder,
  )
  return True


def _are_equal(one: Any, other: Any) -> bool:
  """Whether two matrices of files are; parts are read until they differ."""
  shape = one.get_shape()
  known = one.get_dtype() in DTYPES and other.get_dtype() in DTYPES
  if not known or len(shape) != 2 or other.get_shape() != shape:
    return False
  step = max(1, 2**23 // max(1, shape[1]))
  parts = (slice(a, min(a + step, shape[0])) for a in range(0, shape[0], step))
  return all(np.array_equal(one[part], other[part]) for part in parts)


def check_tensors(shards: Shards, config: ModelConfig) -> dict[str, Rows]:
  """Compares the names and shapes of the files with what config.json says.

  Returns:
    The tensors that make up the model by our names; none is read yet.

  Raises:
    UserError: naming the tensors that are missing, unknown or of wrong size.
  """
  shapes = hf_shapes(param_shapes(config, np.float32), config)
  row = row_of(config.family)
  expected = stored_shapes(shapes, row)
  missing = sorted(expected.keys() - shards.names)
  # A tied model's files may hold a copy of the embeddings as lm_head.
  unknown = sorted(
    name
    for name in shards.names - expected.keys()
    if not IGNORED.fullmatch(name)
    and not (config.tie_embeddings and name == _HEAD)
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
  return our_tensors(shards.slice_of, shapes, config, row)


def mesh_of_all(config: ModelConfig) -> Mesh:
  """All devices, for a model of these sizes.

  As many as divide the width of the embeddings share every matrix (`fsdp`),
  and the rest share batches (`data`).
  """
  parts = math.gcd(config.embed_dim, jax.device_count())
  return sharding.make_mesh(sharding.mesh_sizes(-1, parts, 1))


def weight_places(
  config: ModelConfig, dtype: Any, mesh: Mesh | None = None
) -> Any:
  """A `NamedSharding` for each tensor of a model; by default of `mesh_of_all`.

  Raises:
    MeshError: for a size that the mesh does not divide.
  """
  return sharding.shardings(
    mesh or mesh_of_all(config),
    logical_axes(config)['params'],
    param_shapes(config, dtype),
  )


def load_or_draw(
  folder: Path | None,
  config: ModelConfig,
  shardings: Any,
  dtype: Any,
  seed: int,
) -> Any:
  """The weights of a folder, or random ones of this seed where there is none.

  The other arguments are those of `load_params`.
  """
  if folder:
    return load_params(folder, config, shardings, dtype)

  leaves, structure = jax.tree.flatten(shardings)
  draw = _make_draw(config, dtype, tuple(leaves), structure)
  return draw(jax.random.key(seed))


# A run draws its model twice: at its start, and once more for comparison.
@functools.lru_cache(4)
def _make_draw(
  config: ModelConfig,
  dtype: Any,
  shardings: tuple[jax.sharding.Sharding, ...],
  structure: Any,
) -> Callable[[jax.Array], Any]:
  """key -> random weights, compiled once."""
  return jax.jit(
    lambda key: init_params(key, config, dtype),
    out_shardings=jax.tree.unflatten(structure, shardings),
  )


def load_params(
  folder: str | Path, config: ModelConfig, shardings: Any, dtype: Any
) -> Any:
  """The weights of a folder, as sharded arrays.

  Each process reads only the slices of its own devices, one tensor of a layer
  at a time.

  Args:
    folder: with config.json and safetensors.
    config: `load_config(folder)`, or that with projections to be quantised.
    shardings: a `NamedSharding` for every tensor.
    dtype: to convert to.

  Raises:
    UserError: if the files do not hold what config.json says, or NaN.
  """
  tensors = check_tensors(Shards(folder), config.dequantized)
  try:
    return place_params(tensors.__getitem__, config, shardings, dtype)
  except UserError as error:
    raise UserError(f'{folder}: {error}') from None
