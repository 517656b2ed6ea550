"""Every kind of file, compressed or not, and files that are broken."""

import csv
import json
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from lorapr_jax.data import text_files
from lorapr_jax.data.sources import (
  identity,
  parse_spec,
  read_documents,
  read_records,
)
from lorapr_jax.errors import UserError

ROWS = [{'text': 'one\ntwo', 'n': '1'}, {'text': 'ß, "q"', 'n': '2'}]
COMPRESSIONS = {'': None, '.gz': 'gzip', '.zst': 'zstd'}


def read(spec):
  return list(map(''.join, read_documents(parse_spec(spec))))


def records(spec, fields=None):
  return list(read_records(parse_spec(spec), fields))


def write(path, content):
  """Writes bytes, compressed as the name says."""
  compression = COMPRESSIONS.get(path.suffix)
  with pyarrow.output_stream(str(path), compression=compression) as file:
    file.write(content)
  return path


def parquet(rows):
  sink = pyarrow.BufferOutputStream()
  table = pyarrow.Table.from_pylist(rows)
  pyarrow.parquet.write_table(table, sink, row_group_size=1)
  return sink.getvalue().to_pybytes()


CONTENT = {
  'jsonl': '\n'.join(json.dumps(row) for row in ROWS).encode(),
  'csv': 'text,n\n"one\ntwo",1\n"ß, ""q""",2\n'.encode(),
  'parquet': parquet(ROWS),
}


@pytest.mark.parametrize('compression', COMPRESSIONS)
@pytest.mark.parametrize('kind', CONTENT)
def test_records_of_every_kind(tmp_path, kind, compression):
  path = write(tmp_path / f'a.{kind}{compression}', CONTENT[kind])
  spec = f'file:{path}'
  assert records(spec) == ROWS
  assert records(spec, ['n']) == [{'n': '1'}, {'n': '2'}]
  assert records(spec, []) == [{}, {}]
  assert read(spec) == [row['text'] for row in ROWS]
  option = 'field' if kind == 'jsonl' else 'column'
  assert read(f'{spec}?{option}=n') == ['1', '2']
  with pytest.raises(UserError, match="no .* 'body'; it has text, n$"):
    records(spec, ['n', 'body'])


@pytest.mark.parametrize('compression', COMPRESSIONS)
def test_a_text_is_one_record(tmp_path, compression):
  path = write(tmp_path / f'a.txt{compression}', b'\xef\xbb\xbfa\r\n b\rc')
  assert records(f'file:{path}') == [{'text': 'a\n b\nc'}]
  assert read(f'file:{path}?lines') == ['a\n\nb\n\nc']
  with pytest.raises(UserError, match="a.txt.* no column 'n'; it has text"):
    records(f'file:{path}', ['n'])


def test_wildcards_may_match_several_compressions_of_one_kind(tmp_path):
  for i, compression in enumerate(COMPRESSIONS):
    line = b'{"text": "%d"}' % i
    write(tmp_path / f'part-{i}.jsonl{compression}', line)
  assert read(f'file:{tmp_path}/part-*.jsonl*') == ['0', '1', '2']
  assert read(f'file:{tmp_path}/part-[12].*') == ['1', '2']
  write(tmp_path / 'part-3.csv.gz', b'text\n3\n')
  with pytest.raises(UserError, match='files of .csv, .jsonl; give one kind'):
    read(f'file:{tmp_path}/part-*')


def test_a_name_with_brackets_is_itself_where_it_exists(tmp_path):
  write(tmp_path / 'a[1].txt', b'brackets')
  assert read(f'file:{tmp_path}/a[1].txt') == ['brackets']
  write(tmp_path / 'b1.txt', b'pattern')
  assert read(f'file:{tmp_path}/b[1].txt') == ['pattern']


