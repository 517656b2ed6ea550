"""What a family of models is: how its files differ from LLaMA's.

models/families.py has the rows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import itertools
from typing import Any, NamedTuple

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.models.config import ModelConfig


class Number(NamedTuple):
  """A number of a config.json that decides a field of ModelConfig.

  Attributes:
    key: of the config.json.
    read: from its value to the field's.
    write: the inverse.
  """

  key: str
  read: Callable[[float], float] = float
  write: Callable[[float], float] = float


# The names of layers in `layer_types`.
FULL, SLIDING = 'full_attention', 'sliding_attention'
# Which layers: by the keys of a config.json and the number of the layer.
Layers = Callable[[Mapping[str, Any], int], bool]


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of models, under the name of its `model_type`.

  Attributes:
    architecture: the class of transformers that has logits.
    absent: what keys of a config.json mean that the file lacks. A null means
      mostly the same (hf/config.py has the keys of which it does not).
    only: keys of a config.json that must have this value, or be absent.
    ignored: keys of a config.json that may say anything where others may not.
    written: keys of a config.json that no size decides.
    biases: the projections that always have one.
    bias_keys: flags of a config.json, and the projections that have one then.
    fixed: FEATURES of every model of the family.
    numbers: FEATURES that config.json decides. Those that are neither here nor
      in `fixed` are LLaMA's.
    activation_key: the key of a config.json that names the activation.
    activations: the names that it may have there, of which the first is ours.
    theta_grows: whether a `dynamic` RoPE with `alpha` is a plain one, with
      theta alpha^(H / (H - 2)) times as large.
    slides: whether layer i is one of those with a window, by the keys of the
      file and i, where there is no `layer_types`; None: no layer is.
    has_layer_types: whether the file's `layer_types` counts.
    turns: whether layer i turns queries and keys, by the keys and i; None: all
      do.
    local_theta: the key of theta in layers with a window, where that is
      another than in the others; these have no scaling. None: it is the same.
    scales_queries: whether queries grow by `llama_4_scaling_beta`.
    stored: where the files have a module of a block, by where we have it; those
      that they do not have in our place. What has one place is stored there as
      one, the rows of the first, then of the next.
    interleaved: whether the rows of a head are stored pair by pair, x0 y0 x1 y1
      ..., where RoPE rotates x and y. We have x0 x1 ... y0 y1 ..., as LLaMA.
    heads_divide_embed: whether the hidden size must be a multiple of the number
      of heads. transformers 5.4 to 5.23 demand that of some families, even with
      an explicit head_dim (issue 46082).
    heads_fill_embed: whether the heads of every layer must be as wide together
      as the hidden size.
    longrope_fills_embed: the same in layers of one size where RoPE is scaled as
      longrope; transformers demands that.
    pruned_as: the family that a model is exported as, if it can be, where the
      heads are not: some tools take that for granted in this family.
    names_version: whether its config.json must name a version of transformers
      where it has more than 100,000 tokens: without one, transformers takes the
      tokenizer for one with a known flaw.
    exported_as: the family that a model of this one is exported as, where every
      transformers knows that one only; None: this one.
  """

  architecture: str
  absent: Mapping[str, Any]
  only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  written: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  biases: tuple[str, ...] = ()
  bias_keys: Mapping[str, Iterable[str]] = dataclasses.field(
    default_factory=dict
  )
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)
  activation_key: str = 'hidden_act'
  activations: tuple[str, ...] = ('silu',)
  theta_grows: bool = False
  slides: Layers | None = None
  has_layer_types: bool = True
  turns: Layers | None = None
  local_theta: str | None = None
  scales_queries: bool = False
  stored: Mapping[str, str] = dataclasses.field(default_factory=dict)
  interleaved: bool = False
  heads_divide_embed: bool = False
  heads_fill_embed: bool = False
  longrope_fills_embed: bool = False
  pruned_as: str | None = None
  names_version: bool = False
  exported_as: str | None = None

  def holds(self, config: ModelConfig) -> bool:
    """Whether a model of this family computes what `config` says."""
    return (
      config.biases in self.possible_biases()
      and all(
        name in self.numbers
        or getattr(config, name) == self.fixed.get(name, default)
        for name, default in FEATURES.items()
      )
      and (config.heads_fill_embed or not self.heads_fill_embed)
      and self._has_windows(config)
      and self._has_ropes(config)
    )

  def takes_heads(self, config: ModelConfig) -> bool:
    """Whether every transformers loads as many heads, in layers of one size."""
    fills = self.longrope_fills_embed and bool(config.short_texts)
    return (
      not self.heads_divide_embed
      or config.embed_dim % config.layers[0].num_heads == 0
    ) and (config.heads_fill_embed or not fills)

  def _has_windows(self, config: ModelConfig) -> bool:
    if not config.windows:
      return True
    sizes = set(config.windows)
    one = len(sizes - {None}) == 1 and (self.has_layer_types or len(sizes) == 1)
    return self.slides is not None and one

  def _has_ropes(self, config: ModelConfig) -> bool:
    first = config.ropes[0]
    if config.rotary_dim and 'partial_rotary_factor' not in self.absent:
      return False
    if {*config.ropes} - {None, first} and self.local_theta is None:
      return False
    beta = getattr(first.scaling, 'llama_4_scaling_beta', None)
    if (beta is not None) != self.scales_queries:
      return False
    keys = layer_keys(config)
    turned = map(bool, keys['no_rope_layers'])
    return all(
      turns == (self.turns is None or self.turns(keys, i))
      for i, turns in enumerate(turned)
    )

  def possible_biases(self) -> Iterator[tuple[str, ...]]:
    """What ModelConfig's `biases` may be, the fewest first."""
    for count in range(len(self.bias_keys) + 1):
      for keys in itertools.combinations(self.bias_keys, count):
        yield self.biases_by(keys)

  def biases_by(self, keys: Iterable[str]) -> tuple[str, ...]:
    """ModelConfig's `biases` where these of `bias_keys` are true."""
    biased = {*self.biases, *(n for key in keys for n in self.bias_keys[key])}
    return tuple(name for name in LORA_TARGETS if name in biased)

  def values(self, config: ModelConfig) -> dict[str, float | None]:
    """The values of the keys of `numbers` for a model of this family."""
    values = dataclasses.asdict(config)
    values['attention_scale'] = config.score_scale
    return {
      number.key: None if values[name] is None else number.write(values[name])
      for name, number in self.numbers.items()
    }

  def flags(self, config: ModelConfig) -> dict[str, bool]:
    """The values of `bias_keys` for a model of this family."""
    return {
      key: {*names} <= {*config.biases} for key, names in self.bias_keys.items()
    }


def layer_keys(config: ModelConfig) -> dict[str, Any]:
  """The keys of a config.json that tell layers apart."""
  windows = config.layer_windows
  return {
    'sliding_window': next(filter(None, windows), None),
    'layer_types': [SLIDING if w else FULL for w in windows],
    'no_rope_layers': [int(x is not None) for x in config.layer_ropes],
  }


# Fields of ModelConfig that a family decides, and what they are for LLaMA.
FEATURES = {
  name: getattr(ModelConfig, name)
  for name in (
    *('norms', 'norm_offset', 'activation', 'qk_norm'),
    *('residual_scale', 'embed_scale', 'logit_scale', 'logit_cap'),
    *('attention_scale', 'attention_cap'),
  )
}
