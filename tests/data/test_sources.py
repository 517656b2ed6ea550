"""Every form of a data spec, and what is refused."""

import csv
import dataclasses
import importlib.util
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lorapr_jax
from lorapr_jax.data import demo
from lorapr_jax.data.sources import (
  identity,
  parse_spec,
  read_documents,
  read_records,
)
from lorapr_jax.errors import UserError
from lorapr_jax.runtime.content import sha256_of


def read(spec):
  return list(map(''.join, read_documents(parse_spec(spec))))


def write(path, text):
  path.write_bytes(text.encode())
  return path


def test_a_text_file_is_one_document_with_lf_line_ends(tmp_path):
  path = write(tmp_path / 'a.txt', ' first\r\nsecond \n\n\rthird ß\n')
  assert read(f'file:{path}') == [' first\nsecond \n\n\nthird ß\n']


def test_lines_are_stripped_and_joined_by_a_blank_line(tmp_path):
  path = write(tmp_path / 'a.txt', ' the\x0bcat \r\n\n \tsat\n on it')
  assert read(f'file:{path}?lines') == ['the\x0bcat\n\nsat\n\non it']


@pytest.mark.parametrize('option, field', [('', 'text'), ('?field=t', 't')])
def test_a_jsonl_record_is_a_document(tmp_path, option, field, caplog):
  texts = ['one\ntwo', 'ß "quoted"', ' ', 'a\u2028b\x85c\x1cd']
  lines = [
    json.dumps({'other': 1, field: text}, ensure_ascii=False) for text in texts
  ]
  path = write(tmp_path / 'a.jsonl', '\n'.join([*lines, '', ' ']) + '\r\n')
  spec = f'file:{path}{option}'
  # Documents without text are dropped.
  assert read(spec) == [*texts[:2], texts[3]]
  assert caplog.messages == [
    f'{spec}: 1 of 4 documents hold no text and are left out'
  ]


@pytest.mark.parametrize('option, column', [('', 'text'), ('?column=t', 't')])
def test_a_csv_record_is_a_document(tmp_path, option, column):
  texts = ['one, "two"\n\nthree', '', 'ß', 'x' * 200_000]
  with open(tmp_path / 'a.csv', 'w', newline='', encoding='utf-8') as file:
    rows = csv.writer(file)
    rows.writerow(['id', column])
    rows.writerows(enumerate(texts))
    rows.writerow(['cut short'])
  documents = read(f'file:{tmp_path / "a.csv"}{option}')
  assert documents == [texts[0], *texts[2:]]


def test_wildcards_read_the_files_in_sorted_order(tmp_path):
  (tmp_path / 'deep').mkdir()
  for name in ('b.txt', 'a.txt', 'c.txt', 'deep/d.txt'):
    write(tmp_path / name, name)
  assert read(f'file:{tmp_path}/[ac].txt') == ['a.txt', 'c.txt']
  assert read(f'file:{tmp_path}/*.txt') == ['a.txt', 'b.txt', 'c.txt']
  assert read(f'file:{tmp_path}/**/*.txt') == [
    'a.txt',
    'b.txt',
    'c.txt',
    'deep/d.txt',
  ]


def test_the_demos_news_come_by_split(tmp_path, monkeypatch):
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path))
  with zipfile.ZipFile(tmp_path / 'NewsArticles.zip', 'w') as archive:
    text = 'text\n' + ''.join(f'article {i}\n' for i in range(20))
    archive.writestr('NewsArticles.csv', text)
  content = sha256_of(tmp_path / 'NewsArticles.zip')
  news = dataclasses.replace(demo._NEWS, content=content)
  monkeypatch.setattr(demo, '_NEWS', news)
  articles = [f'article {i}' for i in range(20)]
  assert read('demo:news:train') == articles[:18]
  assert read('demo:news:heldout') == articles[18:]
  train, heldout = map(parse_spec, ('demo:news:train', 'demo:news:heldout'))
  assert list(read_records(heldout)) == [{'text': t} for t in articles[18:]]
  with pytest.raises(UserError, match="heldout has no column 'n'; it has text"):
    list(read_records(heldout, ['n']))
  assert identity(train) == identity(train) != identity(heldout)