def test_zstd_frames_and_gzip_members_end_to_end_are_all_read(tmp_path):
  for suffix, compression in list(COMPRESSIONS.items())[1:]:
    parts = [
      write(tmp_path / f'{i}{suffix}', b'{"text": "%d"}\n' % i).read_bytes()
      for i in range(2)
    ]
    path = tmp_path / f'all.jsonl{suffix}'
    path.write_bytes(b''.join(parts))
    assert read(f'file:{path}') == ['0', '1'], compression


def peak_of(stream, count):
  """The most bytes that Python holds while it reads records after the first."""
  next(stream)
  tracemalloc.start()
  for _ in range(count):
    next(stream)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  return peak


def test_records_are_read_as_they_are_asked_for(tmp_path):
  # What comes after a record is neither held nor looked at before.
  line = json.dumps({'text': 'x' * 1000}).encode() + b'\n'
  path = write(tmp_path / 'a.jsonl.zst', line * 10_000 + b'no JSON')
  stream = read_records(parse_spec(f'file:{path}'))
  assert peak_of(stream, 9_999) < 1e6
  with pytest.raises(UserError, match='a.jsonl.zst:10001 is not JSON'):
    next(stream)


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.txt.gz', b'no gzip', 'a.txt.gz cannot be read: .*incorrect header'),
    ('a.csv.zst', b'no zstd', 'a.csv.zst cannot be read: ZSTD decompress'),
    ('a.parquet', b'no parquet', 'a.parquet is no Parquet file that can be'),
    ('a.parquet', b'', 'a.parquet is no Parquet file that can be read'),
    ('a.parquet', CONTENT['parquet'][:-9], 'is no Parquet file that can be'),
    ('a.csv', b'text\n"\xff"\n', 'a.csv:2 is not UTF-8 text .* save it as'),
    ('a.jsonl', b'\n{"text": "\xe9"}', 'a.jsonl:2 is not UTF-8 text'),
    ('a.jsonl', b'{"text": "\\udc00"}', 'a.jsonl:1: .*surrogates not allowed'),
    ('a.jsonl', b'{"a": ' + b'[' * 10**5, 'a.jsonl:1: maximum recursion'),
    ('a.jsonl', b'{"a": ' + b'9' * 5000 + b'}', 'a.jsonl:1: Exceeds the limit'),
    # A comma too many, quotes that are not closed or not doubled.
    ('a.csv', b'n,text\n1,a\n2,b, c\n3,d\n', 'a.csv:3: the row has 3 fields'),
    ('a.csv', b'text\n"a\nb"\n\na, b\n', 'a.csv:5: the row has 2 fields, but'),
    ('a.csv', b'n,text\n1,a\n2,"b\n3,c\n4,d\n', 'a.csv:3: .* end of data'),
    ('a.csv', b'n,text\n1,"a\n2,"b"\n', 'a.csv:2: the row that begins here'),
    ('a.csv', b'text\n"a "b" c"\n', 'a.csv:2: the row that begins here is'),
    ('a.csv', b'"text\na\nb\n', 'a.csv:1: the row that begins here is not'),
    ('a.csv', b'text,n,text\na,1,b\n', "a.csv:1 names the column 'text' twice"),
    # The first page is not what the index at the end says.
    ('a.parquet', b'PAR1' + bytes(40) + CONTENT['parquet'][44:], 'a.parquet '),
  ],
)
def test_a_broken_file_is_one_line(tmp_path, name, content, message):
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    records(f'file:{path}')
  assert '\n' not in str(error.value)


ALPACA = [
  {'text': 'a ]"}[{ \\ \n,', 'n': '1', 'more': [[], {}, [{'x': '"'}]]},
  {'text': '\u2028 ß \U0001f30a', 'n': '2', 'more': {}},
  {'text': '', 'n': '3', 'more': None},
]


