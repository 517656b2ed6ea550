"""A GGUF file or a Hugging Face folder into a Hugging Face folder."""

import functools
from pathlib import Path

import numpy as np

from lorapr_jax.data.demo import MODEL, fetch
from lorapr_jax.exporting.routes import Route
from lorapr_jax.gguf.format import our_names
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.hf.layout import hf_config, stored_family
from lorapr_jax.hf.load import check_tensors, load_config
from lorapr_jax.hf.names import hf_shapes
from lorapr_jax.hf.shards import Shards
from lorapr_jax.hf.stored import stored_shapes, stored_tensors
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
    config, stored, tensor_of = model.config, 'float32', model.tensor_of
    beside = model.write_tokenizer
  else:
    config, shards = load_config(source), Shards(source)
    tensors, stored = check_tensors(shards, config), shards.dtype.name

    def tensor_of(name: str) -> np.ndarray:
      return tensors[name][:]

    beside = functools.partial(copy_companions, path_of(source))
  kind = np.dtype(dtype or stored)
  family = stored_family(config, 'auto', 'auto')
  # By layers, as the source has them: each is read in one piece.
  names = list(our_names(config))
  shapes = hf_shapes(param_shapes(config, kind), config)
  stored_as = stored_tensors(tensor_of, names, config, family)
  write_folder(
    destination,
    hf_config(config, kind.name, 'auto', 'auto'),
    stored_shapes({name: shapes[name] for name in names}, family),
    ((name, x.astype(kind, copy=False)) for name, x in stored_as),
    beside=beside,
  )
  return config
