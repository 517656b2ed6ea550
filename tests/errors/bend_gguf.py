"""A small GGUF in parts, and the same with one part bent.

gguf-py writes no file that contradicts itself, so the bytes are put together
here.
"""

from collections.abc import Iterator
import random
import struct
from typing import Any

from tests.errors.bend import Bent, bent_bytes

_U8, _I32, _U32, _F32, _BOOL, _TEXT, _LIST, _U64 = 0, 5, 4, 6, 7, 8, 9, 10


def _text(content: bytes) -> bytes:
  return struct.pack('<Q', len(content)) + content


def typed(value: Any) -> bytes:
  """A value behind its type; bytes stand for themselves."""
  match value:
    case bytes():
      return value
    case bool():
      return struct.pack('<I?', _BOOL, value)
    case int():
      return struct.pack('<II', _U32, value)
    case float():
      return struct.pack('<If', _F32, value)
    case str():
      return struct.pack('<I', _TEXT) + _text(value.encode())
  inner = [typed(x) for x in value]
  return (
    struct.pack('<I', _LIST)
    + (inner[0][:4] if inner else struct.pack('<I', _U32))
    + struct.pack('<Q', len(inner))
    + b''.join(x[4:] for x in inner)
  )


METADATA = {
  'general.architecture': 'llama',
  'llama.block_count': 1,
  'llama.context_length': 64,
  'llama.embedding_length': 4,
  'llama.feed_forward_length': 6,
  'llama.attention.head_count': 2,
  'llama.attention.head_count_kv': 1,
  'llama.attention.key_length': 2,
  'llama.attention.value_length': 2,
  'llama.attention.layer_norm_rms_epsilon': 1e-5,
  'llama.rope.dimension_count': 2,
  'llama.rope.freq_base': 10000.0,
  'llama.vocab_size': 5,
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'gpt-2',
  'tokenizer.ggml.tokens': ['<s>', '</s>', 'a', 'b', 'ab'],
  'tokenizer.ggml.token_type': [3, 3, 1, 1, 1],
  'tokenizer.ggml.merges': ['a b'],
  'tokenizer.ggml.bos_token_id': 0,
  'tokenizer.ggml.eos_token_id': 1,
  'tokenizer.ggml.add_bos_token': True,
  'tokenizer.chat_template': 'text',
  'lorapr_jax.eos_token_ids': [1],
  'lorapr_jax.rope_scaling.factor': 8.0,
  'lorapr_jax.rope_scaling.low_freq_factor': 1.0,
  'lorapr_jax.rope_scaling.high_freq_factor': 4.0,
  'lorapr_jax.rope_scaling.original_max_position_embeddings': 64,
}
# The sizes of a tensor as the file has them: of a row first.
TENSORS = {
  'token_embd.weight': (4, 5),
  'output_norm.weight': (4,),
  'rope_freqs.weight': (1,),
  'blk.0.attn_norm.weight': (4,),
  'blk.0.attn_q.weight': (4, 4),
  'blk.0.attn_k.weight': (4, 2),
  'blk.0.attn_v.weight': (4, 2),
  'blk.0.attn_output.weight': (4, 4),
  'blk.0.ffn_norm.weight': (4,),
  'blk.0.ffn_gate.weight': (4, 6),
  'blk.0.ffn_up.weight': (4, 6),
  'blk.0.ffn_down.weight': (6, 4),
}
# What is put in the place of a value.
_VALUES = {
  'true': True,
  '0': 0,
  '3': 3,
  '1000': 1000,
  '2**31': 2**31,
  '2**32 - 1': 2**32 - 1,
  '-1': struct.pack('<Ii', _I32, -1),
  '2**63': struct.pack('<IQ', _U64, 2**63),
  '2.5': 2.5,
  'not a number': float('nan'),
  'infinite': float('inf'),
  'an empty text': '',
  'a text': 'x:²',
  'a text that is not UTF-8': struct.pack('<I', _TEXT) + _text(b'\xff\xfe'),
  'a text of 2**62 bytes': struct.pack('<IQ', _TEXT, 2**62),
  'an empty list': [],
  'a list of numbers': [1, 0, 2**31],
  'a list of texts': ['a', 'b', 'ab', '', 'a'],
  'a list of 2**60 bytes': struct.pack('<IIQ', _LIST, _U8, 2**60),
  'a list of 2**60 texts': struct.pack('<IIQ', _LIST, _TEXT, 2**60),
  'a list of lists, 5,000 deep': (
    struct.pack('<I', _LIST) + 5000 * struct.pack('<IQ', _LIST, 1)
  ),
  'of an unknown type': struct.pack('<II', 99, 0),
}


