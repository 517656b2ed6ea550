"""config.json is read whole, or refused by the name of the key."""

import dataclasses
import json
import math

import pytest
import transformers

from lorapr_jax.axes import LORA_TARGETS, PROJECTIONS
from lorapr_jax.errors import UserError
from lorapr_jax.hf.config import config_from_hf, config_to_hf
from lorapr_jax.hf.layout import hf_config
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.families import BIAS_KEYS, EXPORTED, FAMILIES, TEXT_OF
from lorapr_jax.models.family import FULL, SLIDING
from lorapr_jax.models.rope import (
  Dynamic,
  Linear,
  Llama3,
  LongRope,
  Rope,
  Yarn,
)
from tests.kinds import skip_if_unknown

TRANSFORMERS_5 = int(transformers.__version__.split('.')[0]) > 4
HF = {
  'model_type': 'llama',
  'vocab_size': 96,
  'hidden_size': 32,
  'head_dim': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'intermediate_size': 48,
  'hidden_act': 'silu',
  'max_position_embeddings': 128,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500000.0,
  'rope_scaling': None,
  'tie_word_embeddings': True,
  'bos_token_id': 1,
  'eos_token_id': [2, 3],
  'pad_token_id': 0,
}
CONFIG = ModelConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=16,
  layers=(LayerShape(num_kv_heads=2, queries_per_kv=3, mlp_dim=48),) * 2,
  norm_eps=1e-5,
  ropes=(Rope(500000.0),),
  tie_embeddings=True,
  max_positions=128,
  bos_token_id=1,
  eos_token_id=(2, 3),
  pad_token_id=0,
)
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
POSITIONS = 'max_position_embeddings'
ORIGINAL = 'original_max_position_embeddings'
YARN = {
  'rope_type': 'yarn',
  'factor': 4.0,
  'original_max_position_embeddings': 32,
  'mscale': 0.7,
  'mscale_all_dim': 1.0,
  'truncate': False,
}
LONGROPE = {
  'rope_type': 'longrope',
  'short_factor': [1.0 + 0.1 * i for i in range(8)],
  'long_factor': [1.0 + 0.9 * i for i in range(8)],
  'original_max_position_embeddings': 32,
}
SCALED = (Rope(1e6, Llama3(8.0, 1.0, 4.0, 8192)),)
UNEQUAL = dataclasses.replace(
  CONFIG,
  layers=(
    LayerShape(1, 3, 16),
    LayerShape(2, 3, 48),
    LayerShape(2, 3, 48),
    LayerShape(2, 1, 40),
  ),
)


def _changed(changes, base=HF):
  """The keys of `base` with changes; a value of ... drops the key."""
  return {k: v for k, v in {**base, **changes}.items() if v is not ...}


def test_every_size_is_read():
  assert config_from_hf(HF) == CONFIG


def test_every_size_is_written():
  hf = config_to_hf(CONFIG)
  assert {key: hf[key] for key in HF if key != 'model_type'} == {
    key: value for key, value in HF.items() if key != 'model_type'
  }
  assert 'per_layer_config' not in hf


def test_unequal_layers_are_written_as_differences_from_the_largest():
  hf = config_to_hf(UNEQUAL)
  assert hf['num_hidden_layers'] == 4
  assert hf['num_attention_heads'] == 6
  assert hf['num_key_value_heads'] == 2
  assert hf['intermediate_size'] == 48
  assert hf['per_layer_config'] == {
    '0': {
      'num_attention_heads': 3,
      'num_key_value_heads': 1,
      'intermediate_size': 16,
    },
    '3': {
      'num_attention_heads': 2,
      'num_key_value_heads': 2,
      'intermediate_size': 40,
    },
  }


