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

from lorapr_jax.axes import ProjectionLetters
from lorapr_jax.models import llama
from lorapr_jax.models.config import LayerShape, LlamaConfig, LoraConfig
from lorapr_jax.models.layers import dropout
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.masks import initial_masks
from lorapr_jax.pruning.shrink import kept_groups, shrunk_config
from lorapr_jax.training.cut import cut_adapters, cut_params
from lorapr_jax.training.steps import by_stack, select_stack_masks

CONFIG = LlamaConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=8,
  layers=(LayerShape(2, 3, 48), LayerShape(2, 3, 48), LayerShape(1, 2, 40)),
)
SMALL = dataclasses.replace(CONFIG, layers=(LayerShape(2, 3, 48),) * 2)
BIASED = dataclasses.replace(CONFIG, mlp_bias=True)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
LORA = LoraConfig(rank=4, alpha=8.0)
# Positions beyond the 32 that the llama3 model was first trained on.
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 64))


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, config):
  return llama.logits(params, llama.hidden_states(params, TOKENS, config))


@functools.partial(jax.jit, static_argnames=('lora_config', 'dtype'))
def _hidden(params, lora=None, lora_config=None, key=None, dtype=jnp.float32):
  return llama.hidden_states(
    params,
    TOKENS[:, :8],
    SMALL,
    lora=lora,
    lora_config=lora_config,
    dropout_key=key,
    dtype=dtype,
  )


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
  params = random_params(SMALL)
  hidden = _hidden(params, dtype=jnp.bfloat16)
  exact = _hidden(params)
  assert (hidden.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32)
  assert llama.logits(params, hidden).dtype == jnp.float32
  # Three decimal digits a rounding, some tens of them in a row.
  error = jnp.linalg.norm(hidden.astype(jnp.float32) - exact)
  assert error < 0.1 * jnp.linalg.norm(exact)


