"""Whole layers as a group: counts, averages, and what is left of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.layout import check_padded, resolve_layout
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.families import EXPORTED
from lorapr_jax.models.rope import Linear, Rope
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, with_kept
from lorapr_jax.pruning.importance import SUM, Criterion, update_importance
from lorapr_jax.pruning.masks import alive_counts
from lorapr_jax.pruning.milestones import Milestones
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.schedule import PruneSchedule
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.settings.checks import outcomes
from tests.kinds import KINDS

SMOLLM2 = ModelConfig(
  vocab_size=49152,
  embed_dim=576,
  head_dim=64,
  layers=(LayerShape(3, 3, 1536),) * 30,
  tie_embeddings=True,
)
ALONE = {'heads': 'none', 'channels': False}


@pytest.mark.parametrize(
  'target, gone', [(0.03, 1), (0.25, 6), (0.5, 13), (0.98, 25)]
)
def test_a_share_of_the_layers_that_are_not_protected_goes(target, gone):
  plan = plan_pruning(SMOLLM2, Targets(layers_target=target, **ALONE))
  assert list(plan.keep) == [LAYERS] and not plan.within_layers
  kept = plan.keep[LAYERS]
  assert kept.count(0) == gone == len(plan.going)
  assert all(kept[i] for i in (0, 1, 2, 29))
  assert plan.pruned_config.layers == SMOLLM2.layers[gone:]
  parameters = gone * SMOLLM2.layer_parameters(SMOLLM2.layers[0])
  share = parameters / SMOLLM2.num_parameters
  assert plan.sparsity(plan.keep) == {
    'heads': 0.0,
    'channels': 0.0,
    'layers': pytest.approx(gone / 26),
    'params': pytest.approx(share),
  }
  assert plan.targets_by_kind()['layers'] == target


def test_heads_and_channels_are_of_the_layers_that_stay():
  targets = Targets(layers_target=0.5, heads='none')
  plan = plan_pruning(SMOLLM2, targets)
  assert plan.sparsity(plan.keep)['channels'] == 0.5
  assert plan.kept_by_depth == {CHANNELS: [(768, 13)]}
  sizes = [layer.mlp_dim for layer in plan.pruned_config.layers]
  assert sizes == [1536] * 3 + [768] * 13 + [1536]
  assert plan.targets_by_kind() == {
    'heads': 0.0,
    'channels': 0.5,
    'layers': 0.5,
    'params': None,
  }


def test_layers_are_a_part_of_a_share_of_the_parameters():
  for layers_target in (0.0, 0.2, 0.3):
    targets = Targets(
      target=0.34, unit='params', layers_target=layers_target, heads='none'
    )
    plan = plan_pruning(SMOLLM2, targets)
    found = plan.sparsity(plan.keep)['params']
    assert found == pytest.approx(0.34, abs=2e-4)
    assert plan.targets_by_kind()['params'] == 0.34


def test_layers_go_along_the_ramp_as_other_groups_do():
  targets = Targets(layers_target=0.2, heads='none')
  plan = plan_pruning(SMOLLM2, targets)
  schedule = PruneSchedule(100, 5, 0.1, 0.1)
  steps = [s for s in range(100) if schedule.is_pruning_step(s)]
  counts = []
  for step in steps:
    progress = schedule.progress(step)
    keep = plan.keep_at(progress)
    gone = keep[LAYERS].count(0)
    counts.append(gone)
    # The k-th of five goes at k / 5.5.
    assert gone == min(5, int(progress * 5.5))
    # Those that stand for what is gone stay gone.
    assert set(plan.layers_in(30 - gone)) == set(np.flatnonzero(keep[LAYERS]))
    assert plan.layers_in(30 - gone)[-1] == 29
  assert counts[-1] == 5 and plan.keep_at(1.0) == plan.keep
  milestones = Milestones(plan, schedule)
  went = [
    s for s, a, b in zip(steps, [0, *counts], counts, strict=False) if a != b
  ]
  assert list(milestones.layer_maskings) == went
  assert set(went) <= set(milestones.maskings)


def test_counts_of_arrays_without_some_layers():
  plan = plan_pruning(SMOLLM2, Targets(layers_target=0.2, heads='none'))
  counts = plan.counts_in(plan.keep_at(0.6), 28)
  assert counts[LAYERS].count(0) == 1 and len(counts[CHANNELS]) == 28
  assert counts[CHANNELS][0] == counts[CHANNELS][-1] == 1536
  assert plan.protected_in(28) == [True] * 3 + [False] * 24 + [True]
  # Two layers are in no array, of those there one is masked.
  masks = (
    {LAYERS: np.r_[np.ones(4), 0, np.ones(23)], CHANNELS: np.ones((28, 1536))},
  )
  alive = alive_counts(masks)
  assert alive[LAYERS] == (1,) * 4 + (0,) + (1,) * 23
  assert plan.sparsity(alive)['layers'] == pytest.approx(3 / 26)
  assert plan.sparsity(alive)['channels'] == 0.0
  layer = SMOLLM2.layer_parameters(SMOLLM2.layers[0])
  assert plan.sparsity(alive)['params'] == pytest.approx(
    3 * layer / SMOLLM2.num_parameters
  )


@pytest.mark.parametrize(
  'options, words',
  [
    ({'layers_target': 0.99}, 'would leave none of the 26 layers'),
    ({'layers_target': 0.01}, 'rounds to nothing pruned'),
    ({'layers_target': 1.0}, r'must be in \[0, 1\)'),
    ({'layers_target': -0.1}, r'must be in \[0, 1\)'),
    (
      {'layers_target': 0.5, 'layer_profile': '1,2'},
      'prune.layer_profile=1,2 does not go with whole layers',
    ),
    (
      {'layers_target': 0.5, 'unit': 'params', **ALONE},
      'use prune.unit=groups',
    ),
    (
      {'layers_target': 0.5, 'unit': 'params', 'target': 0.2},
      'prune.layers_target alone takes 0.3421 of the parameters',
    ),
    ({**ALONE}, 'there is nothing to prune'),
  ],
)
def test_what_cannot_be_is_refused(options, words):
  with pytest.raises(UserError, match=words) as error:
    plan_pruning(SMOLLM2, Targets(**options))
  assert '\n' not in str(error.value)


def test_the_nearest_that_is_named_works():
  with pytest.raises(UserError, match='works is 0.961538'):
    plan_pruning(SMOLLM2, Targets(layers_target=0.99, **ALONE))
  plan = plan_pruning(SMOLLM2, Targets(layers_target=0.961538, **ALONE))
  assert len(plan.going) == 25
  single = dataclasses.replace(SMOLLM2, layers=SMOLLM2.layers[:2])
  with pytest.raises(UserError, match='use prune.layers_target=0'):
    plan_pruning(single, Targets(layers_target=0.5, **ALONE))


def test_sum_goes_with_scores_that_are_averaged():
  assert Criterion('lora', layers=SUM).averaged
  with pytest.raises(UserError, match='magnitude does not: use loss or cosine'):
    Criterion('magnitude', layers=SUM)
  with pytest.raises(UserError, match='prune.layers_criterion'):
    Criterion('lora', layers='depth')


def _average(layers, criterion):
  """Of one layer of two KV heads of two queries, and three channels."""
  config = dataclasses.replace(
    SMOLLM2, embed_dim=2, head_dim=2, layers=(LayerShape(2, 2, 3),)
  )
  axes = block_axes(config, LoraConfig(1, 1.0, 0.0))['params']
  sizes, rng = config.sizes(config.layers[0]), np.random.default_rng(0)
  scored = {
    'self_attn': ('q_proj', 'o_proj'),
    'mlp': ('up_proj', 'down_proj'),
  }

  def draw(part, name):
    shape = [sizes[axis] for axis in axes[part][name]['weight']]
    return {'weight': rng.random(shape, np.float32)}

  scores = {
    part: {name: draw(part, name) for name in names}
    for part, names in scored.items()
  }
  masks = {
    KV_HEADS: jnp.array([0.0, 1.0]),
    CHANNELS: jnp.array([1.0, 0.0, 1.0]),
    LAYERS: jnp.float32(layers),
  }
  old = {KV_HEADS: jnp.full(2, 3.0), CHANNELS: jnp.full(3, 4.0), LAYERS: 5.0}
  new = update_importance(old, scores, masks, axes, criterion)
  return old, new, jax.tree.map(np.asarray, scores)


@pytest.mark.parametrize('norm', [False, True])
def test_a_layers_sum_is_of_all_that_is_alive_in_it(norm):
  criterion = Criterion('lora', layers=SUM, norm=norm, decay=0.9)
  _, new, scores = _average(1.0, criterion)
  q, o = (scores['self_attn'][n]['weight'] for n in ('q_proj', 'o_proj'))
  up, down = (scores['mlp'][n]['weight'] for n in ('up_proj', 'down_proj'))
  # Axes: D K G H, K G H D, D F, F D.
  total = q[:, 1].sum() + o[1].sum() + up[:, ::2].sum() + down[::2].sum()
  assert float(new[LAYERS]) == pytest.approx(0.9 * 5 + 0.1 * total, rel=1e-6)


def test_a_layer_that_is_gone_keeps_its_averages():
  old, new, _ = _average(0.0, Criterion('lora', layers=SUM))
  jax.tree.map(np.testing.assert_array_equal, new, old)
  old, new, _ = _average(1.0, Criterion('lora'))
  assert new[LAYERS] == old[LAYERS]
  assert float(new[CHANNELS][0]) != 4.0 == float(new[CHANNELS][1])


def test_layers_take_their_windows_and_rotations_along():
  full, local = Rope(1e5, Linear(8.0)), Rope(100.0)
  config = dataclasses.replace(
    SMOLLM2,
    layers=SMOLLM2.layers[:4],
    windows=(8, 8, None, 8),
    ropes=(full, local),
    rope_of_layer=(1, 1, 0, 1),
  )
  left = with_kept(config, {LAYERS: (1, 0, 1, 1)})
  assert left.windows == (8, None, 8) and left.rope_of_layer == (1, 0, 1)
  left = with_kept(config, {LAYERS: (0, 0, 1, 0)})
  assert (left.windows, left.ropes, left.rope_of_layer) == ((), (full,), ())
  left = with_kept(config, {LAYERS: (1, 0, 0, 1)})
  # The first is how layers without a window turn, though there is none.
  assert left.ropes == (full, local) and left.rope_of_layer == (1, 1)


def test_layers_that_are_alike_leave_one_outcome():
  plan = plan_pruning(SMOLLM2, Targets(layers_target=0.5, **ALONE))
  assert outcomes(plan) == [plan.pruned_config]


def test_outcomes_are_those_that_a_file_may_not_hold():
  keys = KINDS['exaone4'].keys | {'num_hidden_layers': 6}
  types = ['sliding_attention', 'full_attention'] * 3
  config = config_from_hf(keys | {'layer_types': types})
  plan = plan_pruning(
    config, Targets(layers_target=0.5, protect='none', **ALONE)
  )
  windows = [x.windows for x in outcomes(plan)]
  assert windows[:2] == [(None, 8, None), (8, None, 8)]
  # All that have a window, or none.
  assert set(windows[2:]) == {(), (8, 8, 8)}
  held = [
    any(family.holds(x) for family in EXPORTED.values()) for x in outcomes(plan)
  ]
  # Without a window all layers of an EXAONE 4 turn.
  assert held == [True, True, False, True]
  with pytest.raises(UserError, match='which turn, once so many are gone'):
    resolve_layout(outcomes(plan)[2], 'auto')


@pytest.mark.parametrize('group', [KV_HEADS, LAYERS])
def test_zeros_in_place_of_layers_are_in_no_norm(group):
  """As zeros in place of heads are, where a norm is over all heads."""
  config = config_from_hf(KINDS['olmo2'].keys)
  left = with_kept(config, {group: (1, 0, 1) if group == LAYERS else (1,) * 3})
  if group == LAYERS:
    check_padded(config, left)
    return
  with pytest.raises(UserError, match='padded cannot hold'):
    check_padded(config, left)
