"""A GGUF file or a Hugging Face folder into a Hugging Face folder."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lorapr_jax.data.demo import demo_gguf
from lorapr_jax.gguf.format import hf_names
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.hf.layout import hf_config
from lorapr_jax.hf.load import check_tensors, load_config
from lorapr_jax.hf.names import hf_shapes
from lorapr_jax.hf.shards import Shards, write_safetensors
from lorapr_jax.hf.write import copy_companions, write_config
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.models.trees import param_shapes
from lorapr_jax.runtime.paths import new_folder, path_of

DEMO = 'demo:smollm2-135m-instruct'


def convert(
  source: str, destination: str | Path, dtype: str | None = None
) -> LlamaConfig:
  """Writes `source` as a Hugging Face folder that stock tools load.

  Args:
    source: a .gguf file, a folder that hf.load reads, or DEMO.
    destination: to be made; it must not exist.
    dtype: of the weights; None is float32 for a GGUF, else the source's.

  Returns:
    The model's sizes.

  Raises:
    UserError: if the destination exists or the source is not supported.
  """
  with new_folder(path_of(destination)) as folder:
    if source == DEMO or source.endswith('.gguf'):
      model = open_gguf(demo_gguf() if source == DEMO else source)
      model.write_tokenizer(folder)
      config, tensors = model.config, model.tensors()
      dtype = dtype or 'float32'
    else:
      config = load_config(source)
      shards = Shards(source)
      tensors = _folder_tensors(shards, config)
      dtype = dtype or shards.dtype.name
      copy_companions(path_of(source), folder)
    kind = np.dtype(dtype)
    shapes = hf_shapes(param_shapes(config, kind), config)
    write_safetensors(
      folder,
      {name: shapes[name] for name in hf_names(config).values()},
      kind,
      ((name, x.astype(kind, copy=False)) for name, x in tensors),
    )
    write_config(folder, hf_config(config, dtype, 'auto', 'auto'))
  return config


def _folder_tensors(
  shards: Shards, config: LlamaConfig
) -> Iterator[tuple[str, np.ndarray]]:
  check_tensors(shards, config)
  for name in hf_names(config).values():
    # Not [...], which safetensors before 0.8 does not take.
    yield name, shards.slice_of(name)[:]
