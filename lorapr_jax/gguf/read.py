"""Reading a LLaMA from a GGUF file: sizes, weights, tokenizer. No torch."""

from collections.abc import Iterator
import dataclasses
import functools
from pathlib import Path

import numpy as np

from lorapr_jax.errors import UserError, first_line, short
from lorapr_jax.gguf.format import (
  EOS_IDS,
  PER_LAYER,
  ROPE_FACTORS,
  SCALING_KEYS,
  UNIFORM,
  Metadata,
  biases,
  hf_names,
  interleaved_to_halves,
  is_bias,
  is_rotated,
  rope_factors,
  shapes,
)
from lorapr_jax.gguf.header import Tensor, read_header
from lorapr_jax.gguf.tokenizer import ROLES, TOKENS, write_tokenizer_files
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.hf.rope import is_positive
from lorapr_jax.models.config import (
  MOST,
  MOST_LAYERS,
  LayerShape,
  ModelConfig,
)
from lorapr_jax.models.rope import Llama3, Rope
from lorapr_jax.runtime.files import write_json
from lorapr_jax.runtime.paths import local_file, path_of


@dataclasses.dataclass(frozen=True, repr=False)
class GgufModel:
  """A LLaMA in a GGUF file, mapped into memory; made by `open_gguf`."""

  config: ModelConfig
  _metadata: Metadata
  _tensors: dict[str, Tensor]

  def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight as (Hugging Face name, float32 array in its layout).

    One at a time, from the embeddings to the head, dequantised; projections
    are (outputs, inputs). Tied embeddings come once. Biases that the file does
    not have are zero where it has others of that part of a block.
    """
    for name in self._names:
      yield name, self.tensor_of(name)

  def tensor_of(self, name: str) -> np.ndarray:
    """One of `tensors` by its Hugging Face name."""
    name = self._names[name]
    if name not in self._tensors:
      weight = self._tensors[name.removesuffix('bias') + 'weight']
      return np.zeros(weight.shape[0], np.float32)
    weight = self._tensors[name].read()
    if is_rotated(name):
      weight = interleaved_to_halves(weight, self.config.head_dim)
    return np.ascontiguousarray(weight)

  @functools.cached_property
  def _names(self) -> dict[str, str]:
    """Hugging Face's name of every weight -> that of the file."""
    return {theirs: name for name, theirs in hf_names(self.config).items()}

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
    values, tensors = read_header(local_file(path))
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path}: cannot be read as GGUF ({first_line(error)}): it is damaged, '
      'or of another kind'
    ) from error
  metadata = Metadata(path, values)
  config = _read_config(metadata, tied='output.weight' not in tensors)
  if ROPE_FACTORS in tensors:
    config = _with_scaling(config, metadata, tensors.pop(ROPE_FACTORS))
  config = config.with_biases(biases(tensors))
  _check_tensors(metadata, tensors, config)
  return GgufModel(config, metadata, tensors)


def _read_config(metadata: Metadata, tied: bool) -> ModelConfig:
  # Every key that is understood is taken out, for what is left may change what
  # the model computes: experts, a sliding window, a scaled RoPE, ...
  arch = metadata.take_only('general.architecture', *UNIFORM, PER_LAYER)
  metadata.take_only(f'{arch}.rope.scaling.type', 'none')
  metadata.take_only(f'{arch}.tensor_data_layout', 'Meta AI original pth')
  embed_dim = metadata.size(f'{arch}.embedding_length')
  layers = _read_layers(metadata, arch)
  head_dim = metadata.size(
    f'{arch}.attention.key_length', embed_dim // layers[0].num_heads
  )
  if head_dim % 2:
    raise metadata.error(
      f'heads of {head_dim} dimensions, which RoPE cannot pair'
    )
  metadata.take_only(f'{arch}.attention.value_length', head_dim)
  metadata.take_only(f'{arch}.rope.dimension_count', head_dim)
  # Files older than the key vocab_size have the vocabulary alone.
  tokens = metadata.list_of(TOKENS, str, ())
  vocab_size = metadata.size(f'{arch}.vocab_size', len(tokens))
  if len(tokens) > vocab_size:
    raise metadata.error(
      f'{TOKENS} has {len(tokens)} entries, but the vocabulary is {vocab_size}'
    )
  ids = {
    role: metadata.check_id(key, metadata[key], vocab_size)
    for role, key in ROLES.items()
    if key in metadata
  }
  eos = ids.get('eos_token')
  if EOS_IDS in metadata:
    found = metadata.list_of(EOS_IDS, int)
    eos = tuple(metadata.check_id(EOS_IDS, i, vocab_size) for i in found) or eos
  config = ModelConfig(
    vocab_size=vocab_size,
    embed_dim=embed_dim,
    head_dim=head_dim,
    layers=layers,
    norm_eps=metadata.number(f'{arch}.attention.layer_norm_rms_epsilon'),
    ropes=(Rope(metadata.number(f'{arch}.rope.freq_base', 10000.0)),),
    tie_embeddings=tied,
    max_positions=metadata.size(f'{arch}.context_length'),
    bos_token_id=ids.get('bos_token'),
    eos_token_id=eos,
    pad_token_id=ids.get('pad_token'),
  )
  for key, value in metadata.items():
    if key.startswith(f'{arch}.'):
      raise metadata.error(
        f'{key} is {short(repr(value))}, which is not supported'
      )
  return config