def test_a_spec_is_taken_apart():
  spec = parse_spec('synthetic:3?windows=12')
  assert (spec.scheme, spec.path) == ('synthetic', '3')
  assert spec.options == {'windows': '12'}
  assert parse_spec('demo:news:train').path == 'news:train'


def test_parsing_looks_at_names_and_reads_nothing(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\xff no JSON, and no UTF-8')
  spec = parse_spec(f'file:{path}?field=body')
  assert (spec.path, spec.options) == (str(path), {'field': 'body'})


@pytest.mark.parametrize(
  'spec, message',
  [
    ('', 'is not known: use file:PATH'),
    ('wikitext2', "'wikitext2' is not known: use file:PATH"),
    ('http://example.com/a.txt', 'is not known: use file:PATH'),
    ('demo:news', 'only demo:news:train and demo:news:heldout exist'),
    ('demo:news:test', 'only demo:news:train and demo:news:heldout exist'),
    ('demo:news:train?lines', "option 'lines' is not known here"),
    ('tfds:x?field=y', "option 'field' is not known here; there is column, d"),
    ('synthetic:', "'' is not a number"),
    ('synthetic:one', "'one' is not a number"),
    ('synthetic:1?windows=-3', "'-3' is not a number"),
    ('synthetic:1?lines=3', "option 'lines' is not known here; there is windo"),
    ('file:{}/none.txt', 'none.txt is not a file'),
    ('file:{}/none*.txt', 'none.* matches no file'),
    ('file:{}', 'is not a file'),
    ('file:{}/a.md', 'files of .md; give one kind of .txt, .jsonl, .csv'),
    ('file:{}/a.*', 'files of .csv, .jsonl, .md, .txt; give one kind'),
    ('file:{}/a.txt?field=x', "option 'field' is not known here; there is lin"),
    ('file:{}/a.csv?lines', "option 'lines' is not known here; there is colum"),
    ('file:{}/a.jsonl?line', "option 'line' is not known here; there is field"),
  ],
)
def test_a_spec_that_cannot_be_is_refused_unread(tmp_path, spec, message):
  for suffix in ('txt', 'jsonl', 'csv', 'md'):
    write(tmp_path / f'a.{suffix}', 'text')
  with pytest.raises(UserError, match=message) as error:
    parse_spec(spec.format(tmp_path))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.txt', b'caf\xe9', 'a.txt:1 is not UTF-8 text'),
    ('a.txt', b' \n\n\t', 'a.txt holds no text'),
    ('a.txt?lines', b' \n\n\t', r'a.txt\?lines holds no text'),
    ('a.jsonl', b'', 'a.jsonl holds no text'),
    ('a.jsonl', b'{"text": "a"}\n{"text"', 'a.jsonl:2 is not JSON'),
    (
      'a.jsonl',
      b'{"text": "a"}\n\n{"t": ""}',
      "jsonl:3 has no field 'text'; it has t$",
    ),
    ('a.jsonl', b'["text"]', 'a.jsonl:1 is no JSON object'),
    ('a.jsonl', b'"text"', 'a.jsonl:1 is no JSON object'),
    ('a.jsonl?field=n', b'{"n": 3}', "record 1: 'n' is not text but int"),
    ('a.csv', b'id,body\n1,x\n', "no column 'text'; it has id, body"),
    ('a.csv?column=x', b'text\ny\n', "no column 'x'; it has text"),
    ('a.csv', b'', 'a.csv is empty'),
    ('a.csv', b'text\n\n""\n', 'a.csv holds no text'),
  ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(
  tmp_path, name, content, message
):
  (tmp_path / name.partition('?')[0]).write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    read(f'file:{tmp_path}/{name}')
  assert '\n' not in str(error.value)


def test_synthetic_data_has_no_text():
  with pytest.raises(UserError, match='it needs a model without a tokenizer'):
    read('synthetic:1')


def test_hugging_face_data_sets_need_their_package():
  if importlib.util.find_spec('datasets'):
    pytest.skip('the package datasets is installed')
  with pytest.raises(UserError, match=r"pip install 'lorapr-jax\[hf\]'"):
    parse_spec('hf:owner/name')


@pytest.fixture
def datasets(tmp_path, monkeypatch):
  """The package, with a cache of its own, and no network: see conftest.py."""
  datasets = pytest.importorskip('datasets', reason='it is not installed')
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  return datasets


ROWS = {'text': ['one', 'two\n', None, ' '], 'other': ['a', 'b', 'c', 'd']}
NUMBERED = {'text': ['three'], 'other': ['e'], 'number': [3]}


def test_a_saved_data_set(tmp_path, datasets):
  rows = datasets.Dataset.from_dict(ROWS)
  rows.save_to_disk(tmp_path / 'one')
  numbered = datasets.Dataset.from_dict(NUMBERED)
  datasets.DatasetDict(train=rows, test=numbered).save_to_disk(tmp_path / 'two')
  for spec, documents in (
    ('one', ['one', 'two\n']),
    ('one?column=other', ['a', 'b', 'c', 'd']),
    ('two', ['one', 'two\n']),
    ('two:test', ['three']),
    ('two:test?column=other', ['e']),
  ):
    assert read(f'hf:{tmp_path}/{spec}') == documents
  identities = [
    identity(parse_spec(f'hf:{tmp_path}/{spec}'))
    for spec in ('one', 'two:test', 'one?column=other')
  ]
  assert len(set(identities)) == 3
  assert identity(parse_spec(f'hf:{tmp_path}/one')) == identities[0]
  shutil.copytree(
    tmp_path / 'one', tmp_path / 'copy', copy_function=shutil.copyfile
  )
  copy = parse_spec(f'hf:{tmp_path}/copy')
  assert identity(copy) == identities[0]
  # Other rows, beside what was saved of the old ones.
  other = {'text': [*'zyxw'], 'other': [*'abcd']}
  datasets.Dataset.from_dict(other).save_to_disk(tmp_path / 'other')
  [rows] = (tmp_path / 'other').glob('*.arrow')
  shutil.copy(rows, tmp_path / 'copy' / rows.name)
  assert identity(copy) != identities[0]
  spec = parse_spec(f'hf:{tmp_path}/two:test')
  assert list(read_records(spec)) == [
    {'text': 'three', 'other': 'e', 'number': 3}
  ]
  assert list(read_records(spec, ['number'])) == [{'number': 3}]
  for spec, message in (
    ('one:test', "one:test: it has no splits, so no 'test'"),
    ('two:dev', "it has no split 'dev'; it has train, test"),
    ('two?column=body', "no column 'body'; it has text, other"),
    ('two:test?column=number', "record 1: 'number' is not text but int"),
  ):
    with pytest.raises(UserError, match=message):
      read(f'hf:{tmp_path}/{spec}')


@pytest.mark.parametrize('suffix', ['parquet', 'jsonl', 'csv'])
def test_a_folder_of_files(tmp_path, monkeypatch, datasets, suffix):
  # A folder's name is not taken for the kind of file that it could be.
  folder = tmp_path / 'json'
  folder.mkdir()
  for split, rows in (('train', ROWS), ('test', NUMBERED)):
    rows = datasets.Dataset.from_dict(
      rows | {'number': [3] * len(rows['text'])}
    )
    write_rows = {
      'parquet': rows.to_parquet,
      'jsonl': rows.to_json,
      'csv': rows.to_csv,
    }[suffix]
    write_rows(folder / f'{split}.{suffix}')
  monkeypatch.chdir(tmp_path)
  assert read('hf:json') == ['one', 'two\n']
  assert read('hf:json:test') == ['three']
  assert read('hf:json:test?column=other') == ['e']
  spec = parse_spec('hf:json')
  before = identity(spec)
  assert identity(spec) == before != identity(parse_spec('hf:json:test'))
  # Times count nothing, and content does.
  os.utime(folder / f'train.{suffix}', (0, 0))
  assert identity(spec) == before
  shutil.copy(folder / f'test.{suffix}', folder / f'train.{suffix}')
  assert identity(spec) != before
  with pytest.raises(UserError, match='hf:json:dev: Unknown split "dev"'):
    read('hf:json:dev')


def test_a_hugging_face_folder_that_cannot_be_read_is_one_line(
  tmp_path, datasets
):
  for name in ('script', 'latin', 'bytes'):
    (tmp_path / name).mkdir()
  # A data set that is a program, which is never run.
  (tmp_path / 'script' / 'script.py').write_text('raise SystemExit(3)')
  (tmp_path / 'latin' / 'train.csv').write_bytes(b'text\ncaf\xe9\n')
  column = pa.Array.from_buffers(
    pa.utf8(),
    1,
    [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b'\xe9')],
  )
  pq.write_table(
    pa.table({'text': column}), tmp_path / 'bytes' / 'train.parquet'
  )
  for name, message in (
    ('script', 'scripts are no longer supported'),
    ('latin', 'utf-8'),
    ('bytes', 'utf-8|UTF8'),
  ):
    spec = f'hf:{tmp_path}/{name}'
    with pytest.raises(UserError, match=message) as error:
      read(spec)
    assert str(error.value).startswith(f'{spec}: ')
    assert '\n' not in str(error.value)


