"""Trees have the shapes of their axes; fresh ones are drawn as stated."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.axes import PROJECTIONS
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.trees import (
  init_lora,
  init_params,
  logical_axes,
  param_shapes,
)

CONFIG = ModelConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=8,
  layers=(LayerShape(2, 3, 48), LayerShape(2, 3, 48), LayerShape(1, 2, 40)),
)
SMALL = dataclasses.replace(CONFIG, layers=(LayerShape(2, 3, 48),) * 2)
BIASED = dataclasses.replace(
  CONFIG.with_biases(('q_proj', *PROJECTIONS['mlp'])), qk_norm='head'
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)


def test_shapes_of_a_small_model():
  shapes = jax.tree.map(
    lambda x: x.shape,
    jax.eval_shape(lambda: init_params(jax.random.key(0), CONFIG, 'float32')),
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
    lambda: init_lora(jax.random.key(0), config, lora_config)
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
  axes = logical_axes(config, LORA)
  trees = {
    'params': jax.eval_shape(
      lambda: init_params(jax.random.key(0), config, 'bfloat16')
    ),
    'lora': _lora_shapes(config, LORA),
  }
  assert ('lm_head' in trees['params']) == (config is not TIED)
  block = trees['params']['stacks'][0]
  for part, names in PROJECTIONS.items():
    for name in names:
      assert ('bias' in block[part][name]) == (name in config.biases)
  assert ('q_norm' in block['self_attn']) == bool(config.qk_norm)
  assert param_shapes(config, jnp.bfloat16) == trees['params']

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
  params = init_params(jax.random.key(0), SMALL, 'bfloat16')
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
  big = ModelConfig(
    vocab_size=32000,
    embed_dim=4096,
    head_dim=128,
    layers=(LayerShape(32, 1, 11008),) * 4,
  )
  compiled = init_lora.lower(jax.random.key(0), big, LORA)
  memory = compiled.compile().memory_analysis()
  base = 4 * big.num_parameters
  used = memory.temp_size_in_bytes + memory.output_size_in_bytes
  assert used < base / 50


def test_a_is_kaiming_uniform_and_b_zero_in_float32():
  lora = init_lora(jax.random.key(0), SMALL, LORA)
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
  other = init_lora(jax.random.key(1), SMALL, LORA)
  assert jnp.any(other[0]['mlp']['up_proj']['a'] != draws[1])


def test_only_the_targets_have_adapters():
  targets = ('v_proj', 'q_proj', 'down_proj')
  lora_config = dataclasses.replace(LORA, targets=targets)
  lora = _lora_shapes(CONFIG, lora_config)
  axes = logical_axes(CONFIG, lora_config)['lora']
  for tree in (*lora, *axes):
    assert {part: set(tree[part]) for part in tree} == {
      'self_attn': {'q_proj', 'v_proj'},
      'mlp': {'down_proj'},
    }
  # A part without an adapter has no entry.
  mlp = dataclasses.replace(LORA, targets=('up_proj',))
  assert set(_lora_shapes(CONFIG, mlp)[0]) == {'mlp'}
