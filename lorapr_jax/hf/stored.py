"""How the files of a family hold our tensors.

Three things differ from ours (models/families.py has them by family): names;
several of our projections in one tensor, as rows of it; and the order of the
rows of a head that RoPE rotates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import re
from typing import Any, NamedTuple, Protocol

import numpy as np

from lorapr_jax.axes import PROJECTIONS
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.families import row_of

_IN_BLOCK = re.compile(r'(?P<block>model\.layers\.\d+\.)(?P<module>.+)\.(\w+)')
_ROTATED = ('self_attn.q_proj', 'self_attn.k_proj')
_Shapes = Mapping[str, tuple[int, ...]]


class Storage(Protocol):
  """How files hold our tensors: a row of models/families.py, for one.

  Attributes:
    stored: where they have a module of a block, by where we have it.
    interleaved: whether they have the rows of a head pair by pair.
  """

  stored: Mapping[str, str]
  interleaved: bool


# Of files that have our tensors as they are.
OURS: Storage = row_of(None)


def module_of(name: str) -> str:
  """The module of a block that a tensor of ours is of; '' outside blocks."""
  match = _IN_BLOCK.fullmatch(name)
  return match['module'] if match else ''


def stored_names(
  names: Iterable[str], storage: Storage
) -> dict[str, list[str]]:
  """Their name of every tensor -> our names of its rows, in their order."""
  stored = storage.stored
  order = {module: i for i, module in enumerate(stored)}
  found: dict[str, list[str]] = {}
  for name in names:
    theirs, module = name, module_of(name)
    if module in stored:
      block, _, leaf = _IN_BLOCK.fullmatch(name).groups()
      theirs = f'{block}{stored[module]}.{leaf}'
    found.setdefault(theirs, []).append(name)
  for parts in found.values():
    parts.sort(key=lambda name: order.get(module_of(name), 0))
  return found


def stored_shapes(shapes: _Shapes, storage: Storage) -> dict[str, tuple]:
  """Shapes by our names, of matrices (outputs, inputs), to those stored."""
  return {
    theirs: (sum(shapes[x][0] for x in parts), *shapes[parts[0]][1:])
    for theirs, parts in stored_names(shapes, storage).items()
  }


def stored_tensors(
  tensor_of: Callable[[str], np.ndarray],
  names: Iterable[str],
  config: ModelConfig,
  storage: Storage,
) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor under their name, as they store it, one at a time.

  Args:
    tensor_of: from our name to a matrix (outputs, inputs) or a vector.
    names: ours, of all tensors.
    config: the model's sizes.
    storage: of the files that they are for.
  """
  for theirs, parts in stored_names(names, storage).items():
    rows = [to_stored_rows(tensor_of(x), x, config, storage) for x in parts]
    yield theirs, rows[0] if len(rows) == 1 else np.concatenate(rows)


def to_stored_rows(
  x: np.ndarray, name: str, config: ModelConfig, storage: Storage
) -> np.ndarray:
  """A tensor under our name, its rows in their order."""
  order = _order(name, config, storage)
  return x if order is None else _reordered(x, np.argsort(order))


def from_stored_rows(
  x: np.ndarray, name: str, config: ModelConfig, storage: Storage
) -> np.ndarray:
  """The inverse of `to_stored_rows`."""
  order = _order(name, config, storage)
  return x if order is None else _reordered(x, order)


def stored_projection(name: str, storage: Storage) -> str:
  """What files call the module that holds a projection of ours."""
  part = next(part for part, specs in PROJECTIONS.items() if name in specs)
  module = f'{part}.{name}'
  return storage.stored.get(module, module).rpartition('.')[2]


class Rows(NamedTuple):
  """Rows of a stored tensor, in our order; read when they are indexed.

  Attributes:
    tensor: as `safetensors.safe_open(...).get_slice` gives it.
    first: the first row.
    shape: of the rows.
    order: theirs by ours, of the rows of a head; None: they are the same. What
      is read then must be whole heads.
  """

  tensor: Any
  first: int
  shape: tuple[int, ...]
  order: np.ndarray | None

  def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
    rows, *others = index if isinstance(index, tuple) else (index,)
    first, last, _ = rows.indices(self.shape[0])
    rows = slice(self.first + first, self.first + last)
    x = self.tensor[(rows, *others)]
    return x if self.order is None else _reordered(x, self.order)


def our_tensors(
  slice_of: Callable[[str], Any],
  shapes: _Shapes,
  config: ModelConfig,
  storage: Storage,
) -> dict[str, Rows]:
  """The tensors of files by our names.

  Args:
    slice_of: from their name to a tensor that is read when it is indexed.
    shapes: by our names, of matrices (outputs, inputs).
    config: the model's sizes.
    storage: of the files.
  """
  tensors = {}
  for theirs, parts in stored_names(shapes, storage).items():
    first = 0
    for name in parts:
      order = _order(name, config, storage)
      tensors[name] = Rows(slice_of(theirs), first, shapes[name], order)
      first += shapes[name][0]
  return tensors


def _order(
  name: str, config: ModelConfig, storage: Storage
) -> np.ndarray | None:
  """For each row of a head of ours, which one of theirs it is."""
  if not storage.interleaved or module_of(name) not in _ROTATED:
    return None
  rows, turned = np.arange(config.head_dim), config.rotated
  return np.concatenate([rows[:turned:2], rows[1:turned:2], rows[turned:]])


def _reordered(x: np.ndarray, order: np.ndarray) -> np.ndarray:
  heads = x.reshape(-1, len(order), *x.shape[1:])
  return heads[:, order].reshape(x.shape)