def make_gguf(
  metadata: dict[str, Any] | None = None,
  tensors: dict[str, Any] | None = None,
  *,
  counts: tuple[int, int] | None = None,
  version: int = 3,
  more: bytes = b'',
) -> tuple[bytes, bytes]:
  """A header, and the weights behind it.

  Args:
    metadata: by key, in place of METADATA.
    tensors: sizes by name, in place of TENSORS; or (sizes, type, offset).
    counts: of the tensors and of the keys, in place of the true ones.
    version: of the format.
    more: stands between the metadata and the tensors.
  """
  metadata = METADATA if metadata is None else metadata
  tensors = TENSORS if tensors is None else tensors
  counts = counts or (len(tensors), len(metadata))
  header = struct.pack('<4sIQQ', b'GGUF', version, *counts)
  for key, value in metadata.items():
    header += _text(key.encode()) + typed(value)
  header += more
  for i, (name, what) in enumerate(tensors.items()):
    sizes, kind, at = what if isinstance(what[0], tuple) else (what, 0, 128 * i)
    header += _text(name.encode('latin-1'))
    header += struct.pack(f'<I{len(sizes)}QIQ', len(sizes), *sizes, kind, at)
  header += bytes(-len(header) % 32)
  one = struct.pack('<f', 1.0)
  return header, 32 * len(TENSORS) * one


def bent_gguf() -> Iterator[Bent]:
  """Files whose metadata lie, or contradict the tensors or each other."""
  choices = [(key, what) for key in METADATA for what in _VALUES]
  for key, what in random.Random(0).sample(choices, 150):
    parts = make_gguf(METADATA | {key: _VALUES[what]})
    yield Bent(f'{key} is {what}', b''.join(parts))
  for key in METADATA:
    others = {k: v for k, v in METADATA.items() if k != key}
    yield Bent(f'{key} is gone', b''.join(make_gguf(others)))
  for did, arguments in _contradictions():
    yield Bent(did, b''.join(make_gguf(**arguments)))
  header, weights = make_gguf()
  for did, content in bent_bytes(header, 60):
    yield Bent(did, content if 'cut' in did else content + weights)


def _contradictions() -> Iterator[tuple[str, dict[str, Any]]]:
  """What is wrong with a file, and the arguments of `make_gguf`."""
  key = 'tokenizer.ggml'
  for did, changes in {
    'a token too few': {f'{key}.tokens': ['<s>', '</s>', 'a', 'b']},
    'a kind too many': {f'{key}.token_type': [3, 3, 1, 1, 1, 1]},
    'a token twice': {f'{key}.tokens': ['<s>', '</s>', 'a', 'ab', 'ab']},
    'a merge of one': {f'{key}.merges': ['ab']},
    'a merge of strangers': {f'{key}.merges': ['a c']},
    'a merge into a stranger': {f'{key}.merges': ['b a']},
    'BOS is not in use': {f'{key}.token_type': [5, 3, 1, 1, 1]},
    'an end behind the vocabulary': {'lorapr_jax.eos_token_ids': [1, 5]},
    'RoPE turns backwards': {
      'lorapr_jax.rope_scaling.low_freq_factor': 4.0,
    },
  }.items():
    yield did, {'metadata': METADATA | changes}
  down = 'blk.0.ffn_down.weight'
  for did, what in {
    'no sizes': (),
    'one size': (24,),
    'sizes the other way round': (4, 6),
    'three sizes': (6, 4, 1),
    'five sizes': (6, 4, 1, 1, 1),
    'a size of 0': (0, 4),
    'sizes of 2**63': (2**63, 2**63),
    'sizes whose product is 24 in 64 bits': (2**61 + 3, 8),
    'an unknown type': ((6, 4), 99, 0),
    'blocks that rows do not divide into': ((6, 4), 8, 0),
    'a type for integers': ((6, 4), 26, 0),
    'a beginning behind the end': ((6, 4), 0, 2**40),
    'a beginning of 2**64 - 1': ((6, 4), 0, 2**64 - 1),
  }.items():
    yield (
      f'a tensor has {did}',
      {'tensors': TENSORS | {down: what or ((), 0, 0)}},
    )
  yield 'a name is not UTF-8', {'tensors': TENSORS | {'\xff': (4,)}}
  yield 'a tensor is unknown', {'tensors': TENSORS | {'x' * 10**5: (4,)}}
  yield 'a layer too many', {'tensors': TENSORS | {'blk.1.ffn_up.weight': (4,)}}
  for counts in ((2**60, 27), (12, 2**60), (0, 27), (11, 27), (12, 26)):
    yield f'counts of {counts}', {'counts': counts}
  for version in (0, 1, 4, 2**31, 3 << 24):
    yield f'version {version}', {'version': version}
  yield 'one more key', {'more': _text(b'key')}
