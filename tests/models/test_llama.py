"""The forward pass is transformers'; trees have the shapes of their axes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lorapr_jax.models import llama
from lorapr_jax.models.config import (
  LayerShape,
  LlamaConfig,
  LoraConfig,
  ProjectionLetters,
)
from lorapr_jax.models.layers import dropout

CONFIG = LlamaConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=8,
  layers=(LayerShape(2, 3, 48), LayerShape(2, 3, 48), LayerShape(1, 2, 40)),
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
LORA = LoraConfig(rank=4, alpha=8.0)
# Positions beyond the 32 that the llama3 model was first trained on.
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 64))


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, config):
  return llama.logits(params, llama.hidden_states(params, TOKENS, config))


def _torch_logits(folder):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS)).logits.numpy()


def _check_logits(folder, load):
  config, params = load(folder)
  want = _torch_logits(folder)
  assert want.std() > 0.5
  np.testing.assert_allclose(_logits(params, config), want, rtol=0, atol=1e-4)


def test_logits_equal_transformers(kind, save_hf, load):
  _check_logits(save_hf(kind), load)


@pytest.mark.parametrize('kind', ['gqa_tied', 'mistral'])
@pytest.mark.parametrize(
  'saved', [{'max_shard_size': '20KB'}, {'dtype': 'bfloat16'}]
)
def test_logits_equal_transformers_however_saved(kind, saved, save_hf, load):
  folder = save_hf(kind, **saved)
  files = list(folder.glob('*.safetensors'))
  assert (len(files) > 2) == ('max_shard_size' in saved)
  _check_logits(folder, load)


def test_the_kinds_differ_in_what_they_are_named_for(save_hf, load):
  config = {kind: load(save_hf(kind))[0] for kind in ('mha', 'gqa', 'llama3')}
  assert config['mha'].layers == (LayerShape(4, 1, 48),) * 2
  assert config['gqa'].layers == (LayerShape(2, 2, 48),) * 2
  params = load(save_hf('llama3'))[1]
  unscaled = dataclasses.replace(config['llama3'], rope_scaling=None)
  difference = _logits(params, config['llama3']) - _logits(params, unscaled)
  assert jnp.abs(difference).max() > 0.1


def test_a_bf16_computation_is_near_the_float32_one(random_params):
  params = random_params(CONFIG)
  tokens = jnp.asarray(TOKENS)
  hidden = llama.hidden_states(params, tokens, CONFIG, dtype=jnp.bfloat16)
  exact = llama.hidden_states(params, tokens, CONFIG)
  assert (hidden.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32)
  assert llama.logits(params, hidden).dtype == jnp.float32
  # Three decimal digits a rounding, some tens of them in a row.
  error = jnp.linalg.norm(hidden.astype(jnp.float32) - exact)
  assert error < 0.1 * jnp.linalg.norm(exact)


def test_shapes_of_a_small_model():
  shapes = jax.tree.map(
    lambda x: x.shape, llama.init_params(jax.random.key(0), CONFIG, 'float32')
  )

  def weights(**shapes):
    return {name: {'weight': shape} for name, shape in shapes.items()}

  assert shapes == {
    **weights(embed_tokens=(96, 32), norm=(32,), lm_head=(96, 32)),
    'stacks': (
      {
        **weights(input_layernorm=(2, 32), post_attention_layernorm=(2, 32)),
        'self_attn': weights(
          q_proj=(2, 32, 2, 3, 8),
          k_proj=(2, 32, 2, 8),
          v_proj=(2, 32, 2, 8),
          o_proj=(2, 2, 3, 8, 32),
        ),
        'mlp': weights(
          gate_proj=(2, 32, 48), up_proj=(2, 32, 48), down_proj=(2, 48, 32)
        ),
      },
      {
        **weights(input_layernorm=(1, 32), post_attention_layernorm=(1, 32)),
        'self_attn': weights(
          q_proj=(1, 32, 1, 2, 8),
          k_proj=(1, 32, 1, 8),
          v_proj=(1, 32, 1, 8),
          o_proj=(1, 1, 2, 8, 32),
        ),
        'mlp': weights(
          gate_proj=(1, 32, 40), up_proj=(1, 32, 40), down_proj=(1, 40, 32)
        ),
      },
    ),
  }


def test_shapes_of_its_adapters():
  shapes = jax.tree.map(
    lambda x: x.shape, llama.init_lora(jax.random.key(0), CONFIG, LORA)
  )

  def adapter(a, b):
    return {'a': a, 'b': b}

  assert shapes[0] == {
    'self_attn': {
      'q_proj': adapter((2, 32, 4), (2, 4, 2, 3, 8)),
      'k_proj': adapter((2, 32, 4), (2, 4, 2, 8)),
      'v_proj': adapter((2, 32, 4), (2, 4, 2, 8)),
      'o_proj': adapter((2, 2, 3, 8, 4), (2, 4, 32)),
    },
    'mlp': {
      'gate_proj': adapter((2, 32, 4), (2, 4, 48)),
      'up_proj': adapter((2, 32, 4), (2, 4, 48)),
      'down_proj': adapter((2, 48, 4), (2, 4, 32)),
    },
  }
  assert shapes[1]['self_attn']['o_proj'] == adapter(
    (1, 1, 2, 8, 4), (1, 4, 32)
  )


@pytest.mark.parametrize('config', [CONFIG, TIED])
def test_axes_times_sizes_are_the_shapes(config):
  axes = llama.logical_axes(config, LORA)
  key = jax.random.key(0)
  trees = {
    'params': llama.init_params(key, config, 'bfloat16'),
    'lora': llama.init_lora(key, config, LORA),
  }
  assert ('lm_head' in trees['params']) == (config is CONFIG)
  shapes = llama.param_shapes(config, jnp.bfloat16)
  assert shapes == jax.eval_shape(lambda: trees['params'])

  def check(axes, tree, sizes):
    expected = jax.tree.map(lambda a: tuple(sizes[name] for name in a), axes)
    assert expected == jax.tree.map(lambda x: x.shape, tree)

  for i, stack in enumerate(config.stacks):
    sizes = {**config.sizes(stack.shape), 'layers': stack.size, 'rank': 4}
    for name, tree in trees.items():
      stacks = [
        t['stacks'] if name == 'params' else t for t in (axes[name], tree)
      ]
      check(stacks[0][i], stacks[1][i], sizes)
  outside = [
    {name: leaf for name, leaf in tree.items() if name != 'stacks'}
    for tree in (axes['params'], trees['params'])
  ]
  check(*outside, config.sizes(config.layers[0]))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_init_params_draws_small_weights_and_norms_of_one(dtype):
  params = llama.init_params(jax.random.key(0), CONFIG, dtype)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    assert leaf.dtype == dtype
    values = np.asarray(leaf, np.float32)
    if 'norm' in jax.tree_util.keystr(path):
      assert np.all(values == 1)
    else:
      assert values.std() == pytest.approx(0.02, rel=0.15)
  first = params['stacks'][0]['mlp']['up_proj']['weight']
  assert jnp.any(first[0] != first[1])


def test_init_lora_never_materialises_the_base():
  big = LlamaConfig(
    vocab_size=32000,
    embed_dim=4096,
    head_dim=128,
    layers=(LayerShape(32, 1, 11008),) * 4,
  )
  compiled = llama.init_lora.lower(jax.random.key(0), big, LoraConfig())
  memory = compiled.compile().memory_analysis()
  base = 4 * big.num_parameters
  used = memory.temp_size_in_bytes + memory.output_size_in_bytes
  assert used < base / 50


def test_a_is_kaiming_uniform_and_b_zero_in_float32():
  lora = llama.init_lora(jax.random.key(0), CONFIG, LORA)
  fan_in = {'o_proj': 2 * 3 * 8, 'down_proj': 48}
  for part in lora[0].values():
    for name, adapter in part.items():
      a, b = adapter['a'], adapter['b']
      assert a.dtype == b.dtype == jnp.float32
      assert jnp.all(b == 0)
      bound = 1 / math.sqrt(fan_in.get(name, 32))
      assert 0.9 * bound < jnp.abs(a).max() <= bound
      assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
      assert abs(a.mean()) < 0.15 * bound
      assert jnp.any(a[0] != a[1])
  draws = [lora[0]['mlp'][n]['a'] for n in ('gate_proj', 'up_proj')]
  assert jnp.any(draws[0] != draws[1])
  other = llama.init_lora(jax.random.key(1), CONFIG, LORA)
  assert jnp.any(other[0]['mlp']['up_proj']['a'] != draws[1])


def test_only_the_targets_have_adapters():
  targets = ('v_proj', 'q_proj', 'down_proj')
  lora_config = LoraConfig(rank=4, targets=targets)
  lora = llama.init_lora(jax.random.key(0), CONFIG, lora_config)
  axes = llama.logical_axes(CONFIG, lora_config)['lora']
  for tree in (*lora, *axes):
    assert {part: set(tree[part]) for part in tree} == {
      'self_attn': {'q_proj', 'v_proj'},
      'mlp': {'down_proj'},
    }
  # A part without an adapter has no entry.
  mlp = LoraConfig(rank=4, targets=('up_proj',))
  assert set(llama.init_lora(jax.random.key(0), CONFIG, mlp)[0]) == {'mlp'}


@functools.partial(jax.jit, static_argnames='lora_config')
def _hidden(params, lora=None, lora_config=None, key=None):
  return llama.hidden_states(
    params,
    TOKENS,
    CONFIG,
    lora=lora,
    lora_config=lora_config,
    dropout_key=key,
  )


HALF = dataclasses.replace(LORA, dropout=0.5)


def test_adapters_at_step_0_change_nothing_even_with_dropout(random_params):
  # B is zero, so that whatever dropout does can only be on LoRA's side.
  params = random_params(CONFIG)
  lora = llama.init_lora(jax.random.key(0), CONFIG, HALF)
  want = _hidden(params)
  for key in (None, jax.random.key(3)):
    got = _hidden(params, lora, HALF, key)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_dropout_needs_a_key_and_a_rate(random_params, random_lora):
  params, lora = random_params(CONFIG), random_lora(CONFIG, LORA)
  key = jax.random.key(3)
  plain = _hidden(params, lora, LORA)
  assert jnp.all(_hidden(params, lora, HALF) == plain)
  assert jnp.all(_hidden(params, lora, LORA, key) == plain)
  assert jnp.abs(_hidden(params, lora, HALF, key) - plain).max() > 0.1


def test_dropout_is_decided_by_its_key(random_params, random_lora):
  params, lora = random_params(CONFIG), random_lora(CONFIG, HALF)
  first = _hidden(params, lora, HALF, jax.random.key(3))
  assert jnp.all(_hidden(params, lora, HALF, jax.random.key(3)) == first)
  other = _hidden(params, lora, HALF, jax.random.key(4))
  assert jnp.abs(other - first).max() > 0.1


def test_dropout_on_the_input_of_one_adapter_is_the_formula(random_params):
  # One layer whose only adapter is down_proj's: what dropout adds to the
  # residual stream has rank 1 per token, and its mean over keys is none.
  config = dataclasses.replace(CONFIG, layers=(LayerShape(1, 1, 200),))
  lora_config = LoraConfig(
    rank=1, alpha=1.0, dropout=0.5, targets=('down_proj',)
  )
  params = random_params(config)
  a = jnp.ones((1, 200, 1))
  b = jnp.zeros((1, 1, 32)).at[..., 0].set(1.0)
  lora = ({'mlp': {'down_proj': {'a': a, 'b': b}}},)
  block = llama.Block(config, config.layers[0], lora_config)
  variables = jax.tree.map(
    lambda x: x[0], {'params': params['stacks'][0], 'lora': lora[0]}
  )
  x = jax.random.normal(jax.random.key(0), (6, 32))
  angles = llama.rope_angles(config, 6)

  @jax.jit
  @jax.vmap
  def outputs(key):
    return block.apply(variables, x, angles, rngs={'dropout': key})

  got = outputs(jax.random.split(jax.random.key(1), 4000))
  plain = block.apply(variables, x, angles)
  assert jnp.abs(got - plain)[..., 1:].max() < 1e-5
  spread = jnp.std(got[..., 0], axis=0)
  assert spread.min() > 0.1
  error = jnp.abs(got[..., 0].mean(axis=0) - plain[:, 0])
  assert jnp.all(error < 5 * spread / math.sqrt(4000))


@pytest.mark.parametrize('rate', [0.0, 0.05, 0.3, 0.9])
def test_dropout_keeps_its_share_and_rescales_it(rate):
  x = jnp.ones((200, 500))
  out = dropout(jax.random.key(0), x, rate)
  kept = out != 0
  # Five standard deviations of a share of 100,000 draws.
  tolerance = 5 * math.sqrt(rate * (1 - rate) / x.size)
  assert float(kept.mean()) == pytest.approx(1 - rate, abs=tolerance + 1e-5)
  np.testing.assert_allclose(out[kept], 1 / (1 - rate), rtol=1e-3)


def test_dropout_keeps_the_dtype():
  x = jnp.ones(64, jnp.bfloat16)
  assert dropout(jax.random.key(0), x, 0.5).dtype == jnp.bfloat16


def test_an_adapter_of_the_wrong_shape_is_refused(random_params, random_lora):
  params = random_params(CONFIG)
  lora = random_lora(CONFIG, LoraConfig(rank=2))
  with pytest.raises(ValueError, match=r'q_proj/a is .*, expected \(32, 4\)'):
    _hidden(params, lora, LORA)


@pytest.mark.parametrize(
  'spec, letters',
  [
    ('ND,DKGH->NKGH', ('DKGH', 'D', 'KGH')),
    ('NKGH,KGHD->ND', ('KGHD', 'KGH', 'D')),
    ('NF,FD->ND', ('FD', 'F', 'D')),
  ],
)
def test_an_einsum_is_taken_apart(spec, letters):
  assert ProjectionLetters.of(spec) == letters
