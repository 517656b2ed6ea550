"""Documents to windows on disk: what shares a window, and what is cut."""

import json

import numpy as np
import pytest

from lorapr_jax.data import packing, pipeline
from lorapr_jax.data.packing import Counts, Tokens
from lorapr_jax.data.templates import Template
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError

VOCAB = 300


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """The folder of cached windows, of this test alone."""
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'windows'


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory, add_tokenizer):
  folder = tmp_path_factory.mktemp('tokenizer')
  return Tokenizer(add_tokenizer(folder, 'chat_template.jinja'))


def fill(sizes, seq_len):
  """The windows of documents 1 1 1, 2 2, ... of these sizes; the counts."""
  documents = [
    Tokens(np.full(size, i, np.int32), np.ones(size, np.uint8))
    for i, size in enumerate(sizes, 1)
  ]
  counts = Counts()
  rows = list(packing.fill(iter(documents), seq_len, counts))
  windows = {
    name: np.array([row[name] for row in rows]).tolist() for name in rows[0]
  }
  return windows, counts


def test_documents_share_a_window_literally():
  windows, counts = fill([3, 2, 2], 5)
  assert windows == {
    'tokens': [[1, 1, 1, 2, 2], [3, 3, 0, 0, 0]],
    'segments': [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]],
    'weights': [[0, 1, 1, 0, 1], [0, 1, 0, 0, 0]],
  }
  assert (counts.cut, counts.padding) == (0, 3)


def test_a_long_document_goes_on_in_windows_of_its_own():
  windows, counts = fill([9, 3], 4)
  assert windows == {
    'tokens': [[1, 1, 1, 1], [1, 1, 1, 1], [1, 2, 2, 2]],
    'segments': [[1, 1, 1, 1], [1, 1, 1, 1], [1, 2, 2, 2]],
    'weights': [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]],
  }
  assert (counts.cut, counts.padding) == (1, 0)


def test_a_document_goes_where_it_fits_best():
  windows, _ = fill([5, 6, 2], 8)
  assert windows['tokens'][0] == [2] * 6 + [3] * 2


def test_filling_keeps_every_token_once_and_pads_little():
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 150, 2000)
  windows, counts = fill(sizes, 128)
  tokens, segments = np.array(windows['tokens']), np.array(windows['segments'])
  assert np.bincount(tokens[segments > 0])[1:].tolist() == sizes.tolist()
  assert counts.padding == (segments == 0).sum() < 0.05 * tokens.size
  assert counts.cut == (sizes > 128).sum()
  # Segments count up by one, and padding is at the end.
  for row in segments:
    steps = np.diff(row[row > 0])
    assert row[0] == 1 and set(steps) <= {0, 1}
    assert not np.any(row[np.count_nonzero(row) :])


def test_streams_are_not_read_ahead_of_the_windows():
  """A corpus larger than memory can be packed."""
  read = 0

  def documents():
    nonlocal read
    while True:
      read += 1
      yield Tokens(np.full(7, read, np.int32), np.ones(7, np.uint8))

  windows = packing.fill(documents(), 10, Counts())
  for _ in range(20):
    next(windows)
  assert read < 100


