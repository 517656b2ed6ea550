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
  EOS_IDS,
  OWN,
  Metadata,
  from_stored,
  gguf_name,
  is_bias,
  shapes,
  shortest,
  with_biases,
)
from lorapr_jax.gguf.header import Tensor, read_header
from lorapr_jax.gguf.rope import (
  DIMENSIONS,
  OWN_ROTARY_DIM,
  OWN_SCALING,
  SCALING_TYPE,
  TABLES,
  THETA,
  given_scaling,
  rope_keys,
  rope_tables,
)
from lorapr_jax.gguf.tokenizer import ROLES, TOKENS, write_tokenizer_files
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.hf.rope import rope_from_hf
from lorapr_jax.hf.stored import Rows, our_tensors, stored_shapes
from lorapr_jax.models.config import (
  MOST,
  MOST_LAYERS,
  LayerShape,
  ModelConfig,
)
from lorapr_jax.models.families import FEATURES
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
  config = _with_rope(config, metadata, name, tables)
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
  # It is stored in float32.
  if math.isclose(config.score_scale, head_dim**-0.5, rel_tol=1e-6):
    return dataclasses.replace(config, attention_scale=None)
  return config


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


def _with_rope(
  config: ModelConfig,
  metadata: Metadata,
  arch: str,
  tensors: dict[str, Tensor],
) -> ModelConfig:
  """The config with the RoPE that the keys say and tables come from."""
  keys = _take_rope_keys(metadata, arch)
  for name, tensor in tensors.items():
    if tensor.shape != (config.head_dim // 2,) or not tensor.is_readable:
      raise metadata.error(_strange_table(name))
  tables = {name: tensor[:] for name, tensor in tensors.items()}
  turned = keys.get(OWN_ROTARY_DIM, config.head_dim)
  if ARCHS[arch].turns_parts:
    turned = keys.get(DIMENSIONS, config.head_dim)
  if type(turned) is not int or turned % 2 or not 0 < turned <= config.head_dim:
    raise metadata.error(
      f'RoPE turns {short(repr(turned))} of {config.head_dim} dimensions'
    )
  given = given_scaling(keys, tables)
  hf = {
    'rope_theta': keys.get(THETA, 10000.0),
    'rope_scaling': given,
    'max_position_embeddings': config.max_positions,
  }
  try:
    rope = rope_from_hf(hf, turned // 2)
  except UserError as error:
    problem = str(error).removeprefix('config.json: ')
    raise metadata.error(f'{arch}.{SCALING_TYPE}: {problem}') from None
  config = dataclasses.replace(
    config,
    ropes=(rope,),
    rotary_dim=None if turned == config.head_dim else turned,
  )
  _check_rope(metadata, arch, config, keys, tables)
  return config


def _take_rope_keys(metadata: Metadata, arch: str) -> dict[str, Any]:
  """Removes the keys of RoPE; those of llama.cpp without the architecture."""
  keys = {}
  for key in list(metadata):
    name = key.removeprefix(f'{arch}.')
    if key == OWN_ROTARY_DIM or key.startswith(OWN_SCALING):
      name = key
    elif name == key or not name.startswith('rope.'):
      continue
    value = metadata.pop(key)
    if isinstance(value, list):
      value = [shortest(x) if isinstance(x, float) else x for x in value]
    keys[name] = shortest(value) if isinstance(value, float) else value
  return keys


def _check_rope(
  metadata: Metadata,
  arch: str,
  config: ModelConfig,
  keys: dict[str, Any],
  tables: dict[str, np.ndarray],
) -> None:
  """Compares what a file says of RoPE with what we would write."""
  parts = ARCHS[arch].turns_parts
  expected = rope_keys(config, parts)
  for key, value in keys.items():
    shown = key if key.startswith(OWN) else f'{arch}.{key}'
    if (key, value) == (SCALING_TYPE, 'none'):
      continue
    if key not in expected or type(value) is not type(expected[key]):
      raise metadata.error(
        f'{shown} is {short(repr(value))}, which is not supported'
      )
    same = value == expected[key]
    if isinstance(value, float):
      same = math.isclose(value, expected[key], rel_tol=1e-5)
    if not same:
      raise metadata.error(
        f'{shown} is {short(repr(value))}, but its other keys mean '
        f'{expected[key]!r}'
      )
  ours = rope_tables(config, parts)
  for name in tables.keys() | ours.keys():
    # Other programs compute their tables in float32.
    if not (
      name in tables
      and name in ours
      and np.allclose(tables[name], ours[name], rtol=1e-4)
    ):
      raise metadata.error(_strange_table(name))


def _strange_table(name: str) -> str:
  return (
    f'tensor {name} holds a RoPE scaling as a table, which is not that of '
    'Llama 3 or of the keys; start from the original Hugging Face folder'
  )


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