def test_shapes_of_a_small_model():
  shapes = jax.tree.map(
    lambda x: x.shape,
    jax.eval_shape(
      lambda: llama.init_params(jax.random.key(0), CONFIG, 'float32')
    ),
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


def _lora_shapes(config, lora_config):
  return jax.eval_shape(
    lambda: llama.init_lora(jax.random.key(0), config, lora_config)
  )


def test_shapes_of_its_adapters():
  shapes = jax.tree.map(lambda x: x.shape, _lora_shapes(CONFIG, LORA))

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


@pytest.mark.parametrize('config', [CONFIG, TIED, BIASED])
def test_axes_times_sizes_are_the_shapes(config):
  axes = llama.logical_axes(config, LORA)
  trees = {
    'params': jax.eval_shape(
      lambda: llama.init_params(jax.random.key(0), config, 'bfloat16')
    ),
    'lora': _lora_shapes(config, LORA),
  }
  assert ('lm_head' in trees['params']) == (config is not TIED)
  for part, tree in trees['params']['stacks'][0].items():
    for leaves in tree.values() if part in ('self_attn', 'mlp') else ():
      assert ('bias' in leaves) == (part in config.biased)
  assert llama.param_shapes(config, jnp.bfloat16) == trees['params']

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


def test_init_params_draws_small_weights_and_norms_of_one():
  params = llama.init_params(jax.random.key(0), SMALL, 'bfloat16')
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    assert leaf.dtype == jnp.bfloat16
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
  lora = llama.init_lora(jax.random.key(0), SMALL, LORA)
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
  other = llama.init_lora(jax.random.key(1), SMALL, LORA)
  assert jnp.any(other[0]['mlp']['up_proj']['a'] != draws[1])


def test_only_the_targets_have_adapters():
  targets = ('v_proj', 'q_proj', 'down_proj')
  lora_config = LoraConfig(rank=4, targets=targets)
  lora = _lora_shapes(CONFIG, lora_config)
  axes = llama.logical_axes(CONFIG, lora_config)['lora']
  for tree in (*lora, *axes):
    assert {part: set(tree[part]) for part in tree} == {
      'self_attn': {'q_proj', 'v_proj'},
      'mlp': {'down_proj'},
    }
  # A part without an adapter has no entry.
  mlp = LoraConfig(rank=4, targets=('up_proj',))
  assert set(_lora_shapes(CONFIG, mlp)[0]) == {'mlp'}


HALF = dataclasses.replace(LORA, dropout=0.5)


def test_adapters_at_step_0_change_nothing_even_with_dropout(random_params):
  # B is zero, so that whatever dropout does can only be on LoRA's side.
  params = random_params(SMALL)
  lora = llama.init_lora(jax.random.key(0), SMALL, LORA)
  want = _hidden(params)
  for key in (None, jax.random.key(3)):
    got = _hidden(params, lora, HALF, key)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_dropout_needs_a_key_and_a_rate(random_params, random_lora):
  params, lora = random_params(SMALL), random_lora(SMALL, LORA)
  key = jax.random.key(3)
  plain = _hidden(params, lora, LORA)
  assert jnp.all(_hidden(params, lora, HALF) == plain)
  assert jnp.all(_hidden(params, lora, LORA, key) == plain)
  assert jnp.abs(_hidden(params, lora, HALF, key) - plain).max() > 0.1


def test_dropout_is_decided_by_its_key(random_params, random_lora):
  params, lora = random_params(SMALL), random_lora(SMALL, HALF)
  first = _hidden(params, lora, HALF, jax.random.key(3))
  assert jnp.all(_hidden(params, lora, HALF, jax.random.key(3)) == first)
  other = _hidden(params, lora, HALF, jax.random.key(4))
  assert jnp.abs(other - first).max() > 0.1


@pytest.mark.parametrize('rate', [0.0, 0.05, 0.5])
def test_dropout_keeps_its_share_and_rescales_it(rate):
  x = jnp.ones((200, 500))
  out = dropout(jax.random.key(0), x, rate)
  kept = out != 0
  # Five standard deviations of a share of 100,000 draws.
  tolerance = 5 * math.sqrt(rate * (1 - rate) / x.size)
  assert float(kept.mean()) == pytest.approx(1 - rate, abs=tolerance + 1e-5)
  np.testing.assert_allclose(out[kept], 1 / (1 - rate), rtol=1e-3)


def test_dropout_decides_each_element_alone():
  # Two elements share a word of random bits; an odd width leaves half a word.
  kept = dropout(jax.random.key(0), jnp.ones((400, 501)), 0.5) != 0
  assert kept.shape == (400, 501)
  for neighbours in (kept[:, 1:] & kept[:, :-1], kept[1:] & kept[:-1]):
    share = float(neighbours.mean())
    assert share == pytest.approx(0.25, abs=5 * math.sqrt(1 / 4 / kept.size))


def test_dropout_keeps_the_dtype():
  x = jnp.ones(64, jnp.bfloat16)
  assert dropout(jax.random.key(0), x, 0.5).dtype == jnp.bfloat16


def test_an_adapter_of_the_wrong_shape_is_refused(random_params, random_lora):
  params = random_params(SMALL)
  lora = random_lora(SMALL, LoraConfig(rank=2))
  with pytest.raises(ValueError, match=r'q_proj/a is .*, expected \(32, 4\)'):
    _hidden(params, lora, LORA)


@pytest.mark.parametrize(
  'keep',
  [
    {KV_HEADS: (1, 1), CHANNELS: (30, 20)},
    {QUERIES: (1, 2), CHANNELS: (48, 1)},
  ],
)
def test_masked_is_cut_where_there_are_biases(keep, random_params, random_lora):
  config = SMALL.with_biases(('self_attn', 'mlp'))
  params, lora = random_params(config), random_lora(config, LORA)
  masks = initial_masks(tuple(keep), ((2, config.sizes(config.layers[0])),))
  rng = np.random.default_rng(0)
  scores = jax.tree.map(lambda x: rng.normal(size=x.shape), masks)
  masks = select_stack_masks(scores, masks, by_stack(keep, config))
  kept = kept_groups(masks)
  small = shrunk_config(config, kept)
  assert small.biased == config.biased
  cut = cut_params(params, kept, config)
  run = functools.partial(llama.hidden_states, lora_config=LORA)
  np.testing.assert_allclose(
    run(cut, TOKENS, small, lora=cut_adapters(lora, kept, config, LORA)),
    run(params, TOKENS, config, lora=lora, masks=masks),
    atol=2e-5,
  )
  shapes = jax.tree.map(lambda x: x.shape, llama.param_shapes(small, 'float32'))
  assert jax.tree.map(lambda x: x.shape, cut) == shapes


def test_padding_is_not_observed_where_there_are_biases(random_params):
  config = SMALL.with_biases(('self_attn', 'mlp'))
  params = random_params(config)
  observed = []
  for length in (8, 11):
    tokens, valid = TOKENS[:, :length], np.arange(length) < 8
    valid = np.broadcast_to(valid, tokens.shape)
    _, found = llama.observed_hidden_states(
      params, tokens, config, valid=valid, observe=True
    )
    observed.append(found)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5), *observed
  )


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
