"""LoRA as PEFT stores it: adapter_config.json, adapter_model.safetensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorapr_jax.axes import ProjectionLetters
from lorapr_jax.errors import UserError
from lorapr_jax.hf.names import hf_name, hf_shape, letters_of, to_hf_layout
from lorapr_jax.hf.shards import open_file, write_file
from lorapr_jax.models.config import LoraConfig, ModelConfig
from lorapr_jax.models.trees import init_lora
from lorapr_jax.runtime.files import read_json, write_json

# Where an adapter's folder holds the model that it adapts.
BASE_FOLDER = 'base'
_CONFIG, _WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'


def write_adapter(
  folder: Path, lora: Any, config: ModelConfig, lora_config: LoraConfig
) -> None:
  """Writes the two files into an existing folder, factors in float32.

  PEFT takes every size but the rank from the model, so that layers of unequal
  sizes need no word about them. The adapted model lies in the folder's `base`.
  """
  factors = list(_factors(lora, config))
  write_file(
    folder / _WEIGHTS,
    {name: hf_shape(x.shape, letters) for name, x, letters in factors},
    np.dtype(np.float32),
    ((name, to_hf_layout(x, letters)) for name, x, letters in factors),
  )
  write_json(
    folder / _CONFIG,
    {
      'peft_type': 'LORA',
      'task_type': 'CAUSAL_LM',
      'base_model_name_or_path': BASE_FOLDER,
      'r': lora_config.rank,
      'lora_alpha': lora_config.alpha,
      'lora_dropout': lora_config.dropout,
      'target_modules': list(lora_config.targets),
      'bias': 'none',
      'fan_in_fan_out': False,
      'inference_mode': True,
    },
  )


def read_adapter(folder: Path, config: ModelConfig) -> tuple[Any, LoraConfig]:
  """The adapters and their config, from what `write_adapter` wrote.

  `config` has the sizes of the model that they adapt.

  Raises:
    UserError: if the file's tensors are not those of this model.
  """
  hf = read_json(folder / _CONFIG)
  lora_config = LoraConfig(
    rank=hf['r'],
    alpha=hf['lora_alpha'],
    dropout=hf['lora_dropout'],
    targets=tuple(hf['target_modules']),
  )
  shapes = jax.eval_shape(
    lambda key: init_lora(key, config, lora_config), jax.random.key(0)
  )
  stored = open_file(folder / _WEIGHTS)
  names = set(stored.keys())
  lora = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
  expected = set()
  for name, x, letters in _factors(lora, config):
    expected.add(name)
    shape = hf_shape(x.shape, letters)
    tensor = stored.get_slice(name) if name in names else None
    if tensor is None or tuple(tensor.get_shape()) != shape:
      raise UserError(
        f'{folder / _WEIGHTS} lacks {name} of shape {shape}, which the model '
        f'in {BASE_FOLDER} needs'
      )
    x[...] = tensor[:].T.reshape(x.shape)  # x is a view into `lora`.
  if unknown := sorted(names - expected):
    raise UserError(f'{folder / _WEIGHTS} has the unknown {unknown[0]}')
  return lora, lora_config


def _factors(
  lora: Any, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray, ProjectionLetters]]:
  """Yields (PEFT's name, one layer's A or B, the factor's own letters)."""
  for stack, tree in zip(config.stacks, lora, strict=True):
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      *path, factor = (key.key for key in key_path)
      letters = letters_of(tuple(path))
      inputs, outputs = letters.inputs, 'r'
      if factor == 'b':
        inputs, outputs = 'r', letters.outputs
      letters = ProjectionLetters(inputs + outputs, inputs, outputs)
      path += [f'lora_{factor.upper()}', 'weight']
      for row, x in enumerate(np.asarray(leaf), start=stack.start):
        yield f'base_model.model.{hf_name(tuple(path), row)}', x, letters
