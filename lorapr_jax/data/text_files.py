"""Reads records from files of text, JSON, CSV and Parquet.

A file's name says its kind and whether it is compressed: notes.txt,
corpus.jsonl.zst, ROWS.CSV.gz. JSON and CSV are read a record at a time, Parquet
a row group at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
import contextlib
import csv
import glob
import hashlib
import io
import itertools
from pathlib import Path
from typing import Any, BinaryIO

from lorapr_jax.data import json_files
from lorapr_jax.errors import UserError, first_line
from lorapr_jax.runtime.content import sha256_of
from lorapr_jax.runtime.paths import is_local, path_of

Record = dict[str, Any]

# The kinds of files, each with the options that a spec may have.
OPTIONS = {
  '.txt': ('lines',),
  '.jsonl': ('field',),
  '.csv': ('column',),
  '.parquet': ('column',),
  '.json': ('field',),
}
# The other names of kinds.
_NAMES = {'.ndjson': '.jsonl'}
# The compressions, with pyarrow's name of each.
_COMPRESSED = {'.gz': 'gzip', '.zst': 'zstd'}
# The most bytes of a line, a record of CSV, or a Parquet file that is unpacked:
# a small file may unpack to any size.
MOST_BYTES = 2**27
_TOO_LONG = f'has more than {MOST_BYTES:,} bytes, which is the most allowed'


def find_files(path: str) -> list[Path]:
  """The file, or the files that match the wildcards, sorted. Reads none.

  Raises:
    UserError: if there is none, or if they are not all of one known kind.
  """
  named = path_of(path)
  # A file may have brackets in its name.
  if not glob.has_magic(path) or named.is_file():
    files = [named]
  elif is_local(named):
    found = glob.glob(str(named), recursive=True)
    files = [Path(name) for name in sorted(found)]
  else:
    found = named.fs.glob(named.path)
    files = [path_of(named.fs.unstrip_protocol(name)) for name in sorted(found)]
  if not files:
    raise UserError(f'{path} matches no file')
  for file in files:
    if not file.is_file():
      raise UserError(f'{file} is not a file')
  kinds = {kind(file) for file in files}
  if len(kinds) > 1 or not kinds <= set(OPTIONS):
    raise UserError(
      f'{path} has files of {", ".join(sorted(kinds))}; give one kind of '
      f'{", ".join(OPTIONS)}, each also {" or ".join(_COMPRESSED)}'
    )
  return files


def kind(file: Path) -> str:
  """The suffix of a file's name before that of a compression."""
  name = file.stem if _compression(file) else file.name
  suffix = Path(name).suffix.lower()
  return _NAMES.get(suffix, suffix)


def _compression(file: Path) -> str | None:
  return _COMPRESSED.get(file.suffix.lower())


def kind_of(path: str) -> str:
  """The one kind of the files that `find_files` finds."""
  return kind(find_files(path)[0])


def read_files(
  path: str, fields: Sequence[str] | None = None, *, lines: bool = False
) -> Iterator[Record]:
  """Yields the records of the files, in order.

  They have these `fields`; None: all. A text file is one record with the field
  `text`; its line ends become LF, or with `lines` its lines are stripped and
  joined by blank lines.

  Raises:
    UserError: if a file cannot be read as its kind, or if a field is missing.
  """
  for file in find_files(path):
    if kind(file) == '.txt':
      text = ''.join(_text(file, lines))
      yield pick({'text': text}, fields, str(file))
      continue
    with _open(file) as stream:
      match kind(file):
        case '.jsonl':
          found = json_files.read_lines(file, _lines(file, stream))
          yield from _picked(found, fields)
        case '.json':
          lines = _lines(file, stream)
          found = json_files.read_list_or_lines(file, lines, MOST_BYTES)
          yield from _picked(found, fields)
        case '.csv':
          yield from _csv(file, stream, fields)
        case '.parquet':
          yield from _parquet(file, stream, fields)


def read_texts(path: str, *, lines: bool = False) -> Iterator[Iterator[str]]:
  """Yields each text file in parts, which must be read before the next file.

  The arguments and errors are those of `read_files`.
  """
  for file in find_files(path):
    yield _text(file, lines)


def hash_files(path: str) -> bytes:
  """A hash of the files' bytes, as they are on the disk, and of their kinds.

  Raises:
    UserError: if a file cannot be read.
  """
  digest = hashlib.sha256()
  for file in find_files(path):
    digest.update(f'{kind(file)}{file.suffix}'.encode())
    digest.update(bytes.fromhex(sha256_of(file)))
  return digest.digest()


