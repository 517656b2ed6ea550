"""Small TensorFlow data sets, prepared from text made here and read back."""

import json
from pathlib import Path
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

import lorapr_jax
from lorapr_jax.data.sources import (
  identity,
  parse_spec,
  read_documents,
  read_records,
)
from lorapr_jax.errors import UserError

TEXTS = [f'article {i} of größe\n\n"{i}"' for i in range(20)]
FEATURES = tfds.features.FeaturesDict(
  {
    'text': tfds.features.Text(),
    'title': tfds.features.Text(),
    'stars': tfds.features.Scalar(np.int64),
    'tags': tfds.features.Sequence(tfds.features.Text()),
    'pair': {'en': tfds.features.Text()},
  }
)


def row(i):
  return {
    'text': TEXTS[i],
    'title': f'title {i}',
    'stars': i,
    'tags': ['a', 'ß'][: i % 3],
    'pair': {'en': f'en {i}'},
  }


class HomeMade(tfds.core.GeneratorBasedBuilder):
  """A data set that the library knows, and so can prepare."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = tfds.features.FeaturesDict({'text': tfds.features.Text()})
  SPLITS = {'train': [{'text': text} for text in TEXTS]}

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=self.FEATURES, disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {
      split: self._generate_examples(rows)
      for split, rows in self.SPLITS.items()
    }

  def _generate_examples(self, rows):
    yield from enumerate(rows)


class Broken(HomeMade):
  """One whose own code fails."""

  def _generate_examples(self, rows):
    raise ImportError("No module named 'tensorflow'\nand more")


def store(folder, name, features=FEATURES, **splits):
  """Prepares a data set of which no code is left to be known."""

  class Made(HomeMade, skip_registration=True):
    FEATURES, SPLITS = features, splits

  Made.name = name
  Made(data_dir=folder, file_format='array_record').download_and_prepare()


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """A data_dir with `articles` and `bad`, both prepared."""
  folder = tmp_path_factory.mktemp('tfds')
  rows = [row(i) for i in range(len(TEXTS))]
  blank = {**row(0), 'text': ' '}
  store(folder, 'articles', train=rows[:18], test=rows[18:], blank=[blank])
  latin = {'text': tfds.features.Tensor(shape=(), dtype=np.object_)}
  features = tfds.features.FeaturesDict(latin)
  store(folder, 'bad', features, train=[{'text': 'größe'.encode('latin-1')}])
  return folder


@pytest.fixture
def copied(data_dir, tmp_path):
  """A copy of the data_dir, and the folder of `articles` in it."""
  shutil.copytree(data_dir, tmp_path / 'copy')
  return tmp_path / 'copy', tmp_path / 'copy' / 'articles' / '1.0.0'


def read(name, data_dir, option=''):
  spec = f'tfds:{name}?data_dir={data_dir}{option}'
  return list(map(''.join, read_documents(parse_spec(spec))))


@pytest.mark.parametrize(
  'split, texts',
  [
    ('', TEXTS[:18]),
    (':1.0.0', TEXTS[:18]),
    (':test', TEXTS[18:]),
    (':1.0.0:test', TEXTS[18:]),
    (':train[:10]', TEXTS[:10]),
    (':train[50%:]', TEXTS[9:18]),
    (':test+train[:1]', [*TEXTS[18:], TEXTS[0]]),
  ],
)
def test_a_prepared_data_set(data_dir, split, texts):
  assert read(f'articles{split}', data_dir) == texts


def test_records_are_plain(data_dir):
  spec = parse_spec(f'tfds:articles:train[:2]?data_dir={data_dir}')
  assert list(read_records(spec)) == [row(0), row(1)]
  assert list(read_records(spec, ['stars', 'tags'])) == [
    {'stars': 0, 'tags': []},
    {'stars': 1, 'tags': ['a']},
  ]
  assert list(read_records(spec, [])) == [{}, {}]
  assert read('articles:train[:2]', data_dir, '&column=title') == [
    'title 0',
    'title 1',
  ]


def test_a_data_set_that_is_not_prepared_is_prepared(tmp_path, capsys):
  assert read('home_made', tmp_path) == TEXTS
  [prepared] = (tmp_path / 'home_made' / '1.0.0').glob('*.array_record*')
  time = prepared.stat().st_mtime_ns
  assert read('home_made:train[3:5]', tmp_path) == TEXTS[3:5]
  assert prepared.stat().st_mtime_ns == time
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
  'spec, message',
  [
    ('articles:dev', "Unknown split 'dev'. Should be one of .*'test'"),
    ('articles:train[', 'Error parsing split'),
    ('articles:train[90:]', 'incompatible with 18 examples'),
    ('articles:2.0.0', 'articles:2.0.0:train is not prepared in .*, nor known'),
    ('articles/en', 'articles/en:train is not prepared in .*, nor known'),
    ('articles:blank', 'holds no text'),
    ('articles:train[:0]', 'holds no text'),
    ('imdb_review', r'did you mean imdb_reviews\?'),
    ('no_such', 'not prepared in .*, nor known to .*: give its .data_dir='),
    ('broken', "cannot be prepared here: No module named 'tensorflow'; prepa"),
    ('bad', "record 1, 'text' is not UTF-8 text"),
  ],
)
def test_what_cannot_be_read_is_one_line(data_dir, spec, message):
  with pytest.raises(UserError, match=message) as error:
    read(spec, data_dir)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('column', ['body', 'stars', 'tags'])
def test_a_column_that_is_not_text(data_dir, column):
  message = {
    'body': "no column 'body'; it has .*title",
    'stars': "record 1: 'stars' is not text but int",
    'tags': "record 1: 'tags' is not text but list",
  }[column]
  with pytest.raises(UserError, match=message):
    read('articles', data_dir, f'&column={column}')


@pytest.mark.parametrize('spec', ['', '/x', 'a b', 'a/b/c', 'a:', '../a'])
def test_a_name_that_cannot_be_is_refused_unread(spec):
  with pytest.raises(UserError, match='is not of the form tfds:NAME'):
    parse_spec(f'tfds:{spec}')


def test_files_that_are_broken(copied):
  data_dir, folder = copied
  [train] = folder.glob('*-train.array_record*')
  train.write_bytes(train.read_bytes()[:-3000])
  with pytest.raises(UserError, match='cannot be read from .*: Corrupted .*'):
    read('articles', data_dir)
  train.unlink()
  with pytest.raises(UserError, match='No such file .*; prepare it anew'):
    read('articles', data_dir)
  with pytest.raises(UserError, match='No such file .*; prepare it anew'):
    identity(parse_spec(f'tfds:articles?data_dir={data_dir}'))
  (folder / 'dataset_info.json').write_text('{')
  with pytest.raises(UserError, match='articles:train: Failed to load JSON'):
    read('articles', data_dir)


def test_what_only_tensorflow_reads_is_refused(copied):
  data_dir, folder = copied
  info = folder / 'dataset_info.json'
  values = json.loads(info.read_text())
  info.write_text(json.dumps(values | {'fileFormat': 'tfrecord'}))
  with pytest.raises(UserError, match='prepared as tfrecord in .*, which only'):
    read('articles', data_dir)


def test_the_identity_goes_with_content_split_and_column(copied, tmp_path):
  data_dir, folder = copied

  def of(spec, at=data_dir, option=''):
    return identity(parse_spec(f'tfds:{spec}?data_dir={at}{option}'))

  specs = ('articles', 'articles:test', 'articles:train[:9]', 'bad')
  found = {of(spec) for spec in specs}
  assert len(found | {of('articles', option='&column=title')}) == 5
  assert of('articles') == of('articles:1.0.0:train')
  # A copy is the same data, whatever its files' times.
  moved = tmp_path / 'moved'
  shutil.copytree(data_dir, moved, copy_function=shutil.copyfile)
  assert of('articles') == of('articles', moved)
  # Prepared anew from other text, under the same version.
  shutil.rmtree(folder)
  rows = [row(i) for i in range(len(TEXTS))]
  store(data_dir, 'articles', train=rows[:17], test=rows[18:])
  assert of('articles') not in found


def test_neither_tensorflow_nor_torch_nor_a_network_is_used(data_dir):
  code = f"""
import os
import socket
import sys
def refuse(*_):
  os._exit(9)  # No one swallows that.
socket.getaddrinfo = socket.socket.connect = refuse
import lorapr_jax.data.sources as sources
assert not {{'tensorflow_datasets', 'pyarrow'}} & set(sys.modules)
spec = 'tfds:articles:test?data_dir={data_dir}'
print(len(list(sources.read_documents(sources.parse_spec(spec)))))
print({{'tensorflow', 'torch', 'jax'}} & set(sys.modules))
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=Path(lorapr_jax.__file__).parents[1],
    check=True,
    capture_output=True,
    text=True,
  )
  assert done.stdout.split() == ['2', 'set()']