def _read_layers(metadata: Metadata, arch: str) -> tuple[LayerShape, ...]:
  """The sizes of every layer; in a `deci` they may be lists, one entry each."""
  num_layers = metadata.size(f'{arch}.block_count', most=MOST_LAYERS)

  def take(name, default=None):
    key = f'{arch}.{name}'
    if arch != PER_LAYER or not isinstance(metadata.get(key, default), list):
      return [metadata.size(key, default)] * num_layers
    sizes = metadata.list_of(key, int, default)
    metadata.pop(key, None)
    if len(sizes) != num_layers or min(sizes) < 1 or max(sizes) > MOST:
      raise metadata.error(
        f'{key} is {short(repr(sizes))}; {num_layers} positive numbers are '
        'supported'
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
  config: ModelConfig, metadata: Metadata, table: Tensor
) -> ModelConfig:
  """The config with the RoPE scaling that a table of factors comes from.

  A table does not tell all four parameters. Ours are in the metadata; in other
  files Llama 3's are tried, of which only `factor` varies from model to model.
  """
  shape = (config.head_dim // 2,)
  factors = np.zeros(shape, np.float32)
  if table.shape == shape and table.is_readable:
    factors = table.read()
  if set(SCALING_KEYS.values()) <= set(metadata):
    read = {int: metadata.size, float: metadata.number}
    scaling = Llama3(
      **{
        field.name: read[field.type](SCALING_KEYS[field.name])
        for field in dataclasses.fields(Llama3)
      }
    )
  else:
    scaling = Llama3(float(factors.max()), 1.0, 4.0, 8192)
  config = dataclasses.replace(
    config, ropes=(Rope(config.ropes[0].theta, scaling),)
  )
  # Other programs compute their tables in float32.
  if not (
    is_positive(scaling.factor)
    and scaling.low_freq_factor < scaling.high_freq_factor
    and np.allclose(factors, rope_factors(config), rtol=1e-4)
  ):
    raise metadata.error(
      f'tensor {ROPE_FACTORS} holds a RoPE scaling as a table, which is not '
      'that of Llama 3; start from the original Hugging Face folder'
    )
  return config


def _check_tensors(
  metadata: Metadata, tensors: dict[str, Tensor], config: ModelConfig
) -> None:
  """Compares the tensors of a file with what its metadata say."""
  expected = shapes(config)
  if unknown := tensors.keys() - expected.keys():
    raise metadata.error(
      f'tensor {short(min(unknown))} is not part of the LLaMA models supported'
    )
  absent = expected.keys() - tensors.keys()
  if needed := {name for name in absent if not is_bias(name)}:
    raise metadata.error(
      f'tensor {min(needed)} is absent; join the files of a split '
      'model first (llama-gguf-split --merge)'
    )
  for name, tensor in tensors.items():
    if tensor.shape != expected[name]:
      raise metadata.error(
        f'tensor {name} has the shape {tensor.shape}, but the metadata say '
        f'{expected[name]}'
      )
    if not tensor.is_readable:
      raise metadata.error(
        f'tensor {name} has type {tensor.kind.name}, which gguf-py cannot '
        'dequantise'
      )