@pytest.mark.parametrize(
  'config',
  [
    CONFIG,
    UNEQUAL,
    dataclasses.replace(CONFIG, ropes=SCALED),
    *(
      dataclasses.replace(CONFIG, ropes=(Rope(500.0, scaling),))
      for scaling in (
        Linear(2.0),
        Dynamic(2.0),
        Yarn(64, 3.0, mscale=0.7, truncate=False),
        LongRope((1.0,) * 8, (2.0,) * 8, 64, attention_factor=1.5),
      )
    ),
    dataclasses.replace(CONFIG, tie_embeddings=False, eos_token_id=7),
    CONFIG.with_biases(PROJECTIONS['self_attn']),
    UNEQUAL.with_biases(LORA_TARGETS),
    dataclasses.replace(
      UNEQUAL, bos_token_id=None, eos_token_id=None, pad_token_id=None
    ),
  ],
)
def test_written_and_read_again_it_is_the_same(config):
  hf = json.loads(json.dumps(config_to_hf(config)))
  assert config_from_hf({'model_type': 'pruned_llama', **hf}) == config


@pytest.mark.parametrize(
  'rope',
  [
    {'rope_theta': 1e6, 'rope_scaling': LLAMA3},
    {'rope_theta': ..., 'rope_parameters': {'rope_theta': 1e6, **LLAMA3}},
    {'rope_theta': 1e6, 'rope_parameters': {'rope_theta': 1e6, **LLAMA3}},
    {'rope_theta': 1e6, 'rope_parameters': LLAMA3},
    {
      'rope_theta': 1e6,
      'rope_scaling': {
        'type': 'llama3',
        **{k: v for k, v in LLAMA3.items() if k != 'rope_type'},
      },
    },
  ],
)
def test_both_spellings_of_llama3_scaling_are_understood(rope):
  config = config_from_hf(_changed(rope))
  assert config.ropes == SCALED


def test_the_original_positions_are_found_where_phi_3_has_them():
  inside = {key: x for key, x in LONGROPE.items() if key[:8] != 'original'}
  for scaling, outside in (
    (inside, 64),
    (LONGROPE, 64),
    ({**inside, 'rope_type': 'su'}, 64),
    ({**inside, 'rope_type': ..., 'type': 'yarn'}, 64),
  ):
    changes = {'rope_scaling': _changed({}, scaling)}
    changes[ORIGINAL] = outside
    scaling = config_from_hf(_changed(changes)).ropes[0].scaling
    assert isinstance(scaling, LongRope)
    assert scaling.original_max_position_embeddings == 64
  # transformers takes all of the model's where there are none.
  scaling = config_from_hf(_changed({'rope_scaling': inside})).ropes[0].scaling
  assert scaling.original_max_position_embeddings == HF[POSITIONS]


def test_a_factor_that_is_null_is_the_ratio_of_the_positions():
  for changes in ({}, {'factor': None}):
    scaling = config_from_hf(_changed({'rope_scaling': YARN | changes}))
    assert scaling == config_from_hf(_changed({'rope_scaling': YARN}))


@pytest.mark.parametrize(
  'rope',
  [
    {'rope_theta': 1e6},
    {'rope_theta': 1e6, 'rope_scaling': ...},
    {'rope_theta': 1e6, 'rope_scaling': {'rope_type': 'default'}},
    {
      'rope_theta': ...,
      'rope_scaling': ...,
      'rope_parameters': {'rope_theta': 1e6, 'rope_type': 'default'},
    },
    {
      'rope_theta': ...,
      'rope_parameters': {'rope_theta': 1e6, 'partial_rotary_factor': 1.0},
    },
  ],
)
def test_both_spellings_of_the_default_rope_are_understood(rope):
  config = config_from_hf(_changed(rope))
  assert config.ropes == (Rope(1e6),)


