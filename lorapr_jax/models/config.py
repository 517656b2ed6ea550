"""A model in numbers and flags, and its adapters. Letters: axes.py."""

from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import math
from typing import Any, NamedTuple

from lorapr_jax.axes import (
  LORA_TARGETS,
  SPECS,
  Axes,
  ProjectionLetters,
)
from lorapr_jax.errors import UserError
from lorapr_jax.models.rope import Dynamic, LongRope, Rope

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


# The norms of a block, in their order: before and after attention, before and
# after the MLP. The third has LLaMA's name for it.
NORMS = BEFORE_ATTENTION, AFTER_ATTENTION, BEFORE_MLP, AFTER_MLP = (
  'input_layernorm',
  'attention_output_layernorm',
  'post_attention_layernorm',
  'mlp_output_layernorm',
)


QK_NORMS = ('q_norm', 'k_norm')


class Stack(NamedTuple):
  """A run of `size` equal layers, the first of which is layer `start`."""

  start: int
  size: int
  shape: LayerShape


def kind_fields(
  base: Rope | None,
  windows: Sequence[int | None],
  ropes: Sequence[Rope | None],
) -> dict[str, Any]:
  """The fields of a ModelConfig that tell its layers apart.

  Args:
    base: the first of its `ropes`, whether or not a layer turns so.
    windows: how many tokens each layer sees; None: all before it.
    ropes: how each layer turns; None: not at all.
  """
  all_ropes = list(dict.fromkeys((base, *ropes)))
  several = len(all_ropes) > 1
  return {
    'windows': tuple(windows) if any(windows) else (),
    'ropes': tuple(all_ropes),
    'rope_of_layer': tuple(map(all_ropes.index, ropes)) if several else (),
  }


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
  """A dense decoder-only model. Layers may differ in size once it is pruned.

  The defaults are those of a LLaMA.
  """

  vocab_size: int
  embed_dim: int
  head_dim: int
  layers: tuple[LayerShape, ...]
  norm_eps: float = 1e-6
  # How queries and keys turn: in one way (None: not at all), or by layer.
  ropes: tuple[Rope | None, ...] = (Rope(),)
  rope_of_layer: tuple[int, ...] = ()
  # By layer, how many tokens each sees, with itself; None: all before it.
  # Empty: so do all layers.
  windows: tuple[int | None, ...] = ()
  # How many of a head's dimensions turn; None: all.
  rotary_dim: int | None = None
  tie_embeddings: bool = False
  # The projections that have one, in the order of LORA_TARGETS.
  biases: tuple[str, ...] = ()
  # Queries and keys are RMS-normed, over the numbers of each head before RoPE
  # ('head') or after it ('head_after_rope'), or over those of all heads before
  # it ('heads'). None: they are not.
  qk_norm: str | None = None
  # Those of NORMS that a block has.
  norms: tuple[str, ...] = (BEFORE_ATTENTION, BEFORE_MLP)
  # Whether norms multiply by 1 + weight, not by the weight.
  norm_offset: bool = False
  # Of the MLP: 'silu' or 'gelu_tanh'.
  activation: str = 'silu'
  # What a block's parts add to the stream, and the embeddings and logits, are
  # multiplied by these.
  residual_scale: float = 1.0
  embed_scale: float = 1.0
  logit_scale: float = 1.0
  # Logits l become cap tanh(l / cap); None: they stay.
  logit_cap: float | None = None
  # By which q k is multiplied; None: 1 / sqrt(H).
  attention_scale: float | None = None
  # Attention's scores s become cap tanh(s / cap); None: they stay.
  attention_cap: float | None = None
  max_positions: int = 2048
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None
  pad_token_id: int | None = None
  # The projections that are int8 in memory (models/quantization.py). A folder
  # has none, and its config.json does not say it.
  quantized: tuple[str, ...] = ()
  # The row of models/families.py whose files the model came from, if any. It
  # decides how files are read and written, and nothing that the model computes.
  family: str | None = dataclasses.field(default=None, compare=False)

  @property
  def dequantized(self) -> 'ModelConfig':
    """The same model with no projection quantised."""
    return dataclasses.replace(self, quantized=())

  @property
  def rotated(self) -> int:
    """R, how many of a head's dimensions turn."""
    return self.head_dim if self.rotary_dim is None else self.rotary_dim

  @property
  def longest(self) -> int:
    """The tokens of the longest text; a dynamic RoPE makes room for more."""
    scalings = [rope.scaling for rope in self.ropes if rope]
    factors = [x.factor for x in scalings if isinstance(x, Dynamic)]
    return int(self.max_positions * max(factors, default=1))

  @property
  def short_texts(self) -> set[int]:
    """How long the texts may be that LongRoPE turns by its short factors."""
    scalings = [rope.scaling for rope in self.ropes if rope]
    long = [x for x in scalings if isinstance(x, LongRope)]
    return {x.original_max_position_embeddings for x in long}

  @property
  def layer_windows(self) -> tuple[int | None, ...]:
    """`windows` with an entry for each layer."""
    return self.windows or (None,) * len(self.layers)

  @property
  def layer_ropes(self) -> tuple[Rope | None, ...]:
    """How each layer turns."""
    of_layer = self.rope_of_layer or (0,) * len(self.layers)
    return tuple(self.ropes[i] for i in of_layer)

  def of_layers(self, layers: Sequence[int]) -> 'ModelConfig':
    """The model of these of its layers alone."""
    windows, ropes = self.layer_windows, self.layer_ropes
    return dataclasses.replace(
      self,
      layers=tuple(self.layers[i] for i in layers),
      **kind_fields(
        self.ropes[0],
        [windows[i] for i in layers],
        [ropes[i] for i in layers],
      ),
    )

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
  def heads_fill_embed(self) -> bool:
    """Whether the heads of each layer are as wide together as the model."""
    widths = {shape.num_heads * self.head_dim for shape in self.layers}
    return widths == {self.embed_dim}

  @property
  def is_uniform(self) -> bool:
    """Whether every layer has the same size."""
    return len(set(self.layers)) == 1

  def with_biases(self, names: Iterable[str]) -> 'ModelConfig':
    """The sizes where these projections have biases too."""
    biased = {*self.biases, *names}
    biases = tuple(name for name in LORA_TARGETS if name in biased)
    return dataclasses.replace(self, biases=biases)

  @property
  def score_scale(self) -> float:
    """By which q k is multiplied."""
    scale = self.attention_scale
    return self.head_dim**-0.5 if scale is None else scale

  @property
  def query_scale(self) -> float:
    """By which queries grow before they attend, which divides by sqrt(H)."""
    if self.attention_scale is None:
      return 1.0
    return self.attention_scale * math.sqrt(self.head_dim)

  @property
  def qk_norms(self) -> dict[str, str]:
    """The norms of queries and keys: their weights' letters, by name."""
    if not self.qk_norm:
      return {}
    over_all = self.qk_norm == 'heads'
    return dict(zip(QK_NORMS, ('KGH', 'KH') if over_all else 'HH', strict=True))

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
    matrices = (ProjectionLetters.of(spec).weight for spec in SPECS.values())
    return self._count(shape, matrices) + self.layer_vectors(shape)

  def layer_vectors(self, shape: LayerShape) -> int:
    """The number of biases and norms' weights among `layer_parameters`."""
    biases = (ProjectionLetters.of(SPECS[n]).outputs for n in self.biases)
    norms = ('D' for _ in self.norms)
    return self._count(shape, (*biases, *norms, *self.qk_norms.values()))

  def quantized_numbers(self, shape: LayerShape) -> tuple[int, int]:
    """The int8 values, and their scales, in a block of this shape."""
    letters = [ProjectionLetters.of(SPECS[n]) for n in self.quantized]
    return (
      self._count(shape, (x.weight for x in letters)),
      self._count(shape, (x.outputs for x in letters)),
    )

  def _count(self, shape: LayerShape, tensors: Iterable[str]) -> int:
    """The numbers in tensors of these letters."""
    sizes = self.sizes(shape)
    return sum(math.prod(sizes[a] for a in Axes.of(x)) for x in tensors)

  @property
  def num_parameters(self) -> int:
    """The number of weights of the model; tied embeddings count once."""
    embeddings = self.vocab_size * self.embed_dim
    embeddings *= 1 if self.tie_embeddings else 2
    blocks = sum(
      n * self.layer_parameters(shape) for _, n, shape in self.stacks
    )
    return embeddings + blocks + self.embed_dim
