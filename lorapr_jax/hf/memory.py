"""A model in memory, on all devices of the machine."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from lorapr_jax.hf.load import check_tensors, load_config, load_params
from lorapr_jax.hf.shards import Shards
from lorapr_jax.models.compute import (
  resolve_dtype,
)
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.models.trees import logical_axes, param_shapes
from lorapr_jax.runtime import sharding
from lorapr_jax.runtime.paths import path_of


@dataclasses.dataclass(frozen=True)
class Model:
  """A model in memory.

  Attributes:
    params: its weights, a tree of arrays.
    config: its sizes.
    folder: where it was read, and its tokenizer lies.
    dtype: of the weights, and of computation with them.
  """

  params: Any = dataclasses.field(repr=False)
  config: LlamaConfig
  folder: Path
  dtype: Any


def load(folder: str | Path, dtype: str = 'auto') -> Model:
  """Reads a model from a Hugging Face folder, in parts, onto all devices.

  Each device holds a part of every matrix (`fsdp`) where the width of the
  embeddings can be divided so, and works on a part of every batch.

  Args:
    folder: a llama or mistral in safetensors, or an export.
    dtype: float32, bfloat16, or auto: float32 on CPU, bfloat16 elsewhere.

  Raises:
    UserError: if there is no such folder or its model is not supported.
  """
  config = load_config(folder)
  resolved = resolve_dtype('dtype', dtype)
  parts = math.gcd(config.embed_dim, jax.device_count())
  mesh = sharding.make_mesh(sharding.mesh_sizes(data=-1, fsdp=parts, tensor=1))
  places = sharding.shardings(
    mesh, logical_axes(config)['params'], param_shapes(config, resolved)
  )
  params = load_params(folder, config, places, resolved)
  return Model(params, config, path_of(folder), resolved)


def folder_and_config(model: Model | str | Path) -> tuple[Path, LlamaConfig]:
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
