"""The tokenizer in a GGUF's metadata, as Hugging Face's files.

The other direction: gguf/vocabulary.py.
"""

from pathlib import Path

import gguf
import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from lorapr_jax.errors import short
from lorapr_jax.gguf.format import Metadata
from lorapr_jax.runtime.files import write_json

_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _words_and(digits: str) -> pre_tokenizers.Sequence:
  """Words, digits, punctuation, line ends and spaces are split apart."""
  split = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + '|'
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(split), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


# tokenizer.ggml.pre -> how text is split before the merges. The first name of
# equal ones is written.
PRE_TOKENIZERS = {
  'gpt-2': _BYTE_LEVEL,
  'default': _BYTE_LEVEL,
  'smollm': pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]
  ),
  'llama-bpe': _words_and(r'\p{N}{1,3}'),
  'dbrx': _words_and(r'\p{N}{1,3}'),
  'qwen2': _words_and(r'\p{N}'),
}
# With it, a word of the vocabulary is one token whatever the merges say, and
# BOS comes first unless the file says otherwise.
LLAMA3 = 'llama-bpe'
# With it, a folder's tokenizer brings characters into Unicode's form NFC.
COMPOSED = 'qwen2'
# The names of special tokens at Hugging Face -> the keys of their ids here.
ROLES = {
  'bos_token': 'tokenizer.ggml.bos_token_id',
  'eos_token': 'tokenizer.ggml.eos_token_id',
  'unk_token': 'tokenizer.ggml.unknown_token_id',
  'pad_token': 'tokenizer.ggml.padding_token_id',
}
TOKENS = 'tokenizer.ggml.tokens'
_KINDS = 'tokenizer.ggml.token_type'
_MERGES = 'tokenizer.ggml.merges'
_TEMPLATE = 'tokenizer.chat_template'
_SUPPORTED = {
  'tokenizer.ggml.model': ('gpt2',),
  'tokenizer.ggml.pre': tuple(PRE_TOKENIZERS),
  'tokenizer.ggml.add_bos_token': (None, False, True),
  'tokenizer.ggml.add_eos_token': (None, False),
  'tokenizer.ggml.add_space_prefix': (None, False),
}


def write_tokenizer_files(
  metadata: Metadata, folder: Path, max_positions: int
) -> None:
  """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

  Raises:
    UserError: naming the metadata key, where it is not a byte-level BPE whose
      way of splitting text is known, or contradicts another.
  """
  text = _read_tokenizer(metadata).to_str(pretty=True)
  (folder / 'tokenizer.json').write_text(text, encoding='utf-8')
  tokens = metadata[TOKENS]
  write_json(
    folder / 'tokenizer_config.json',
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      **{
        role: tokens[metadata[key]]
        for role, key in ROLES.items()
        if key in metadata
      },
      'add_bos_token': _adds_bos(metadata),
      'clean_up_tokenization_spaces': False,
      'model_max_length': max_positions,
    },
  )
  template = metadata.get(_TEMPLATE)
  if not isinstance(template, str | None):
    raise metadata.error(f'{_TEMPLATE} is {short(repr(template))}, not a text')
  if template:
    (folder / 'chat_template.jinja').write_text(template, encoding='utf-8')


def _adds_bos(metadata: Metadata) -> bool:
  default = metadata['tokenizer.ggml.pre'] == LLAMA3
  return bool(metadata.get('tokenizer.ggml.add_bos_token', default))


def _read_tokenizer(metadata: Metadata) -> tokenizers.Tokenizer:
  for key, supported in _SUPPORTED.items():
    value = metadata.get(key)
    if value not in supported:
      raise metadata.error(
        f'{key} is {short(repr(value))}, not one of {supported}; take the '
        'tokenizer files from the original Hugging Face folder'
      )
  tokens, kinds, vocab = _read_tokens(metadata)
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=_read_merges(metadata, vocab),
      ignore_merges=metadata['tokenizer.ggml.pre'] == LLAMA3,
    )
  )
  tokenizer.pre_tokenizer = PRE_TOKENIZERS[metadata['tokenizer.ggml.pre']]
  if metadata['tokenizer.ggml.pre'] == COMPOSED:
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.decoder = decoders.ByteLevel()
  # Control and user-defined tokens are found in the text before it is split.
  control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(token, normalized=False, special=kind == control)
      for token, kind in zip(tokens, kinds, strict=True)
      if kind in (control, user)
    ]
  )
  if _adds_bos(metadata):
    bos_id = metadata['tokenizer.ggml.bos_token_id']
    bos = tokens[bos_id]
    if bos.startswith('$') or ':' in bos:  # Signs of a template's own.
      raise metadata.error(f'BOS is {short(repr(bos))}, which is not supported')
    tokenizer.post_processor = processors.TemplateProcessing(
      single=[bos, '$A'],
      pair=[bos, '$A', bos, '$B'],
      special_tokens=[(bos, bos_id)],
    )
  return tokenizer


def _read_tokens(
  metadata: Metadata,
) -> tuple[list[str], list[int], dict[str, int]]:
  """The tokens in the order of their ids, their kinds, and the ids in use."""
  tokens, kinds = metadata.list_of(TOKENS, str), metadata.list_of(_KINDS, int)
  if len(tokens) != len(kinds):
    raise metadata.error(
      f'{TOKENS} has {len(tokens)} entries, {_KINDS} {len(kinds)}'
    )
  used = [kind != gguf.TokenType.UNUSED for kind in kinds]
  vocab = {token: i for i, token in enumerate(tokens) if used[i]}
  if len(vocab) != sum(used):
    raise metadata.error(f'{TOKENS} has a token twice')
  for key in ROLES.values():
    i = metadata.get(key)
    if i is not None and (i >= len(tokens) or not used[i]):
      raise metadata.error(f'{key} is {i}, which {TOKENS} has no token for')
  return tokens, kinds, vocab


def _read_merges(
  metadata: Metadata, vocab: dict[str, int]
) -> list[tuple[str, str]]:
  merges = [tuple(m.split(' ')) for m in metadata.list_of(_MERGES, str)]
  for merge in merges:
    if len(merge) != 2 or not {*merge, ''.join(merge)} <= vocab.keys():
      found = short(repr(' '.join(merge)))
      raise metadata.error(f'{_MERGES} has {found}, no two tokens of {TOKENS}')
  return merges
