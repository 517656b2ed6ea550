"""Names and layouts: our tree to Hugging Face's tensors and back.

Our trees use Hugging Face's names, so that a path joined by dots is a name.
Only the projections have another layout: ours is (inputs..., outputs...),
theirs a matrix (outputs, inputs) with each side's axes merged, or of a bias,
which has no inputs, a vector. Letters: axes.py.
"""

import math
import re
from typing import Any

import jax
import numpy as np

from lorapr_jax.axes import PROJECTIONS, ProjectionLetters
from lorapr_jax.models.config import ModelConfig, Stack

# Of what is no projection, such as a norm's weight.
_VECTOR = ProjectionLetters('', '', '')
# Tensors that the model of text does not have: of old checkpoints those that
# are computed, not learned; and what sees.
IGNORED = re.compile(
  r'.*\.rotary_emb\.inv_freq|(vision_tower|multi_modal_projector)\..*'
)


def locate(
  path: tuple[Any, ...], stacks: tuple[Stack, ...]
) -> tuple[tuple[str, ...], range | None]:
  """Where a leaf of `params` lies: its path in the block, and its layers.

  Args:
    path: a key path of jax.tree_util.
    stacks: of the model.

  Returns:
    The names on the path, below the stack if it is in one; and the layers of
    that stack, or None for a tensor outside the stacks.
  """
  keys = [key.idx if hasattr(key, 'idx') else key.key for key in path]
  if keys[0] != 'stacks':
    return tuple(keys), None
  stack = stacks[keys[1]]
  return tuple(keys[2:]), range(stack.start, stack.start + stack.size)


def hf_name(path: tuple[str, ...], layer: int | None = None) -> str:
  """The tensor's name, for a path in `params` or, with a layer, in a block."""
  if layer is not None:
    return f'model.layers.{layer}.' + '.'.join(path)
  return ('' if path[0] == 'lm_head' else 'model.') + '.'.join(path)


def letters_of(path: tuple[str, ...]) -> ProjectionLetters:
  """The axes of a tensor of a block; without inputs, those of a vector."""
  spec = PROJECTIONS.get(path[0], {}).get(path[1])
  if spec is None:
    return _VECTOR
  letters = ProjectionLetters.of(spec)
  if path[2:] == ('bias',):
    return ProjectionLetters(letters.outputs, '', letters.outputs)
  return letters


def to_hf_layout(
  x: np.ndarray, letters: ProjectionLetters | None
) -> np.ndarray:
  """(inputs..., outputs...) to (outputs, inputs), contiguous.

  What has no letters, as it is outside blocks, stays.
  """
  if letters is None:
    return np.ascontiguousarray(x)
  if not letters.inputs:
    return np.ascontiguousarray(x.reshape(-1))
  rows = math.prod(x.shape[: len(letters.inputs)])
  return np.ascontiguousarray(x.reshape(rows, -1).T)


def hf_shape(
  shape: tuple[int, ...], letters: ProjectionLetters
) -> tuple[int, ...]:
  """The shape of `to_hf_layout(x)` for an x of this shape."""
  split = len(letters.inputs)
  rows = math.prod(shape[split:])
  return (rows, math.prod(shape[:split])) if split else (rows,)


def hf_shapes(params: Any, config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor of a tree by its name, in the tree's order."""
  shapes, stacks = {}, config.stacks
  for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
    path, layers = locate(key_path, stacks)
    if layers is None:
      shapes[hf_name(path)] = leaf.shape
    else:
      shape = hf_shape(leaf.shape[1:], letters_of(path))
      shapes |= {hf_name(path, layer): shape for layer in layers}
  return shapes


def read_slices(
  matrix, shape: tuple[int, ...], index: tuple[slice, ...], letters
) -> np.ndarray:
  """Part of a tensor in our layout, read by slices of theirs.

  Args:
    matrix: what `safetensors.safe_open(...).get_slice` gives, or an array.
    shape: the whole tensor's, in our layout.
    index: the part, with a slice for each of our axes.
    letters: of the tensor.
  """
  bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
  split = len(letters.inputs)
  # Each side's leading axis is cut while reading, the others afterwards.
  rows, read = _leading(bounds[split:], shape[split:])
  if not split:
    part = matrix[rows].reshape(read)
  else:
    columns, inputs = _leading(bounds[:split], shape[:split])
    part = matrix[rows, columns].T.reshape(*inputs, *read)
  rest = [slice(*b) for b in bounds]
  rest[0] = rest[split] = slice(None)
  return part[tuple(rest)]


def _leading(bounds, shape) -> tuple[slice, tuple[int, ...]]:
  """A side's merged slice, cut by its first axis, and the shape of that."""
  first, last = bounds[0]
  inner = math.prod(shape[1:])
  return slice(first * inner, last * inner), (last - first, *shape[1:])
