"""Writing a LLaMA as a GGUF file, for llama.cpp and what is built on it."""

from collections.abc import Iterator
import contextlib
import math
from pathlib import Path
import re
from typing import Any

import gguf
import numpy as np

from lorapr_jax.errors import choose
from lorapr_jax.gguf.archs import ARCHS, Arch, architecture
from lorapr_jax.gguf.format import (
  EOS_IDS,
  OWN,
  empty_sinks,
  gguf_name,
  to_stored,
)
from lorapr_jax.gguf.kinds import kind_keys
from lorapr_jax.gguf.rope import rope_keys, rope_tables
from lorapr_jax.gguf.vocabulary import vocabulary
from lorapr_jax.hf.names import hf_shapes
from lorapr_jax.hf.stored import stored_shapes
from lorapr_jax.hf.write import GGUF_DTYPES, hf_tensors
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.runtime.paths import new_path, path_of, written_locally

_Type = gguf.GGMLQuantizationType


def write_gguf(
  path: str | Path,
  params: Any,
  config: ModelConfig,
  *,
  base: str | Path | None,
  dtype: str,
  name: str,
) -> None:
  """Writes weights, sizes and tokenizer as one file.

  The architecture is the first of gguf/archs.py that computes what the model
  does. Norms and biases are float32. q8_0 stores blocks of 32 numbers of a row:
  a matrix whose rows are no multiple of 32 long is written as f16. One tensor
  is held at a time.

  Args:
    path: to be made; it must not exist.
    params: the merged weights.
    config: their sizes.
    base: the folder whose tokenizer is embedded; None: no tokenizer.
    dtype: of the matrices, one of GGUF_DTYPES.
    name: the model's, in the metadata.

  Raises:
    UserError: if the file exists, the dtype is unknown, or llama.cpp has no
      such model or no such tokenizer (gguf/vocabulary.py); before anything is
      written.
  """
  path = path_of(path)
  choose('export.gguf_dtype', dtype, GGUF_DTYPES)
  name_of_arch = architecture(config)
  matrix_type = _Type[dtype.upper()]
  share = 'ALL' if matrix_type == _Type.F32 else 'MOSTLY'
  file_type = gguf.LlamaFileType[f'{share}_{matrix_type.name}']
  tokenizer = vocabulary(base and path_of(base), config)
  metadata = {
    'general.type': 'model',
    'general.name': _name(name, tokenizer),
    'general.file_type': int(file_type),
    'general.quantization_version': gguf.GGML_QUANT_VERSION,
    **_sizes(config, name_of_arch),
    **tokenizer,
  }
  with new_path(path) as partial, written_locally(partial) as local:
    writer = gguf.GGUFWriter(local, name_of_arch)
    with contextlib.closing(writer):
      for key, value in metadata.items():
        _add(writer, key, value)
      _write_tensors(writer, params, config, ARCHS[name_of_arch], matrix_type)


def _name(name: str, tokenizer: dict[str, Any]) -> str:
  """A name that llama.cpp loads the model under.

  It takes a model of this name for one that has these tokens, and fails to load
  it if it has not.
  """
  tokens = {'</s>', '<unk>', '<s>', '<|endoftext|>'}
  if tokens <= {*tokenizer.get('tokenizer.ggml.tokens', ())}:
    return name
  return re.sub('(phi)-?(3)', r'\1 \2', name, flags=re.IGNORECASE)


def gguf_tensors(
  params: Any, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor as the file has it, float32, one at a time.

  Of weights that lie on several processes all must go through all tensors.
  """
  arch = ARCHS[architecture(config)]
  for name, x in hf_tensors(params, config, np.float32, arch):
    yield gguf_name(name), to_stored(x, name, config, arch)


def _sizes(config: ModelConfig, name: str) -> dict[str, Any]:
  """The metadata that take the place of config.json."""
  arch = ARCHS[name]
  layers = {
    'attention.head_count': [s.num_heads for s in config.layers],
    'attention.head_count_kv': [s.num_kv_heads for s in config.layers],
    'feed_forward_length': [s.mlp_dim for s in config.layers],
  }
  if config.is_uniform:
    layers = {key: sizes[0] for key, sizes in layers.items()}
  sizes = {
    'block_count': len(config.layers),
    'context_length': config.max_positions,
    'embedding_length': config.embed_dim,
    **layers,
    'attention.key_length': config.head_dim,
    'attention.value_length': config.head_dim,
    'attention.layer_norm_rms_epsilon': float(config.norm_eps),
    'vocab_size': config.vocab_size,
    **rope_keys(config, arch.rope),
    **kind_keys(config, arch.kinds),
    **arch.keys(config),
  }
  metadata = {
    key if key.startswith(OWN) else f'{name}.{key}': value
    for key, value in sizes.items()
  }
  if isinstance(config.eos_token_id, tuple):
    metadata[EOS_IDS] = list(config.eos_token_id)
  return metadata


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  """Adds a key in the type that llama.cpp reads it as."""
  kind = gguf.GGUFValueType.get_type(value)
  if kind == gguf.GGUFValueType.INT32:
    kind = gguf.GGUFValueType.UINT32
  if value != []:  # GGUF has no empty lists.
    writer.add_key_value(key, value, kind)


def _write_tensors(
  writer: gguf.GGUFWriter,
  params: Any,
  config: ModelConfig,
  arch: Arch,
  matrix_type: _Type,
) -> None:
  """Writes the header with every tensor's shape, then tensor by tensor."""
  tables, types = rope_tables(config, arch.rope), {}
  if arch.sinks:
    tables |= empty_sinks(config)
  for name, table in tables.items():
    _declare(writer, name, table.shape, _Type.F32)
  shapes = stored_shapes(hf_shapes(params, config), arch)
  for name, shape in shapes.items():
    types[gguf_name(name)] = storage = _storage(shape, matrix_type)
    _declare(writer, gguf_name(name), shape, storage)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for table in tables.values():
    writer.write_tensor_data(table)
  for name, weight in gguf_tensors(params, config):
    writer.write_tensor_data(gguf.quants.quantize(weight, types[name]))


def _storage(shape: tuple[int, ...], matrix_type: _Type) -> _Type:
  if len(shape) == 1:
    return _Type.F32
  block, _ = gguf.GGML_QUANT_SIZES[matrix_type]
  return _Type.F16 if shape[-1] % block else matrix_type


def _declare(
  writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], storage: _Type
) -> None:
  size = math.prod(gguf.quant_shape_to_byte_shape(shape, storage))
  writer.add_tensor_info(
    name, shape, np.dtype(np.float32), size, raw_dtype=storage
  )
