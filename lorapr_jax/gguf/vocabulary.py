"""A Hugging Face folder's tokenizer as a GGUF's metadata.

llama.cpp has its own tokenizers: what a folder does must be one of those.
The other direction: gguf/tokenizer.py.
"""

import json
from pathlib import Path
import re
from typing import Any

import gguf
import tokenizers

from lorapr_jax.data.tokenizer_files import (
  chat_template_of,
  read_fast,
  settings_of,
)
from lorapr_jax.errors import UserError
from lorapr_jax.gguf.sentencepiece import merge_scores, read_pieces
from lorapr_jax.gguf.tokenizer import COMPOSED, LLAMA3, PRE_TOKENIZERS, ROLES
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.runtime.paths import tokenizer_folder
from lorapr_jax.runtime.rust import rust_errors

_Kind = gguf.TokenType
_SPACE = '▁'
_BYTE = re.compile('<0x[0-9A-F]{2}>')
# Gemma's.
_AT_SPACES = {
  'type': 'Split',
  'pattern': {'String': ' '},
  'behavior': 'MergedWithPrevious',
  'invert': False,
}
# The score of a token that is no piece of the model.
_NO_SCORE = -1000.0


def vocabulary(base: Path | None, config: ModelConfig) -> dict[str, Any]:
  """The keys tokenizer.* of the metadata.

  Byte-level BPE whose way of splitting text is in PRE_TOKENIZERS (Llama 3,
  SmolLM2, GPT-2, Qwen2), and SentencePiece's BPE with byte fallback (Llama 1
  and 2, Gemma),
  with the scores of tokenizer.model if the folder has it. Ids without a token
  become unused ones. The ids of BOS, EOS and the like are the tokenizer's or,
  where it has none, the config's.

  llama.cpp does not know tokens that swallow the spaces around them, and leaves
  characters as they are where Qwen2's tokenizer brings them into NFC. It puts
  SentencePiece's space in front of every text, and after special tokens, where
  some folders leave it out.

  Args:
    base: the folder, or None for a model without a tokenizer.
    config: of the model; its vocabulary may be larger than the tokenizer's.

  Raises:
    UserError: naming what llama.cpp has no tokenizer for.
  """
  eos = config.eos_token_id
  ids = {
    'bos_token': config.bos_token_id,
    'eos_token': eos[0] if isinstance(eos, tuple) else eos,
    'pad_token': config.pad_token_id,
  }
  if base is None:
    return {'tokenizer.ggml.model': 'none', **_id_keys(ids, config)}
  if not (base / 'tokenizer.json').is_file():
    raise UserError(
      f'{base}/tokenizer.json is absent; write it with transformers: '
      'AutoTokenizer.from_pretrained(folder).save_pretrained(folder)'
    )
  base = tokenizer_folder(base)
  file = base / 'tokenizer.json'
  try:
    with rust_errors():
      tokenizer = read_fast(file)
  except UserError:
    raise
  # tokenizers raises no narrower type.
  except Exception as error:
    raise UserError(f'{file} cannot be read: {error}') from None
  settings = settings_of(base)
  for role in ROLES:
    token = settings.get(role)
    found = tokenizer.token_to_id(token) if token else None
    ids[role] = ids.get(role) if found is None else found
  adds_bos, bos = _bos(file, tokenizer, settings, ids['bos_token'])
  ids['bos_token'] = bos
  data = json.loads(tokenizer.to_str())
  keys = {
    **_model(file, data, config.vocab_size, ids['unk_token']),
    **_id_keys(ids, config),
    'tokenizer.ggml.add_bos_token': adds_bos,
  }
  if template := chat_template_of(base, settings):
    keys['tokenizer.chat_template'] = template
  return keys


def _id_keys(ids: dict[str, int | None], config: ModelConfig) -> dict[str, int]:
  # Old config.json files have -1 for no token.
  known = range(config.vocab_size)
  return {ROLES[role]: i for role, i in ids.items() if i in known}


def _bos(
  file: Path,
  tokenizer: tokenizers.Tokenizer,
  settings: dict[str, Any],
  bos_id: int | None,
) -> tuple[bool, int | None]:
  """Whether texts start with BOS, and its id."""
  tokenizer.no_padding()
  tokenizer.no_truncation()
  bare = tokenizer.encode('a', add_special_tokens=False).ids
  ids = tokenizer.encode('a').ids
  adds = ids != bare
  if adds and ids[1:] != bare:
    raise UserError(
      f'{file}: it adds {len(ids) - len(bare)} tokens to a text; llama.cpp '
      'is only told of BOS in front'
    )
  if settings.get('add_eos_token'):
    raise UserError(
      f'{file.parent}/tokenizer_config.json: add_eos_token is not supported'
    )
  bos_id = ids[0] if adds else bos_id
  adds = settings.get('add_bos_token', adds)
  if adds and bos_id is None:
    raise UserError(f'{file}: texts start with BOS, but no token has that role')
  return bool(adds), bos_id


