"""Which files of a Hugging Face folder hold its weights."""

from pathlib import Path

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import read_json
from lorapr_jax.runtime.paths import is_local

WEIGHTS_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'


def weight_files(folder: Path) -> list[Path]:
  """The files of the weights, as transformers chooses them.

  model.safetensors, or without it the files that the index names. No other file
  is read, whatever its name.

  Raises:
    UserError: if there is neither, or the index names no files.
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


def _names(index: Path) -> list[str]:
  """The names in an index, each once."""
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f'{index} has no weight_map of tensors to files')
  return sorted(set(map(str, weight_map.values())))


def check_file(path: Path) -> None:
  """Refuses what is no file, such as a link that leads nowhere or a pipe.

  Raises:
    UserError: saying what it is.
  """
  if path.is_file():
    return
  if is_local(path) and path.is_symlink() and not path.exists():
    raise UserError(
      f'{path} is a link to {path.readlink()}, which does not exist: fetch the '
      'model again'
    )
  what = 'is not a file' if path.exists() else 'does not exist'
  raise UserError(f'{path} {what}')
