"""Reading a model from a GGUF file: sizes, weights, tokenizer. No torch."""

from collections.abc import Iterator
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np

from lorapr_jax.errors import UserError, first_line, short
from lorapr_jax.gguf.archs import ARCHS, Arch
from lorapr_jax.gguf.format import (
  EMPTY,
  EOS_IDS,
  Metadata,
  empty_sinks,
  from_stored,
  gguf_name,
  is_bias,
  shapes,
  with_biases,
)
from lorapr_jax.gguf.header import Tensor, read_header
from lorapr_jax.gguf.read_rope import with_rope
from lorapr_jax.gguf.rope import TABLES
from lorapr_jax.gguf.tokenizer import ROLES, TOKENS, write_tokenizer_files
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.hf.stored import Rows, our_tensors, stored_shapes
from lorapr_jax.models.config import (
  MOST,
  MOST_LAYERS,
  LayerShape,
  ModelConfig,
)
from lorapr_jax.models.family import FEATURES
from lorapr_jax.runtime.files import write_json
from lorapr_jax.runtime.paths import local_file, path_of


@dataclasses.dataclass(frozen=True, repr=False)
class GgufModel:
  """A model in a GGUF file, mapped into memory; made by `open_gguf`."""

  config: ModelConfig
  _arch: Arch
  _metadata: Metadata
  _tensors: dict[str, Tensor]

  def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight as (Hugging Face name, float32 array in its layout).

    One at a time, from the embeddings to the head, dequantised; projections
    are (outputs, inputs). Tied embeddings come once. Biases that the file does
    not have are zero where it has others of that part of a block.
    """
    for name in self._rows:
      yield name, self.tensor_of(name)

  def tensor_of(self, name: str) -> np.ndarray:
    """One of `tensors` by its Hugging Face name."""
    values = from_stored(self._rows[name][:], name, self.config)
    return np.ascontiguousarray(values)

  @functools.cached_property
  def _rows(self) -> dict[str, Rows]:
    """The weights by Hugging Face's names; none is read yet."""
    found = shapes(self.config)
    stored = stored_shapes(found, self._arch)

    def slice_of(name: str) -> Any:
      tensor = self._tensors.get(gguf_name(name))
      return np.zeros(stored[name], np.float32) if tensor is None else tensor

    tensors = our_tensors(slice_of, found, self.config, self._arch)
    return {name: tensors[name] for name in found}

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

  The architecture is one of gguf/archs.py, with attention and MLP in every
  layer.

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
  # Every key that is understood is taken out, for what is left may change what
  # the model computes: experts, a sliding window, ...
  name = metadata.pop('general.architecture', next(iter(ARCHS)))
  if name not in list(ARCHS):  # A list has no hash.
    raise metadata.error(
      f'general.architecture is {short(repr(name))}; only {", ".join(ARCHS)} '
      'are supported'
    )
  arch = ARCHS[name]
  config = _read_config(metadata, name, tied='output.weight' not in tensors)
  tables = {x: tensors.pop(x) for x in TABLES if x in tensors}
  config = with_rope(config, metadata, name, tables)
  if arch.sinks:
    _take_sinks(metadata, tensors, config)
  for key, value in metadata.items():
    if key.startswith(f'{name}.'):
      raise metadata.error(
        f'{key} is {short(repr(value))}, which is not supported'
      )
  config = with_biases(config, arch, tensors)
  _check_tensors(metadata, tensors, config, arch)
  return GgufModel(config, arch, metadata, tensors)


def _read_config(metadata: Metadata, arch: str, tied: bool) -> ModelConfig:
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
  row = ARCHS[arch]
  config = ModelConfig(
    vocab_size=vocab_size,
    embed_dim=embed_dim,
    head_dim=head_dim,
    layers=layers,
    norm_eps=metadata.number(f'{arch}.attention.layer_norm_rms_epsilon'),
    tie_embeddings=tied,
    max_positions=metadata.size(f'{arch}.context_length'),
    bos_token_id=ids.get('bos_token'),
    eos_token_id=eos,
    pad_token_id=ids.get('pad_token'),
  )
  numbers = {
    name: number.read(metadata.number(f'{arch}.{number.key}'))
    for name, number in row.numbers.items()
    if name not in row.absent or f'{arch}.{number.key}' in metadata
  }
  features = {name: row.feature(name, config) for name in FEATURES}
  config = dataclasses.replace(config, **features | row.absent | numbers)
  scale = config.attention_scale or row.score_scale(config)
  # It is stored in float32.
  if math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
    scale = None
  return dataclasses.replace(config, attention_scale=scale)


def _read_layers(metadata: Metadata, arch: str) -> tuple[LayerShape, ...]:
  """The sizes of every layer; some have lists of them, an entry for each."""
  num_layers = metadata.size(f'{arch}.block_count', most=MOST_LAYERS)
  per_layer = ARCHS[arch].per_layer

  def take(name, default=None):
    key = f'{arch}.{name}'
    if not per_layer or not isinstance(metadata.get(key, default), list):
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
  absent = heads if per_layer else heads[0]
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


def _take_sinks(
  metadata: Metadata, tensors: dict[str, Tensor], config: ModelConfig
) -> None:
  """Removes the sinks of a softmax; there must be none but empty ones."""
  for name, empty in empty_sinks(config).items():
    sinks = tensors.pop(name, None)
    is_known = sinks is not None and sinks.shape == empty.shape
    if not (is_known and sinks.is_readable and max(sinks[:]) <= EMPTY):
      raise metadata.error(f'{name} is a sink, which is not supported')


def _check_tensors(
  metadata: Metadata,
  tensors: dict[str, Tensor],
  config: ModelConfig,
  arch: Arch,
) -> None:
  """Compares the tensors of a file with what its metadata say."""
  stored = stored_shapes(shapes(config), arch)
  expected = {gguf_name(name): shape for name, shape in stored.items()}
  if unknown := tensors.keys() - expected.keys():
    raise metadata.error(
      f'tensor {short(min(unknown))} is not part of the models supported'
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