def pick(
  record: Record,
  fields: Sequence[str] | None,
  where: str,
  noun: str = 'column',
) -> Record:
  """A record with these fields alone; None: with all of them.

  Raises:
    UserError: if a field is missing.
  """
  if fields is None:
    return record
  for field in fields:
    if field not in record:
      raise UserError(
        f'{where} has no {noun} {field!r}; it has '
        + (', '.join(record) or 'none')
      )
  return {field: record[field] for field in fields}


def _picked(
  records: Iterable[tuple[str, Record]], fields: Sequence[str] | None
) -> Iterator[Record]:
  for where, record in records:
    yield pick(record, fields, where, 'field')


@contextlib.contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
  """Opens a file to read its bytes, decompressed on the way."""
  try:
    with file.open('rb') as stream:
      if not _compression(file):
        yield stream
        return
      # Imported here: it takes a while, and plain files do not need it. Unlike
      # zstandard it refuses a stream that was cut short.
      import pyarrow

      name = _compression(file)
      with pyarrow.CompressedInputStream(stream, name) as unpacked:
        yield io.BufferedReader(unpacked)
  except OSError as error:
    raise UserError(f'{file} cannot be read: {first_line(error)}') from None


def _lines(file: Path, stream: BinaryIO) -> Iterator[str]:
  """Yields lines of text with LF ends and without a byte order mark."""
  lines = iter(lambda: stream.readline(MOST_BYTES + 1), b'')
  for number, line in enumerate(lines, 1):
    if len(line) > MOST_BYTES:
      raise UserError(f'{file}:{number}: the line {_TOO_LONG}')
    try:
      text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
    except UnicodeDecodeError as error:
      raise UserError(
        f'{file}:{number} is not UTF-8 text ({error}): save it as UTF-8'
      ) from None
    # The stream splits at LF alone; this turns a CR into one as well.
    if '\r' in text:
      yield from io.StringIO(text, newline=None)
    else:
      yield text


def _text(file: Path, lines: bool) -> Iterator[str]:
  with _open(file) as stream:
    if not lines:
      yield from _lines(file, stream)
      return
    stripped = (line.strip() for line in _lines(file, stream))
    for i, line in enumerate(filter(None, stripped)):
      yield f'\n\n{line}' if i else line


def _csv(
  file: Path, stream: BinaryIO, fields: Sequence[str] | None
) -> Iterator[Record]:
  # Python's own limit is too small for texts.
  csv.field_size_limit(MOST_BYTES)
  names: list[str] = []
  first, size = 1, 0  # The line in which the row begins, and its length so far.

  def lines() -> Iterator[str]:
    nonlocal size
    for line in _lines(file, stream):
      size += len(line)
      if size > MOST_BYTES:
        raise UserError(
          f'{file}:{first}: the row that begins here {_TOO_LONG} (is a quote '
          'not closed?)'
        )
      yield line

  reader = csv.reader(lines(), strict=True)
  try:
    for row in reader:
      if not names:
        names = _columns(file, first, row)
        pick(dict.fromkeys(names), fields, str(file))
      elif len(row) > len(names):
        raise UserError(
          f'{file}:{first}: the row has {len(row)} fields, but there are '
          f'{len(names)} columns: put a text with commas in quotes'
        )
      elif row:
        # A row that is cut short has nothing for the rest.
        record = dict(itertools.zip_longest(names, row, fillvalue=''))
        yield pick(record, fields, str(file))
      first, size = reader.line_num + 1, 0
  except csv.Error as error:
    raise UserError(
      f'{file}:{first}: the row that begins here is not CSV ({error}): close '
      'each quote, and double it within quotes'
    ) from None
  if not names:
    raise UserError(f'{file} is empty: its first line names the columns')


def _columns(file: Path, line: int, row: list[str]) -> list[str]:
  """The names in the first row."""
  twice = sorted(name for name in row if name and row.count(name) > 1)
  if twice:
    raise UserError(f'{file}:{line} names the column {twice[0]!r} twice')
  return row


def _parquet(
  file: Path, stream: BinaryIO, fields: Sequence[str] | None
) -> Iterator[Record]:
  import pyarrow
  import pyarrow.parquet

  if _compression(file):
    # Its index is at its end, so that it needs all of a compressed file.
    content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
      raise UserError(f'{file}, unpacked, {_TOO_LONG}: unpack it yourself')
    stream = io.BytesIO(content)
  try:
    table = pyarrow.parquet.ParquetFile(stream)
    pick(dict.fromkeys(table.schema_arrow.names), fields, str(file))
    for batch in table.iter_batches(batch_size=1024, columns=fields):
      yield from batch.to_pylist()
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise UserError(
      f'{file} is no Parquet file that can be read: {first_line(error)}'
    ) from None
