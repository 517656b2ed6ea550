"""The cut: masked == shrunk == padded and merged == unmerged, on logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.axes import (
  LAYERS,
  Axes,
  along_first,
  apply_masks,
  member_axes,
  take_kept,
)
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.decoder import hidden_states, logits
from lorapr_jax.models.lora import merge_lora
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.importance import (
  Criterion,
  Options,
  Signals,
  element_scores,
  update_importance,
)
from lorapr_jax.pruning.masks import (
  by_stack,
  gated,
  initial_masks,
  of_layers,
  select_mask,
  select_masks,
  with_layers,
  without_layers,
)
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.shrink import kept_groups, pad, shrink, shrunk_config
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.training.steps import make_optimizer

LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.0)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 5))


def model(layers, *shape):
  return ModelConfig(
    vocab_size=11,
    embed_dim=8,
    head_dim=4,
    layers=(LayerShape(*shape),) * layers,
  )


MHA, GQA = model(3, 4, 1, 6), model(3, 2, 3, 6)
DEEP = model(10, 2, 3, 6)  # Reference protection: layers 0 and 9.
AXES = block_axes(GQA, LORA)

CASES = {
  'kv_heads_and_channels': (GQA, dict(protect='none')),
  'queries_and_channels': (GQA, dict(protect='none', heads='queries')),
  'heads_alone': (MHA, dict(protect='none', channels=False)),
  'channels_alone': (MHA, dict(protect='none', heads='none')),
  'a_protected_layer': (GQA, dict()),
  'layers_alone': (
    DEEP,
    dict(layers_target=0.5, heads='none', channels=False),
  ),
  'layers_and_groups': (GQA, dict(layers_target=0.4, protect='none')),
  'layers_and_queries': (DEEP, dict(layers_target=0.3, heads='queries')),
  'nothing': (GQA, dict(target=0.0)),
}


def randomise(tree, seed, scale=0.3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), tree
  )


def random_masks(config, keep, seed=0):
  """Masks that keep what random importance says, {group: count by layer}."""
  stacks = tuple((s.size, config.sizes(s.shape)) for s in config.stacks)
  masks = initial_masks(tuple(keep), stacks)
  importance = randomise(masks, seed)
  chosen = tuple(
    mask | select_masks(*map(without_layers, (scores, mask, counts)))
    for scores, mask, counts in zip(
      importance, masks, by_stack(keep, config), strict=True
    )
  )
  if LAYERS not in keep:
    return chosen
  # The first and the last one are protected in some cases.
  scores = of_layers(importance).at[jnp.array([0, -1])].set(9.0)
  left = jnp.asarray(sum(keep[LAYERS]))
  left = select_mask(scores, of_layers(masks), left)
  return with_layers(chosen, left)


@pytest.fixture
def make_model(random_params, random_lora):
  """Parameters and adapters of a config, all of them random, B too."""
  return lambda config: (random_params(config), random_lora(config, LORA))


@functools.partial(jax.jit, static_argnames='config')
def run(params, config, lora=None, masks=None):
  hidden = hidden_states(
    params, TOKENS, config, lora=lora, lora_config=LORA, masks=masks
  )
  return logits(params, hidden, config)


def cut(params, lora, kept, config, change=shrink):
  """Parameters and adapters after `change`, which is shrink or pad."""

  @jax.jit
  def trees(stacks, lora):
    return (
      change(stacks, AXES['params'], kept, config),
      change(lora, AXES['lora'], kept, config),
    )

  stacks, lora = trees(params['stacks'], lora)
  return {**params, 'stacks': stacks}, lora


@jax.jit
def merged(params, lora):
  stacks = zip(params['stacks'], lora, strict=True)
  return {
    **params,
    'stacks': tuple(merge_lora(*stack, LORA.scale) for stack in stacks),
  }


def assert_close(found, expected):
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_masked_is_shrunk_is_padded_is_merged(case, make_model):
  config, options = CASES[case]
  plan = plan_pruning(config, Targets(**options))
  params, lora = make_model(config)
  expected = run(params, config, lora)
  kept = tuple({} for _ in config.layers)
  if plan.keep:
    dense, masks = expected, random_masks(config, plan.keep)
    expected = run(params, config, lora, masks)
    assert np.abs(expected - dense).max() > 1e-2
    kept = kept_groups(masks)

  small = shrunk_config(config, kept)
  assert small == plan.pruned_config
  assert len(small.layers) == sum(plan.keep.get(LAYERS, [1] * len(kept)))
  shrunk = cut(params, lora, kept, config)
  assert_close(run(shrunk[0], small, shrunk[1]), expected)
  assert_close(run(merged(*shrunk), small), expected)

  padded = cut(*shrunk, kept, config, pad)
  assert_close(run(padded[0], config, padded[1]), expected)
  assert_close(run(merged(*padded), config), expected)


def test_layers_may_keep_different_numbers_and_be_cut_again(make_model):
  config = model(3, 2, 3, 6)
  masks = random_masks(config, {QUERIES: (3, 2, 2), CHANNELS: (6, 4, 4)})
  kept = kept_groups(masks)
  small = shrunk_config(config, kept)
  assert small.layers == (
    LayerShape(2, 3, 6),
    LayerShape(2, 2, 4),
    LayerShape(2, 2, 4),
  )
  assert [stack.size for stack in small.stacks] == [1, 2]
  params, lora = make_model(config)
  params, lora = cut(params, lora, kept, config)

  # The stacks of what is left are not those of what will be.
  masks = random_masks(small, {QUERIES: (1, 1, 1), CHANNELS: (2, 2, 3)}, seed=1)
  expected = run(params, small, lora, masks)
  kept = kept_groups(masks)
  smaller = shrunk_config(small, kept)
  assert [stack.size for stack in smaller.stacks] == [2, 1]
  trees = cut(params, lora, kept, small)
  assert_close(run(trees[0], smaller, trees[1]), expected)


def shapes(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): x.shape
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_arrays_are_smaller(make_model):
  plan = plan_pruning(DEEP, Targets(target=0.5))
  kept = kept_groups(random_masks(DEEP, plan.keep))
  params, lora = cut(*make_model(DEEP), kept, DEEP)
  first, middle, last = params['stacks']
  dense = {
    'input_layernorm.weight': (1, 8),
    'mlp.down_proj.weight': (1, 6, 8),
    'mlp.gate_proj.weight': (1, 8, 6),
    'mlp.up_proj.weight': (1, 8, 6),
    'post_attention_layernorm.weight': (1, 8),
    'self_attn.k_proj.weight': (1, 8, 2, 4),
    'self_attn.o_proj.weight': (1, 2, 3, 4, 8),
    'self_attn.q_proj.weight': (1, 8, 2, 3, 4),
    'self_attn.v_proj.weight': (1, 8, 2, 4),
  }
  assert shapes(first) == shapes(last) == dense
  assert shapes(middle) == {
    'input_layernorm.weight': (8, 8),
    'mlp.down_proj.weight': (8, 3, 8),
    'mlp.gate_proj.weight': (8, 8, 3),
    'mlp.up_proj.weight': (8, 8, 3),
    'post_attention_layernorm.weight': (8, 8),
    'self_attn.k_proj.weight': (8, 8, 1, 4),
    'self_attn.o_proj.weight': (8, 1, 3, 4, 8),
    'self_attn.q_proj.weight': (8, 8, 1, 3, 4),
    'self_attn.v_proj.weight': (8, 8, 1, 4),
  }
  assert shapes(lora[1]['self_attn']) == {
    'k_proj.a': (8, 8, 2),
    'k_proj.b': (8, 2, 1, 4),
    'o_proj.a': (8, 1, 3, 4, 2),
    'o_proj.b': (8, 2, 8),
    'q_proj.a': (8, 8, 2),
    'q_proj.b': (8, 2, 1, 3, 4),
    'v_proj.a': (8, 8, 2),
    'v_proj.b': (8, 2, 1, 4),
  }


def test_fewer_queries_leave_keys_and_values_alone(make_model):
  plan = plan_pruning(GQA, Targets(heads='queries', protect='none'))
  kept = kept_groups(random_masks(GQA, plan.keep))
  params, _ = cut(*make_model(GQA), kept, GQA)
  found = shapes(params['stacks'][0]['self_attn'])
  assert found == {
    'k_proj.weight': (3, 8, 2, 4),
    'o_proj.weight': (3, 2, 2, 4, 8),
    'q_proj.weight': (3, 8, 2, 2, 4),
    'v_proj.weight': (3, 8, 2, 4),
  }


@pytest.mark.parametrize(
  'config, options',
  [
    (GQA, dict(heads='queries', protect='none')),
    (DEEP, dict(target=0.5)),
    (DEEP, dict(layers_target=0.5, heads='queries')),
  ],
  ids=['queries', 'protected', 'layers'],
)
def test_every_tree_of_the_state_is_cut_and_padded_alike(
  config, options, make_model
):
  keep = plan_pruning(config, Targets(**options)).keep
  masks = random_masks(config, keep)
  kept = kept_groups(masks)
  _, lora = make_model(config)
  moments = make_optimizer(1e-3).init(lora)[0]
  group_tree = {group: Axes(member_axes(group)) for group in keep}
  for axes, trees in (
    (AXES['lora'], (lora, randomise(moments.mu, 3), randomise(moments.nu, 4))),
    (group_tree, (masks, randomise(masks, 5))),
  ):
    to_small = jax.jit(lambda x, axes=axes: shrink(x, axes, kept, config))
    to_full = jax.jit(lambda x, axes=axes: pad(x, axes, kept, config))
    apply = jax.vmap(lambda x, m, axes=axes: apply_masks(x, m, axes))
    for stacks in trees:
      small = to_small(stacks)
      padded = to_full(small)
      # Of a layer that is gone, nothing comes back.
      alive = [
        (jax.tree.map(_whole(m), s), gated(m))
        for s, m in zip(stacks, masks, strict=True)
      ]
      masked = tuple(apply(*both) for both in alive)
      jax.tree.map(np.testing.assert_array_equal, padded, masked)
      jax.tree.map(np.testing.assert_array_equal, to_small(padded), small)
      assert sum(x.size for x in jax.tree.leaves(small)) < sum(
        x.size for x in jax.tree.leaves(stacks)
      )
  assert all(np.all(x == 1) for x in jax.tree.leaves(to_small(masks)))


def _whole(masks):
  """What layers that are gone as a whole lose."""
  return lambda x: x * along_first(masks.get(LAYERS, jnp.ones(len(x))), x)


def test_take_kept_takes_the_named_members():
  tree = {'q_proj': jnp.arange(12).reshape(1, 2, 3, 2)}
  axes = {'q_proj': Axes.of('DKGH')}
  by_kv_head = take_kept(tree, axes, {KV_HEADS: jnp.asarray([1])})
  assert by_kv_head['q_proj'].tolist() == [[[[6, 7], [8, 9], [10, 11]]]]
  queries = {QUERIES: jnp.asarray([[0, 2], [1, 2]])}
  assert take_kept(tree, axes, queries)['q_proj'].tolist() == [
    [[[0, 1], [4, 5]], [[8, 9], [10, 11]]]
  ]


def test_kept_groups_are_the_indices_by_layer():
  masks = (
    {CHANNELS: np.array([[1.0, 0, 1, 1]]), KV_HEADS: np.array([[1.0, 1]])},
    {CHANNELS: np.array([[0.0, 0, 0, 1]]), KV_HEADS: np.array([[0.0, 1]])},
  )
  found = [{g: i.tolist() for g, i in x.items()} for x in kept_groups(masks)]
  assert found == [
    {CHANNELS: [0, 2, 3], KV_HEADS: [0, 1]},
    {CHANNELS: [3], KV_HEADS: [1]},
  ]
  queries = np.array([[[1.0, 0, 1], [0, 1, 1]]])
  [layer] = kept_groups(({QUERIES: queries},))
  assert layer[QUERIES].tolist() == [[0, 2], [1, 2]]


def test_kv_heads_with_different_numbers_of_queries_are_no_model():
  queries = np.array([[[1.0, 0, 1], [0, 1, 0]]])
  with pytest.raises(ValueError, match='different numbers'):
    kept_groups(({QUERIES: queries},))


@pytest.mark.parametrize('heads', ['kv_groups', 'queries'])
def test_importance_goes_on_after_a_cut_as_if_only_masked(heads, make_model):
  plan = plan_pruning(GQA, Targets(heads=heads, protect='none'))
  masks = random_masks(GQA, plan.keep)
  kept = kept_groups(masks)
  params, lora = make_model(GQA)
  grads = randomise(lora, 6)
  group_tree = {group: Axes(member_axes(group)) for group in plan.keep}
  importance = randomise(masks, 7)

  @jax.jit
  def update(stacks, lora, grads, importance, masks):
    def layer(inputs):
      params, lora, grads, old, mask = inputs
      scores = element_scores(
        Signals(params, lora, grads, 0), Options(Criterion('lora'), LORA.scale)
      )
      return update_importance(
        old, scores, mask, AXES['params'], Criterion('lora', decay=0.9)
      )

    trees = (stacks[0], lora[0], grads[0], importance[0], masks[0])
    return (jax.lax.map(layer, trees),)

  whole = update(params['stacks'], lora, grads, importance, masks)
  small_params, small_lora = cut(params, lora, kept, GQA)
  small = update(
    small_params['stacks'],
    small_lora,
    shrink(grads, AXES['lora'], kept, GQA),
    shrink(importance, group_tree, kept, GQA),
    shrink(masks, group_tree, kept, GQA),
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5),
    small,
    shrink(whole, group_tree, kept, GQA),
  )