def test_keys_that_old_files_leave_out_have_hugging_faces_defaults():
  sizes = (
    'model_type',
    'vocab_size',
    'hidden_size',
    'num_hidden_layers',
    'num_attention_heads',
    'intermediate_size',
  )
  old = {key: HF[key] for key in sizes} | {'num_attention_heads': 4}
  assert config_from_hf(old) == ModelConfig(
    vocab_size=96,
    embed_dim=32,
    head_dim=8,
    layers=(LayerShape(4, 1, 48),) * 2,
    norm_eps=1e-6,
    ropes=(Rope(10000.0),),
    tie_embeddings=False,
    max_positions=2048,
  )
  nulls = {'head_dim': None, 'num_key_value_heads': None, 'rope_scaling': None}
  assert config_from_hf(old | nulls) == config_from_hf(old)


def test_biases_are_read_and_written():
  for key, value, names in (
    ('attention_bias', True, PROJECTIONS['self_attn']),
    ('mlp_bias', None, ()),
  ):
    assert key not in config_to_hf(CONFIG)
    config = config_from_hf({**HF, key: value})
    assert config == CONFIG.with_biases(names)
  hf = config_to_hf(CONFIG.with_biases(LORA_TARGETS))
  assert hf['attention_bias'] is hf['mlp_bias'] is True


@pytest.mark.parametrize('name, family', EXPORTED.items())
def test_every_family_is_read_as_it_is_written(name, family):
  numbers = {n: x.read(HF.get(x.key, 2)) for n, x in family.numbers.items()}
  config = dataclasses.replace(CONFIG, **family.fixed, **numbers)
  if family.heads_fill_embed:
    config = dataclasses.replace(config, layers=(LayerShape(2, 1, 48),) * 2)
  if family.scales_queries:
    beta = Yarn(64, 3.0, llama_4_scaling_beta=0.1)
    config = dataclasses.replace(config, ropes=(Rope(500.0, beta),))
  if family.turns is not None:
    config = dataclasses.replace(
      config, ropes=(*config.ropes, None), rope_of_layer=(0, 1)
    )
  if 'partial_rotary_factor' in family.absent:
    config = dataclasses.replace(config, rotary_dim=6)
  if family.slides is not None:
    windows = (8, None) if family.has_layer_types else (8, 8)
    config = dataclasses.replace(config, windows=windows)
  for biases in family.possible_biases():
    config = dataclasses.replace(config, biases=biases)
    hf = json.loads(json.dumps(hf_config(config, 'float32', 'uniform', name)))
    assert hf['model_type'] == name
    assert config_from_hf(hf) == config


def test_phi_3_with_a_longrope_keeps_its_heads_or_is_of_another_type():
  # transformers takes its heads for as wide as the hidden size allows.
  heads = {'hidden_size': 64, 'num_attention_heads': 4}
  keys = {'model_type': 'phi3', 'rope_scaling': LONGROPE, ORIGINAL: 32}
  config = config_from_hf(_changed(keys | heads))
  hf = hf_config(config, 'float32', 'uniform', 'auto')
  assert hf['model_type'] == 'phi3' and config_from_hf(hf) == config
  # The keys that transformers 4 lets it have.
  assert {*hf['rope_scaling']} == {'type', 'short_factor', 'long_factor'}
  fewer = dataclasses.replace(config, layers=(LayerShape(1, 2, 48),) * 2)
  hf = hf_config(fewer, 'float32', 'uniform', 'auto')
  assert hf['model_type'] == 'llama' and config_from_hf(hf) == fewer
  short = LONGROPE | {'short_factor': [1.0] * 6, 'long_factor': [2.0] * 6}
  part = {'rope_scaling': short, 'partial_rotary_factor': 0.75}
  config = config_from_hf(_changed(keys | heads | part))
  assert config.rotary_dim == 12
  fewer = dataclasses.replace(config, layers=fewer.layers)
  # Of the types in which a part of a head turns.
  hf = hf_config(fewer, 'float32', 'uniform', 'auto')
  assert hf['model_type'] == 'glm' and config_from_hf(hf) == fewer


