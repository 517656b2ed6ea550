"""Hugging Face data sets: NAME[/CONFIG][@REVISION][:SPLIT].

NAME is a local folder, or OWNER/NAME on the Hub. A local folder was written by
`save_to_disk`, or holds Parquet, JSON or CSV files. Only the Hub needs the
network.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import importlib.metadata
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from lorapr_jax.data.text_files import Record, pick
from lorapr_jax.errors import UserError, first_line
from lorapr_jax.runtime.content import sha256_of
from lorapr_jax.runtime.paths import expanded

# Files that `save_to_disk` writes, for one split and for several.
_SAVED = ('state.json', 'dataset_dict.json')


@dataclasses.dataclass(frozen=True)
class HubSpec:
  """The parts of NAME[/CONFIG][@REVISION][:SPLIT].

  Attributes:
    name: a folder, or OWNER/NAME on the Hub.
    config: the configuration of a data set on the Hub, or None.
    revision: of the data set's repository; None: the newest.
    split: the split; None: `train`, or the whole of a folder without splits.
  """

  name: str
  config: str | None
  revision: str | None
  split: str | None


def parse_hub(path: str) -> HubSpec:
  """Splits NAME[/CONFIG][@REVISION][:SPLIT]. Reads and fetches nothing.

  Raises:
    UserError: if it is neither a folder nor a name that the Hub could have, or
      if the package `datasets` is not installed.
  """
  try:
    importlib.metadata.version('datasets')
  except importlib.metadata.PackageNotFoundError:
    raise UserError(
      f"hf:{path} needs the package datasets: pip install 'lorapr-jax[hf]'"
    ) from None
  name, _, split = path.partition(':')
  if name and (folder := expanded(name)).is_dir():
    # An absolute path: `datasets` takes a bare `json` for a kind of file.
    return HubSpec(str(folder.absolute()), None, None, split or None)
  name, _, revision = name.partition('@')
  parts = name.split('/')
  if len(parts) > 3 or not all(part.strip('.~') for part in parts):
    raise UserError(
      f'hf:{path}: {name} is no folder, nor OWNER/NAME[/CONFIG] on the Hub'
    )
  config = parts.pop() if len(parts) == 3 else None
  return HubSpec('/'.join(parts), config, revision or None, split or None)


def read_hub(
  path: str, fields: Sequence[str] | None = None
) -> Iterator[Record]:
  """Yields the rows in order, with the columns `fields`; None: with all.

  Raises:
    UserError: if there is no such data set, split or column, or if the rows
      cannot be read.
  """
  data = _load(path)
  if fields is not None:
    pick(dict.fromkeys(data.column_names), fields, f'hf:{path}')
    data = data.select_columns(list(fields))
  with readable(f'hf:{path}'):
    yield from data


def hub_fingerprint(path: str) -> bytes:
  """Tells data sets apart: a folder's by their content, the Hub's by revision.

  Raises:
    UserError: if there is no such data set or split.
  """
  data = _load(path)
  # The rows as the library keeps them. Its own fingerprint knows the times of
  # the files that it read, or is one that was saved beside the rows.
  files = data.cache_files if Path(parse_hub(path).name).is_dir() else ()
  content = [sha256_of(Path(file['filename'])) for file in files]
  content = content or [data._fingerprint]
  return ' '.join((str(data.split), str(len(data)), *content)).encode()


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
  """Turns the errors that the library raises in the block into UserErrors.

  Each says in a line `what` failed and the cause of the library's error, which
  says more than the error itself.
  """
  datasets = import_datasets()
  try:
    yield
  except (
    OSError,
    RuntimeError,  # The data set is a script, which is never run.
    ValueError,
    datasets.exceptions.DatasetsError,
  ) as error:
    reason = error.__cause__ or error
    raise UserError(f'{what}: {first_line(reason)}') from None


def import_datasets() -> ModuleType:
  """Imports `datasets`, which takes seconds and which no other data need.

  It would tell the Hub of each data set that is read, even of local files; that
  is turned off.
  """
  os.environ.setdefault('HF_UPDATE_DOWNLOAD_COUNTS', '0')
  import datasets

  return datasets


def _load(path: str) -> Any:
  """The data set of a split; its rows stay on the disk."""
  spec, datasets = parse_hub(path), import_datasets()
  split = spec.split or 'train'
  saved = any((Path(spec.name) / file).is_file() for file in _SAVED)
  with readable(f'hf:{path}'):
    if not saved:
      return datasets.load_dataset(
        spec.name, spec.config, revision=spec.revision, split=split
      )
    data = datasets.load_from_disk(spec.name)
  if not isinstance(data, datasets.Dataset):
    if split not in data:
      raise UserError(
        f'hf:{path}: it has no split {split!r}; it has {", ".join(data)}'
      )
    return data[split]
  if spec.split:
    raise UserError(f'hf:{path}: it has no splits, so no {split!r}')
  return data
