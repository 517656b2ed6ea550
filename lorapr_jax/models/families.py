"""What a config.json's `model_type` changes: a row for each family of models.

hf/ and gguf/ read the rows where a file becomes a ModelConfig, and where one
becomes a file. A ModelConfig has numbers and flags alone: nothing else knows
which family a model is of.
"""

from collections.abc import Mapping
import math
from typing import Any

from lorapr_jax.axes import LORA_TARGETS, PROJECTIONS
from lorapr_jax.models.config import (
  AFTER_ATTENTION,
  AFTER_MLP,
  BEFORE_MLP,
  NORMS,
  ModelConfig,
)
from lorapr_jax.models.family import SLIDING, Family, Number


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


_GLM = _ABSENT | {
  'attention_bias': True,
  'head_dim': 128,
  'max_position_embeddings': 131072,
  'num_key_value_heads': 2,
  'partial_rotary_factor': 0.5,
  'rms_norm_eps': 1.5625e-7,
}
# A model is exported as what it came from, or as the first that holds it, if no
# other is asked for.
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
      # The text_config of a gemma3 says little more than its sizes.
      'hidden_size': 2304,
      'intermediate_size': 9216,
      'max_position_embeddings': 131072,
      'num_attention_heads': 8,
      'num_hidden_layers': 26,
      'num_key_value_heads': 4,
      'query_pre_attn_scalar': 256,
      'rope_local_base_freq': 1e4,
      'rope_theta': 1e6,
      'sliding_window': 4096,
      'sliding_window_pattern': 6,
      'vocab_size': 262208,
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
  return FAMILIES[name_of(config)]


def name_of(config: ModelConfig) -> str:
  """The name of `family_of`."""
  names = (config.family or 'llama', *FAMILIES)
  return next(name for name in names if FAMILIES[name].holds(config))