@pytest.mark.parametrize('name, family', FAMILIES.items())
def test_what_is_absent_means_what_it_means_to_transformers(name, family):
  skip_if_unknown(name)
  if name == 'olmo3' and not TRANSFORMERS_5:
    pytest.skip('transformers 4 has another theta')
  # Without the flag a class says that there is no window.
  flag = 'use_sliding_window'
  flags = {flag: True} if flag in family.absent else {}
  defaults = transformers.AutoConfig.for_model(name, **flags)
  # Versions before 5 have it by itself.
  ropes = getattr(defaults, 'rope_parameters', None) or vars(defaults)
  by_layer = (ropes.get(x, ropes) for x in (FULL, SLIDING))
  full, sliding = (rope['rope_theta'] for rope in by_layer)
  assert full == family.absent.get('rope_theta', 10000.0)
  if family.local_theta and SLIDING in ropes:
    assert sliding == family.absent[family.local_theta]
  for key in BIAS_KEYS:
    assert hasattr(defaults, key) == (key in family.bias_keys)
    assert getattr(defaults, key, False) == family.absent.get(key, False)
  for key, value in family.absent.items():
    if key == 'rope_scaling':
      assert ropes.items() >= {**value, 'rope_type': ropes['rope_type']}.items()
      continue
    if key == flag:
      assert transformers.AutoConfig.for_model(name).use_sliding_window is value
      continue
    assert getattr(defaults, key, value) == value


def test_the_numbers_of_a_granite():
  hf = _changed(
    {
      'model_type': 'granite',
      'embedding_multiplier': 12,
      'logits_scaling': 8.0,
      'residual_multiplier': 0.22,
      'attention_multiplier': 0.25,
    }
  )
  config = config_from_hf(hf)
  # 0.25 is what heads of 16 dimensions have anyway.
  assert config == dataclasses.replace(
    CONFIG, embed_scale=12.0, logit_scale=0.125, residual_scale=0.22
  )
  assert hf.items() <= hf_config(config, 'float32', 'auto', 'auto').items()
  # What is absent is 1; a LLaMA saved as a granite says what it computes.
  absent = config_from_hf({**HF, 'model_type': 'granite'})
  assert absent == dataclasses.replace(CONFIG, attention_scale=1.0)
  hf = hf_config(CONFIG, 'float32', 'auto', 'granite')
  assert (hf['attention_multiplier'], hf['logits_scaling']) == (0.25, 1.0)
  assert config_from_hf(hf) == CONFIG


@pytest.mark.parametrize('name', ['gelu_pytorch_tanh', 'gelu', ...])
def test_an_old_gemma_says_gelu_and_means_the_approximation(name):
  gemma = {'model_type': 'gemma', 'hidden_act': name}
  config = config_from_hf(_changed(gemma))
  assert (config.activation, config.norm_offset) == ('gelu_tanh', True)
  assert config.embed_scale == 32**0.5
  hf = hf_config(config, 'float32', 'auto', 'auto')
  assert (hf['hidden_act'], hf['hidden_size']) == ('gelu_pytorch_tanh', 32)


def test_the_numbers_of_a_gemma2_and_what_a_null_means():
  gemma = _changed({'model_type': 'gemma2', 'sliding_window': 8})
  config = config_from_hf(gemma)
  assert (config.attention_cap, config.logit_cap) == (50.0, 30.0)
  assert config.attention_scale == 256**-0.5
  assert config.windows == (8, None)
  nulls = {'attn_logit_softcapping': None, 'final_logit_softcapping': None}
  config = config_from_hf(gemma | nulls | {'query_pre_attn_scalar': 16})
  assert (config.attention_cap, config.logit_cap) == (None, None)
  assert config.attention_scale is None  # Heads have 16 dimensions.
  hf = hf_config(config, 'float32', 'uniform', 'gemma2')
  assert nulls.items() <= hf.items()
  # transformers takes no float.
  assert type(hf['query_pre_attn_scalar']) is int
  assert hf['query_pre_attn_scalar'] == 16


