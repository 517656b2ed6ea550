"""The architectures of llama.cpp that models of ours are written as.

A row says what llama.cpp computes under that name. gguf/ writes and reads by
the rows; a model goes to the first that computes exactly what it does.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.errors import UserError
from lorapr_jax.gguf.kinds import OWN_THETA, SAME_THETA, Kinds, kinds_lack
from lorapr_jax.gguf.rope import Says, rope_lacks
from lorapr_jax.models.config import (
  AFTER_ATTENTION,
  AFTER_MLP,
  BEFORE_ATTENTION,
  BEFORE_MLP,
  NORMS,
  ModelConfig,
)
from lorapr_jax.models.family import FEATURES, Number


@dataclasses.dataclass(frozen=True)
class Arch:
  """An architecture of llama.cpp.

  Attributes:
    biases: the projections that may have one.
    fixed: FEATURES of all its models.
    numbers: FEATURES that the metadata decide; their keys follow the name of
      the architecture. Those that are neither here nor in `fixed` are LLaMA's.
    absent: what it means that the metadata lack one of `numbers`.
    grows: whether embeddings are multiplied by the root of their width.
    wide_heads_at: the number of layers of models whose attention has the scale
      of heads of D / heads dimensions, whatever they have; None: there is none.
    stored: the tensor that has a module of a block. What has one place is
      stored as one, the rows of the first, then of the next.
    interleaved: whether the rows of a head are stored pair by pair, x0 y0 x1 y1
      ..., where RoPE rotates x and y. We have x0 x1 ... y0 y1 ...
    rope: what it can say of how a layer turns.
    kinds: of its layers.
    sinks: whether the softmax of each head has a sink, which takes nothing
      where a model has none.
    per_layer: whether layers may differ in size.
    tied: whether the head is the embeddings; None: it may be.
    full_width: whether all heads together are as wide as the embeddings, so
      that none may be pruned.
  """

  stored: Mapping[str, str]
  biases: tuple[str, ...] = ()
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)
  absent: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
  grows: bool = False
  wide_heads_at: int | None = None
  interleaved: bool = False
  rope: Says = Says()
  kinds: Kinds = Kinds()
  sinks: bool = False
  per_layer: bool = False
  tied: bool | None = None
  full_width: bool = False

  def lacks(self, config: ModelConfig) -> list[str]:
    """What a model has and no model of this architecture, in words."""
    lacks = []
    if not (self.per_layer or config.is_uniform):
      lacks.append('layers of unequal size')
    if self.tied is not None and self.tied != config.tie_embeddings:
      lacks.append('head of its own' if self.tied else 'tied embeddings')
    if self.full_width and not config.heads_fill_embed:
      lacks.append('heads that are not as wide as the embeddings together')
    if biases := [name for name in config.biases if name not in self.biases]:
      lacks.append(f'bias of {" and ".join(biases)}')
    lacks += [
      words for name, words in _WORDS.items() if not self._has(name, config)
    ]
    of_layers = kinds_lack(config, self.kinds), rope_lacks(config, self.rope)
    return lacks + [what for what in of_layers if what]

  def has_tensors_of(self, config: ModelConfig) -> bool:
    """Whether it has the norms that a model has."""
    return all(self._has(name, config) for name in ('norms', 'qk_norm'))

  def _has(self, feature: str, config: ModelConfig) -> bool:
    """Whether one of FEATURES can be what it is for this model."""
    value = getattr(config, feature)
    if feature in self.numbers:
      return value is not None or self.absent.get(feature) is None
    if feature == 'attention_scale':
      return self.has_scale_of(config) or bool(config.qk_norm)
    expected = self.feature(feature, config)
    if isinstance(value, float) and expected is not None:
      return math.isclose(value, expected, rel_tol=1e-6)
    return value == expected

  def keys(self, config: ModelConfig) -> dict[str, float]:
    """The keys of its `numbers`; those that stand for no number are absent."""
    values = vars(config) | {'attention_scale': config.score_scale}
    return {
      number.key: float(number.write(values[name]))
      for name, number in self.numbers.items()
      if values[name] is not None
    }

  def feature(self, name: str, config: ModelConfig) -> Any:
    """One of FEATURES in all models of such sizes, if it is no number."""
    if name == 'embed_scale' and self.grows:
      return math.sqrt(config.embed_dim)
    return self.fixed.get(name, FEATURES[name])

  def has_scale_of(self, config: ModelConfig) -> bool:
    """Whether attention can have the scale that it has in this model."""
    if 'attention_scale' in self.numbers:
      return True
    scale = self.score_scale(config)
    return math.isclose(config.score_scale, scale, rel_tol=1e-6)

  def score_scale(self, config: ModelConfig) -> float:
    """By which llama.cpp multiplies q k, if no key says it."""
    if len(config.layers) != self.wide_heads_at:
      return config.head_dim**-0.5
    return (config.embed_dim // config.layers[0].num_heads) ** -0.5


# In an error, where there is no such thing.
_WORDS = {
  'norms': 'such norms in a block',
  'norm_offset': 'norms that multiply so',
  'activation': 'such activation',
  'qk_norm': 'such norms of queries and keys',
  'residual_scale': 'multiplier of residuals',
  'embed_scale': 'multiplier of embeddings',
  'logit_scale': 'multiplier of logits',
  'logit_cap': 'such cap of logits',
  'attention_scale': 'such scale of attention',
  'attention_cap': 'such cap of attention',
}
_QKV = ('q_proj', 'k_proj', 'v_proj')
_STORED = {
  BEFORE_ATTENTION: 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  BEFORE_MLP: 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
_QK_NORMS = {
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
}
_AFTER_NORMS = {
  AFTER_ATTENTION: 'post_attention_norm',
  AFTER_MLP: 'post_ffw_norm',
}
_LLAMA = Arch(
  stored=_STORED, biases=LORA_TARGETS, interleaved=True, rope=Says(tables=True)
)
_QWEN3 = Arch(
  stored=_STORED | _QK_NORMS, biases=_QKV, fixed={'qk_norm': 'head'}
)
_GEMMA = Arch(
  stored=_STORED,
  biases=_QKV,
  fixed={'norm_offset': True, 'activation': 'gelu_tanh'},
  grows=True,
  tied=True,
)

_GRANITE = dataclasses.replace(
  _LLAMA,
  numbers={
    'embed_scale': Number('embedding_scale'),
    'residual_scale': Number('residual_scale'),
    'attention_scale': Number('attention.scale'),
    'logit_scale': Number('logit_scale', lambda x: 1 / x, lambda x: 1 / x),
  },
  absent={'embed_scale': 1.0, 'residual_scale': 1.0, 'attention_scale': None},
)
_GEMMA2 = dataclasses.replace(
  _GEMMA,
  stored=_STORED | _AFTER_NORMS,
  fixed=_GEMMA.fixed | {'norms': NORMS},
  numbers={
    'attention_cap': Number('attn_logit_softcapping'),
    'logit_cap': Number('final_logit_softcapping'),
  },
  absent={'attention_cap': 50.0, 'logit_cap': 30.0},
  wide_heads_at=46,
  kinds=Kinds(period=2, always=True),
)

# A model is of the first that lacks nothing. Some are here to be read alone.
ARCHS = {
  'llama': _LLAMA,
  'qwen2': Arch(stored=_STORED, biases=_QKV, full_width=True),
  'seed_oss': Arch(
    stored=_STORED | {BEFORE_MLP: 'post_attention_norm'}, biases=_QKV
  ),
  'granite': _GRANITE,
  'qwen3': _QWEN3,
  'mistral3': dataclasses.replace(_LLAMA, rope=Says(tables=True, betas=True)),
  'gemma': _GEMMA,
  'gemma2': _GEMMA2,
  'gemma3': dataclasses.replace(
    _GEMMA2,
    stored=_GEMMA2.stored | _QK_NORMS,
    fixed=_GEMMA2.fixed | {'qk_norm': 'head'},
    numbers={'logit_cap': _GEMMA2.numbers['logit_cap']},
    absent={'logit_cap': None},
    wide_heads_at=62,
    kinds=Kinds(period=6, local=OWN_THETA),
    tied=None,
  ),
  'glm4': Arch(
    stored=_STORED
    | _AFTER_NORMS
    | dict.fromkeys(('mlp.gate_proj', 'mlp.up_proj'), 'ffn_up'),
    biases=_QKV,
    fixed={'norms': NORMS},
    interleaved=True,
    rope=Says(parts=True),
  ),
  'hunyuan-dense': dataclasses.replace(
    _QWEN3, fixed={'qk_norm': 'head_after_rope'}
  ),
  'olmo2': Arch(
    stored=_STORED | _QK_NORMS | _AFTER_NORMS,
    biases=_QKV,
    fixed={'norms': (AFTER_ATTENTION, AFTER_MLP), 'qk_norm': 'heads'},
    tied=False,
    full_width=True,
    kinds=Kinds(period=4, local=SAME_THETA),
  ),
  'smollm3': dataclasses.replace(
    _LLAMA,
    biases=_QKV,
    rope=Says(),
    kinds=Kinds(turns=lambda i: (i + 1) % 4 > 0),
  ),
  # Its head's softmax has a sink.
  'granite_swa': dataclasses.replace(
    _GRANITE,
    kinds=Kinds(period=1, always=True, says_turns=True),
    sinks=True,
  ),
  'deci': dataclasses.replace(_LLAMA, per_layer=True),
  'openelm': dataclasses.replace(
    _QWEN3,
    stored=_STORED
    | _QK_NORMS
    | dict.fromkeys((f'self_attn.{name}' for name in _QKV), 'attn_qkv'),
    biases=(),
    per_layer=True,
    tied=True,
  ),
}


def architecture(config: ModelConfig) -> str:
  """The architecture that a model is written as.

  Raises:
    UserError: if none computes what the model does, naming what those lack
      that come nearest.
  """
  lacks = {name: arch.lacks(config) for name, arch in ARCHS.items()}
  for name, words in lacks.items():
    if not words:
      return name
  # The nearest have its tensors, if any has.
  alike = [name for name, arch in ARCHS.items() if arch.has_tensors_of(config)]
  fewest = min(len(lacks[name]) for name in alike or lacks)
  nearest: dict[str, str] = {}
  for name in alike or lacks:
    if len(lacks[name]) == fewest:
      nearest.setdefault(' and no '.join(lacks[name]), name)
  reasons = ', '.join(f'{name} has no {what}' for what, name in nearest.items())
  raise UserError(
    'format gguf cannot hold the model, as no architecture of llama.cpp '
    f'computes what it does: {reasons}. Choose format hf'
  )
