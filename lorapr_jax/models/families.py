"""What a config.json's `model_type` changes: a row for each family of models.

hf/ and gguf/ read the rows where a file becomes a ModelConfig, and where one
becomes a file. A ModelConfig has numbers and flags alone: nothing else knows
which family a model is of.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import itertools
import math
from typing import Any, NamedTuple

from lorapr_jax.axes import LORA_TARGETS, PROJECTIONS
from lorapr_jax.models.config import (
  AFTER_ATTENTION,
  AFTER_MLP,
  BEFORE_MLP,
  NORMS,
  ModelConfig,
)


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
  num_layers = len(config.layers)
  windows = config.windows or (None,) * num_layers
  ropes = config.rope_of_layer or (0,) * num_layers
  return {
    'sliding_window': next(filter(None, windows), None),
    'layer_types': [SLIDING if w else FULL for w in windows],
    'no_rope_layers': [int(config.ropes[i] is not None) for i in ropes],
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


def _inverse(x: float) -> float:
  return float(f'{1 / x:.12g}')


_QKV = ('q_proj', 'k_proj', 'v_proj')
_ABSENT = {
  'max_position_embeddings': 2048,
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': False,
}
_MISTRAL = _ABSENT | {
  'max_position_embeddings': 131072,
  'num_key_value_heads': 8,
  'sliding_window': 4096,
}
_QWEN = _ABSENT | {
  'max_position_embeddings': 32768,
  'max_window_layers': 28,
  'num_key_value_heads': 32,
  'sliding_window': 4096,
  'use_sliding_window': False,
}

_GELU = 'gelu_pytorch_tanh'
_GEMMA = _ABSENT | {
  'head_dim': 256,
  'max_position_embeddings': 8192,
  'tie_word_embeddings': True,
}
_GEMMA_FIXED = {'norm_offset': True, 'activation': 'gelu_tanh'}
_GEMMA_NUMBERS = {
  'embed_scale': Number('hidden_size', math.sqrt, lambda x: round(x * x)),
}

_QUERY_SCALAR = Number(
  'query_pre_attn_scalar', lambda x: x**-0.5, lambda x: round(x**-2)
)

# The norm after attention has LLaMA's name of the one before the MLP.
_NORMS_AFTER = {
  AFTER_ATTENTION: 'post_attention_layernorm',
  AFTER_MLP: 'post_feedforward_layernorm',
}
_FOUR_NORMS = _NORMS_AFTER | {BEFORE_MLP: 'pre_feedforward_layernorm'}
_QKV_PROJ = dict.fromkeys(
  ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
  'self_attn.qkv_proj',
)
_GATE_UP_PROJ = dict.fromkeys(
  ('mlp.gate_proj', 'mlp.up_proj'), 'mlp.gate_up_proj'
)
_BIAS_KEYS = {
  'attention_bias': PROJECTIONS['self_attn'],
  'mlp_bias': PROJECTIONS['mlp'],
}


def _always(hf: Mapping[str, Any], i: int) -> bool:
  return True


def _qwen_slides(hf: Mapping[str, Any], i: int) -> bool:
  return i >= hf['max_window_layers']


def _even_slides(hf: Mapping[str, Any], i: int) -> bool:
  return i % 2 == 0


def _pattern_slides(hf: Mapping[str, Any], i: int) -> bool:
  return (i + 1) % hf['sliding_window_pattern'] > 0


def _exaone4_turns(hf: Mapping[str, Any], i: int) -> bool:
  if hf.get('sliding_window') is None:
    return True
  if 'layer_types' in hf:
    return hf['layer_types'][i] == SLIDING
  return _pattern_slides(hf, i)


def _smollm3_turns(hf: Mapping[str, Any], i: int) -> bool:
  if 'no_rope_layers' in hf:
    return hf['no_rope_layers'][i] == 1
  return (i + 1) % hf['no_rope_layer_interval'] > 0


# A model is exported as what it came from, or as the first that holds it, if no
# other is asked for.
_GLM = _ABSENT | {
  'attention_bias': True,
  'head_dim': 128,
  'max_position_embeddings': 131072,
  'num_key_value_heads': 2,
  'partial_rotary_factor': 0.5,
  'rms_norm_eps': 1.5625e-7,
}
FAMILIES = {
  'llama': Family(
    architecture='LlamaForCausalLM',
    absent=_ABSENT,
    bias_keys=_BIAS_KEYS,
    heads_divide_embed=True,
  ),
  'mistral': Family(
    architecture='MistralForCausalLM',
    absent=_MISTRAL,
    slides=_always,
    has_layer_types=False,
    names_version=True,
  ),
  'ministral': Family(
    architecture='MinistralForCausalLM',
    absent=_MISTRAL,
    slides=_always,
    names_version=True,
  ),
  'ministral3': Family(
    architecture='Ministral3ForCausalLM',
    absent=_MISTRAL
    | {
      'head_dim': 128,
      'max_position_embeddings': 262144,
      'rms_norm_eps': 1e-5,
      'rope_scaling': {
        'rope_type': 'yarn',
        'rope_theta': 1e6,
        'factor': 16.0,
        'original_max_position_embeddings': 16384,
        'mscale': 1.0,
        'mscale_all_dim': 1.0,
        'llama_4_scaling_beta': 0.1,
      },
      'rope_theta': 1e6,
      'sliding_window': None,
    },
    slides=_always,
    has_layer_types=False,
    scales_queries=True,
    names_version=True,
  ),
  'cwm': Family(
    architecture='CwmForCausalLM',
    absent=_ABSENT
    | {
      'eos_token_id': [128001, 128008, 128009],
      'head_dim': 128,
      'max_position_embeddings': 131072,
      'num_key_value_heads': 8,
      'rms_norm_eps': 1e-5,
      'rope_scaling': {
        'rope_type': 'llama3',
        'rope_theta': 1e6,
        'factor': 16.0,
        'high_freq_factor': 4.0,
        'low_freq_factor': 1.0,
        'original_max_position_embeddings': 8192,
      },
      'rope_theta': 1e6,
      'sliding_window': 8192,
    },
    bias_keys={'mlp_bias': PROJECTIONS['mlp']},
    heads_divide_embed=True,
    slides=lambda hf, i: i % 4 > 0,
  ),
  'granite': Family(
    architecture='GraniteForCausalLM',
    absent=_ABSENT
    | dict.fromkeys(
      (
        *('embedding_multiplier', 'residual_multiplier', 'logits_scaling'),
        'attention_multiplier',
      ),
      1.0,
    ),
    bias_keys=_BIAS_KEYS,
    numbers={
      'embed_scale': Number('embedding_multiplier'),
      'residual_scale': Number('residual_multiplier'),
      'attention_scale': Number('attention_multiplier'),
      'logit_scale': Number('logits_scaling', lambda x: 1 / x, _inverse),
    },
  ),
  'smollm3': Family(
    architecture='SmolLM3ForCausalLM',
    absent=_ABSENT
    | {
      'max_position_embeddings': 32768,
      'no_rope_layer_interval': 4,
      'num_key_value_heads': 4,
      'rope_theta': 2e6,
      'tie_word_embeddings': True,
      'use_sliding_window': False,
    },
    bias_keys=_BIAS_KEYS,
    slides=lambda hf, i: not _smollm3_turns(hf, i),
    turns=_smollm3_turns,
  ),
  'gemma': Family(
    architecture='GemmaForCausalLM',
    absent=_GEMMA | {'num_key_value_heads': 16},
    bias_keys={'attention_bias': PROJECTIONS['self_attn']},
    fixed=_GEMMA_FIXED,
    numbers=_GEMMA_NUMBERS,
    # Older files say gelu, and always meant the approximation.
    activations=(_GELU, 'gelu'),
  ),
  'gemma2': Family(
    architecture='Gemma2ForCausalLM',
    absent=_GEMMA
    | {
      'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0,
      'num_key_value_heads': 4,
      'query_pre_attn_scalar': 256,
      'sliding_window': 4096,
    },
    bias_keys={'attention_bias': PROJECTIONS['self_attn']},
    fixed=_GEMMA_FIXED | {'norms': NORMS},
    numbers=_GEMMA_NUMBERS
    | {
      'attention_scale': _QUERY_SCALAR,
      'attention_cap': Number('attn_logit_softcapping'),
      'logit_cap': Number('final_logit_softcapping'),
    },
    activation_key='hidden_activation',
    activations=(_GELU,),
    slides=_even_slides,
    stored=_FOUR_NORMS,
    heads_divide_embed=True,
  ),
  'gemma3_text': Family(
    architecture='Gemma3ForCausalLM',
    absent=_GEMMA
    | {
      'final_logit_softcapping': None,
      'max_position_embeddings': 131072,
      'num_key_value_heads': 4,
      'query_pre_attn_scalar': 256,
      'rope_local_base_freq': 1e4,
      'rope_theta': 1e6,
      'sliding_window': 4096,
      'sliding_window_pattern': 6,
    },
    bias_keys={'attention_bias': PROJECTIONS['self_attn']},
    fixed=_GEMMA_FIXED | {'norms': NORMS, 'qk_norm': 'head'},
    numbers=_GEMMA_NUMBERS
    | {
      'attention_scale': _QUERY_SCALAR,
      'logit_cap': Number('final_logit_softcapping'),
    },
    activation_key='hidden_activation',
    activations=(_GELU,),
    slides=_pattern_slides,
    local_theta='rope_local_base_freq',
    stored=_FOUR_NORMS,
    heads_divide_embed=True,
  ),
  'olmo3': Family(
    architecture='Olmo3ForCausalLM',
    absent=_ABSENT
    | {
      'rms_norm_eps': 1e-5,
      'rope_theta': 5e5,
      'sliding_window': 4096,
      'sliding_window_pattern': 4,
    },
    bias_keys={'attention_bias': PROJECTIONS['self_attn']},
    fixed={'norms': (AFTER_ATTENTION, AFTER_MLP), 'qk_norm': 'heads'},
    slides=_pattern_slides,
    # The same theta, but scaled in the layers without a window alone.
    local_theta='rope_theta',
    stored=_NORMS_AFTER,
  ),
  'olmo2': Family(
    architecture='Olmo2ForCausalLM',
    absent=_ABSENT | {'rms_norm_eps': 1e-5},
    bias_keys={'attention_bias': PROJECTIONS['self_attn']},
    fixed={'norms': (AFTER_ATTENTION, AFTER_MLP), 'qk_norm': 'heads'},
    stored=_NORMS_AFTER,
  ),
  'glm': Family(
    architecture='GlmForCausalLM',
    absent=_GLM,
    bias_keys={'attention_bias': _QKV},
    stored=_GATE_UP_PROJ,
    interleaved=True,
  ),
  'glm4': Family(
    architecture='Glm4ForCausalLM',
    absent=_GLM,
    bias_keys={'attention_bias': _QKV},
    fixed={'norms': NORMS},
    stored=_GATE_UP_PROJ
    | {
      AFTER_ATTENTION: 'post_self_attn_layernorm',
      AFTER_MLP: 'post_mlp_layernorm',
    },
    interleaved=True,
  ),
  'exaone4': Family(
    architecture='Exaone4ForCausalLM',
    absent=_ABSENT
    | {
      'num_key_value_heads': 32,
      'rms_norm_eps': 1e-5,
      'sliding_window': 4096,
      'sliding_window_pattern': 4,
    },
    fixed={'norms': (AFTER_ATTENTION, AFTER_MLP), 'qk_norm': 'head'},
    slides=_pattern_slides,
    turns=_exaone4_turns,
    stored=_NORMS_AFTER,
  ),
  'hunyuan_v1_dense': Family(
    architecture='HunYuanDenseV1ForCausalLM',
    absent=_ABSENT | {'rms_norm_eps': 1e-5},
    bias_keys={'attention_bias': PROJECTIONS['self_attn']},
    fixed={'qk_norm': 'head_after_rope'},
    theta_grows=True,
    stored={
      'self_attn.q_norm': 'self_attn.query_layernorm',
      'self_attn.k_norm': 'self_attn.key_layernorm',
    },
  ),
  'qwen2': Family(
    architecture='Qwen2ForCausalLM',
    absent=_QWEN,
    biases=_QKV,
    pruned_as='seed_oss',
    slides=_qwen_slides,
  ),
  'qwen3': Family(
    architecture='Qwen3ForCausalLM',
    absent=_QWEN | {'head_dim': 128},
    bias_keys={'attention_bias': PROJECTIONS['self_attn']},
    fixed={'qk_norm': 'head'},
    slides=_qwen_slides,
  ),
  'seed_oss': Family(
    architecture='SeedOssForCausalLM',
    absent=_ABSENT
    | {
      'attention_bias': True,
      'head_dim': 128,
      'max_position_embeddings': 524288,
      'num_key_value_heads': 8,
    },
    ignored=('attention_dropout',),
    written={'attention_dropout': 0.0, 'residual_dropout': 0.0},
    bias_keys={
      'attention_bias': _QKV,
      'attention_out_bias': ('o_proj',),
      'mlp_bias': PROJECTIONS['mlp'],
    },
  ),
  'phi3': Family(
    architecture='Phi3ForCausalLM',
    absent=_ABSENT
    | {
      'max_position_embeddings': 4096,
      'original_max_position_embeddings': 4096,
      'partial_rotary_factor': 1.0,
      'rms_norm_eps': 1e-5,
    },
    slides=_always,
    has_layer_types=False,
    stored=_QKV_PROJ | _GATE_UP_PROJ,
    longrope_fills_embed=True,
  ),
  'ernie4_5': Family(
    architecture='Ernie4_5ForCausalLM',
    absent=_ABSENT
    | {
      'head_dim': 128,
      'max_position_embeddings': 131072,
      'num_key_value_heads': 2,
      'rms_norm_eps': 1e-5,
      'rope_theta': 5e5,
      'tie_word_embeddings': True,
    },
    bias_keys={'use_bias': LORA_TARGETS},
    interleaved=True,
  ),
  'iquestcoder': Family(
    architecture='LlamaForCausalLM',
    absent=_ABSENT
    | {
      'max_position_embeddings': 131072,
      'num_key_value_heads': 8,
      'rms_norm_eps': 1e-5,
    },
    bias_keys=_BIAS_KEYS,
    exported_as='llama',
  ),
  'internlm3': Family(
    architecture='LlamaForCausalLM',
    absent=_ABSENT
    | {
      'head_dim': 128,
      'max_position_embeddings': 32768,
      'num_key_value_heads': 2,
      'rms_norm_eps': 1e-5,
    },
    bias_keys=_BIAS_KEYS,
    # The model's own code and transformers make different biases of these.
    only={'bias': False, 'qkv_bias': False},
    exported_as='llama',
  ),
  'helium': Family(
    architecture='HeliumForCausalLM',
    absent=_ABSENT
    | {
      'head_dim': 128,
      'max_position_embeddings': 4096,
      'num_key_value_heads': 20,
      'rms_norm_eps': 1e-8,
      'rope_theta': 1e5,
    },
    bias_keys={'attention_bias': _QKV, 'mlp_bias': PROJECTIONS['mlp']},
    interleaved=True,
    heads_fill_embed=True,
  ),
}


def row_of(family: str | None) -> Family:
  """The row of this name; of none LLaMA's, whose names are ours."""
  return FAMILIES['llama' if family is None else family]


# A model that sees too -> the family of its text model.
TEXT_OF = {'gemma3': 'gemma3_text'}
# The families that a model can be exported as.
EXPORTED = {n: x for n, x in FAMILIES.items() if x.exported_as is None}
# The same where layers differ in size, by the code that hf/remote.py writes.
PREFIX = 'pruned_'
REMOTE_CODE = {f'{PREFIX}{name}': x for name, x in EXPORTED.items()}
BIAS_KEYS = sorted({key for x in FAMILIES.values() for key in x.bias_keys})


def family_of(config: ModelConfig) -> Family:
  """The model's own, or the first that holds it."""
  own = row_of(config.family)
  return next(x for x in (own, *FAMILIES.values()) if x.holds(config))