@pytest.mark.parametrize('newer', [False, True])
def test_the_theta_of_a_hunyuan_is_larger_once_and_for_all(newer):
  rope = {'type': 'dynamic', 'alpha': 1000.0, 'factor': 1.0}
  keys = {'rope_theta': 1e4, 'rope_scaling': rope}
  if newer:
    keys = {'rope_theta': ..., 'rope_scaling': ...}
    keys['rope_parameters'] = rope | {'rope_type': 'dynamic', 'rope_theta': 1e4}
  config = config_from_hf(_changed({'model_type': 'hunyuan_v1_dense', **keys}))
  assert config.ropes == (Rope(1e4 * 1000 ** (16 / 14)),)


def test_a_mistral_without_a_window_is_the_same_model():
  hf = _changed({'model_type': 'mistral', 'sliding_window': None})
  assert config_from_hf(hf) == CONFIG


def test_an_absent_number_of_kv_heads_is_eight_for_mistral():
  # The default of transformers' MistralConfig, unlike LlamaConfig's.
  mistral = {'model_type': 'mistral', 'sliding_window': None}
  changes = {'num_attention_heads': 16, 'num_key_value_heads': ...}
  config = config_from_hf(_changed({**mistral, **changes}))
  assert config.layers == (LayerShape(8, 2, 48),) * 2


@pytest.mark.parametrize('key', ['3', '03'])
def test_layers_are_found_by_number_however_it_is_padded(key):
  hf = _changed(
    {
      'model_type': 'pruned_llama',
      'num_hidden_layers': 11,
      'per_layer_config': {
        key: {'num_attention_heads': 3, 'num_key_value_heads': 1},
        '10': {'intermediate_size': 16},
      },
    }
  )
  full = LayerShape(2, 3, 48)
  expected = [full] * 11
  expected[3], expected[10] = LayerShape(1, 3, 48), LayerShape(2, 3, 16)
  assert config_from_hf(hf).layers == tuple(expected)


