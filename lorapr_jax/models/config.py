"""A model in numbers and flags, and its adapters. Letters: axes.py."""

from collections.abc import Iterable
import dataclasses
import itertools
import math
from typing import NamedTuple

from lorapr_jax.axes import LORA_TARGETS, PROJECTIONS, Axes, ProjectionLetters
from lorapr_jax.errors import UserError
from lorapr_jax.models.rope import Rope

# By part of a block, the flag that says whether its projections have biases;
# config.json has a key of the same name.
BIAS_KEYS = {'self_attn': 'attention_bias', 'mlp': 'mlp_bias'}

# Files that say more are refused: a size is an int32 everywhere, and a list of
# layers takes memory before a weight is read.
MOST_LAYERS, MOST = 1000, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class LayerShape:
  """The sizes of a block that pruning changes."""

  num_kv_heads: int
  queries_per_kv: int
  mlp_dim: int

  @property
  def num_heads(self) -> int:
    """Query heads."""
    return self.num_kv_heads * self.queries_per_kv


class Stack(NamedTuple):
  """A run of `size` equal layers, the first of which is layer `start`."""

  start: int
  size: int
  shape: LayerShape


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which projections get a low-rank update W + (alpha / rank) A B."""

  rank: int
  alpha: float
  dropout: float
  targets: tuple[str, ...] = LORA_TARGETS

  def __post_init__(self):
    if self.rank < 1:
      raise UserError(f'lora.rank is {self.rank}: it must be at least 1')
    if not self.alpha > 0:
      raise UserError(f'lora.alpha is {self.alpha}: it must be positive')
    if not 0.0 <= self.dropout < 1.0:
      raise UserError(f'lora.dropout is {self.dropout}: it must be in [0, 1)')
    unknown = sorted(set(self.targets) - set(LORA_TARGETS))
    if unknown or not self.targets:
      raise UserError(
        f'lora.targets has {unknown or "no projection"}: choose from '
        + ', '.join(LORA_TARGETS)
      )

  @property
  def scale(self) -> float:
    """s = alpha / r."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A LLaMA-family model. Layers may differ in size once they are pruned."""

  vocab_size: int
  embed_dim: int
  head_dim: int
  layers: tuple[LayerShape, ...]
  norm_eps: float = 1e-6
  ropes: tuple[Rope, ...] = (Rope(),)
  # How many of a head's dimensions turn; None: all.
  rotary_dim: int | None = None
  tie_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  max_positions: int = 2048
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None
  pad_token_id: int | None = None
  # The projections that are int8 in memory (models/quantization.py). A folder
  # has none, and its config.json does not say it.
  quantized: tuple[str, ...] = ()

  @property
  def dequantized(self) -> 'ModelConfig':
    """The same model with no projection quantised."""
    return dataclasses.replace(self, quantized=())

  @property
  def rotated(self) -> int:
    """R, how many of a head's dimensions turn."""
    return self.head_dim if self.rotary_dim is None else self.rotary_dim

  @property
  def stacks(self) -> tuple[Stack, ...]:
    """Runs of equal layers, in order; each is one scan in the forward pass."""
    stacks, start = [], 0
    for shape, run in itertools.groupby(self.layers):
      size = len(list(run))
      stacks.append(Stack(start, size, shape))
      start += size
    return tuple(stacks)

  @property
  def is_uniform(self) -> bool:
    """Whether every layer has the same size."""
    return len(set(self.layers)) == 1

  @property
  def biased(self) -> tuple[str, ...]:
    """The parts of a block all of whose projections have biases."""
    return tuple(part for part, key in BIAS_KEYS.items() if getattr(self, key))

  def with_biases(self, parts: Iterable[str]) -> 'ModelConfig':
    """The sizes where these parts have biases too."""
    return dataclasses.replace(self, **{BIAS_KEYS[p]: True for p in parts})

  def sizes(self, shape: LayerShape) -> dict[str, int]:
    """Axis name -> size, for the tensors of a layer of this shape."""
    return {
      'embed': self.embed_dim,
      'head_dim': self.head_dim,
      'kv_heads': shape.num_kv_heads,
      'queries_per_kv': shape.queries_per_kv,
      'mlp': shape.mlp_dim,
      'vocab': self.vocab_size,
    }

  def layer_parameters(self, shape: LayerShape) -> int:
    """The number of weights in a block of this shape, biases and norms too."""
    sizes = self.sizes(shape)
    projections = [
      math.prod(sizes[a] for a in Axes.of(ProjectionLetters.of(spec).weight))
      for part in PROJECTIONS.values()
      for spec in part.values()
    ]
    return sum(projections) + self.layer_biases(shape) + 2 * self.embed_dim

  def layer_biases(self, shape: LayerShape) -> int:
    """The number of biases among `layer_parameters`."""
    sizes = self.sizes(shape)
    return sum(
      math.prod(sizes[a] for a in Axes.of(ProjectionLetters.of(spec).outputs))
      for part in self.biased
      for spec in PROJECTIONS[part].values()
    )

  @property
  def num_parameters(self) -> int:
    """The number of weights of the model; tied embeddings count once."""
    embeddings = self.vocab_size * self.embed_dim
    embeddings *= 1 if self.tie_embeddings else 2
    blocks = sum(self.layer_parameters(shape) for shape in self.layers)
    return embeddings + blocks + self.embed_dim
