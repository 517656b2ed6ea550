"""What reading and writing a GGUF share: metadata, names and shapes of tensors.

GGUF is llama.cpp's file format: metadata, which take the place of config.json
and of the tokenizer's files, and tensors, which are mostly quantised.
"""

from collections.abc import Collection, Iterator
import dataclasses
import math
import re
from typing import Any

import numpy as np

from lorapr_jax.axes import PROJECTIONS, Axes, ProjectionLetters
from lorapr_jax.errors import UserError, check_size, short
from lorapr_jax.gguf.archs import Arch
from lorapr_jax.hf.rope import is_positive
from lorapr_jax.models.config import MOST, ModelConfig
from lorapr_jax.models.families import FAMILIES

# A score that is nothing to the softmax.
EMPTY = -1e30
# Of the keys of our own, which llama.cpp skips.
OWN = 'lorapr_jax.'
# The end tokens where there are several.
EOS_IDS = f'{OWN}eos_token_ids'

_TOP = {
  'model.embed_tokens.weight': 'token_embd.weight',
  'model.norm.weight': 'output_norm.weight',
  'lm_head.weight': 'output.weight',
}
_IN_BLOCK = re.compile(r'model\.layers\.(\d+)\.(.+)')


class Metadata(dict[str, Any]):
  """The key-value part of a GGUF; errors name the file and the key."""

  def __init__(self, path: Any, values: Any):
    super().__init__(values)
    self._path = path

  def error(self, problem: str) -> UserError:
    return UserError(f'{self._path}: {problem}')

  def __missing__(self, key: str) -> Any:
    raise self.error(f'{key} is absent')

  def size(self, key: str, default: int | None = None, most: int = MOST) -> int:
    """Removes and returns an integer from 1 to `most`."""
    value = self.pop(key, self[key] if default is None else default)
    return check_size(f'{self._path}: {key}', value, most)

  def number(self, key: str, default: float | None = None) -> float:
    """Removes and returns a positive number."""
    value = self.pop(key, self[key] if default is None else default)
    if not (isinstance(value, float) and is_positive(value)):
      found = short(repr(value))
      raise self.error(f'{key} is {found}, not a positive number of type float')
    return shortest(value)

  def list_of(self, key: str, kind: type, default: Any = None) -> Any:
    """The list under a key, all of whose members are of this type."""
    value = self[key] if default is None else self.get(key, default)
    if not isinstance(value, list | tuple) or {*map(type, value)} - {kind}:
      found = short(repr(value))
      raise self.error(f'{key} is {found}, not a list of {kind.__name__}')
    return value

  def check_id(self, key: str, value: Any, vocab_size: int) -> int:
    """A value under a key, if it is the id of a token."""
    if type(value) is not int or not 0 <= value < vocab_size:
      raise self.error(
        f'{key} is {short(repr(value))}, but the ids of tokens are 0 to '
        f'{vocab_size - 1}'
      )
    return value

  def take_only(self, key: str, *values: Any) -> Any:
    """Removes and returns a value: one of these; if absent, the first."""
    found = self.pop(key, values[0])
    if found not in values:
      supported = ' and '.join(map(repr, values))
      raise self.error(
        f'{key} is {short(repr(found))}; only {supported} is supported'
      )
    return found


def shortest(value: float) -> float:
  """The number of fewest digits that float32 rounds to this one.

  Numbers are stored in float32: 9.999999747378752e-06 stands for 1e-5.
  """
  return float(str(np.float32(value)))


def gguf_name(stored: str) -> str:
  """The name of a tensor, from that which hf/stored.py gives by an Arch."""
  match = _IN_BLOCK.fullmatch(stored)
  return 'blk.{}.{}'.format(*match.groups()) if match else _TOP[stored]


