"""Writing a model as a folder that stock tools load.

The folder has its name, or its config.json, once it is complete.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.hf.layout import hf_config, stored_family
from lorapr_jax.hf.names import (
  hf_name,
  hf_shapes,
  letters_of,
  locate,
  to_hf_layout,
)
from lorapr_jax.hf.remote import remote_code
from lorapr_jax.hf.shards import MAX_SHARD_BYTES, write_safetensors
from lorapr_jax.hf.stored import OURS, Storage, stored_shapes, stored_tensors
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.runtime.files import LARGE, read_bytes, read_json, write_json
from lorapr_jax.runtime.paths import (
  copy_file,
  files_in,
  is_folder,
  names_in,
  new_folder,
  path_of,
)
from lorapr_jax.runtime.processes import to_host

DTYPES = ('float32', 'bfloat16', 'float16')
GGUF_DTYPES = ('f32', 'bf16', 'f16', 'q8_0')

# Copied byte for byte from the base: a tokenizer that is saved again is not
# the same file any more, and llama.cpp recognises it by its hash.
COPIED = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.jinja',
  'tokenizer.model',
  'vocab.json',
  'merges.txt',
  'generation_config.json',
  'LICEN[CS]E*',
  'NOTICE*',
  'USE_POLICY*',
)


def hf_tensors(
  params: Any,
  config: ModelConfig,
  dtype: Any,
  storage: Storage = OURS,
) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor as files of this storage hold it, one at a time.

  Of weights that lie on several processes all must go through all tensors.
  """
  places = {}
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path, layers = locate(key_path, config.stacks)
    if layers is None:
      places[hf_name(path)] = leaf, None, None
      continue
    letters = letters_of(path)
    for row, layer in enumerate(layers):
      places[hf_name(path, layer)] = leaf, row, letters

  def tensor_of(name: str) -> np.ndarray:
    leaf, row, letters = places[name]
    x = leaf if row is None else _of_row(leaf, row)
    return to_hf_layout(to_host(x), letters)

  for name, x in stored_tensors(tensor_of, places, config, storage):
    yield name, _cast(name, x, dtype)


@jax.jit
def _of_row(stack: jax.Array, row: int) -> jax.Array:
  """One layer of a stack; which one is no part of what is compiled."""
  return jax.lax.dynamic_index_in_dim(stack, row, keepdims=False)


def _cast(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
  if np.dtype(dtype) != np.float16:
    return x.astype(dtype, copy=False)
  with np.errstate(over='ignore'):
    half = x.astype(dtype)
  if np.isinf(half).any() and np.isfinite(x).all():
    raise UserError(
      f'{name} has a weight of {abs(x.astype(np.float32)).max():.0f}, which '
      'float16 cannot hold: choose bfloat16 or float32'
    )
  return half


def export_model(
  folder: str | Path,
  params: Any,
  config: ModelConfig,
  *,
  layout: str = 'auto',
  model_type: str = 'auto',
  dtype: Any = None,
  base: str | Path | None = None,
  pruning: dict[str, Any] | None = None,
  card: str | None = None,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a complete Hugging Face folder.

  Args:
    folder: to be made; it must not exist.
    params: the merged weights.
    config: their sizes.
    layout: one of layout.LAYOUTS.
    model_type: one of layout.MODEL_TYPES.
    dtype: of the weights; None keeps theirs.
    base: the folder whose tokenizer, generation config and licence are copied.
    pruning: the contents of pruning.json.
    card: the text of README.md.
    max_shard_bytes: the largest size of one file.

  Raises:
    UserError: if the folder exists or the layout cannot hold the model.
  """
  dtype = np.dtype(dtype or params['embed_tokens']['weight'].dtype)
  storage = stored_family(config, layout, model_type)

  def beside(partial: Path) -> None:
    if base is not None:
      copy_companions(path_of(base), partial)
    if pruning is not None:
      write_json(partial / 'pruning.json', pruning)
    if card is not None:
      (partial / 'README.md').write_text(card, encoding='utf-8')

  write_folder(
    folder,
    hf_config(config, dtype.name, layout, model_type),
    stored_shapes(hf_shapes(params, config), storage),
    hf_tensors(params, config, dtype, storage),
    beside=beside,
    max_shard_bytes=max_shard_bytes,
  )


def write_folder(
  folder: str | Path,
  hf: dict[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  tensors: Iterator[tuple[str, np.ndarray]],
  *,
  beside: Callable[[Path], None],
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Writes a Hugging Face folder; one tensor is held at a time.

  Args:
    folder: to be made; it must not exist.
    hf: the contents of config.json.
    shapes: of all tensors, in their order, by Hugging Face's names.
    tensors: name and values of each.
    beside: writes the files beside config.json and the weights.
    max_shard_bytes: the largest size of one file.

  Raises:
    UserError: if the folder exists or cannot be written.
  """
  dtype = np.dtype(hf['torch_dtype'])
  with new_folder(path_of(folder)) as partial:
    beside(partial)
    write_safetensors(partial, shapes, dtype, tensors, max_shard_bytes)
    if 'auto_map' in hf:  # It names code.
      for name, text in remote_code(hf['model_type']).items():
        (partial / name).write_text(text, encoding='utf-8')
    # It comes last: a folder without it is no model.
    write_json(partial / 'config.json', hf)


def check_companions(base: Path) -> None:
  """Reads, before any work, all that `copy_companions` will copy.

  Raises:
    UserError: naming a file that cannot be read, or is not the JSON that its
      name says.
  """
  for path in names_in(base, *COPIED):
    if is_folder(path):
      continue
    # Tokenizers read theirs, which is large, in less time.
    if path.suffix == '.json' and path.name != 'tokenizer.json':
      read_json(path, LARGE)
    else:
      read_bytes(path, LARGE)


def copy_companions(base: Path, folder: Path) -> None:
  """Copies tokenizer, generation config and licence, byte for byte."""
  for path in files_in(base, *COPIED):
    copy_file(path, folder / path.name)
