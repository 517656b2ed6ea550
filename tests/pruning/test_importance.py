"""Importance against the NumPy transcription of method.md in reference.py."""

import functools
import itertools

import jax
from jax.sharding import SingleDeviceSharding
import numpy as np
import pytest

from lorapr_jax.axes import group_axes
from lorapr_jax.errors import UserError
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.trees import block_axes, init_lora, param_shapes
from lorapr_jax.pruning import block_sums
from lorapr_jax.pruning.importance import (
  Criterion,
  Options,
  Signals,
  element_scores,
  group_scores,
  update_importance,
)
from lorapr_jax.pruning.masks import initial_masks
from lorapr_jax.training import steps
from lorapr_jax.training.steps import make_update_importance
from tests.pruning import reference

GROUPS = ('kv_heads', 'kv_heads,queries_per_kv', 'mlp')
SIZES = dict(K=2, G=3, H=4, F=5)
SHAPE = LayerShape(num_kv_heads=2, queries_per_kv=3, mlp_dim=5)
WIDE = LayerShape(num_kv_heads=3, queries_per_kv=2, mlp_dim=7)
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.0)
PARTS = {'q_proj': 1, 'k_proj': 1, 'v_proj': 1, 'gate_proj': 1, 'up_proj': 1}
PARTS |= {'o_proj': -1, 'down_proj': -1}


def model(*layers):
  return ModelConfig(vocab_size=11, embed_dim=6, head_dim=4, layers=layers)


def randomise(tree, seed, scale=0.3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.asarray(scale * rng.normal(size=x.shape), np.float32), tree
  )


@functools.cache
def shapes_of(config, lora_config):
  lora = jax.eval_shape(
    lambda key: init_lora(key, config, lora_config), jax.random.key(0)
  )
  return param_shapes(config, np.float32), lora


def random_model(config, lora_config, seed):
  """Weights, adapters (B not zero) and gradients, none of them small."""
  params, lora = shapes_of(config, lora_config)
  return tuple(
    randomise(tree, seed + i) for i, tree in enumerate((params, lora, lora))
  )


def matrix(x, inputs):
  """Merges the first `inputs` axes (from the end if negative), and the rest."""
  x = np.asarray(x, np.float64)
  return x.reshape(int(np.prod(x.shape[:inputs])), -1)


def reference_scores(params, lora, grads, criterion, lora_config):
  """{projection: element scores} of one layer."""
  scores = {}
  for part in ('self_attn', 'mlp'):
    for name, adapter in lora.get(part, {}).items():
      split, grad = PARTS[name], grads[part][name]
      scores[name] = reference.element_scores(
        matrix(params[part][name]['weight'], split),
        matrix(adapter['a'], -1),
        matrix(adapter['b'], 1),
        matrix(grad['a'], -1),
        matrix(grad['b'], 1),
        s=lora_config.alpha / lora_config.rank,
        score=criterion.score,
        lora_gradient=criterion.lora_gradient,
        inputs=name in ('o_proj', 'down_proj'),
      )
  return scores


def reference_update(
  old, params, lora, grads, masks, criterion, lora_config, shape
):
  """One step of the moving average of one layer, {group: (U,)}."""
  scores = reference_scores(params, lora, grads, criterion, lora_config)
  sizes = {'K': shape.num_kv_heads, 'G': shape.queries_per_kv, 'H': 4}
  new = {}
  for group, mask in masks.items():
    members = reference.members(group, **sizes, F=shape.mlp_dim)
    mask = np.ravel(mask)
    ghat = reference.group_scores(scores, mask, members, norm=criterion.norm)
    average = reference.moving_average(old[group], ghat, decay=criterion.decay)
    # What a masked group had when it was masked stays for the record.
    new[group] = np.where(np.ravel(mask) > 0, average, old[group])
  return new


