"""Which files of a Hugging Face folder hold its weights, and their hash."""

from pathlib import Path
import re
from typing import Any

from lorapr_jax.errors import UserError, short
from lorapr_jax.runtime.content import combined, hashing
from lorapr_jax.runtime.files import check_file, read_json
from lorapr_jax.runtime.paths import is_local

WEIGHTS_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
# Of any file system.
_LONGEST_NAME = 255


def weight_files(folder: Path) -> list[Path]:
  """The files of the weights, as transformers chooses them.

  model.safetensors, or without it the files that the index names. No other file
  is read, whatever its name.

  Raises:
    UserError: if there is neither, or the index names no files of the folder.
  """
  weights, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
  if weights.is_file():
    return [weights]
  if index.is_file():
    return [folder / name for name in _names(index)]
  if is_local(weights) and weights.is_symlink():
    check_file(weights)
  raise UserError(
    f'{folder} holds no {WEIGHTS_FILE} and no {INDEX_FILE} (other files are '
    'not read: save the model with transformers and safe_serialization=True)'
  )


def has_weights(folder: Path) -> bool:
  """Whether the files of the weights are all there.

  A folder may have come without them: its config.json says its sizes.
  """
  found = (WEIGHTS_FILE, INDEX_FILE)
  if not any((folder / name).is_file() for name in found):
    return False
  return all(path.is_file() for path in weight_files(folder))


def base_files(folder: Path) -> list[Path]:
  """The files that decide what a model computes: config.json, and the weights.

  Raises:
    UserError: as `weight_files`.
  """
  return [folder / 'config.json', *weight_files(folder)]


def content_hash(folder: Path) -> str:
  """The SHA-256 of `base_files`. Files that have not changed are read once.

  Raises:
    UserError: if a file cannot be read.
  """
  with hashing(base_files(folder)) as hashes:
    return combined(hashes().values())


def _names(index: Path) -> list[str]:
  """The names in an index, each once."""
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f'{index} has no weight_map of tensors to files')
  for tensor, name in weight_map.items():
    if not _is_inside(name):
      raise UserError(
        f'{index} says that {short(tensor)} is in {short(repr(name))}, which '
        'is no name of a file in its folder'
      )
  return sorted(set(weight_map.values()))


def _is_inside(name: Any) -> bool:
  """Whether a name, joined to a folder, stays below it; links may lead out."""
  if not isinstance(name, str):
    return False
  parts = re.split(r'[/\\]', name)
  if max(map(len, parts)) > _LONGEST_NAME:
    return False
  return parts[0] != '' and ':' not in parts[0] and '..' not in parts
