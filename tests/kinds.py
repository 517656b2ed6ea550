"""Tiny random models of every family, in whose logits every feature shows.

A kind is the keys of a config.json, in the older style: rope_theta and
rope_scaling. Windows are shorter than the tests' sequences, soft caps are low,
multipliers are not 1, biases and norms are random.
"""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any, NamedTuple

_SIZES = {
  'vocab_size': 96,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 12,
  'max_position_embeddings': 128,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500.0,
  'tie_word_embeddings': False,
  'bos_token_id': None,
  'eos_token_id': None,
  'pad_token_id': None,
}
_LLAMA = _SIZES | {
  'model_type': 'llama',
  'num_hidden_layers': 2,
  'head_dim': 8,
}
_FULL, _SLIDING = 'full_attention', 'sliding_attention'
_MIXED = [_SLIDING, _FULL, _SLIDING]
# Of the frequencies of 8 dimensions one is kept, one blended, two are divided.
_LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
_YARN = {
  'rope_type': 'yarn',
  'factor': 4.0,
  'beta_fast': 4.0,
  'beta_slow': 1.0,
  'original_max_position_embeddings': 16,
}
_BETA = 'llama_4_scaling_beta'
_MINISTRAL3 = _YARN | {
  'rope_theta': 500.0,
  'mscale': 1.0,
  'mscale_all_dim': 1.0,
  _BETA: 0.3,
  'max_position_embeddings': 128,
}
# Without which RoPE is plain, and without which there is no window.
_UNSCALED = {'rope_scaling': None}
_ENDLESS = {'sliding_window': 4096}
_AS_LLAMA = {'model_type': 'llama'}
_BIASES = ('.bias',)
_QK_NORMS = ('q_norm', 'k_norm')


class Kind(NamedTuple):
  """A tiny model.

  Attributes:
    keys: of its config.json.
    features: what it has that LLaMA has not, and how that is taken away: by
      other keys; or, as a tuple of names, without the tensors (`.bias`) or the
      modules of these names.
  """

  keys: dict[str, Any]
  features: Mapping[str, dict[str, Any] | tuple[str, ...]] = {}


def _kind(model_type: str, keys: dict[str, Any], **features) -> Kind:
  return Kind(_SIZES | {'model_type': model_type} | keys, features)