def our_names(config: ModelConfig) -> Iterator[str]:
  """Our name of every tensor, from the embeddings to the head, by layers."""
  yield 'model.embed_tokens.weight'
  first, *others = config.norms
  modules = [first]
  for part, names in PROJECTIONS.items():
    modules += [f'{part}.{name}' for name in names]
    if part == 'self_attn':
      modules += [f'{part}.{name}' for name in config.qk_norms]
      modules += others
  for i in range(len(config.layers)):
    for module in modules:
      yield f'model.layers.{i}.{module}.weight'
      if module.rpartition('.')[2] in config.biases:
        yield f'model.layers.{i}.{module}.bias'
  yield 'model.norm.weight'
  if not config.tie_embeddings:
    yield 'lm_head.weight'


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor by our name, in Hugging Face's layout."""
  return {name: _shape(name, config) for name in our_names(config)}


def _shape(name: str, config: ModelConfig) -> tuple[int, ...]:
  if name in _TOP:
    rows = () if is_norm(name) else (config.vocab_size,)
    return (*rows, config.embed_dim)
  _, _, layer, *module, leaf = name.split('.')
  if len(module) == 1:
    return (config.embed_dim,)
  part, projection = module
  sizes = config.sizes(config.layers[int(layer)])
  if projection in config.qk_norms:
    axes = Axes.of(config.qk_norms[projection])
    return (math.prod(sizes[axis] for axis in axes),)
  letters = ProjectionLetters.of(PROJECTIONS[part][projection])
  rows, columns = (
    math.prod(sizes[axis] for axis in Axes.of(side))
    for side in (letters.outputs, letters.inputs)
  )
  return (rows, columns) if leaf == 'weight' else (rows,)


def with_biases(
  config: ModelConfig, arch: Arch, names: Collection[str]
) -> ModelConfig:
  """The sizes with the biases that a file of these tensors has.

  They are the fewest of a family that has those of the file among them: a file
  may lack those that are zero.
  """
  modules = {theirs: module for module, theirs in arch.stored.items()}
  found = {
    modules[name.split('.')[2]].rpartition('.')[2]
    for name in names
    if is_bias(name) and name.split('.')[2] in modules
  } & {*arch.biases}
  possible = (
    dataclasses.replace(config, biases=biases)
    for family in FAMILIES.values()
    for biases in family.possible_biases()
    if found <= {*biases}
  )
  held = [x for x in possible if any(f.holds(x) for f in FAMILIES.values())]
  return min(
    held, key=lambda x: len(x.biases), default=config.with_biases(found)
  )


def is_bias(name: str) -> bool:
  """Whether GGUF's tensor of this name is a bias in a block."""
  return name.endswith('.bias') and name.count('.') > 2


def is_norm(name: str) -> bool:
  """Whether our tensor of this name is the weight of a norm."""
  return name.endswith('norm.weight')


def empty_sinks(config: ModelConfig) -> dict[str, np.ndarray]:
  """Sinks that take nothing of attention, by GGUF's names: (K G,) each."""
  return {
    f'blk.{i}.attn_sinks.weight': np.full(shape.num_heads, EMPTY, np.float32)
    for i, shape in enumerate(config.layers)
  }


def to_stored(
  x: np.ndarray, name: str, config: ModelConfig, arch: Arch
) -> np.ndarray:
  """The values of a tensor as llama.cpp has them.

  Its norms multiply by their weight, without an offset. Where attention has
  another scale than llama.cpp's, the norm of the queries makes up for it.

  Args:
    x: float32 values, in the order of rows of the file.
    name: ours.
    config: the model's numbers.
    arch: that the file is of.
  """
  if not is_norm(name):
    return x
  x = x + 1 if config.norm_offset else x
  if name.endswith('q_norm.weight') and not arch.has_scale_of(config):
    x = x * np.float32(config.score_scale / arch.score_scale(config))
  return x


def from_stored(x: np.ndarray, name: str, config: ModelConfig) -> np.ndarray:
  """Its inverse, for a config that has llama.cpp's scale."""
  return x - 1 if config.norm_offset and is_norm(name) else x
