"""TensorFlow Datasets, without TensorFlow: NAME[/CONFIG][:VERSION][:SPLIT].

A data set that lies prepared in the data_dir is read as it is, without running
its code and without a network. Any other is prepared there, as array_record.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import os
import re
import sys
from typing import Any

import numpy as np

from lorapr_jax.data.text_files import Record, pick
from lorapr_jax.errors import UserError, first_line
from lorapr_jax.runtime.content import sha256_of
from lorapr_jax.runtime.paths import path_of

_SPEC = re.compile(
  r'(?P<name>\w+(?:/[\w.-]+)?)(?::(?P<version>\d+\.\d+\.\d+))?'
  r'(?::(?P<split>.+))?'
)
# Records read at a time.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class TfdsSpec:
  """The parts of NAME[/CONFIG][:VERSION][:SPLIT].

  Attributes:
    name: NAME[/CONFIG][:VERSION], as the library takes it.
    split: `train`, or a slice such as `train[:10%]`.
    data_dir: the folder of prepared data sets; None: the library's default.
  """

  name: str
  split: str
  data_dir: str | None

  def __str__(self) -> str:
    return f'tfds:{self.name}:{self.split}'


def parse_tfds(path: str, data_dir: str | None = None) -> TfdsSpec:
  """Splits NAME[/CONFIG][:VERSION][:SPLIT] into its parts. Reads nothing.

  Raises:
    UserError: if it is not of this form.
  """
  match = _SPEC.fullmatch(path)
  if not match:
    raise UserError(
      f'tfds:{path} is not of the form tfds:NAME[/CONFIG][:VERSION][:SPLIT]'
    )
  name, version, split = match.group('name', 'version', 'split')
  return TfdsSpec(
    name=f'{name}:{version}' if version else name,
    split=split or 'train',
    data_dir=os.path.expanduser(data_dir) if data_dir else None,
  )


def read_tfds(
  spec: TfdsSpec, fields: Sequence[str] | None = None
) -> Iterator[Record]:
  """Yields the records of a split, in the order in which they were prepared.

  They have the columns `fields`; None: all. Bytes are decoded as UTF-8; arrays
  become lists.

  Raises:
    UserError: if there is no such data set, split or column, if it cannot be
      prepared or read, or if it is not UTF-8.
  """
  builder, split = _open(spec)
  columns = dict.fromkeys(builder.info.features.keys())
  wanted = pick(columns, fields, str(spec))
  if not split.num_examples:
    return
  try:
    source = builder.as_data_source(split=spec.split)
  except NotImplementedError:
    raise UserError(
      f'{spec} is prepared as {builder.info.file_format.value} in '
      f'{builder.data_dir}, which only TensorFlow reads: give another folder '
      'as ?data_dir=, where it is prepared as array_record'
    ) from None
  for start in range(0, len(source), _CHUNK):
    numbers = range(start, min(start + _CHUNK, len(source)))
    try:
      records = source.__getitems__(list(numbers))
    except RuntimeError as error:  # array_record raises no other.
      raise _unreadable(spec, builder, error) from None
    for number, record in zip(numbers, records, strict=True):
      yield {
        field: _plain(record[field], f'{spec}, record {number + 1}, {field!r}')
        for field in wanted
      }


def tfds_fingerprint(spec: TfdsSpec) -> bytes:
  """A hash of what the data set says of itself, and of its files.

  It covers the version, the checksums of what was downloaded, the sizes of the
  splits and the slice, and the names and contents of the slice's files.

  Raises:
    UserError: as `read_tfds`.
  """
  builder, split = _open(spec)
  info = builder.info.as_proto.SerializeToString(deterministic=True)
  digest = hashlib.sha256(info)
  for part in split.file_instructions:
    path = path_of(builder.data_path / os.path.basename(part.filename))
    try:
      content = sha256_of(path)
    except UserError as error:
      raise _unreadable(spec, builder, error) from None
    digest.update(repr((path.name, part.skip, part.take, content)).encode())
  return digest.digest()


def _open(spec: TfdsSpec) -> tuple[Any, Any]:
  """The builder of the data set, prepared if need be, and its split."""
  # Imported here: it takes a second, and other data do not need it.
  from google.protobuf import json_format
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  from_files = read_only_builder.builder_from_files
  try:
    try:
      builder = from_files(spec.name, data_dir=spec.data_dir)
    except tfds.core.DatasetNotFoundError:
      _prepare(spec)
      # Every later run will read the files, so this one does too.
      builder = from_files(spec.name, data_dir=spec.data_dir)
    return builder, builder.info.splits[spec.split]
  except (OSError, ValueError, json_format.ParseError) as error:
    raise UserError(f'{spec}: {first_line(error)}') from None


def _prepare(spec: TfdsSpec) -> None:
  """Downloads and prepares a data set that the library knows."""
  import tensorflow_datasets as tfds

  where = f'is not prepared in {spec.data_dir or "the default data_dir"}'
  try:
    # The library imports kinds of data sets up to the first that needs
    # TensorFlow. These need none.
    for kind in ('text', 'summarization', 'question_answering'):
      importlib.import_module(f'tensorflow_datasets.{kind}')
    builder = tfds.builder(
      spec.name, data_dir=spec.data_dir, file_format='array_record'
    )
    # The library prints, but standard output is for results.
    with contextlib.redirect_stdout(sys.stderr):
      builder.download_and_prepare()
  except tfds.core.DatasetNotFoundError:
    name = spec.name.partition('/')[0].partition(':')[0]
    known = tfds.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(name, known, n=1)
    raise UserError(
      f'{spec} {where}, nor known to tensorflow-datasets: '
      + (f'did you mean {close[0]}?' if close else 'give its ?data_dir=')
    ) from None
  # A data set's own code runs here, and may raise anything.
  except Exception as error:
    raise UserError(
      f'{spec} {where}, and cannot be prepared here: {first_line(error)}; '
      "prepare it elsewhere with file_format='array_record' and give that "
      'folder as ?data_dir='
    ) from error


def _unreadable(spec: TfdsSpec, builder: Any, error: Exception) -> UserError:
  return UserError(
    f'{spec} cannot be read from {builder.data_dir}: {first_line(error)}; '
    'prepare it anew'
  )


def _plain(value: Any, where: str) -> Any:
  """The value in Python's own types, with bytes decoded to text."""
  match value:
    case bytes():
      try:
        return value.decode()
      except UnicodeDecodeError as error:
        raise UserError(f'{where} is not UTF-8 text ({error})') from None
    case np.ndarray() | np.generic():
      return _plain(value.tolist(), where)
    case dict():
      return {key: _plain(item, where) for key, item in value.items()}
    case list():
      return [_plain(item, where) for item in value]
    case _:
      return value
