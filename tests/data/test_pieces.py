"""A long text tokenised in pieces has the ids that it has as a whole."""

import json
import random
import tracemalloc

import numpy as np
import pytest
import tokenizers
from tokenizers import (
  AddedToken,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from lorapr_jax.data import packing, pieces, pipeline, tokenizer
from lorapr_jax.data.packing import Counts, Tokens
from lorapr_jax.data.pieces import Pieces
from lorapr_jax.data.sources import parse_spec
from lorapr_jax.data.templates import PLAIN, template_documents
from lorapr_jax.data.tokenizer import Tokenizer

LLAMA3 = tokenizers.Regex(
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPACES = normalizers.Replace(' ', '▁')
# name -> (model, normalizer, pre-tokenizer).
KINDS = {
  'gpt2': ('BPE', None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
  'prefix space': ('BPE', None, pre_tokenizers.ByteLevel()),
  'llama3': (
    'BPE',
    None,
    pre_tokenizers.Sequence([pre_tokenizers.Split(LLAMA3, 'isolated'), BYTES]),
  ),
  # Nothing is split, so that tokens may have spaces and line ends within.
  'bytes': ('BPE', None, BYTES),
  'llama2': (
    'BPE',
    normalizers.Sequence([normalizers.Prepend('▁'), SPACES]),
    None,
  ),
  'metaspace': ('BPE', normalizers.NFKC(), pre_tokenizers.Metaspace()),
  'metaspace whole': ('BPE', None, pre_tokenizers.Metaspace(split=False)),
  'unigram': ('Unigram', normalizers.NFKC(), pre_tokenizers.Metaspace()),
  'stripped': ('BPE', normalizers.Strip(), pre_tokenizers.Whitespace()),
  'bert': (
    'WordPiece',
    normalizers.BertNormalizer(),
    pre_tokenizers.BertPreTokenizer(),
  ),
  'words': ('WordLevel', None, pre_tokenizers.WhitespaceSplit()),
}
ADDED = [
  AddedToken('<|left|>', lstrip=True),
  AddedToken('<|right|>', rstrip=True),
  AddedToken('two words', normalized=False),
  AddedToken('a\nb', normalized=False),
  AddedToken('only', single_word=True),
]
WORDS = [
  *(
    'the',
    'Quick',
    'brown',
    'fox',
    "don't",
    'ﬁne',
    'née',
    '12345',
    '狐狸は',
    '🌊',
  ),
  *('x²', '...', '(a)', 'a\nb', 'only', 'two words', '<|left|>', '<|right|>'),
]
GAPS = [' ', ' ', ' ', '\n', '\n\n', ' \n', '  ', '.\n', '. ', '\t', '', '\r\n']


def write_text(rng, words):
  return ''.join(rng.choice(WORDS) + rng.choice(GAPS) for _ in range(words))


def make(kind):
  """A tokenizer of a kind, trained on such a text."""
  name, normalizer, pre_tokenizer = KINDS[kind]
  unknown = {} if name == 'Unigram' else {'unk_token': '<unk>'}
  made = tokenizers.Tokenizer(getattr(models, name)(**unknown))
  if normalizer:
    made.normalizer = normalizer
  if pre_tokenizer:
    made.pre_tokenizer = pre_tokenizer
  options = {'unk_token': '<unk>'} if name == 'Unigram' else {}
  trainer = getattr(trainers, f'{name}Trainer'.replace('BPE', 'Bpe'))(
    vocab_size=500, special_tokens=['<unk>'], show_progress=False, **options
  )
  if kind == 'llama2':  # SentencePiece learns from words.
    made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.train_from_iterator([write_text(random.Random(1), 400)], trainer)
  if kind == 'llama2':
    made.pre_tokenizer = None
  made.add_tokens(ADDED)
  return made


@pytest.fixture
def small(monkeypatch):
  """Pieces of a few lines."""
  monkeypatch.setattr(pieces, '_SIZE', 100)
  monkeypatch.setattr(pieces, '_AROUND', 30)
  monkeypatch.setattr(pieces, '_GROUP', 3)
  monkeypatch.setattr(tokenizer, 'LONG', 1000)


@pytest.mark.parametrize('kind', KINDS)
def test_the_ids_of_the_pieces_are_those_of_the_whole(small, kind):
  made = make(kind)
  rng = random.Random(2)
  cut = Pieces(made)
  numbers = []
  for _ in range(5):
    text = write_text(rng, 800)
    whole = made.encode(text, add_special_tokens=False).ids
    # In parts of any sizes, as a file is read.
    ends = sorted(rng.choices(range(len(text)), k=9))
    parts = [text[i:j] for i, j in zip([0, *ends], [*ends, None], strict=True)]
    found = list(cut.encode(parts))
    assert np.concatenate(found).tolist() == whole
    numbers.append(len(found))
  assert min(numbers) > 1


def test_a_text_that_cannot_be_cut_is_one_piece_and_its_memory_is_told(
  small, monkeypatch, caplog
):
  monkeypatch.setattr(pieces, '_MANY', 20_000)
  made = make('gpt2')
  text = 'fox' * 10_000
  found = list(Pieces(made).encode([text]))
  assert len(found) == 1
  assert found[0].tolist() == made.encode(text, add_special_tokens=False).ids
  assert 1 <= len(caplog.messages) <= 2
  assert 'no place was found at which a text of 1' in caplog.messages[0]


@pytest.fixture
def model(tmp_path, monkeypatch):
  """A folder with a tokenizer that puts BOS in front; its oracle."""
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  made = make('llama3')
  made.add_special_tokens(['<s>', '</s>'])
  bos = made.token_to_id('<s>')
  made.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', bos)]
  )
  made.decoder = decoders.ByteLevel()
  made.save(str(tmp_path / 'tokenizer.json'))
  settings = {'bos_token': '<s>', 'eos_token': '</s>'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  return Tokenizer(tmp_path), made


@pytest.mark.parametrize('name', ['a.txt', 'a.txt?lines', 'a.jsonl'])
@pytest.mark.parametrize('how', ['eval', 'concatenate', 'documents'])
def test_windows_of_long_texts_are_those_of_whole_ones(
  small, model, tmp_path, how, name
):
  found, oracle = model
  rng = random.Random(3)
  texts = ['short', write_text(rng, 900), write_text(rng, 9), 'ab ' * 900]
  if '.txt' in name:
    (tmp_path / 'a.txt').write_text(texts[1], newline='')
    text = texts[1].replace('\r\n', '\n')
    lines = [line.strip() for line in text.split('\n')]
    texts = ['\n\n'.join(filter(None, lines)) if 'lines' in name else text]
  else:
    rows = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
    (tmp_path / name).write_text(rows)
  spec, vocab = f'file:{tmp_path}/{name}', oracle.get_vocab_size()
  eos = oracle.token_to_id('</s>')
  whole = [[*oracle.encode(text).ids, eos] for text in texts]
  if how == 'eval':
    whole = [oracle.encode('\n\n'.join(texts)).ids]
    windows = {'tokens': pipeline.evaluation_windows(spec, found, 16, vocab)}
  else:
    [part] = pipeline.training_windows(spec, found, 16, vocab, pack=how)
    windows = part.windows
  if how == 'documents':
    ids = [Tokens(np.array(ids), np.ones(len(ids), np.uint8)) for ids in whole]
    rows = list(packing.fill(ids, 16, Counts()))
    for key, array in windows.items():
      np.testing.assert_array_equal(array, [row[key] for row in rows])
  else:
    flat = np.concatenate(whole)
    flat = flat[: len(flat) - len(flat) % 16]
    assert windows['tokens'].ravel().tolist() == flat.tolist()


def test_a_long_file_takes_little_memory_and_is_not_read_on(
  model, tmp_path, monkeypatch
):
  monkeypatch.setattr(pieces, '_SIZE', 2**11)
  monkeypatch.setattr('lorapr_jax.data.templates.LONG', 2**14)
  line = write_text(random.Random(4), 20).replace('\n', ' ') + '\n'
  content = line.encode() * (2**18 // len(line.encode()))
  (tmp_path / 'a.txt').write_bytes(content)
  (tmp_path / 'b.txt').write_bytes(content + b'\xff')
  found, oracle = model

  # What comes after the tokens that are wanted is not looked at.
  [part] = pipeline.training_windows(
    f'file:{tmp_path}/b.txt',
    found,
    16,
    oracle.get_vocab_size(),
    pack='concatenate',
    max_tokens=8_000,
  )
  assert part.windows['tokens'].size == 8_000
  tracemalloc.start()
  documents = template_documents(
    parse_spec(f'file:{tmp_path}/a.txt'), PLAIN, found
  )
  parts = packing.tokenise(documents, found, whole=False)
  assert sum(len(tokens.ids) for tokens in parts) > 50_000
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 5 * len(content)