@pytest.mark.parametrize('indent', [None, 0, 2, '\t'])
@pytest.mark.parametrize('ascii', [False, True])
@pytest.mark.parametrize('count', [0, 1, 3])
def test_a_list_of_json_is_read_as_pythons_own_reader_does(
  tmp_path, indent, ascii, count
):
  text = json.dumps(ALPACA[:count], indent=indent, ensure_ascii=ascii)
  for around in ('', '\n', ' \n\n\t'):
    write(tmp_path / 'a.json', (around + text + around).encode())
    assert records(f'file:{tmp_path}/a.json') == json.loads(text)
  # Objects on lines are often called the same.
  lines = ''.join(json.dumps(row) + '\n' for row in ALPACA)
  for name in ('b.json', 'b.ndjson'):
    write(tmp_path / name, lines.encode())
    assert records(f'file:{tmp_path}/{name}') == ALPACA
  assert read(f'file:{tmp_path}/b.json?field=n') == ['1', '2', '3']


def test_a_list_of_json_is_read_record_by_record(tmp_path):
  row = json.dumps({'text': 'x' * 1000}, indent=1) + ',\n'
  path = write(tmp_path / 'a.json.gz', b'[' + row.encode() * 5_000 + b'no JSON')
  stream = read_records(parse_spec(f'file:{path}'))
  assert peak_of(stream, 4_999) < 1e6
  with pytest.raises(UserError, match="a.json.gz:15001 .* ',noJSON' in place"):
    next(stream)


def test_a_bent_list_of_json_is_refused_in_one_line(tmp_path):
  """Whatever is taken out or put in, Python's reader refuses it too, or not."""
  rng = random.Random(0)
  good = json.dumps(ALPACA, indent=1)
  refused = 0
  for _ in range(300):
    at = rng.randrange(len(good))
    bent = good[:at] + rng.choice(['', *'[]{}",:\\1 \n']) + good[at + 1 :]
    write(tmp_path / 'a.json', bent.encode())
    try:
      expected = json.loads(bent)
      assert all(isinstance(row, dict) for row in expected)
      json.dumps(expected, ensure_ascii=False).encode()
    except (ValueError, AssertionError):
      refused += 1
      with pytest.raises(UserError) as error:
        records(f'file:{tmp_path}/a.json')
      assert '\n' not in str(error.value)
    else:
      assert records(f'file:{tmp_path}/a.json') == expected
  assert refused > 100


@pytest.mark.parametrize('compression', COMPRESSIONS)
@pytest.mark.parametrize('kind', [*CONTENT, 'txt', 'json'])
def test_suffixes_may_be_in_capitals(tmp_path, kind, compression):
  content = CONTENT.get(kind, b'[{"text": "one\\ntwo"}, {"text": "3"}]')
  path = tmp_path / f'a.{kind}{compression}'
  write(path, content)
  expected = read(f'file:{path}')
  for suffix in (f'{kind.upper()}{compression.upper()}', kind.title()):
    capital = tmp_path / f'B.{suffix}'
    if suffix == kind.title():
      write(capital, content)
    else:
      capital.write_bytes(path.read_bytes())
    assert read(f'file:{capital}') == expected


