"""Text to windows, with a small tokenizer that is trained here."""

import json
import os
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lorapr_jax.data import pipeline
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError
from lorapr_jax.hf.layout import hf_config
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.rope import Llama3, Rope
from lorapr_jax.runtime.files import write_json

EOS, BOS = '<|endoftext|>', '<|begin|>'
TEXTS = [
  'the quick brown fox jumps over the lazy dog\n' * 3,
  'pack my box with five dozen jugs, said the fox',
  'the dog and the fox sat in the box',
  'how quickly the five brown jugs jump',
]
VOCAB = 300


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """The folder of cached windows, of this test alone."""
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'windows'


def save_tokenizer(folder, habit=None, vocab_size=VOCAB):
  """Trains a byte-level BPE and saves it as a Hugging Face folder does.

  Args:
    folder: to be made.
    habit: `bos` or `eos` for a tokenizer that adds that to every text.
    vocab_size: 256 bytes, two special tokens and some merges.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[EOS, BOS],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  if habit:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{BOS} $A' if habit == 'bos' else f'$A {EOS}',
      special_tokens=[(EOS, 0), (BOS, 1)],
    )
  folder.mkdir()
  tokenizer.save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': EOS}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def plain_ids(folder, text):
  """The ids by the tokenizers library, without special tokens."""
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture
def corpus(tmp_path):
  """A spec whose documents are TEXTS."""
  lines = [json.dumps({'text': text}) + '\n' for text in TEXTS]
  (tmp_path / 'corpus.jsonl').write_text(''.join(lines))
  return f'file:{tmp_path}/corpus.jsonl'


def concatenated(spec, tokenizer, seq_len, vocab_size):
  """The windows (W, T) of one spec, its documents end to end."""
  [part] = pipeline.training_windows(
    spec, tokenizer, seq_len, vocab_size, pack='concatenate'
  )
  assert part.windows.keys() == {'tokens'}
  return part.windows['tokens']


def test_the_tokenizer_of_an_export_needs_no_remote_code(tmp_path):
  folder = save_tokenizer(tmp_path / 'model')
  rope = Rope(10000.0, Llama3(4.0, 1.0, 4.0, 32))
  sizes = ModelConfig(
    VOCAB,
    32,
    8,
    (LayerShape(2, 1, 16), LayerShape(1, 1, 8)),
    ropes=(rope,),
  )
  write_json(
    folder / 'config.json', hf_config(sizes, 'float32', 'auto', 'auto')
  )
  ids = Tokenizer(folder).encode(TEXTS[0])
  assert ids.tolist() == plain_ids(folder, TEXTS[0])


@pytest.mark.parametrize('habit', [None, 'bos', 'eos'])
def test_training_windows_are_documents_and_eos_end_to_end(
  tmp_path, corpus, habit
):
  folder = save_tokenizer(tmp_path / 'model', habit)
  expected = []
  for text in TEXTS:
    bos = [1] if habit == 'bos' else []
    expected += [*bos, *plain_ids(folder, text), 0]
  # The corpus must not happen to be a number of whole windows.
  assert len(expected) % 8
  windows = concatenated(corpus, Tokenizer(folder), 8, VOCAB)
  assert windows.shape == (len(expected) // 8, 8)
  assert windows.ravel().tolist() == expected[: windows.size]


@pytest.mark.parametrize('habit', [None, 'bos', 'eos'])
def test_evaluation_text_is_joined_by_a_blank_line_and_encoded_once(
  tmp_path, corpus, habit
):
  folder = save_tokenizer(tmp_path / 'model', habit)
  bos = [1] if habit == 'bos' else []
  expected = bos + plain_ids(folder, '\n\n'.join(TEXTS))
  assert len(expected) % 8
  windows = pipeline.evaluation_windows(corpus, Tokenizer(folder), 8, VOCAB)
  assert windows.shape == (len(expected) // 8, 8)
  assert windows.ravel().tolist() == expected[: windows.size]


def test_windows_are_literally_these(tmp_path):
  folder = save_tokenizer(tmp_path / 'model', vocab_size=258)
  (tmp_path / 'a.txt').write_text('abcabc')
  letters = plain_ids(folder, 'abc')
  assert len(letters) == 3
  tokenizer = Tokenizer(folder)
  a, b, c = letters
  spec = f'file:{tmp_path}/a.txt'
  assert pipeline.evaluation_windows(spec, tokenizer, 2, 258).tolist() == [
    [a, b],
    [c, a],
    [b, c],
  ]
  assert concatenated(spec, tokenizer, 4, 258).tolist() == [[a, b, c, a]]
  assert concatenated(spec, tokenizer, 7, 258).tolist() == [
    [a, b, c, a, b, c, 0]
  ]


def test_windows_are_packed_once(tmp_path, corpus, cache):
  tokenizer = Tokenizer(save_tokenizer(tmp_path / 'model'))
  first = concatenated(corpus, tokenizer, 8, VOCAB)
  [path] = cache.iterdir()
  assert isinstance(first.base, np.memmap)
  before = path.stat().st_ino
  again = concatenated(corpus, tokenizer, 8, VOCAB)
  np.testing.assert_array_equal(again, first)
  assert path.stat().st_ino == before


def bend_array(name, change):
  """Changes an array of a folder of windows."""

  def bend(folder):
    path = folder / f'{name}.bin'
    array = np.fromfile(path, np.uint8 if name == 'weights' else np.int32)
    change(array).tofile(path)

  return bend


def bend_counts(change):
  """Changes the text of counts.json."""

  def bend(folder):
    path = folder / 'counts.json'
    path.write_text(change(path.read_text()))

  return bend


def in_place_of(name, make):
  """Makes something else in place of a file."""

  def bend(folder):
    (folder / name).unlink()
    make(folder / name)

  return bend


def replaced(index, value):
  """A change of one number."""

  def change(array):
    array[index] = value
    return array

  return change


DAMAGES = {
  'half of it': bend_array('tokens', lambda x: x[: len(x) // 2]),
  'nothing in it': bend_array('tokens', lambda x: x[:0]),
  'zeros': bend_array('tokens', np.zeros_like),
  'a large id': bend_array('tokens', replaced(3, 2**30)),
  'an id below 0': bend_array('tokens', replaced(-1, -5)),
  'twice as much': bend_array('tokens', lambda x: np.append(x, x)),
  'a byte more': bend_array('weights', lambda x: np.append(x, x[:1])),
  'other segments': bend_array('segments', lambda x: x[::-1]),
  'other weights': bend_array('weights', lambda x: 1 - x),
  **{
    f'no {name}': in_place_of(name, lambda path: None)
    for name in ('tokens.bin', 'segments.bin', 'weights.bin', 'counts.json')
  },
  'a folder for a file': in_place_of('tokens.bin', lambda path: path.mkdir()),
  'a pipe for a file': in_place_of('weights.bin', lambda path: os.mkfifo(path)),
  'no JSON': bend_counts(lambda text: text[:-9]),
  'empty JSON': bend_counts(lambda text: ''),
  'another object': bend_counts(lambda text: '{}'),
  'a list': bend_counts(lambda text: '[]'),
  'another key': bend_counts(lambda text: text.replace('padding', 'room')),
  'another kind': bend_counts(
    lambda text: text.replace('"cut": 0', '"cut": ""')
  ),
  'another number': bend_counts(lambda t: t.replace('"cut": 0', '"cut": 1')),
  'one more': bend_counts(lambda text: text.replace('{', '{"a": 1,', 1)),
  'no folder': lambda folder: (shutil.rmtree(folder), folder.write_text('')),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_windows_are_made_again(
  tmp_path, corpus, cache, caplog, damage
):
  tokenizer = Tokenizer(save_tokenizer(tmp_path / 'model'))

  def pack():
    [part] = pipeline.training_windows(
      corpus, tokenizer, 40, VOCAB, pack='documents'
    )
    return part.windows

  good = {name: array.tolist() for name, array in pack().items()}
  [folder] = cache.iterdir()
  DAMAGES[damage](folder)
  for _ in range(2):
    found = pack()
    assert {name: array.tolist() for name, array in found.items()} == good
  # Told once; then they are whole.
  [told] = [m for m in caplog.messages if m.endswith('text is packed again')]
  assert told.startswith(str(folder)) and '\n' not in told


@pytest.mark.parametrize('make', [concatenated, pipeline.evaluation_windows])
def test_tokens_that_fill_no_window_are_counted(tmp_path, corpus, make, caplog):
  tokenizer = Tokenizer(save_tokenizer(tmp_path / 'model'))
  tokens = make(corpus, tokenizer, 1, VOCAB).size
  assert caplog.messages == []
  message = (
    f'{corpus}: the last 2 of {tokens} tokens fill no window of {tokens - 2} '
    'and are left out'
  )
  # Packed, and found in the cache.
  for times in (1, 2):
    assert make(corpus, tokenizer, tokens - 2, VOCAB).shape == (1, tokens - 2)
    assert caplog.messages == times * [message]


def test_the_cache_knows_text_tokenizer_length_and_purpose(
  tmp_path, corpus, cache
):
  tokenizer = Tokenizer(save_tokenizer(tmp_path / 'model'))
  other = Tokenizer(save_tokenizer(tmp_path / 'other', vocab_size=280))
  (tmp_path / 'other.txt').write_text(TEXTS[0])
  concatenated(corpus, tokenizer, 8, VOCAB)
  for entries, change in enumerate(
    (
      lambda: concatenated(corpus, tokenizer, 9, VOCAB),
      lambda: concatenated(corpus, other, 8, VOCAB),
      lambda: pipeline.evaluation_windows(corpus, tokenizer, 8, VOCAB),
      lambda: concatenated(f'file:{tmp_path}/other.txt', tokenizer, 8, VOCAB),
    ),
    start=2,
  ):
    change()
    assert len(list(cache.iterdir())) == entries


def test_the_same_text_from_another_file_is_found_in_the_cache(tmp_path, cache):
  tokenizer = Tokenizer(save_tokenizer(tmp_path / 'model'))
  for name in ('a.txt', 'b.txt'):
    (tmp_path / name).write_text(TEXTS[0])
    concatenated(f'file:{tmp_path}/{name}', tokenizer, 8, VOCAB)
  assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize('make', [concatenated, pipeline.evaluation_windows])
def test_what_does_not_fit_the_model_is_refused(tmp_path, corpus, make):
  tokenizer = Tokenizer(save_tokenizer(tmp_path / 'model'))
  with pytest.raises(UserError, match='fewer than one window of 5000'):
    make(corpus, tokenizer, 5000, VOCAB)
  largest = int(make(corpus, tokenizer, 8, VOCAB).max())
  make(corpus, tokenizer, 8, largest + 1)
  # Also where the windows lie in the cache already.
  message = f'gives id {largest}, but the model has a vocabulary of {largest}'
  with pytest.raises(UserError, match=message):
    make(corpus, tokenizer, 8, largest)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(UserError, match='holds no tokenizer files'):
    Tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(UserError, match='the tokenizer of') as error:
    Tokenizer(tmp_path)
  assert '\n' not in str(error.value)


def synthetic(spec, seq_len=16, vocab=50):
  return concatenated(spec, None, seq_len, vocab)


def test_synthetic_data_are_a_function_of_the_spec():
  one = synthetic('synthetic:1?windows=64')
  assert one.shape == (64, 16) and one.min() >= 0 and one.max() < 50
  np.testing.assert_array_equal(one, synthetic('synthetic:1?windows=64'))
  assert not np.array_equal(one, synthetic('synthetic:2?windows=64'))
  held_out = pipeline.evaluation_windows('synthetic:1?windows=64', None, 16, 50)
  np.testing.assert_array_equal(one, held_out)
  assert synthetic('synthetic:1').shape == (256, 16)


def test_all_synthetic_data_are_of_one_language():
  pairs = {}
  for seed in (1, 2):
    windows = synthetic(f'synthetic:{seed}')
    for before, after in zip(
      windows[:, :-1].ravel(), windows[:, 1:].ravel(), strict=True
    ):
      pairs.setdefault(before, []).append(after)
  follows = [max(map(after.count, set(after))) for after in pairs.values()]
  share = sum(follows) / sum(map(len, pairs.values()))
  assert 0.87 < share < 0.93


def test_text_needs_a_tokenizer(corpus):
  with pytest.raises(UserError, match='the model has no tokenizer'):
    synthetic(corpus)
