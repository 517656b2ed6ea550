"""A GGUF file or a Hugging Face folder into a Hugging Face folder."""

import functools
from pathlib import Path

import numpy as np

from lorapr_jax.data.demo import MODEL, fetch
from lorapr_jax.exporting.routes import Route
from lorapr_jax.gguf.format import hf_names
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.hf.layout import hf_config
from lorapr_jax.hf.load import check_tensors, load_config
from lorapr_jax.hf.names import hf_shapes
from lorapr_jax.hf.shards import Shards
from lorapr_jax.hf.write import copy_companions, write_folder
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.trees import param_shapes
from lorapr_jax.runtime.paths import path_of

DEMO = 'demo:smollm2-135m-instruct'


def convert(
  source: str, destination: str | Path, dtype: str | None = None
) -> ModelConfig:
  """Writes `source` as a Hugging Face folder that stock tools load.

  One tensor is held at a time: a model need not fit in memory. The source is a
  .gguf file, a folder that hf.load reads, or DEMO. The dtype of the weights is
  by default float32 for a GGUF, else the source's.

  Returns:
    The model's sizes.

  Raises:
    UserError: if the destination exists or the source is not supported.
  """
  Route('hf', path_of(destination)).check_path()
  if source == DEMO or source.endswith('.gguf'):
    model = open_gguf(fetch(MODEL) if source == DEMO else source)
    config, stored, tensors = model.config, 'float32', model.tensors()
    beside = model.write_tokenizer
  else:
    config, shards = load_config(source), Shards(source)
    check_tensors(shards, config)
    stored = shards.dtype.name
    # Not [...], which safetensors before 0.8 does not take.
    tensors = (
      (name, shards.slice_of(name)[:]) for name in hf_names(config).values()
    )
    beside = functools.partial(copy_companions, path_of(source))
  kind = np.dtype(dtype or stored)
  shapes = hf_shapes(param_shapes(config, kind), config)
  write_folder(
    destination,
    hf_config(config, kind.name, 'auto', 'auto'),
    {name: shapes[name] for name in hf_names(config).values()},
    ((name, x.astype(kind, copy=False)) for name, x in tensors),
    beside=beside,
  )
  return config
