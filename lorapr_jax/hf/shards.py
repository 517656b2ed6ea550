"""safetensors files: read by slices, written a tensor at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from lorapr_jax.errors import UserError
from lorapr_jax.hf.files import INDEX_FILE, WEIGHTS_FILE, weight_files
from lorapr_jax.runtime.files import check_file, write_json
from lorapr_jax.runtime.paths import is_local, path_of

MAX_SHARD_BYTES = 5_000_000_000
# By the names that safetensors gives them.
DTYPES = {
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(jnp.bfloat16),
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
}
# In front of the names of the text model, in one that sees too.
_TEXT = 'language_model.'
# More than this safetensors refuses.
_LARGEST_HEADER = 100_000_000
# Bytes written at a time: some file systems hold a whole write in memory.
_PIECE = 2**25


class Shards:
  """The tensors of one or many safetensors files, read by slices."""

  def __init__(self, folder: str | Path):
    """Opens the folder's files without reading any tensor.

    Raises:
      UserError: if there is no safetensors file, if one is damaged, or if two
        hold the same tensor.
    """
    self.folder = path_of(folder)
    self._files = {}
    for path in weight_files(self.folder):
      file = open_file(path)
      names = {x.removeprefix(_TEXT): x for x in set(file.keys())}
      if twice := sorted(self._files.keys() & names.keys()):
        raise UserError(
          f'{path} holds tensor {twice[0]}, as another file of the '
          'index does: save the model again with transformers'
        )
      self._files |= {x: (file, name) for x, name in names.items()}

  @property
  def names(self) -> set[str]:
    """The tensors' names, as a model of text alone has them."""
    return set(self._files)

  @property
  def dtype(self) -> np.dtype:
    """The dtype of the embeddings, which stands for all."""
    return self.slice_of('model.embed_tokens.weight')[:1].dtype

  def slice_of(self, name: str) -> Any:
    """A tensor that is read when it is indexed; see `get_shape()`."""
    file, name = self._files[name]
    return file.get_slice(name)


def open_file(path: Path) -> Any:
  """One file: `keys()` and `get_slice(name)`, as `safetensors.safe_open` has.

  Raises:
    UserError: if it cannot be read.
  """
  check_file(path)
  try:
    if is_local(path):
      return safe_open(path, framework='np')
    return _FarFile(path)
  except (SafetensorError, OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {error}') from None


class _FarFile:
  """A file that cannot be mapped into memory; its parts are requested."""

  def __init__(self, path: Path):
    self._path, end = path, path.stat().st_size
    begin = 8 + int.from_bytes(self.read(0, min(8, end)), 'little')
    if begin > min(end, _LARGEST_HEADER):
      raise ValueError('it is no safetensors file, or only a part of one')
    header = json.loads(self.read(8, begin))
    try:
      header.pop('__metadata__', None)
      self._tensors = {
        name: _FarTensor(
          self,
          stored['dtype'],
          tuple(stored['shape']),
          begin + stored['data_offsets'][0],
        )
        for name, stored in header.items()
      }
      last = max(stored['data_offsets'][1] for stored in header.values())
    except (AttributeError, KeyError, TypeError):
      raise ValueError('its header names no tensors') from None
    if begin + last != end:
      raise ValueError(f'it has {end} bytes where {begin + last} should be')

  def read(self, begin: int, end: int) -> bytes:
    return self._path.fs.cat_file(self._path.path, start=begin, end=end)

  def keys(self) -> Iterable[str]:
    return self._tensors.keys()

  def get_slice(self, name: str) -> '_FarTensor':
    return self._tensors[name]


class _FarTensor(NamedTuple):
  """A tensor of a `_FarFile`, with the methods of safetensors' own.

  Rows are read in one request, whole; of the other axes what is not asked for
  is thrown away. What is read of a tensor is held until another one is read,
  for all devices that have parts of it.
  """

  file: _FarFile
  dtype: str
  shape: tuple[int, ...]
  begin: int

  def get_dtype(self) -> str:
    return self.dtype

  def get_shape(self) -> tuple[int, ...]:
    return self.shape

  def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
    rows, *others = index if isinstance(index, tuple) else (index,)
    dtype, (length, *row) = DTYPES[self.dtype], self.shape
    first, last, _ = rows.indices(length)
    size = dtype.itemsize * math.prod(row)
    read = _reader(self)(self.begin + first * size, self.begin + last * size)
    read = np.frombuffer(read, dtype).reshape(last - first, *row)
    return read[:, *others]


@functools.lru_cache(maxsize=1)
def _reader(tensor: _FarTensor) -> Callable[[int, int], bytes]:
  return functools.cache(tensor.file.read)


def write_safetensors(
  folder: Path,
  shapes: Mapping[str, tuple[int, ...]],
  dtype: np.dtype,
  tensors: Iterator[tuple[str, np.ndarray]],
  max_shard_bytes: int,
) -> None:
  """Writes shards of at most `max_shard_bytes`, and an index if several.

  One tensor is held at a time; one that is larger has a shard to itself.

  Args:
    folder: where to.
    shapes: of all tensors, in their order.
    dtype: of all.
    tensors: name and values of each.
    max_shard_bytes: of a file.
  """
  shards: list[dict[str, tuple[int, ...]]] = [{}]
  held = total = 0
  for name, shape in shapes.items():
    size = dtype.itemsize * math.prod(shape)
    if shards[-1] and held + size > max_shard_bytes:
      shards.append({})
      held = 0
    shards[-1][name] = shape
    held, total = held + size, total + size
  if len(shards) == 1:
    write_file(folder / WEIGHTS_FILE, shapes, dtype, tensors)
    return
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = f'model-{i:05d}-of-{len(shards):05d}.safetensors'
    some = itertools.islice(tensors, len(shard))
    write_file(folder / file, shard, dtype, some)
    weight_map |= dict.fromkeys(shard, file)
  write_json(
    folder / INDEX_FILE,
    {'metadata': {'total_size': total}, 'weight_map': weight_map},
  )


def write_file(
  path: Path,
  shapes: Mapping[str, tuple[int, ...]],
  dtype: np.dtype,
  tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
  """Writes one file, as https://github.com/huggingface/safetensors has it.

  safetensors itself writes a file once it has all of its tensors. The arguments
  are those of `write_safetensors`.
  """
  stored = {kind: name for name, kind in DTYPES.items()}[dtype]
  # transformers asks for the format.
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, shape in shapes.items():
    begin, end = end, end + dtype.itemsize * math.prod(shape)
    header[name] = {
      'dtype': stored,
      'shape': shape,
      'data_offsets': (begin, end),
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for (name, shape), (given, x) in zip(shapes.items(), tensors, strict=True):
      if (given, x.shape, x.dtype) != (name, shape, dtype):
        raise ValueError(f'{given} {x.shape} {x.dtype} in place of {name}')
      values = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
      for begin in range(0, len(values), _PIECE):
        file.write(values[begin : begin + _PIECE])
