"""LoRA as PEFT stores it: adapter_config.json, adapter_model.safetensors.

A matrix of the model's files may join several of our projections
(hf/stored.py). Its A then has the rows of each projection's A, one after the
other, and its B has their B as blocks on the diagonal, so that B A has the rows
of each product. A projection without adapters has zeros there.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorapr_jax.axes import LORA_TARGETS, ProjectionLetters
from lorapr_jax.errors import UserError
from lorapr_jax.hf.names import hf_name, hf_shapes, letters_of, to_hf_layout
from lorapr_jax.hf.shards import open_file, write_file
from lorapr_jax.hf.stored import (
  OURS,
  Storage,
  from_stored_rows,
  stored_names,
  stored_projection,
  to_stored_rows,
)
from lorapr_jax.models.config import LoraConfig, ModelConfig
from lorapr_jax.models.families import row_of
from lorapr_jax.models.trees import init_lora, param_shapes
from lorapr_jax.runtime.files import read_json, write_json

# Where an adapter's folder holds the model that it adapts.
BASE_FOLDER = 'base'
_CONFIG, _WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'


def write_adapter(
  folder: Path,
  lora: Any,
  config: ModelConfig,
  lora_config: LoraConfig,
  storage: Storage = OURS,
) -> None:
  """Writes the two files into an existing folder, factors in float32.

  PEFT takes every size but the rank from the model, so that layers of unequal
  sizes need no word about them. The adapted model lies in the folder's `base`;
  `storage` is that of its files.
  """
  tensors: dict[str, np.ndarray] = {}
  for factor in _factors(lora, config, lora_config.rank, storage):
    x = to_hf_layout(factor.x, factor.letters)
    if factor.kind == 'B':
      x = to_stored_rows(x, factor.name, config, storage)
    empty = np.zeros(factor.shape, np.float32)
    tensors.setdefault(factor.stored, empty)[factor.index] = x
  write_file(
    folder / _WEIGHTS,
    {name: x.shape for name, x in tensors.items()},
    np.dtype(np.float32),
    tensors.items(),
  )
  names = {name: stored_projection(name, storage) for name in LORA_TARGETS}
  hf = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': BASE_FOLDER,
    'r': lora_config.rank,
    'lora_alpha': lora_config.alpha,
    'lora_dropout': lora_config.dropout,
    'target_modules': list(
      dict.fromkeys(names[x] for x in lora_config.targets)
    ),
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
  }
  parts = Counter(names.values())
  joined = {x: parts[x] for x in hf['target_modules'] if parts[x] > 1}
  if joined:  # The scale alpha / r is the same.
    hf['rank_pattern'] = {x: n * hf['r'] for x, n in joined.items()}
    hf['alpha_pattern'] = {x: n * hf['lora_alpha'] for x, n in joined.items()}
  write_json(folder / _CONFIG, hf)


def read_adapter(folder: Path, config: ModelConfig) -> tuple[Any, LoraConfig]:
  """The adapters and their config, from what `write_adapter` wrote.

  `config` has the sizes and the family of the model that they adapt.

  Raises:
    UserError: if the file's tensors are not those of this model.
  """
  hf, row = read_json(folder / _CONFIG), row_of(config.family)
  lora_config = LoraConfig(
    rank=hf['r'],
    alpha=hf['lora_alpha'],
    dropout=hf['lora_dropout'],
    targets=tuple(
      name
      for name in LORA_TARGETS
      if stored_projection(name, row) in hf['target_modules']
    ),
  )
  shapes = jax.eval_shape(
    lambda key: init_lora(key, config, lora_config), jax.random.key(0)
  )
  lora = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
  stored = open_file(folder / _WEIGHTS)
  names, tensors = set(stored.keys()), {}
  for factor in _factors(lora, config, lora_config.rank, row):
    name, shape = factor.stored, factor.shape
    if name not in tensors:
      tensor = stored.get_slice(name) if name in names else None
      if tensor is None or tuple(tensor.get_shape()) != shape:
        raise UserError(
          f'{folder / _WEIGHTS} lacks {name} of shape {shape}, which the model '
          f'in {BASE_FOLDER} needs'
        )
      tensors[name] = tensor[:]
    x = tensors[name][factor.index]
    if factor.kind == 'B':
      x = from_stored_rows(x, factor.name, config, row)
    # It is a view into `lora`.
    factor.x[...] = x.T.reshape(factor.x.shape)
  if unknown := sorted(names - tensors.keys()):
    raise UserError(f'{folder / _WEIGHTS} has the unknown {unknown[0]}')
  return lora, lora_config


class _Factor(NamedTuple):
  """The A or the B of one projection of one layer, and where it is stored.

  Attributes:
    kind: A or B.
    name: our name of the weight that it adapts.
    x: its values.
    letters: its axes.
    stored: PEFT's name of the matrix that holds it.
    shape: of that matrix.
    index: the part of that matrix.
  """

  kind: str
  name: str
  x: np.ndarray
  letters: ProjectionLetters
  stored: str
  shape: tuple[int, int]
  index: tuple[slice, slice]


def _factors(
  lora: Any, config: ModelConfig, rank: int, storage: Storage
) -> Iterator[_Factor]:
  places = _places(config, rank, storage)
  for stack, tree in zip(config.stacks, lora, strict=True):
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      *path, kind = (key.key for key in key_path)
      letters = letters_of(tuple(path))
      inputs, outputs = letters.inputs, 'r'
      if kind == 'b':
        inputs, outputs = 'r', letters.outputs
      letters = ProjectionLetters(inputs + outputs, inputs, outputs)
      for row, x in enumerate(np.asarray(leaf), start=stack.start):
        name = hf_name((*path, 'weight'), row)
        place = places[name, kind.upper()]
        yield _Factor(kind.upper(), name, x, letters, *place)


def _places(config: ModelConfig, rank: int, storage: Storage) -> dict[Any, Any]:
  """(our name, A or B) -> (PEFT's name, its shape, the part that is ours)."""
  shapes = hf_shapes(param_shapes(config.dequantized, np.float32), config)
  places = {}
  for theirs, parts in stored_names(shapes, storage).items():
    prefix = f'base_model.model.{theirs.removesuffix(".weight")}'
    ranks, outputs = len(parts) * rank, sum(shapes[name][0] for name in parts)
    first = 0
    for i, name in enumerate(parts):
      own, last = slice(i * rank, (i + 1) * rank), first + shapes[name][0]
      places[name, 'A'] = (
        f'{prefix}.lora_A.weight',
        (ranks, *shapes[name][1:]),
        (own, slice(None)),
      )
      places[name, 'B'] = (
        f'{prefix}.lora_B.weight',
        (outputs, ranks),
        (slice(first, last), own),
      )
      first = last
  return places