def save_lines(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return f'file:{path}'


@pytest.fixture
def corpus(tmp_path):
  texts = ['the fox', 'the quick brown fox jumps over the lazy dog', 'dog']
  return save_lines(tmp_path / 'c.jsonl', [{'text': t} for t in texts])


def pack(spec, tokenizer, seq_len=16, vocab_size=VOCAB, **options):
  options = {'pack': 'documents', **options}
  parts = pipeline.training_windows(
    spec, tokenizer, seq_len, vocab_size, **options
  )
  return [part.windows for part in parts]


def documents_of(windows):
  """The ids of each segment, and which of them are targets."""
  for tokens, segments, weights in zip(*windows.values(), strict=True):
    for number in range(1, segments.max() + 1):
      here = segments == number
      yield tokens[here].tolist(), weights[here].tolist()


def test_documents_on_disk_are_whole_and_end_with_eos(tokenizer, corpus, cache):
  [windows] = pack(corpus, tokenizer)
  assert list(windows) == ['tokens', 'segments', 'weights']
  assert all(isinstance(x.base, np.memmap) for x in windows.values())
  texts = ['the fox', 'the quick brown fox jumps over the lazy dog', 'dog']
  expected = [[*tokenizer.encode(text), 0] for text in texts]
  found = sorted(ids for ids, _ in documents_of(windows))
  assert found == sorted(expected)
  for ids, weights in documents_of(windows):
    assert weights == [0] + [1] * (len(ids) - 1)
  assert len(list(cache.iterdir())) == 1


def test_documents_longer_than_a_window_are_counted(tokenizer, corpus, caplog):
  pack(corpus, tokenizer, seq_len=8)
  message = (
    f'{corpus}: 1 of 3 documents are longer than a window of 8 tokens and go '
    'on in another, without what came before'
  )
  assert message in caplog.messages
  # From the cache, too.
  caplog.clear()
  pack(corpus, tokenizer, seq_len=8)
  assert message in caplog.messages


def test_padding_is_counted_where_it_is_much(tokenizer, corpus, caplog):
  [windows] = pack(corpus, tokenizer, seq_len=60)
  padding = (windows['segments'] == 0).sum()
  assert padding > 6
  assert caplog.messages == [
    f'{corpus}: {padding} of 60 positions are padding, since documents stay '
    'whole; data.packing=concatenate has none'
  ]


def test_the_bound_ends_the_reading(tokenizer, tmp_path, caplog):
  text = 'the lazy dog'
  size = len(tokenizer.encode(text)) + 1
  spec = save_lines(tmp_path / 'many.jsonl', [{'text': text}] * 50)
  for most, count in ((0, 50), (10 * size, 10), (10 * size + 1, 11)):
    [windows] = pack(spec, tokenizer, max_tokens=most)
    assert len(list(documents_of(windows))) == count
  [flat] = pack(spec, tokenizer, pack='concatenate', max_tokens=32)
  assert flat['tokens'].size == 32
  ended = [m for m in caplog.messages if 'padding' not in m]
  assert ended == [
    f'{spec}: reading ended after {most} tokens (data.max_tokens)'
    for most in (10 * size, 10 * size + 1, 32)
  ]
  # One long document is cut there too.
  (tmp_path / 'long.txt').write_text(f'{text} ' * 500)
  [flat] = pack(
    f'file:{tmp_path}/long.txt', tokenizer, pack='concatenate', max_tokens=64
  )
  assert flat['tokens'].size == 64


def test_the_cache_knows_the_settings(tokenizer, tmp_path, cache):
  records = [{'a': 'the fox', 'b': 'the dog', 'text': 'the lazy dog'}] * 20
  spec = save_lines(tmp_path / 'r.jsonl', records)
  template = Template('{{a}}', '{{b}}')
  changes = (
    dict(),
    dict(pack='concatenate'),
    dict(max_tokens=32),
    dict(template=template),
    dict(template=Template('{{b}}', '{{a}}')),
    dict(template=Template('{{a}}', '{{b}}', 'response')),
  )
  for change in changes * 2:
    pack(spec, tokenizer, **change)
  entries = len(changes)
  assert len(list(cache.iterdir())) == entries
  # Another column of the same records.
  pack(f'{spec}?field=a', tokenizer)
  assert len(list(cache.iterdir())) == entries + 1


QUESTIONS = Template('{{q}}', '{{a}}', 'response')


@pytest.mark.parametrize('how', ['documents', 'concatenate'])
def test_windows_with_nothing_to_learn_are_left_out_and_counted(
  tokenizer, tmp_path, caplog, how
):
  records = [{'q': 'the fox ' * 9, 'a': 'dog'}, {'q': 'the ', 'a': 'fox'}] * 9
  spec = save_lines(tmp_path / 'r.jsonl', records)
  [whole] = pack(spec, tokenizer, 8, pack=how, template=Template('{{q}}{{a}}'))
  [windows] = pack(spec, tokenizer, 8, pack=how, template=QUESTIONS)
  assert np.all(windows['weights'][:, 1:].any(axis=1))
  # What is left is in the order in which it was, and has all targets.
  answers = [tokenizer.encode(' ' + r['a'])[-1] for r in records]
  learnt = windows['tokens'][windows['weights'] > 0]
  assert np.isin(answers, learnt).all()
  rows = iter(whole['tokens'].tolist())
  assert all(row in rows for row in windows['tokens'].tolist())
  out = len(whole['tokens']) - len(windows['tokens'])
  assert out > 9
  assert (
    f'{spec}: {out} of {len(whole["tokens"])} windows of 8 tokens have no '
    'response to learn and are left out'
  ) in caplog.messages


@pytest.mark.parametrize('how', ['documents', 'concatenate'])
def test_a_data_set_with_nothing_to_learn_is_refused(
  tokenizer, tmp_path, cache, how
):
  spec = save_lines(tmp_path / 'r.jsonl', [{'q': 'the fox ' * 9, 'a': 'dog'}])
  with pytest.raises(UserError, match='none of 2 windows of 8 .* raise train'):
    pack(spec, tokenizer, 8, pack=how, template=QUESTIONS, max_tokens=16)
  assert not cache.exists()


def test_a_mixture_is_packed_part_by_part(tokenizer, corpus, tmp_path):
  records = [{'a': 'the fox', 'b': 'jumps'}] * 9
  other = save_lines(tmp_path / 'r.jsonl', records)
  parts = pipeline.training_windows(
    f'0.75*{corpus}?field=text + 0.25*{other}',
    tokenizer,
    16,
    VOCAB,
    pack='documents',
    template=Template('{{a}} ', '{{b}}', 'response'),
  )
  assert [part.weight for part in parts] == [0.75, 0.25]
  plain, learnt = (list(documents_of(part.windows)) for part in parts)
  assert len(plain) == 3 and all(sum(w) == len(w) - 1 for _, w in plain)
  assert len(learnt) == 9 and all(0 < sum(w) < len(w) - 1 for _, w in learnt)


def test_ids_beyond_the_model_are_refused_only_if_they_come(tokenizer, corpus):
  [windows] = pack(corpus, tokenizer)
  largest = int(windows['tokens'].max())
  assert largest + 1 < VOCAB
  pack(corpus, tokenizer, vocab_size=largest + 1)
  for fresh in (False, True):
    # From the cache, and while it is packed.
    with pytest.raises(UserError, match=f'has a vocabulary of {largest}'):
      pack(corpus, tokenizer, seq_len=8 if fresh else 16, vocab_size=largest)


def test_a_broken_corpus_leaves_no_windows(tokenizer, tmp_path, cache):
  path = tmp_path / 'broken.jsonl'
  path.write_text('{"text": "the fox"}\n' * 600 + '{"text": ')
  with pytest.raises(UserError, match='broken.jsonl:601'):
    pack(f'file:{path}', tokenizer)
  assert not cache.exists()


@pytest.fixture(scope='module')
def python_tokenizer(tmp_path_factory):
  """A tokenizer of letters, which transformers runs in Python."""
  folder = tmp_path_factory.mktemp('slow')
  letters = ['[GO]', '[s]', *'abcdefghijklmnopqrstuvwxyz']
  (folder / 'vocab.json').write_text(
    json.dumps({letter: i for i, letter in enumerate(letters)})
  )
  config = {'tokenizer_class': 'MgpstrTokenizer'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return Tokenizer(folder)


def test_a_python_tokenizer_packs_the_same_way(python_tokenizer, tmp_path):
  assert not python_tokenizer.wrapped.is_fast
  spec = save_lines(tmp_path / 'a.jsonl', [{'text': t} for t in ('abc', 'za')])
  [windows] = pack(spec, python_tokenizer, seq_len=8)
  assert windows['tokens'].tolist() == [[2, 3, 4, 1, 27, 2, 1, 0]]
  assert windows['segments'].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
