"""Writing a LLaMA as a GGUF file, for llama.cpp and what is built on it."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lorapr_jax.errors import choose
from lorapr_jax.gguf.format import (
  EOS_IDS,
  ROPE_FACTORS,
  SCALING_KEYS,
  architecture,
  check_held,
  halves_to_interleaved,
  hf_names,
  is_rotated,
  rope_factors,
)
from lorapr_jax.gguf.vocabulary import vocabulary
from lorapr_jax.hf.names import hf_shapes
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

  The architecture is `llama`, or `deci` where layers differ in size. Norms
  and biases are float32. q8_0 stores blocks of 32 numbers of a row: a matrix
  whose rows are no multiple of 32 long is written as f16. One tensor is held at
  a time.

  Args:
    path: to be made; it must not exist.
    params: the merged weights.
    config: their sizes.
    base: the folder whose tokenizer is embedded; None: no tokenizer.
    dtype: of the matrices, one of GGUF_DTYPES.
    name: the model's, in the metadata.

  Raises:
    UserError: if the file exists, the dtype is unknown, or the tokenizer is
      none that llama.cpp has (gguf/vocabulary.py); before anything is written.
  """
  path = path_of(path)
  choose('export.gguf_dtype', dtype, GGUF_DTYPES)
  check_held(config)
  matrix_type = _Type[dtype.upper()]
  share = 'ALL' if matrix_type == _Type.F32 else 'MOSTLY'
  file_type = gguf.LlamaFileType[f'{share}_{matrix_type.name}']
  metadata = {
    'general.type': 'model',
    'general.name': name,
    'general.file_type': int(file_type),
    'general.quantization_version': gguf.GGML_QUANT_VERSION,
    **_sizes(config),
    **vocabulary(base and path_of(base), config),
  }
  with new_path(path) as partial, written_locally(partial) as local:
    writer = gguf.GGUFWriter(local, architecture(config))
    with contextlib.closing(writer):
      for key, value in metadata.items():
        _add(writer, key, value)
      _write_tensors(writer, params, config, matrix_type)


def _sizes(config: ModelConfig) -> dict[str, Any]:
  """The metadata that take the place of config.json."""
  arch = architecture(config)
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
    'rope.dimension_count': config.head_dim,
    'rope.freq_base': float(config.ropes[0].theta),
    'vocab_size': config.vocab_size,
  }
  metadata = {f'{arch}.{key}': value for key, value in sizes.items()}
  if config.ropes[0].scaling:
    for field in dataclasses.fields(config.ropes[0].scaling):
      value = getattr(config.ropes[0].scaling, field.name)
      metadata[SCALING_KEYS[field.name]] = field.type(value)
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
  writer: gguf.GGUFWriter, params: Any, config: ModelConfig, matrix_type: _Type
) -> None:
  """Writes the header with every tensor's shape, then tensor by tensor."""
  names = {theirs: name for name, theirs in hf_names(config).items()}
  types = {}
  if config.ropes[0].scaling:
    _declare(writer, ROPE_FACTORS, (config.head_dim // 2,), _Type.F32)
  for theirs, shape in hf_shapes(params, config).items():
    types[theirs] = _storage(shape, matrix_type)
    _declare(writer, names[theirs], shape, types[theirs])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  if config.ropes[0].scaling:
    writer.write_tensor_data(rope_factors(config))
  for theirs, weight in hf_tensors(params, config, np.float32):
    if is_rotated(names[theirs]):
      weight = halves_to_interleaved(weight, config.head_dim)
    writer.write_tensor_data(gguf.quants.quantize(weight, types[theirs]))


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