def _model(
  file: Path, data: dict[str, Any], size: int, unknown: int | None
) -> dict[str, Any]:
  """The keys of the model: its kind, tokens, merges or scores."""
  model = data['model']
  odd = [
    key
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix')
    if model.get(key)
  ]
  if model['type'] != 'BPE' or odd:
    what = f'{odd[0]} {model[odd[0]]!r}' if odd else f'type {model["type"]}'
    raise _unsupported(file, f'a model of {what}')
  by_id = {i: token for token, i in model['vocab'].items()}
  by_id |= {token['id']: token['content'] for token in data['added_tokens']}
  if max(by_id) >= size:
    raise UserError(
      f'{file} has ids up to {max(by_id)}, but the model has {size} '
      'embeddings: the tokenizer is not of this model'
    )
  tokens = [by_id.get(i, f'[PAD{i}]') for i in range(size)]
  kinds = [_Kind.NORMAL if i in by_id else _Kind.UNUSED for i in range(size)]
  for token in data['added_tokens']:
    special = token['special']
    kinds[token['id']] = _Kind.CONTROL if special else _Kind.USER_DEFINED
  if model['byte_fallback']:
    if unknown is not None:
      kinds[unknown] = _Kind.UNKNOWN
    return _sentencepiece(file, data, tokens, kinds)
  return _byte_level(file, data, tokens, kinds)


def _unsupported(file: Path, what: str) -> UserError:
  return UserError(
    f'{file} has {what}, for which llama.cpp has no tokenizer here'
  )


def _byte_level(
  file: Path, data: dict[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
  split = _comparable(data['pre_tokenizer'])
  names = [
    name
    for name, known in PRE_TOKENIZERS.items()
    if _comparable(json.loads(known.__getstate__())) == split
  ]
  if not names:
    split = json.dumps(data['pre_tokenizer'])
    raise _unsupported(file, f'a pre_tokenizer {split}')
  ignores = data['model']['ignore_merges']
  name = next((x for x in names if (x == LLAMA3) == ignores), None)
  if name is None:
    raise _unsupported(file, f'ignore_merges {ignores} with {names[0]}')
  normalizer = data['normalizer']
  if normalizer and (name, normalizer) != (COMPOSED, {'type': 'NFC'}):
    raise _unsupported(file, f'a normalizer {json.dumps(normalizer)}')
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': name,
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [int(kind) for kind in kinds],
    'tokenizer.ggml.merges': [' '.join(m) for m in data['model']['merges']],
    'tokenizer.ggml.add_space_prefix': False,
  }


def _comparable(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
  """A list of steps, without what changes no id."""
  steps = (pre_tokenizer or {}).get('pretokenizers', [pre_tokenizer or {}])
  return [
    {key: x for key, x in step.items() if key != 'trim_offsets'}
    for step in steps
  ]


def _sentencepiece(
  file: Path, data: dict[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
  prefix = _space_prefix(file, data)
  for i, token in enumerate(tokens):
    if _BYTE.fullmatch(token):
      kinds[i] = _Kind.BYTE
  if kinds.count(_Kind.BYTE) != 256:
    raise _unsupported(file, 'no token for some bytes')
  pieces = [
    token
    for token, kind in zip(tokens, kinds, strict=True)
    if kind == _Kind.NORMAL
  ]
  scores = [
    _NO_SCORE if kind in (_Kind.USER_DEFINED, _Kind.UNUSED) else 0.0
    for kind in kinds
  ]
  spm = file.parent / 'tokenizer.model'
  if spm.is_file():
    for i, piece in enumerate(read_pieces(spm)):
      if i >= len(tokens) or piece.piece != tokens[i]:
        raise UserError(f'{spm} and {file} differ: token {i}, {piece.piece!r}')
      scores[i], kinds[i] = piece.score, piece.type
  else:
    known = merge_scores(file, pieces, data['model']['merges'])
    for i, token in enumerate(tokens):
      scores[i] = known.get(token, scores[i])
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.pre': 'default',
    # llama.cpp looks for these in text whose spaces are spaces.
    'tokenizer.ggml.tokens': [
      token.replace(_SPACE, ' ') if kind == _Kind.USER_DEFINED else token
      for token, kind in zip(tokens, kinds, strict=True)
    ],
    'tokenizer.ggml.scores': scores,
    'tokenizer.ggml.token_type': [int(kind) for kind in kinds],
    'tokenizer.ggml.add_space_prefix': prefix,
  }


def _space_prefix(file: Path, data: dict[str, Any]) -> bool:
  """Whether a space is put in front of a text.

  Spaces become ▁ in the normalizer, or in a pre_tokenizer Metaspace that does
  not split there.
  """
  normalizer, split = data['normalizer'], data['pre_tokenizer']
  if split == _AT_SPACES:  # There are none left.
    split = None
  replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': _SPACE}
  prepend = {'type': 'Prepend', 'prepend': _SPACE}
  steps = (normalizer or {}).get('normalizers', [normalizer])
  if split is None and steps in ([replace], [prepend, replace]):
    return prepend in steps
  metaspace = {'type': 'Metaspace', 'replacement': _SPACE, 'split': False}
  if normalizer is None and split and metaspace.items() <= split.items():
    return split['prepend_scheme'] != 'never'
  raise _unsupported(
    file, f'{json.dumps({"normalizer": normalizer, "pre_tokenizer": split})}'
  )