def test_csv_is_read_as_pythons_own_reader_does(tmp_path):
  rng = random.Random(0)
  rows = [
    {
      name: ''.join(rng.choices('ab ,"\n\'', k=rng.randrange(8)))
      for name in ('text', 'n')
    }
    for _ in range(200)
  ]
  with open(tmp_path / 'a.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, ['text', 'n'])
    writer.writeheader()
    writer.writerows(rows)
  assert records(f'file:{tmp_path}/a.csv') == rows
  # A row that is cut short, and one that is not there.
  write(tmp_path / 'b.csv', b'text,n\na\n\nb,2\n')
  assert records(f'file:{tmp_path}/b.csv') == [
    {'text': 'a', 'n': ''},
    {'text': 'b', 'n': '2'},
  ]


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_a_compressed_file_that_was_cut_short_is_no_shorter_text(
  tmp_path, suffix
):
  text = ' '.join(map(str, range(50_000))).encode()
  path = write(tmp_path / f'a.txt{suffix}', text)
  path.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(UserError, match='Truncated compressed stream'):
    read(f'file:{path}')


@pytest.fixture
def small_bound(monkeypatch):
  """Bounds of a thousandth, so that the bombs of the tests are small."""
  monkeypatch.setattr(text_files, 'MOST_BYTES', 2**17)


@pytest.mark.parametrize('kind', [*CONTENT, 'txt', 'txt?lines'])
@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
@pytest.mark.parametrize('letter', [b'\0', b'x', b'\r', b'"'])
def test_a_bomb_is_refused_at_its_bound(
  tmp_path, small_bound, kind, suffix, letter
):
  kind, mark, option = kind.partition('?')
  path = write(tmp_path / f'a.{kind}{suffix}', letter * 2**20)
  # Streams that are put end to end are one: of 4 GB.
  path.write_bytes(path.read_bytes() * 2**12)
  tracemalloc.start()
  with pytest.raises(UserError) as caught:
    records(f'file:{path}{mark}{option}')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 8e6
  message = str(caught.value)
  assert 'has more than 134,217,728 bytes, which is the most' in message
  assert '\n' not in message


@pytest.mark.parametrize('row', ['"' + 'a\n' * 2**17, '"a\n",' * 2**16])
def test_a_row_of_many_lines_has_a_bound(tmp_path, small_bound, row):
  (tmp_path / 'a.csv').write_text('text\nb\n' + row)
  with pytest.raises(UserError, match='a.csv:3: .* has '):
    records(f'file:{tmp_path}/a.csv')


@pytest.mark.parametrize('end', [b'\n', b''])
def test_a_line_of_just_the_bound_is_read(tmp_path, small_bound, end):
  text = 'x' * (2**17 - len('{"text": ""}') - len(end))
  line = json.dumps({'text': text}).encode() + end
  assert len(line) == text_files.MOST_BYTES
  (tmp_path / 'a.jsonl').write_bytes(line * (2 if end else 1))
  assert read(f'file:{tmp_path}/a.jsonl') == [text] * (2 if end else 1)
  (tmp_path / 'a.jsonl').write_bytes(line[:-1] + b' ' + line[-1:])
  with pytest.raises(UserError, match='a.jsonl:1: the line has more than'):
    read(f'file:{tmp_path}/a.jsonl')


def test_what_is_not_text_is_refused_and_what_is_empty_left_out(
  tmp_path, caplog
):
  rows = [{'text': 'a', 'n': 1}, {'text': None, 'n': 2}, {'text': '\n', 'n': 3}]
  path = write(tmp_path / 'a.parquet', parquet(rows))
  assert read(f'file:{path}') == ['a']
  assert '2 of 3 documents hold no text' in caplog.text
  with pytest.raises(UserError, match="record 1: 'n' is not text but int"):
    read(f'file:{path}?column=n')
  write(path, parquet(rows[1:]))
  with pytest.raises(UserError, match='a.parquet holds no text'):
    read(f'file:{path}')


def test_the_identity_is_that_of_the_content_and_the_options(tmp_path):
  (tmp_path / 'deep').mkdir()
  write(tmp_path / 'a.csv', b'text,n\na,b\n')
  write(tmp_path / 'deep' / 'b.csv', b'text,n\na,b\n')
  write(tmp_path / 'c.csv', b'text,n\na,c\n')
  write(tmp_path / 'd.jsonl', b'text,n\na,b\n')

  def of(spec):
    return identity(parse_spec(f'file:{tmp_path}/{spec}'))

  assert of('a.csv') == of('deep/b.csv') == of('a.csv')
  specs = ('a.csv', 'c.csv', 'd.jsonl', '[ac].csv', 'a.csv?column=n')
  assert len({of(spec) for spec in specs}) == len(specs)
  before = of('[ac].csv')
  write(tmp_path / 'c.csv', b'text,n\na,d\n')
  assert of('[ac].csv') != before
