"""Reads text from many sources; a spec, one string, names each (docs/data.md).

A document is a text file, or a record of one of the other kinds. A mixture is
several specs with weights, `0.7*SPEC + 0.3*SPEC`.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import hashlib
import itertools
import logging
import math
import re

from lorapr_jax.data import hub, text_files, tfds
from lorapr_jax.data.demo import news_split
from lorapr_jax.data.text_files import Record
from lorapr_jax.errors import UserError

_log = logging.getLogger(__name__)

_NUMBER = r'-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?'
_WEIGHTED = re.compile(rf'({_NUMBER})\s*\*\s*(.*)', re.DOTALL)
# A plus only separates two specs if a weight or a scheme follows it: a path may
# contain one.
_PLUS = re.compile(rf' \+ +(?=(?:{_NUMBER}\s*\*|[a-z]+:))')


@dataclasses.dataclass(frozen=True)
class Spec:
  """The parts of a data spec, SCHEME:PATH[?OPTION[=VALUE][&...]]."""

  text: str
  scheme: str
  path: str
  options: dict[str, str]

  @property
  def column(self) -> str:
    """The column of a record that holds its text."""
    return self.options.get('column') or self.options.get('field') or 'text'


def parse_mixture(spec: str) -> tuple[tuple[float, Spec], ...]:
  """The (weight, spec) of each part of `0.7*SPEC + 0.3*SPEC`. Reads nothing.

  A weight is the share of the windows that are drawn from the part; all add up
  to 1. Of the numbers in the text only the ratios count; one SPEC alone needs
  none.

  Raises:
    UserError: if a spec is wrong, if one of several has no weight, or if token
      ids are mixed with text.
  """
  parts = [part.strip() for part in _PLUS.split(spec)]
  weights, specs = [], []
  for part in parts:
    weighted = _WEIGHTED.fullmatch(part)
    if not weighted and len(parts) > 1:
      raise UserError(
        f'data spec {spec!r}: {part!r} has no weight; write 0.7*SPEC + 0.3*SPEC'
      )
    number, part = weighted.groups() if weighted else ('1', part)
    weights.append(float(number))
    if not 0 < weights[-1] < math.inf:
      raise UserError(
        f'data spec {spec!r}: the weight {number} is not a number above 0'
      )
    specs.append(parse_spec(part))
  if len(specs) > 1 and any(part.scheme == 'synthetic' for part in specs):
    raise UserError(
      f'data spec {spec!r}: synthetic: has token ids, no text, so nothing '
      'mixes with it'
    )
  total = math.fsum(weights)
  return tuple(
    (weight / total, part) for weight, part in zip(weights, specs, strict=True)
  )


def parse_spec(spec: str) -> Spec:
  """Splits SCHEME:PATH[?OPTION[=VALUE][&...]] into its parts and checks them.

  Looks for files by name, but reads and fetches nothing.

  Raises:
    UserError: if the spec is unknown or a mixture, or its file does not exist.
  """
  if _WEIGHTED.fullmatch(spec) or _PLUS.search(spec):
    raise UserError(
      f'data spec {spec!r} is a mixture, which only text to train or repair on '
      'can be: give one spec, without a weight'
    )
  scheme, colon, rest = spec.partition(':')
  path, _, query = rest.partition('?')
  options = dict(
    (option.partition('=')[::2]) for option in query.split('&') if option
  )
  known: tuple[str, ...] = ()
  match scheme if colon else None:
    case 'file':
      kind = text_files.kind_of(path)
      known = text_files.OPTIONS[kind]
    case 'tfds':
      tfds.parse_tfds(path)
      known = ('column', 'data_dir')
    case 'hf':
      hub.parse_hub(path)
      known = ('column',)
    case 'demo':
      if path not in ('news:train', 'news:heldout'):
        raise UserError(
          f'data spec {spec!r}: only demo:news:train and demo:news:heldout '
          'exist'
        )
    case 'synthetic':
      known = ('windows',)
      for value in (path, *options.values()):
        if not value.isdigit():
          raise UserError(f'data spec {spec!r}: {value!r} is not a number')
      if options.get('windows', '1').strip('0') == '':
        raise UserError(f'data spec {spec!r}: it needs at least one window')
    case _:
      raise UserError(
        f'data spec {spec!r} is not known: use file:PATH, tfds:NAME, hf:NAME, '
        'demo:news:train, demo:news:heldout or synthetic:SEED'
      )
  unknown = sorted(set(options) - set(known))
  if unknown:
    raise UserError(
      f'data spec {spec!r}: option {unknown[0]!r} is not known here'
      + (f'; there is {", ".join(known)}' if known else '')
    )
  return Spec(spec, scheme, path, options)


def read_records(
  spec: Spec, fields: Sequence[str] | None = None
) -> Iterator[Record]:
  """Yields the records of a spec in order, read as they are asked for.

  A record is a dict of the columns `fields`; None: of all. Plain text is a
  record with the column `text`.

  Raises:
    UserError: if the data cannot be read, or if a field is missing.
  """
  match spec.scheme:
    case 'file':
      yield from text_files.read_files(
        spec.path, fields, lines='lines' in spec.options
      )
    case 'tfds':
      yield from tfds.read_tfds(_tfds_spec(spec), fields)
    case 'hf':
      yield from hub.read_hub(spec.path, fields)
    case 'demo':
      for article in news_split(spec.path.removeprefix('news:')):
        yield text_files.pick({'text': article}, fields, spec.text)
    case _:
      raise UserError(
        f'{spec.text} has token ids, no text: it needs a model without a '
        'tokenizer'
      )


def _tfds_spec(spec: Spec) -> tfds.TfdsSpec:
  return tfds.parse_tfds(spec.path, spec.options.get('data_dir'))


def read_rows(spec: Spec) -> Iterator[Iterator[str]]:
  """Yields the texts of one column in order, the empty ones included.

  Each comes in parts, which must be read before the next text is asked for: a
  text file may be larger than memory.

  Raises:
    UserError: if the data cannot be read, if the column holds something other
      than text, or if all of it is empty.
  """
  filled = False

  def watched(parts: Iterable[str]) -> Iterator[str]:
    nonlocal filled
    for part in parts:
      filled = filled or _has_text(part)
      yield part

  yield from map(watched, _read_rows(spec))
  if not filled:
    raise UserError(f'{spec.text} holds no text')


def _read_rows(spec: Spec) -> Iterator[Iterable[str]]:
  if spec.scheme == 'file' and text_files.kind_of(spec.path) == '.txt':
    lines = 'lines' in spec.options
    yield from text_files.read_texts(spec.path, lines=lines)
    return
  for number, record in enumerate(read_records(spec, [spec.column]), 1):
    text = record[spec.column]
    if text is not None and not isinstance(text, str):
      raise UserError(
        f'{spec.text}, record {number}: {spec.column!r} is not text but '
        f'{type(text).__name__}'
      )
    yield (text or '',)


def _has_text(text: str) -> bool:
  return bool(text) and not text.isspace()


def read_documents(spec: Spec) -> Iterator[Iterator[str]]:
  """Yields the rows of a spec that hold text, in parts as `read_rows` does.

  At the end a warning says how many rows were left out.

  Raises:
    UserError: as `read_rows`.
  """
  count = empty = 0
  for parts in read_rows(spec):
    count += 1
    head = []
    for part in parts:
      head.append(part)
      if _has_text(part):
        yield itertools.chain(head, parts)
        break
    else:
      empty += 1
  if empty:
    _log.warning(
      '%s: %d of %d documents hold no text and are left out',
      *(spec.text, empty, count),
    )


def evaluation_text(spec: Spec) -> Iterator[str]:
  """All rows, the empty ones included, joined by a blank line, in parts.

  This is what the papers do (docs/method.md, evaluation).

  Raises:
    UserError: as `read_rows`.
  """
  for i, parts in enumerate(read_rows(spec)):
    if i:
      yield '\n\n'
    yield from parts


def identity(spec: Spec) -> bytes:
  """A hash that changes when what `read_records` gives changes.

  It is a hash of the content; files that have not changed are read once. Of a
  data set on the Hub it is what the library knows of its revision.

  Raises:
    UserError: if the data cannot be read.
  """
  # Only the content counts, not the folder in which it lies.
  options = [o for o in sorted(spec.options.items()) if o[0] != 'data_dir']
  digest = hashlib.sha256(repr((spec.scheme, options)).encode())
  match spec.scheme:
    case 'file':
      digest.update(text_files.hash_files(spec.path))
    case 'tfds':
      digest.update(tfds.tfds_fingerprint(_tfds_spec(spec)))
    case 'hf':
      digest.update(hub.hub_fingerprint(spec.path))
    case 'demo':
      for article in news_split(spec.path.removeprefix('news:')):
        digest.update(article.encode() + b'\0')
    case _:
      digest.update(spec.path.encode())
  return digest.digest()
