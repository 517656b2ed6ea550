"""Reading a LLaMA from a GGUF file: sizes, weights, tokenizer. No torch.

GGUF is llama.cpp's file format: metadata, which take the place of config.json
and of the tokenizer's files, and tensors, which are mostly quantised.
"""

from collections.abc import Iterator
import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from lorapr_jax.errors import UserError
from lorapr_jax.files import write_json
from lorapr_jax.models.config import LayerShape, LlamaConfig

_LAYER_TENSORS = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}

# tokenizer.ggml.pre -> how text is split before the merges.
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_PRE_TOKENIZERS = {
  'default': _BYTE_LEVEL,
  'gpt-2': _BYTE_LEVEL,
  'smollm': pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]
  ),
}
_TOKENIZER_KEYS = {
  'tokenizer.ggml.model': ('gpt2',),
  'tokenizer.ggml.pre': tuple(_PRE_TOKENIZERS),
  'tokenizer.ggml.add_eos_token': (None, False),
  'tokenizer.ggml.add_space_prefix': (None, False),
}


class _Metadata(dict[str, Any]):
  """The key-value part of a GGUF; errors name the file and the key."""

  def __init__(self, path: str | Path, reader: gguf.GGUFReader):
    super().__init__((k, v.contents()) for k, v in reader.fields.items())
    self._path = path

  def error(self, problem: str) -> UserError:
    return UserError(f'{self._path}: {problem}')

  def __missing__(self, key: str) -> Any:
    raise self.error(f'{key} is absent')

  def take(self, key: str, kind: type, default: Any = None) -> Any:
    """Removes and returns a value, which must be of this type."""
    value = self.pop(key, self[key] if default is None else default)
    if not isinstance(value, kind):
      raise self.error(f'{key} is {value!r}, not of type {kind.__name__}')
    # Stored in float32: 1e-5 is meant where 9.999999747378752e-06 is read.
    return float(str(np.float32(value))) if kind is float else value

  def take_only(self, key: str, value: Any) -> None:
    """Removes a key that must have this value or be absent."""
    found = self.pop(key, value)
    if found != value:
      raise self.error(f'{key} is {found!r}; only {value!r} is supported')


@dataclasses.dataclass(frozen=True, repr=False)
class GgufModel:
  """A LLaMA in a GGUF file, mapped into memory; made by `open_gguf`."""

  config: LlamaConfig
  _metadata: _Metadata
  _tensors: dict[str, gguf.ReaderTensor]

  def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight as (Hugging Face name, float32 array in its layout).

    One at a time, from the embeddings to the head, dequantised; projections
    are (outputs, inputs). Tied embeddings come once.

    Raises:
      UserError: naming a tensor whose type cannot be read.
    """
    for name, hf_name in _hf_names(self.config).items():
      tensor = self._tensors[name]
      try:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
      except NotImplementedError:
        raise self._metadata.error(
          f'tensor {name} has type {tensor.tensor_type.name}, which gguf-py '
          'cannot dequantise'
        ) from None
      if name.endswith(('attn_q.weight', 'attn_k.weight')):
        weight = _interleaved_to_halves(weight, self.config.head_dim)
      yield hf_name, np.ascontiguousarray(weight)

  def write_tokenizer(self, folder: str | Path) -> None:
    """Writes the tokenizer's files and generation_config.json.

    tokenizer.json, tokenizer_config.json and, where the file has one,
    chat_template.jinja.

    Args:
      folder: an existing Hugging Face folder.

    Raises:
      UserError: naming the metadata key, where it is not a byte-level BPE
        whose way of splitting text is known.
    """
    folder, metadata = Path(folder), self._metadata
    _read_tokenizer(metadata).save(str(folder / 'tokenizer.json'))
    ids = self.config.to_hf().items()
    write_json(
      folder / 'generation_config.json',
      {k: v for k, v in ids if k.endswith('_token_id') and v is not None},
    )
    write_json(
      folder / 'tokenizer_config.json',
      {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        **_special_tokens(metadata),
        'add_bos_token': metadata.get('tokenizer.ggml.add_bos_token', False),
        'clean_up_tokenization_spaces': False,
        'model_max_length': self.config.max_positions,
      },
    )
    if template := metadata.get('tokenizer.chat_template'):
      (folder / 'chat_template.jinja').write_text(template, encoding='utf-8')


def open_gguf(path: str | Path) -> GgufModel:
  """Reads the metadata of a GGUF of architecture `llama`; weights stay on disk.

  Raises:
    UserError: where the file is not a GGUF, or naming the metadata key or the
      tensor that asks for something unsupported.
  """
  if not Path(path).is_file():
    raise UserError(f'{path} is not a file; a GGUF file is expected')
  try:
    reader = gguf.GGUFReader(path)
  # What a truncated or foreign file raises depends on where gguf-py stumbles.
  except (OSError, ValueError, IndexError, KeyError) as error:
    raise UserError(
      f'{path}: cannot be read as GGUF ({error}): it is damaged, or of '
      'another kind'
    ) from error
  metadata = _Metadata(path, reader)
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  config = _read_config(metadata, tied='output.weight' not in tensors)
  _check_names(metadata, set(tensors), set(_hf_names(config)))
  return GgufModel(config, metadata, tensors)


def _read_config(metadata: _Metadata, tied: bool) -> LlamaConfig:
  # Every key that is understood is taken out, for what is left may change what
  # the model computes: experts, a sliding window, a scaled RoPE, ...
  metadata.take_only('general.architecture', 'llama')
  metadata.take_only('llama.rope.scaling.type', 'none')
  metadata.take_only('llama.tensor_data_layout', 'Meta AI original pth')
  embed_dim = metadata.take('llama.embedding_length', int)
  heads = metadata.take('llama.attention.head_count', int)
  kv_heads = metadata.take('llama.attention.head_count_kv', int, heads)
  if heads % kv_heads:
    raise metadata.error(
      f'llama.attention.head_count {heads} is not a multiple of '
      f'llama.attention.head_count_kv {kv_heads}'
    )
  head_dim = metadata.take(
    'llama.attention.key_length', int, embed_dim // heads
  )
  metadata.take_only('llama.attention.value_length', head_dim)
  metadata.take_only('llama.rope.dimension_count', head_dim)
  mlp_dim = metadata.take('llama.feed_forward_length', int)
  shape = LayerShape(kv_heads, heads // kv_heads, mlp_dim)
  # Files older than the key llama.vocab_size have the vocabulary alone.
  tokens = metadata.get('tokenizer.ggml.tokens', ())
  config = LlamaConfig(
    vocab_size=metadata.take('llama.vocab_size', int, len(tokens)),
    embed_dim=embed_dim,
    head_dim=head_dim,
    layers=(shape,) * metadata.take('llama.block_count', int),
    norm_eps=metadata.take('llama.attention.layer_norm_rms_epsilon', float),
    rope_theta=metadata.take('llama.rope.freq_base', float, 10000.0),
    tie_embeddings=tied,
    max_positions=metadata.take('llama.context_length', int),
    bos_token_id=metadata.get('tokenizer.ggml.bos_token_id'),
    eos_token_id=metadata.get('tokenizer.ggml.eos_token_id'),
    pad_token_id=metadata.get('tokenizer.ggml.padding_token_id'),
  )
  for key, value in metadata.items():
    if key.startswith('llama.'):
      raise metadata.error(f'{key} is {value!r}, which is not supported')
  return config


def _hf_names(config: LlamaConfig) -> dict[str, str]:
  """GGUF's name of every weight -> Hugging Face's, in the model's order."""
  names = {'token_embd': 'model.embed_tokens'}
  for i in range(len(config.layers)):
    for name, hf_name in _LAYER_TENSORS.items():
      names[f'blk.{i}.{name}'] = f'model.layers.{i}.{hf_name}'
  names['output_norm'] = 'model.norm'
  if not config.tie_embeddings:
    names['output'] = 'lm_head'
  return {f'{k}.weight': f'{v}.weight' for k, v in names.items()}