def layer_of(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


def mask_one(mask, step):
  """Masks one more member at every step, a different one in each row."""
  mask = np.array(mask)
  rows = mask.reshape(-1, mask.shape[-1])
  for r, row in enumerate(rows):
    if row.sum() > 1:
      row[np.flatnonzero(row)[(step + r) % int(row.sum())]] = 0
  return mask


OPTIONS = [
  Criterion('lora', score=score, norm=norm, lora_gradient=terms)
  for score, norm, terms in itertools.product(
    ('abs', 'square'), (True, False), ('own', 'full')
  )
]


def run_steps(group, criterion, steps=3, targets=LORA.targets, fused=False):
  """The package's and the reference's average after every step."""
  lora_config = LoraConfig(rank=2, alpha=3.0, dropout=0.0, targets=targets)
  axes = block_axes(model(SHAPE), lora_config)['params']
  sizes = model(SHAPE).sizes(SHAPE)
  mask = np.ones([sizes[axis] for axis in group_axes(group)], np.float32)
  ours, truth = {group: np.zeros_like(mask)}, {group: np.zeros(mask.size)}
  history = []
  for step in range(steps):
    params, lora, grads = random_model(model(SHAPE), lora_config, 10 * step)
    trees = [layer_of(x[0], 0) for x in (params['stacks'], lora, grads)]
    scores = element_scores(
      Signals(*trees, layer=0), Options(criterion, lora_config.scale, fused)
    )
    ours = update_importance(
      ours,
      scores,
      {group: mask},
      axes,
      criterion,
    )
    truth = reference_update(
      truth, *trees, {group: mask}, criterion, lora_config, SHAPE
    )
    history.append((np.ravel(ours[group]), truth[group]))
    mask = mask_one(mask, step)
  return history


@pytest.mark.parametrize('group', GROUPS)
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('criterion', OPTIONS, ids=str)
def test_the_average_is_the_methods(group, criterion, fused):
  for ours, truth in run_steps(group, criterion, fused=fused):
    np.testing.assert_allclose(ours, truth, rtol=2e-5)


@pytest.mark.parametrize('group', GROUPS)
def test_every_option_makes_a_difference(group):
  ends = [run_steps(group, criterion)[-1][1] for criterion in OPTIONS]
  for one, other in itertools.combinations(ends, 2):
    assert not np.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize(
  'group, targets',
  [
    ('kv_heads', ('q_proj', 'v_proj')),
    ('kv_heads', ('k_proj', 'down_proj')),
    ('kv_heads,queries_per_kv', ('o_proj', 'k_proj')),
    ('mlp', ('up_proj', 'q_proj')),
  ],
)
def test_projections_without_an_adapter_do_not_count(group, targets):
  for ours, truth in run_steps(group, Criterion('lora'), targets=targets):
    assert truth.min() >= 0 and truth.max() > 0
    np.testing.assert_allclose(ours, truth, rtol=2e-5)


def make_step(config, criterion, lora_config=LORA):
  return make_update_importance(
    Compute(config, lora_config),
    criterion,
    SingleDeviceSharding(jax.devices()[0]),
  )


def stack_masks(config, groups):
  stacks = tuple((s.size, config.sizes(s.shape)) for s in config.stacks)
  return jax.tree.map(np.asarray, initial_masks(groups, stacks))


@pytest.mark.parametrize('heads', GROUPS[:2])
@pytest.mark.parametrize('criterion', [OPTIONS[0], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize('kernel', [False, True])
def test_the_jitted_step_is_the_methods_in_every_layer(
  heads, criterion, kernel, monkeypatch
):
  if kernel and not block_sums.has_triton():
    pytest.skip('this JAX has no Pallas for Triton')
  monkeypatch.setattr(steps, 'runs_on', lambda _: kernel)
  interpreted = functools.partial(block_sums.block_sums, interpret=True)
  monkeypatch.setattr(steps, 'block_sums', interpreted)
  config = model(WIDE, SHAPE, SHAPE)
  step = make_step(config, criterion)
  masks = stack_masks(config, (heads, 'mlp'))
  importance = jax.tree.map(np.zeros_like, masks)
  truth = [
    {group: np.zeros(mask[0].size) for group, mask in masks[i].items()}
    for i in (0, 1, 1)
  ]
  for t in range(3):
    params, lora, grads = random_model(config, LORA, 10 * t)
    importance, ok = step(importance, params, lora, grads, {}, masks, 1.0)
    assert ok
    for layer, (i, row) in enumerate(((0, 0), (1, 0), (1, 1))):
      trees = [layer_of(x[i], row) for x in (params['stacks'], lora, grads)]
      truth[layer] = reference_update(
        truth[layer],
        *trees,
        layer_of(masks[i], row),
        criterion,
        LORA,
        config.layers[layer],
      )
      for group, expected in truth[layer].items():
        np.testing.assert_allclose(
          np.ravel(importance[i][group][row]), expected, rtol=2e-5
        )
    masks = jax.tree.map(lambda m, t=t: mask_one(m, t), masks)


def scored(config, name, seed, statistics=None):
  """The scores of a criterion that is not averaged over steps, by stack."""
  options = Options(Criterion(name, norm=False), 1.5)
  params, lora, _ = random_model(config, LORA, seed)
  axes = block_axes(config, LORA)['params']

  def of_layer(layer):
    number, trees, statistics, masks = layer
    signals = Signals(*trees, None, number, statistics=statistics)
    scores = element_scores(signals, options)
    return group_scores(scores, masks, axes, norm=False)

  masks = stack_masks(config, ('kv_heads', 'mlp'))
  return [
    jax.lax.map(
      of_layer,
      (
        stack.start + np.arange(stack.size),
        (params['stacks'][i], lora[i]),
        statistics,
        masks[i],
      ),
    )
    for i, stack in enumerate(config.stacks)
  ]


def one_step(config, name, seed, more=None, **options):
  """The scores of one step under a criterion, by stack."""
  step = make_step(config, Criterion(name=name, decay=0.0, **options))
  masks = stack_masks(config, ('kv_heads', 'mlp'))
  importance, ok = step(
    jax.tree.map(np.zeros_like, masks),
    *random_model(config, LORA, seed),
    more or {},
    masks,
    1.0,
  )
  assert ok
  return importance


def expected_scores(name, block, adapters, signal):
  """|term| of every element by the criterion's formula, in NumPy."""
  scores = {}
  for part in ('self_attn', 'mlp'):
    for projection, adapter in adapters[part].items():
      split = PARTS[projection]
      update = matrix(adapter['a'], -1) @ matrix(adapter['b'], 1)
      weight = matrix(block[part][projection]['weight'], split) + 1.5 * update
      if name == 'gradient':
        factor = matrix(signal[part][projection]['weight'], split)
      else:  # The size of each input feature: a row of the weight.
        factor = np.sqrt(np.ravel(signal[part][projection]))[:, None]
      scores[projection] = np.abs(factor * weight)
  if name == 'fluctuation':  # The variance times the row's squared norm.
    return {n: scores[n] ** 2 for n in ('o_proj', 'down_proj')}
  return scores


def input_sizes(weight, projection):
  """Random statistics in the shape of a projection's input."""
  inputs = {'o_proj': 3}.get(projection, 1)
  shape = weight.shape[: 1 + inputs]  # With `layers` in front.
  return np.random.default_rng(weight.size).uniform(0.1, 9.0, shape)


@pytest.mark.parametrize('name', ['gradient', 'activation', 'fluctuation'])
def test_baselines_are_the_formulas_of_their_papers(name):
  config = model(SHAPE, SHAPE)
  params, lora, _ = random_model(config, LORA, 0)
  stack = {part: params['stacks'][0][part] for part in ('self_attn', 'mlp')}
  if name == 'gradient':
    signal = randomise(stack, 7)
  else:
    signal = {
      part: {
        projection: input_sizes(leaf['weight'], projection)
        for projection, leaf in projections.items()
      }
      for part, projections in stack.items()
    }
  if name == 'gradient':
    more = {'base_grads': (signal,)}
    found = one_step(config, name, 0, more, norm=False)[0]
  else:
    found = scored(config, name, 0, signal)[0]
  for layer in range(2):
    block, adapters, here = (
      layer_of(x, layer) for x in (params['stacks'][0], lora[0], signal)
    )
    scores = expected_scores(name, block, adapters, here)
    for group, ours in found.items():
      expected = reference.group_scores(
        scores,
        np.ones(ours[layer].size),
        reference.members(group, **SIZES),
        norm=False,
      )
      np.testing.assert_allclose(np.ravel(ours[layer]), expected, rtol=2e-5)


def test_magnitude_is_the_sum_of_the_weights_that_would_go():
  config = model(SHAPE, SHAPE)
  importance = scored(config, 'magnitude', 0)[0]
  params, lora, _ = random_model(config, LORA, 0)
  for layer in range(2):
    block, adapters = (
      layer_of(x, layer) for x in (params['stacks'][0], lora[0])
    )
    scores = {}
    for part in ('self_attn', 'mlp'):
      for name, adapter in adapters[part].items():
        update = matrix(adapter['a'], -1) @ matrix(adapter['b'], 1)
        weight = matrix(block[part][name]['weight'], PARTS[name])
        scores[name] = np.abs(weight + 1.5 * update)
    for group, found in importance.items():
      expected = reference.group_scores(
        scores,
        np.ones(found[layer].size),
        reference.members(group, **SIZES),
        norm=False,
      )
      np.testing.assert_allclose(found[layer], expected, rtol=2e-5)


def test_random_scores_depend_on_nothing_but_the_layer():
  here = scored(model(SHAPE, SHAPE, SHAPE), 'random', 0)[0]
  there = scored(model(WIDE, SHAPE, SHAPE), 'random', 7)[1]
  for group in ('kv_heads', 'mlp'):
    np.testing.assert_array_equal(here[group][1:], there[group])


def test_random_scores_differ_by_layer_and_have_no_ties():
  layers = 4
  big = LayerShape(num_kv_heads=8, queries_per_kv=1, mlp_dim=64)
  for group, scores in scored(model(*[big] * layers), 'random', 0)[0].items():
    assert [len(set(row)) for row in np.asarray(scores)] == (
      [8 if group == 'kv_heads' else 64] * layers
    )
    orders = {tuple(np.argsort(row)) for row in np.asarray(scores)}
    assert len(orders) == layers


@pytest.mark.parametrize(
  'bad', ['a nan in one gradient', 'a norm that is not finite', 'overflow']
)
def test_what_is_not_finite_keeps_the_old_average(bad):
  config = model(SHAPE, SHAPE)
  step = make_step(config, Criterion('lora', score='square'))
  masks = stack_masks(config, ('kv_heads', 'mlp'))
  old = randomise(masks, 3)
  params, lora, grads = random_model(config, LORA, 0)
  norm = 1.0
  if bad == 'a nan in one gradient':
    grads[0]['mlp']['up_proj']['b'][1, 0, 2] = np.nan
  elif bad == 'overflow':
    grads[0]['self_attn']['o_proj']['a'][0, 1] = 1e30
  else:
    norm = np.inf
  kept, ok = step(old, params, lora, grads, {}, masks, norm)
  assert not ok
  jax.tree.map(np.testing.assert_array_equal, kept, old)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'name': 'taylor'}, "prune.criterion is 'taylor'.*lora, gradient"),
    ({'score': 'cube'}, "prune.score is 'cube'.*abs, square"),
    ({'lora_gradient': 'half'}, "prune.lora_gradient is 'half'.*own, full"),
    (
      {'lora_gradient': 'first_order'},
      'lora_gradient=first_order was removed: use prune.lora_gradient=full',
    ),
    ({'decay': 1.0}, 'prune.decay is 1.0'),
    ({'decay': -0.1}, 'prune.decay is -0.1'),
  ],
)
def test_what_is_not_a_criterion_is_refused(options, message):
  with pytest.raises(UserError, match=message):
    Criterion(**{'name': 'lora'} | options)
