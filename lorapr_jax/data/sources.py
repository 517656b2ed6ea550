"""Where text comes from: one spec string each.

  file:PATH            .txt: one document; LF line ends
  file:PATH?lines      its stripped lines, joined by a blank line: one document
  file:PATH            .jsonl (?field=text) or .csv (?column=text): a document
                       a record
  hf:NAME[:SPLIT]      a Hugging Face data set: a local folder, or
                       OWNER/NAME[/CONFIG] on the Hub (?column=text); a
                       document a row
  demo:news:train      the demo's news articles, all but the last tenth
  demo:news:heldout    the last tenth
  synthetic:SEED       token ids of a made-up language, for models without a
                       tokenizer (?windows=256)
PATH may have wildcards; the files are read in sorted order.
"""

import csv
import dataclasses
import glob
import io
import json
import logging
from pathlib import Path

from lorapr_jax.data.demo import news_split
from lorapr_jax.data.hub import parse_hub, read_hub
from lorapr_jax.errors import UserError

_log = logging.getLogger(__name__)
_OPTIONS = {
  '.txt': ('lines',),
  '.jsonl': ('field',),
  '.csv': ('column',),
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """A data spec taken apart."""

  text: str
  scheme: str
  path: str
  options: dict[str, str]


def parse_spec(spec: str) -> Spec:
  """Takes SCHEME:PATH[?OPTION[=VALUE][&...]] apart and checks it.

  Looks at file names, but reads and fetches nothing.

  Raises:
    UserError: if the spec is unknown or its file does not exist.
  """
  scheme, colon, rest = spec.partition(':')
  path, _, query = rest.partition('?')
  options = dict(
    (option.partition('=')[::2]) for option in query.split('&') if option
  )
  if not colon or scheme not in ('file', 'hf', 'demo', 'synthetic'):
    raise UserError(
      f'data spec {spec!r} is not known: use file:PATH, hf:NAME, '
      'demo:news:train, demo:news:heldout or synthetic:SEED'
    )
  known = ('windows',) if scheme == 'synthetic' else ()
  if scheme == 'demo' and path not in ('news:train', 'news:heldout'):
    raise UserError(
      f'data spec {spec!r}: only demo:news:train and demo:news:heldout exist'
    )
  if scheme == 'synthetic':
    for value in (path, *options.values()):
      if not value.isdigit():
        raise UserError(f'data spec {spec!r}: {value!r} is not a number')
    if options.get('windows', '1').strip('0') == '':
      raise UserError(f'data spec {spec!r}: it needs at least one window')
  if scheme == 'hf':
    parse_hub(path)
    known = ('column',)
  if scheme == 'file':
    suffixes = {file.suffix for file in _files(path)}
    if len(suffixes) > 1 or not suffixes <= set(_OPTIONS):
      raise UserError(
        f'data spec {spec!r}: files of {", ".join(sorted(suffixes))}; give '
        f'one kind of {", ".join(_OPTIONS)}'
      )
    known = _OPTIONS[suffixes.pop()]
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise UserError(
      f'data spec {spec!r}: option {unknown[0]!r} is not known here'
      + (f'; there is {", ".join(known)}' if known else '')
    )
  return Spec(spec, scheme, path, options)


def _files(path: str) -> list[Path]:
  if glob.has_magic(path):
    files = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
  else:
    files = [Path(path)]
  if not files:
    raise UserError(f'{path} matches no file')
  for file in files:
    if not file.is_file():
      raise UserError(f'{file} is not a file')
  return files


def read_documents(spec: str) -> list[str]:
  """The documents of a spec, in order; documents without text are dropped.

  Raises:
    UserError: if a file cannot be read as what it should be, or no text is
      left.
  """
  parsed = parse_spec(spec)
  if parsed.scheme == 'synthetic':
    raise UserError(
      f'{spec} has token ids, no text: it needs a model without a tokenizer'
    )
  if parsed.scheme == 'demo':
    documents = news_split(parsed.path.removeprefix('news:'))
  elif parsed.scheme == 'hf':
    documents = read_hub(parsed.path, parsed.options.get('column', 'text'))
  else:
    documents = [
      document
      for file in _files(parsed.path)
      for document in _read_file(file, parsed.options)
    ]
  for number, document in enumerate(documents, 1):
    if not document.isascii():
      try:
        document.encode()
      except UnicodeEncodeError as error:
        raise UserError(f'{spec}, document {number}: {error}') from None
  filled = [document for document in documents if document.strip()]
  if not filled:
    raise UserError(f'{spec} holds no text')
  if len(filled) < len(documents):
    _log.warning(
      '%s: %d of %d documents hold no text and are left out',
      *(spec, len(documents) - len(filled), len(documents)),
    )
  return filled


def _read_file(file: Path, options: dict[str, str]) -> list[str]:
  try:
    text = file.read_text(encoding='utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(
      f'{file} is not UTF-8 text ({error}): save it as UTF-8'
    ) from None
  if file.suffix == '.jsonl':
    return _read_jsonl(file, text, options.get('field', 'text'))
  if file.suffix == '.csv':
    return _read_csv(file, text, options.get('column', 'text'))
  if 'lines' in options:
    lines = (line.strip() for line in text.split('\n'))
    return ['\n\n'.join(line for line in lines if line)]
  return [text]


def _read_jsonl(file: Path, text: str, field: str) -> list[str]:
  documents = []
  for number, line in enumerate(text.split('\n'), 1):
    if not line.strip():
      continue
    try:
      documents.append(json.loads(line)[field])
    except (json.JSONDecodeError, KeyError, TypeError):
      raise UserError(
        f'{file}:{number} is no JSON object with the field {field!r}'
      ) from None
    if not isinstance(documents[-1], str):
      raise UserError(f'{file}:{number}: {field!r} is not a string')
  return documents


def _read_csv(file: Path, text: str, column: str) -> list[str]:
  csv.field_size_limit(len(text) + 1)
  reader = csv.DictReader(io.StringIO(text, newline=''))
  columns = reader.fieldnames or ()
  if column not in columns:
    raise UserError(
      f'{file} has no column {column!r}; it has {", ".join(columns) or "none"}'
    )
  return [row[column] or '' for row in reader]