_GEMMA = {
  'hidden_activation': 'gelu_pytorch_tanh',
  'query_pre_attn_scalar': 40,
  'tie_word_embeddings': True,
}
_SCALAR = {'query_pre_attn_scalar': 12}
_AFTER = {
  'norm_after_attention': ('post_attention_layernorm',),
  'norm_after_mlp': ('post_feedforward_layernorm',),
}
# The LLaMAs have no features: they differ in sizes and in what is tied.
LLAMAS = {
  'mha': Kind(_LLAMA | {'num_key_value_heads': 4}),
  'mha_tied': Kind(
    _LLAMA | {'num_key_value_heads': 4, 'tie_word_embeddings': True}
  ),
  'gqa': Kind(_LLAMA),
  'gqa_tied': Kind(_LLAMA | {'tie_word_embeddings': True}),
  'wide_heads': Kind(_LLAMA | {'head_dim': 16}),
  'biases': Kind(
    _LLAMA | {'attention_bias': True, 'mlp_bias': True},
    {'biases': _BIASES},
  ),
  'llama3': Kind(
    _LLAMA | {'rope_scaling': _LLAMA3, 'tie_word_embeddings': True},
    {'rope': _UNSCALED},
  ),
  # Three heads do not divide the hidden size.
  'mistral': Kind(
    _LLAMA
    | {
      'model_type': 'mistral',
      'num_attention_heads': 3,
      'num_key_value_heads': 1,
      'sliding_window': None,
    }
  ),
}
_FAMILIES = {
  'llama_linear': _kind(
    'llama',
    {'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}},
    rope=_UNSCALED,
  ),
  # A text of more than max_position_embeddings: else nothing changes.
  'llama_dynamic': _kind(
    'llama',
    {
      'max_position_embeddings': 16,
      'rope_scaling': {'rope_type': 'dynamic', 'factor': 4.0},
    },
    rope=_UNSCALED,
  ),
  'llama_yarn': _kind('llama', {'rope_scaling': _YARN}, rope=_UNSCALED),
  'mistral_window': _kind('mistral', {'sliding_window': 8}, window=_ENDLESS),
  'ministral': _kind(
    'ministral',
    {'sliding_window': 8, 'layer_types': _MIXED},
    window=_ENDLESS,
    windows_by_layer={'layer_types': [_SLIDING] * 3},
  ),
  'ministral3': _kind(
    'ministral3',
    {
      'rope_theta': None,
      'rope_parameters': _MINISTRAL3,
      'sliding_window': None,
    },
    rope={'rope_parameters': _MINISTRAL3 | {'rope_type': 'default'}},
    query_scale={'rope_parameters': _MINISTRAL3 | {_BETA: 0.0}},
  ),
  'qwen2': _kind(
    'qwen2', {'tie_word_embeddings': True, 'head_dim': 8}, biases=_BIASES
  ),
  'qwen2_window': _kind(
    'qwen2',
    {'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 1},
    biases=_BIASES,
    window=_ENDLESS,
    windows_by_layer={'max_window_layers': 0},
  ),
  'qwen3': _kind('qwen3', {'tie_word_embeddings': True}, qk_norm=_QK_NORMS),
  'qwen3_yarn': _kind(
    'qwen3',
    {'rope_scaling': _YARN, 'attention_bias': True},
    qk_norm=_QK_NORMS,
    rope=_UNSCALED,
    biases=_BIASES,
  ),
  'glm': _kind(
    'glm',
    {
      'partial_rotary_factor': 0.5,
      'attention_bias': True,
      'rms_norm_eps': 1.5625e-7,
    },
    biases=_BIASES,
    partial_rotary={'partial_rotary_factor': 1.0},
  ),
  'glm4': _kind(
    'glm4',
    {'partial_rotary_factor': 0.5, 'attention_bias': True},
    biases=_BIASES,
    partial_rotary={'partial_rotary_factor': 1.0},
    norm_after_attention=('post_self_attn_layernorm',),
    norm_after_mlp=('post_mlp_layernorm',),
  ),
  'gemma': _kind(
    'gemma',
    {
      'hidden_act': 'gelu_pytorch_tanh',
      'hidden_activation': 'gelu_pytorch_tanh',
      'tie_word_embeddings': True,
    },
    activation={'hidden_act': 'silu', 'hidden_activation': 'silu'},
  ),
  'gemma2': _kind(
    'gemma2',
    _GEMMA
    | {
      'attn_logit_softcapping': 5.0,
      'final_logit_softcapping': 3.0,
      'sliding_window': 8,
    },
    activation={'hidden_activation': 'silu'},
    scale=_SCALAR,
    attention_cap={'attn_logit_softcapping': None},
    logit_cap={'final_logit_softcapping': None},
    window=_ENDLESS,
    **_AFTER,
  ),
  'gemma3_text': _kind(
    'gemma3_text',
    _GEMMA
    | {
      'sliding_window': 8,
      'sliding_window_pattern': 2,
      'rope_theta': 100000.0,
      'rope_local_base_freq': 100.0,
      'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
    },
    activation={'hidden_activation': 'silu'},
    scale=_SCALAR,
    qk_norm=_QK_NORMS,
    window=_ENDLESS,
    rope=_UNSCALED,
    rope_by_layer={'rope_local_base_freq': 100000.0},
    **_AFTER,
  ),
  'phi3': _kind('phi3', {'sliding_window': None}),
  'phi3_window': _kind(
    'phi3', {'head_dim': 8, 'sliding_window': 8}, window=_ENDLESS
  ),
  'phi3_longrope': _kind(
    'phi3',
    {
      # 6 of 8 dimensions turn. Its check of them knows no other head_dim.
      'head_dim': 8,
      'partial_rotary_factor': 0.75,
      'original_max_position_embeddings': 16,
      'rope_scaling': {
        'rope_type': 'longrope',
        'short_factor': [1.0, 1.2, 1.5],
        'long_factor': [1.0, 3.0, 7.0],
      },
      'sliding_window': None,
      'tie_word_embeddings': True,
    },
    rope={'original_max_position_embeddings': 4096},
  ),
  'olmo2': _kind('olmo2', {}, qk_norm=_QK_NORMS, **_AFTER),
  # transformers 5 gives another theta of the older style to full layers alone.
  'olmo3': _kind(
    'olmo3',
    {
      'rope_theta': 500000.0,
      'sliding_window': 8,
      'layer_types': _MIXED,
      'rope_scaling': _YARN | {'attention_factor': 1.3},
    },
    qk_norm=_QK_NORMS,
    window=_ENDLESS,
    rope=_UNSCALED,
    windows_by_layer={'layer_types': [_SLIDING] * 3},
    **_AFTER,
  ),
  'smollm3': _kind(
    'smollm3',
    {'no_rope_layers': [1, 0, 1], 'tie_word_embeddings': True},
    rope_by_layer={'no_rope_layers': [1, 1, 1]},
  ),
  'granite': _kind(
    'granite',
    {
      'embedding_multiplier': 3.0,
      'residual_multiplier': 0.6,
      'attention_multiplier': 0.11,
      'logits_scaling': 2.5,
      'attention_bias': True,
      'mlp_bias': True,
      'tie_word_embeddings': True,
    },
    biases=_BIASES,
    embed_scale={'embedding_multiplier': 1.0},
    residual_scale={'residual_multiplier': 1.0},
    scale={'attention_multiplier': 12**-0.5},
    logit_scale={'logits_scaling': 1.0},
  ),
  'seed_oss': _kind(
    'seed_oss',
    {
      'attention_bias': True,
      'attention_out_bias': False,
      'mlp_bias': True,
    },
    biases=_BIASES,
  ),
  'ernie4_5': _kind(
    'ernie4_5',
    {'use_bias': True, 'tie_word_embeddings': True},
    biases=_BIASES,
    interleaved=_AS_LLAMA | {'attention_bias': True, 'mlp_bias': True},
  ),
  'iquestcoder': _kind('iquestcoder', {}),
  'internlm3': _kind('internlm3', {}),
  'exaone4': _kind(
    'exaone4',
    {'sliding_window': 8, 'layer_types': _MIXED},
    qk_norm=_QK_NORMS,
    window=_ENDLESS,
    windows_by_layer={'layer_types': [_SLIDING] * 3},
    **_AFTER,
  ),
  'exaone4_full': _kind(
    'exaone4',
    {'sliding_window': None, 'layer_types': [_FULL] * 3},
    qk_norm=_QK_NORMS,
    **_AFTER,
  ),
  'hunyuan_v1_dense': _kind(
    'hunyuan_v1_dense',
    {},
    qk_norm=('query_layernorm', 'key_layernorm'),
    norm_after_rope={'model_type': 'qwen3'},
  ),
  'cwm': _kind(
    'cwm',
    {
      'bos_token_id': 1,
      'sliding_window': 8,
      'layer_types': _MIXED,
      'rope_scaling': _LLAMA3,
    },
    window=_ENDLESS,
    rope=_UNSCALED,
    windows_by_layer={'layer_types': [_SLIDING] * 3},
  ),
  'helium': _kind(
    'helium',
    {'head_dim': 8, 'num_key_value_heads': 4},
    interleaved=_AS_LLAMA,
  ),
}


KINDS = LLAMAS | _FAMILIES


def torch_model(keys: Mapping[str, Any], without: tuple[str, ...] = ()) -> Any:
  """transformers' model of these keys, with random float32 weights.

  Args:
    keys: of a config.json.
    without: names of modules that hand on what they get, or ends of names of
      tensors that are zero.
  """
  import torch
  import transformers

  skip_if_unknown(keys['model_type'])
  model = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(**keys), attn_implementation='eager'
  ).eval()
  # Gemma's norms multiply by 1 + weight.
  centre = 0.0 if keys['model_type'].startswith('gemma') else 1.0
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      mean = centre if 'norm' in name else 0.0
      weight.normal_(mean, 0.3, generator=generator)
      if name.endswith(without):
        weight.zero_()
  for module in list(model.modules()):
    for child in set(without) & dict(module.named_children()).keys():
      setattr(module, child, torch.nn.Identity())
  return model


def skip_if_unknown(model_type: str) -> None:
  """Skips a test of a family that this transformers does not have yet."""
  import pytest
  from transformers import CONFIG_MAPPING

  if model_type not in CONFIG_MAPPING:
    pytest.skip(f'this version of transformers has no {model_type}')


def save(
  keys: Mapping[str, Any],
  folder: Path,
  dtype: str = 'float32',
  max_shard_size: str = '1GB',
) -> None:
  """Writes transformers' model of these keys, as the Hub has folders."""
  import torch

  model = torch_model(keys).to(getattr(torch, dtype))
  model.save_pretrained(folder, max_shard_size=max_shard_size)
  path = folder / 'config.json'
  written = json.loads(path.read_text())
  head = {'architectures': written['architectures'], 'torch_dtype': dtype}
  path.write_text(json.dumps(head | keys))