MISTRAL = {'model_type': 'mistral', 'sliding_window': None}
MINISTRAL = {'model_type': 'ministral', 'sliding_window': None}
# The change to a good file, and what the message must name.
UNSUPPORTED = [
  ({'model_type': 'gpt2'}, 'model_type'),
  ({'model_type': 'qwen2', 'use_sliding_window': 1}, 'use_sliding_window'),
  ({'model_type': ...}, 'model_type'),
  ({**MISTRAL, 'attention_bias': True}, 'attention_bias'),
  ({'attention_bias': 1}, 'attention_bias'),
  ({'model_type': 'granite', 'logits_scaling': 0}, 'logits_scaling'),
  ({'attention_dropout': 0.1}, 'attention_dropout'),
  ({**MISTRAL, 'mlp_bias': True}, 'mlp_bias'),
  ({'mlp_bias': 'yes'}, 'mlp_bias'),
  ({'model_type': 'mistral', 'sliding_window': 0}, 'sliding_window'),
  ({'model_type': 'ministral', 'layer_types': [SLIDING]}, 'layer_types'),
  ({**MINISTRAL, 'layer_types': [SLIDING] * 2}, 'sliding_window'),
  ({**MINISTRAL, 'layer_types': ['linear_attention'] * 2}, 'linear_attention'),
  ({'model_type': 'smollm3', 'no_rope_layers': [1]}, 'no_rope_layers'),
  ({'model_type': 'smollm3', 'no_rope_layers': [1, 2]}, 'no_rope_layers'),
  ({'model_type': 'smollm3', 'no_rope_layer_interval': 0}, 'no_rope_layer'),
  ({'sliding_window': 4096}, 'sliding_window'),
  ({'rope_scaling': {'type': 'proportional'}}, 'rope_scaling'),
  ({'rope_scaling': {'rope_type': ['yarn']}}, 'rope_scaling'),
  ({'rope_parameters': {'rope_type': 'axial'}}, 'rope_parameters'),
  ({'rope_parameters': {'rope_type': 'linear'}}, 'factor'),
  ({'rope_scaling': YARN | {'truncate': 1}}, 'truncate'),
  ({'rope_scaling': YARN | {'beta_fast': '32'}}, 'beta_fast'),
  ({'rope_scaling': LONGROPE | {'long_factor': [1.0] * 7}}, 'long_factor'),
  ({'rope_scaling': LONGROPE | {'short_factor': 1.0}}, 'short_factor'),
  ({'rope_scaling': LONGROPE | {'factor': 3.0}}, 'attention_factor'),
  ({'rope_scaling': LONGROPE, ORIGINAL: 1}, ORIGINAL),
  ({'rope_scaling': YARN, 'rope_theta': 1.0}, 'rope_theta'),
  ({'rope_scaling': {'rope_type': 'llama3', 'factor': 2.0}}, 'low_freq_factor'),
  ({'hidden_act': 'gelu'}, 'hidden_act'),
  ({'model_type': 'gemma', 'hidden_act': 'silu'}, 'hidden_act'),
  ({'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config'),
  ({'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types'),
  ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
  (
    {'rope_parameters': {'partial_rotary_factor': 0.5}},
    'rope_parameters.partial_rotary_factor',
  ),
  ({'rope_parameters': {'rope_theta': 10000.0}}, 'rope_theta'),
  ({'rope_scaling': {'rope_theta': 10000.0}}, 'rope_theta'),
  ({'per_layer_config': {'1': {'intermediate_size': 8}}}, 'per_layer_config'),
  ({'num_attention_heads': 5}, 'num_attention_heads'),
  ({'hidden_size': ...}, 'hidden_size'),
  ({'vocab_size': None}, 'vocab_size'),
  ({'intermediate_size': '48'}, 'intermediate_size'),
  ({'num_hidden_layers': 2.5}, 'num_hidden_layers'),
  ({'num_attention_heads': 0}, 'num_attention_heads'),
  ({'num_key_value_heads': True}, 'num_key_value_heads'),
  ({'num_hidden_layers': 10**8}, 'num_hidden_layers'),
  ({'vocab_size': 2**31}, 'vocab_size'),
  ({'head_dim': 16.0}, 'head_dim'),
  ({'rms_norm_eps': math.inf}, 'rms_norm_eps'),
  ({'rope_theta': 10**400}, 'rope_theta'),
  ({'eos_token_id': [2, '3']}, 'eos_token_id'),
  ({'layer_types': [{}]}, 'layer_types'),
  ({'rope_scaling': LLAMA3 | {'low_freq_factor': 4.0}}, 'high_freq_factor'),
  (
    {'model_type': 'pruned_llama', 'per_layer_config': {'²': {}}},
    'per_layer_config',
  ),
  (
    {'model_type': 'pruned_llama', 'per_layer_config': {'x': {}}},
    'per_layer_config',
  ),
  (
    {'model_type': 'pruned_llama', 'per_layer_config': {'2': {}}},
    'per_layer_config',
  ),
  (
    {
      'rope_theta': 1e6,
      'rope_scaling': LLAMA3,
      'rope_parameters': {'rope_theta': 1e6, 'rope_type': 'default'},
    },
    'rope_scaling',
  ),
]


@pytest.mark.parametrize('change, key', UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_its_key(change, key):
  with pytest.raises(UserError) as error:
    config_from_hf(_changed(change))
  assert key in str(error.value)


@pytest.mark.parametrize(
  'key, value',
  [
    ('attention_bias', False),
    ('mlp_bias', False),
    ('attention_dropout', 0.0),
    ('sliding_window', None),
    ('partial_rotary_factor', 1.0),
    ('quantization_config', None),
    ('layer_types', ['full_attention', 'full_attention']),
    ('layer_types', None),
    ('per_layer_config', None),
    ('rope_parameters', None),
  ],
)
def test_a_key_with_its_harmless_value_changes_nothing(key, value):
  assert config_from_hf({**HF, key: value}) == CONFIG


LONG = {
  'rope_type': 'longrope',
  'short_factor': [1.0, 1.1, 1.2, 1.3],
  'long_factor': [1.0, 2.0, 3.0, 4.0],
}
TYPES = [
  # model_type, keys, and as what it is exported.
  ('llama', {}, 'llama'),
  ('llama', {'num_attention_heads': 6}, 'mistral'),
  ('llama', {'num_attention_heads': 6, 'attention_bias': True}, 'granite'),
  ('qwen2', {}, 'qwen2'),
  ('qwen2', {'num_attention_heads': 2}, 'seed_oss'),
  ('iquestcoder', {}, 'llama'),
  ('internlm3', {'num_attention_heads': 6}, 'mistral'),
  ('helium', {'num_attention_heads': 2}, 'llama'),
  ('phi3', {'num_attention_heads': 2}, 'phi3'),
  ('glm4', {'num_attention_heads': 6}, 'glm4'),
  ('gemma2', {'hidden_act': ...}, 'gemma2'),
  ('gemma2', {'hidden_act': ..., 'num_attention_heads': 6}, 'pruned_gemma2'),
  ('phi3', {'rope_scaling': LONG}, 'phi3'),
  ('phi3', {'num_attention_heads': 2, 'rope_scaling': LONG}, 'llama'),
]


@pytest.mark.parametrize('model_type, keys, expected', TYPES)
def test_an_export_is_of_a_type_that_stock_tools_load(
  model_type, keys, expected
):
  sizes = {'num_attention_heads': 4, 'head_dim': 8, 'sliding_window': None}
  hf = _changed({'model_type': model_type, **sizes, **keys})
  found = hf_config(config_from_hf(hf), 'float32', 'auto', 'auto')
  assert found['model_type'] == expected


def test_a_gemma_of_a_stock_type_has_heads_that_divide_its_width():
  keys = {'model_type': 'gemma2', 'hidden_act': ..., 'head_dim': 8}
  config = config_from_hf(_changed(keys))
  with pytest.raises(UserError, match='refuses a gemma2 of 6 heads'):
    hf_config(config, 'float32', 'uniform', 'auto')


@pytest.mark.parametrize(
  'model_type, why',
  [
    ('qwen3_next', 'linear attention'),
    ('deepseek_v3', 'MLA'),
    ('qwen3_moe', 'mixture of experts'),
    ('gemma3n_text', 'share keys and values'),
    ('chatglm', 'ends in -hf'),
  ],
)
def test_what_is_known_and_not_supported_says_why(model_type, why):
  with pytest.raises(UserError, match=f"'{model_type}'.*{why}"):
    config_from_hf(_changed({'model_type': model_type}))


@pytest.mark.parametrize(
  'model_type, key, value',
  [
    ('llama', 'attention_chunk_size', 8192),
    ('olmo2', 'clip_qkv', 8.0),
    ('phi3', 'resid_pdrop', 0.1),
    ('gemma', 'use_bidirectional_attention', True),
    ('internlm3', 'qkv_bias', True),
  ],
)
def test_what_is_not_supported_of_a_family_is_named(model_type, key, value):
  keys = {'model_type': model_type, 'hidden_act': ..., key: value}
  with pytest.raises(UserError, match=f'{key} is '):
    config_from_hf(_changed(keys))


def test_of_a_model_that_sees_too_the_text_model_is_read(monkeypatch):
  monkeypatch.setitem(TEXT_OF, 'gemma3', 'gemma')
  text = _changed({'model_type': 'any', 'hidden_act': ..., 'eos_token_id': 1})
  hf = {'model_type': 'gemma3', 'text_config': text, 'eos_token_id': [1, 106]}
  config = config_from_hf(hf)
  assert (config.embed_dim, config.eos_token_id) == (32, (1, 106))
  assert config.family == 'gemma'
  with pytest.raises(UserError, match='quantization_config is'):
    config_from_hf(hf | {'quantization_config': {'quant_method': 'gptq'}})
  with pytest.raises(UserError, match='text_config is null'):
    config_from_hf({'model_type': 'gemma3'})
