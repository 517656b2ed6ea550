"""A small tokenizer, and the same with one place of its files bent."""

from collections.abc import Callable, Iterator
import json
from pathlib import Path

from lorapr_jax.data.tokenizer import Tokenizer
from tests.errors.bend import Bent, bent_json
from tests.errors.survive import Kind

TOKENIZER = {
  'added_tokens': [
    {
      'id': 0,
      'content': '<s>',
      'special': True,
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
    }
  ],
  'normalizer': {
    'type': 'Replace',
    'pattern': {'Regex': ' +'},
    'content': ' ',
  },
  'pre_tokenizer': {
    'type': 'Split',
    'pattern': {'Regex': '[a-z]+'},
    'behavior': 'Isolated',
    'invert': False,
  },
  'post_processor': {
    'type': 'TemplateProcessing',
    'single': [
      {'SpecialToken': {'id': '<s>', 'type_id': 0}},
      {'Sequence': {'id': 'A', 'type_id': 0}},
    ],
    'pair': [],
    'special_tokens': {'<s>': {'id': '<s>', 'ids': [0], 'tokens': ['<s>']}},
  },
  'decoder': {'type': 'BPEDecoder', 'suffix': '</w>'},
  'model': {
    'type': 'BPE',
    'unk_token': '<s>',
    'vocab': {'<s>': 0, 'a': 1, 'b': 2, 'ab': 3},
    'merges': [['a', 'b']],
  },
}
SETTINGS = {
  'tokenizer_class': 'PreTrainedTokenizerFast',
  'bos_token': '<s>',
  'eos_token': {'content': '<s>', 'lstrip': False},
  'add_bos_token': True,
  'added_tokens_decoder': {'4': {'content': '<a>', 'special': True}},
  'chat_template': [{'name': 'default', 'template': '{{ messages | length }}'}],
}
# Patterns that take for ever on most texts, or are none.
PATTERNS = {
  'a pattern that runs away': '(a+)+$',
  'another that runs away': r'(.*)*\d',
  'no pattern': '(',
  'a long pattern': '(' * 10**4 + ')' * 10**4,
  'a pattern of many': '(a{1000}){1000}',
}


def _tokenizer(file: str) -> Callable[[Path], Path]:
  def make(folder: Path) -> Path:
    values = {'tokenizer.json': TOKENIZER, 'tokenizer_config.json': SETTINGS}
    for name, value in values.items():
      (folder / name).write_text(json.dumps(value))
    return folder / file

  return make


def _bent_tokenizer(good: bytes) -> Iterator[Bent]:
  value = json.loads(good)
  yield from bent_json(value, 100)
  for place in ('normalizer', 'pre_tokenizer'):
    for what, pattern in PATTERNS.items():
      step = value[place] | {'pattern': {'Regex': pattern}}
      content = json.dumps(value | {place: step}).encode()
      yield Bent(f'{place}: {what}', content)


def _tokenize(folder: Path) -> None:
  tokenizer = Tokenizer(folder)
  tokenizer.decode(tokenizer.encode(f'ab <a> b {"a" * 40}b'))
  if tokenizer.has_chat_template:
    tokenizer.encode_chat([{'role': 'user', 'content': 'ab'}])


KINDS = {
  'tokenizer.json': Kind(
    make=_tokenizer('tokenizer.json'),
    bend=_bent_tokenizer,
    read=_tokenize,
    # What the library itself takes.
    accepts=(
      '*.type is *',
      '*: a pattern of many',
      'model.type is gone',
      'model.unk_token is gone',
    ),
  ),
  'tokenizer_config.json': Kind(
    make=_tokenizer('tokenizer_config.json'),
    bend=lambda good: bent_json(json.loads(good), 80),
    read=_tokenize,
    accepts=(
      'add_bos_token is null',
      'add_bos_token is true',
      'added_tokens_decoder is null',
      'chat_template is [[]]',
      'chat_template.0.name is *text*',
      'chat_template.0.template is empty text',
      'eos_token.lstrip is *',
      'tokenizer_class is *',
    ),
  ),
}
