"""Reading a LLaMA from a GGUF file: sizes, weights, tokenizer. No torch."""

from collections.abc import Iterator
import dataclasses
from pathlib import Path

import gguf
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.gguf.format import (
  EOS_IDS,
  PER_LAYER,
  ROPE_FACTORS,
  SCALING_KEYS,
  UNIFORM,
  Metadata,
  biased_parts,
  hf_names,
  interleaved_to_halves,
  is_bias,
  is_rotated,
  rope_factors,
)
from lorapr_jax.gguf.tokenizer import write_tokenizer_files
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.models.config import LayerShape, LlamaConfig, RopeScaling
from lorapr_jax.runtime.files import write_json
from lorapr_jax.runtime.paths import local_file, path_of


@dataclasses.dataclass(frozen=True, repr=False)
class GgufModel:
  """A LLaMA in a GGUF file, mapped into memory; made by `open_gguf`."""

  config: LlamaConfig
  _metadata: Metadata
  _tensors: dict[str, gguf.ReaderTensor]

  def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight as (Hugging Face name, float32 array in its layout).

    One at a time, from the embeddings to the head, dequantised; projections
    are (outputs, inputs). Tied embeddings come once. Biases that the file does
    not have are zero where it has others of that part of a block.

    Raises:
      UserError: naming a tensor whose type cannot be read.
    """
    for name, hf_name in hf_names(self.config).items():
      if name not in self._tensors:
        weight = self._tensors[name.removesuffix('bias') + 'weight']
        yield hf_name, np.zeros(weight.shape[-1], np.float32)
        continue
      weight = _dequantised(self._metadata, self._tensors[name])
      if is_rotated(name):
        weight = interleaved_to_halves(weight, self.config.head_dim)
      yield hf_name, np.ascontiguousarray(weight)

  def write_tokenizer(self, folder: str | Path) -> None:
    """Writes generation_config.json and, if there is a tokenizer, its files.

    Raises:
      UserError: as `write_tokenizer_files`.
    """
    folder = path_of(folder)
    if self._metadata.get('tokenizer.ggml.model') != 'none':
      write_tokenizer_files(self._metadata, folder, self.config.max_positions)
    ids = config_to_hf(self.config).items()
    write_json(
      folder / 'generation_config.json',
      {k: v for k, v in ids if k.endswith('_token_id') and v is not None},
    )


def open_gguf(path: str | Path) -> GgufModel:
  """Reads the metadata of a GGUF; the weights stay on disk.

  The architecture is `llama`, or `deci` with attention and MLP in every layer.

  Raises:
    UserError: where the file is not a GGUF, or naming the metadata key or the
      tensor that asks for something unsupported.
  """
  path = path_of(path)
  if not path.is_file():
    raise UserError(f'{path}: cannot be read as GGUF: there is no such file')
  try:
    reader = gguf.GGUFReader(local_file(path))
  # What a truncated or foreign file raises depends on where gguf-py stumbles.
  except (OSError, ValueError, IndexError, KeyError) as error:
    raise UserError(
      f'{path}: cannot be read as GGUF ({error}): it is damaged, or of '
      'another kind'
    ) from error
  metadata = Metadata(
    path, ((k, v.contents()) for k, v in reader.fields.items())
  )
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _read_config(metadata, tied='output.weight' not in tensors)
  if ROPE_FACTORS in tensors:
    config = _with_scaling(config, metadata, tensors.pop(ROPE_FACTORS))
  config = config.with_biases(biased_parts(tensors))
  _check_names(metadata, set(tensors), set(hf_names(config)))
  return GgufModel(config, metadata, tensors)


def _dequantised(metadata: Metadata, tensor: gguf.ReaderTensor) -> np.ndarray:
  try:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError:
    raise metadata.error(
      f'tensor {tensor.name} has type {tensor.tensor_type.name}, which '
      'gguf-py cannot dequantise'
    ) from None


def _read_config(metadata: Metadata, tied: bool) -> LlamaConfig:
  # Every key that is understood is taken out, for what is left may change what
  # the model computes: experts, a sliding window, a scaled RoPE, ...
  arch = metadata.take_only('general.architecture', *UNIFORM, PER_LAYER)
  metadata.take_only(f'{arch}.rope.scaling.type', 'none')
  metadata.take_only(f'{arch}.tensor_data_layout', 'Meta AI original pth')
  embed_dim = metadata.take(f'{arch}.embedding_length', int)
  layers = _read_layers(metadata, arch)
  head_dim = metadata.take(
    f'{arch}.attention.key_length', int, embed_dim // layers[0].num_heads
  )
  metadata.take_only(f'{arch}.attention.value_length', head_dim)
  metadata.take_only(f'{arch}.rope.dimension_count', head_dim)
  # Files older than the key vocab_size have the vocabulary alone.
  tokens = metadata.get('tokenizer.ggml.tokens', ())
  eos = metadata.get('tokenizer.ggml.eos_token_id')
  config = LlamaConfig(
    vocab_size=metadata.take(f'{arch}.vocab_size', int, len(tokens)),
    embed_dim=embed_dim,
    head_dim=head_dim,
    layers=layers,
    norm_eps=metadata.take(f'{arch}.attention.layer_norm_rms_epsilon', float),
    rope_theta=metadata.take(f'{arch}.rope.freq_base', float, 10000.0),
    tie_embeddings=tied,
    max_positions=metadata.take(f'{arch}.context_length', int),
    bos_token_id=metadata.get('tokenizer.ggml.bos_token_id'),
    eos_token_id=tuple(metadata[EOS_IDS]) if EOS_IDS in metadata else eos,
    pad_token_id=metadata.get('tokenizer.ggml.padding_token_id'),
  )
  for key, value in metadata.items():
    if key.startswith(f'{arch}.'):
      raise metadata.error(f'{key} is {value!r}, which is not supported')
  return config


def _read_layers(metadata: Metadata, arch: str) -> tuple[LayerShape, ...]:
  """The sizes of every layer; in a `deci` they may be lists, one entry each."""
  num_layers = metadata.take(f'{arch}.block_count', int)

  def take(name, default=None):
    key = f'{arch}.{name}'
    if arch != PER_LAYER or not isinstance(metadata.get(key, default), list):
      sizes = [metadata.take(key, int, default)] * num_layers
    else:
      sizes = metadata.take(key, list, default)
    if len(sizes) != num_layers or min(sizes) < 1:
      raise metadata.error(
        f'{key} is {sizes}; {num_layers} positive numbers are supported'
      )
    return sizes

  heads = take('attention.head_count')
  absent = heads if arch == PER_LAYER else heads[0]
  kv_heads = take('attention.head_count_kv', absent)
  for queries, kv in zip(heads, kv_heads, strict=True):
    if queries % kv:
      raise metadata.error(
        f'{arch}.attention.head_count {queries} is not a multiple of '
        f'{arch}.attention.head_count_kv {kv}'
      )
  return tuple(
    LayerShape(kv, queries // kv, mlp)
    for queries, kv, mlp in zip(
      heads, kv_heads, take('feed_forward_length'), strict=True
    )
  )


def _with_scaling(
  config: LlamaConfig, metadata: Metadata, table: gguf.ReaderTensor
) -> LlamaConfig:
  """The config with the RoPE scaling that a table of factors comes from.

  A table does not tell all four parameters. Ours are in the metadata; in other
  files Llama 3's are tried, of which only `factor` varies from model to model.
  """
  factors = _dequantised(metadata, table)
  if set(SCALING_KEYS.values()) <= set(metadata):
    scaling = RopeScaling(
      **{
        field.name: metadata.take(SCALING_KEYS[field.name], field.type)
        for field in dataclasses.fields(RopeScaling)
      }
    )
  else:
    scaling = RopeScaling(float(factors.max()), 1.0, 4.0, 8192)
  config = dataclasses.replace(config, rope_scaling=scaling)
  expected = rope_factors(config)
  # Other programs compute their tables in float32.
  if factors.shape != expected.shape or not np.allclose(
    factors, expected, rtol=1e-4
  ):
    raise metadata.error(
      f'tensor {ROPE_FACTORS} holds a RoPE scaling as a table, which is not '
      'that of Llama 3; start from the original Hugging Face folder'
    )
  return config


def _check_names(metadata: Metadata, found: set[str], known: set[str]) -> None:
  if found - known:
    raise metadata.error(
      f'tensor {min(found - known)} is not part of the LLaMA models supported'
    )
  needed = {name for name in known - found if not is_bias(name)}
  if needed:
    raise metadata.error(
      f'tensor {min(needed)} is absent; join the files of a split '
      'model first (llama-gguf-split --merge)'
    )