def _check_names(metadata: _Metadata, found: set[str], known: set[str]) -> None:
  if 'rope_freqs.weight' in found:
    raise metadata.error(
      'tensor rope_freqs.weight holds a RoPE scaling as a table, not as '
      'parameters; start from the original Hugging Face folder'
    )
  if found - known:
    raise metadata.error(
      f'tensor {min(found - known)} is not part of the LLaMA models supported'
    )
  if known - found:
    raise metadata.error(
      f'tensor {min(known - found)} is absent; join the files of a split '
      'model first (llama-gguf-split --merge)'
    )


def _interleaved_to_halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
  """Reorders each head's rows from x0 y0 x1 y1 .. to x0 x1 .. y0 y1 ..

  RoPE rotates the pairs (x, y). GGUF keeps a pair together, Hugging Face keeps
  the first of all pairs, then the second of all.

  Args:
    weight: (heads * head_dim, embed), of query or of KV heads.
  """
  pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
  return pairs.swapaxes(1, 2).reshape(weight.shape)


def _read_tokenizer(metadata: _Metadata) -> tokenizers.Tokenizer:
  for key, supported in _TOKENIZER_KEYS.items():
    value = metadata.get(key)
    if value not in supported:
      raise metadata.error(
        f'{key} is {value!r}, not one of {supported}; take the tokenizer '
        'files from the original Hugging Face folder'
      )
  tokens = metadata['tokenizer.ggml.tokens']
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: i for i, token in enumerate(tokens)},
      merges=[tuple(m.split(' ')) for m in metadata['tokenizer.ggml.merges']],
    )
  )
  tokenizer.pre_tokenizer = _PRE_TOKENIZERS[metadata['tokenizer.ggml.pre']]
  tokenizer.decoder = decoders.ByteLevel()
  # Control and user-defined tokens are found in the text before it is split.
  control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
  kinds = metadata['tokenizer.ggml.token_type']
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(token, normalized=False, special=kind == control)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind in (control, user)
    ]
  )
  if metadata.get('tokenizer.ggml.add_bos_token'):
    bos_id = metadata['tokenizer.ggml.bos_token_id']
    bos = tokens[bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A',
      pair=f'{bos} $A {bos} $B',
      special_tokens=[(bos, bos_id)],
    )
  return tokenizer


def _special_tokens(metadata: _Metadata) -> dict[str, str]:
  """The keys of a tokenizer_config.json that name tokens."""
  tokens = metadata['tokenizer.ggml.tokens']
  ids = {
    'bos_token': metadata.get('tokenizer.ggml.bos_token_id'),
    'eos_token': metadata.get('tokenizer.ggml.eos_token_id'),
    'unk_token': metadata.get('tokenizer.ggml.unknown_token_id'),
    'pad_token': metadata.get('tokenizer.ggml.padding_token_id'),
  }
  return {role: tokens[i] for role, i in ids.items() if i is not None}