def test_nothing_local_asks_the_network(tmp_path, datasets):
  (tmp_path / 'folder').mkdir()
  rows = datasets.Dataset.from_dict(ROWS)
  rows.to_parquet(tmp_path / 'folder' / 'train.parquet')
  rows.save_to_disk(tmp_path / 'saved')
  write(tmp_path / 'a.jsonl', '{"text": "one"}\n')
  code = """
import os
import socket
import sys
def refuse(*_):
  os._exit(9)  # No one swallows that.
socket.getaddrinfo = socket.socket.connect = refuse
from lorapr_jax.data.sources import identity, parse_spec, read_documents
for spec in 'hf:folder', 'hf:saved', 'file:a.jsonl':
  identity(parse_spec(spec))
  print(len(list(read_documents(parse_spec(spec)))))
"""
  # Offline, the libraries would not even try.
  env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'}
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env={**env, 'PYTHONPATH': str(Path(lorapr_jax.__file__).parents[1])},
    capture_output=True,
    text=True,
  )
  assert done.stdout.split() == ['2', '2', '1'], done.stderr


def test_hugging_face_specs_that_cannot_be(tmp_path, datasets):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'bad').mkdir()
  write(tmp_path / 'bad' / 'train.parquet', 'no parquet')
  for spec, message in (
    ('', 'is no folder, nor OWNER/NAME'),
    ('/no/such', '/no/such is no folder, nor OWNER/NAME'),
    ('./such', './such is no folder, nor OWNER/NAME'),
    ('owner/name?field=x', "option 'field' is not known here; there is column"),
  ):
    with pytest.raises(UserError, match=message):
      parse_spec(f'hf:{spec}')
  for spec, message in (
    (f'{tmp_path}/empty', "doesn't contain any data files"),
    (f'{tmp_path}/bad', f'hf:{tmp_path}/bad: '),
    # The tests are offline.
    ('owner/name', "hf:owner/name: Couldn't reach"),
  ):
    with pytest.raises(UserError, match=message) as error:
      read(f'hf:{spec}')
    assert '\n' not in str(error.value)
