"""What a GGUF file says of itself, read within bounds: metadata and tensors.

gguf-py's own reader trusts the lengths in a file. This one believes none that
leads out of the file, holds a list as NumPy does, and leaves the weights where
they are.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has the format.
"""

from collections.abc import Mapping
import dataclasses
import math
from pathlib import Path
import struct
from typing import Any

import gguf
import numpy as np

# Of the metadata and the names of tensors: four times a large vocabulary.
_MOST_BYTES = 2**26
_VERSIONS = (2, 3)
_MOST_AXES = 4
_SCALARS = {
  kind: np.dtype(f'<{code}')
  for kind, code in {
    gguf.GGUFValueType.UINT8: 'u1',
    gguf.GGUFValueType.INT8: 'i1',
    gguf.GGUFValueType.UINT16: 'u2',
    gguf.GGUFValueType.INT16: 'i2',
    gguf.GGUFValueType.UINT32: 'u4',
    gguf.GGUFValueType.INT32: 'i4',
    gguf.GGUFValueType.FLOAT32: 'f4',
    gguf.GGUFValueType.UINT64: 'u8',
    gguf.GGUFValueType.INT64: 'i8',
    gguf.GGUFValueType.FLOAT64: 'f8',
  }.items()
} | {gguf.GGUFValueType.BOOL: np.dtype(bool)}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies in a file that is mapped into memory.

  Attributes:
    kind: how its values are stored.
    shape: rows first, as NumPy has it.
    stored: its bytes, (all axes but the last, bytes of a row).
  """

  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  stored: np.ndarray

  @property
  def is_readable(self) -> bool:
    """Whether gguf-py can dequantise the type; it says so no other way."""
    _, size = gguf.GGML_QUANT_SIZES[self.kind]
    try:
      gguf.quants.dequantize(np.zeros((1, size), np.uint8), self.kind)
    except NotImplementedError:
      return False
    return True

  def __getitem__(self, rows: slice | tuple[slice]) -> np.ndarray:
    """The values of some rows, or of all of a vector, float32."""
    if len(self.shape) == 1:
      return gguf.quants.dequantize(self.stored, self.kind)[rows]
    return gguf.quants.dequantize(self.stored[rows], self.kind)


def read_header(
  path: Path,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """The metadata of a file by their keys, and its tensors by their names.

  Raises:
    OSError, ValueError: if it is no GGUF, or a damaged one.
  """
  data = np.memmap(path, mode='r')
  cursor = _Cursor(data)
  if cursor.take(4) != b'GGUF':
    raise ValueError('it does not begin with GGUF')
  version = cursor.number('I')
  if version not in _VERSIONS:
    raise ValueError(f'version {version} is none of {_VERSIONS}')
  tensors, keys = cursor.number('Q'), cursor.number('Q')
  metadata = {}
  for _ in range(keys):
    key = cursor.text()
    if key in metadata:
      raise ValueError(f'{key[:100]!r} is there twice')
    metadata[key] = cursor.value()
  found = {}
  for _ in range(tensors):
    name = cursor.text()
    if name in found:
      raise ValueError(f'tensor {name[:100]!r} is there twice')
    found[name] = cursor.tensor()
  begin = _aligned(cursor.at, metadata)
  return metadata, {
    name: _mapped(name, data, begin + offset, kind, shape)
    for name, (kind, shape, offset) in found.items()
  }


def _aligned(at: int, metadata: Mapping[str, Any]) -> int:
  """Where the first tensor may begin."""
  step = metadata.get('general.alignment', gguf.GGUF_DEFAULT_ALIGNMENT)
  if type(step) is not int or step < 1 or step & (step - 1):
    raise ValueError('general.alignment is no power of two')
  return -(-at // step) * step


def _mapped(
  name: str, data: np.ndarray, begin: int, kind: int, shape: tuple[int, ...]
) -> Tensor:
  kind = gguf.GGMLQuantizationType(kind)
  block, size = gguf.GGML_QUANT_SIZES[kind]
  if not 1 <= len(shape) <= _MOST_AXES or min(shape) < 1 or shape[-1] % block:
    raise ValueError(
      f'tensor {name[:100]!r} of type {kind.name} has the sizes {shape[:9]}'
    )
  stored = (*shape[:-1], shape[-1] // block * size)
  end = begin + math.prod(stored)
  if end > len(data):
    raise ValueError(f'tensor {name[:100]!r} ends behind the end of the file')
  return Tensor(kind, shape, data[begin:end].reshape(stored))


class _Cursor:
  """Reads one thing behind the other, as far as a header may reach."""

  def __init__(self, data: np.ndarray):
    self._data, self.at = memoryview(data), 0
    self._end = min(len(data), _MOST_BYTES)

  def take(self, size: int) -> bytes:
    begin, self.at = self.at, self.at + size
    if self.at > self._end:
      where = 'the file'
      if self._end < len(self._data):
        where = f'{_MOST_BYTES // 2**20} MiB, the most that is read of metadata'
      raise ValueError(f'its header goes on behind the end of {where}')
    return self._data[begin : self.at].tobytes()

  def number(self, code: str) -> int:
    (value,) = struct.unpack(f'<{code}', self.take(struct.calcsize(code)))
    return value

  def text(self) -> str:
    begin, content = self.at, self.take(self.number('Q'))
    try:
      return content.decode()
    except UnicodeDecodeError:
      raise ValueError(f'the text at byte {begin} is not UTF-8') from None

  def value(self) -> Any:
    """A value behind its type; an array is a list."""
    kind = gguf.GGUFValueType(self.number('I'))
    if kind == gguf.GGUFValueType.STRING:
      return self.text()
    if kind in _SCALARS:
      return self._scalars(kind, 1)[0]
    kind, length = gguf.GGUFValueType(self.number('I')), self.number('Q')
    if kind == gguf.GGUFValueType.STRING:
      return [self.text() for _ in range(length)]
    if kind not in _SCALARS:
      raise ValueError('it has a list of lists')
    return self._scalars(kind, length)

  def _scalars(self, kind: gguf.GGUFValueType, length: int) -> list[Any]:
    dtype = _SCALARS[kind]
    return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()

  def tensor(self) -> tuple[int, tuple[int, ...], int]:
    """Its type, its sizes, rows first, and where it begins."""
    axes = self.number('I')
    sizes = np.frombuffer(self.take(8 * axes), '<u8').tolist()
    return self.number('I'), tuple(reversed(sizes)), self.number('Q')
