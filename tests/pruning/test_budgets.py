"""Global budgets: the same total, from where standardised scores are lowest."""

import numpy as np
import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.models.config import LayerShape, LlamaConfig
from lorapr_jax.pruning.budgets import decide, standardised
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.targets import Targets, plan_pruning

LAYERS = 12


def config_of(shape):
  return LlamaConfig(
    vocab_size=64, embed_dim=32, head_dim=4, layers=(shape,) * LAYERS
  )


CONFIG = config_of(LayerShape(8, 3, 96))


def of_layers(count):
  return LlamaConfig(
    vocab_size=8,
    embed_dim=4,
    head_dim=2,
    layers=(LayerShape(2, 1, 4),) * count,
  )


def planned(config=CONFIG, **targets):
  return plan_pruning(config, Targets(scope='global', **targets))


def scores(plan, rng, spread=1.0):
  """Of every layer, whose distributions differ; in two stacks."""
  shape = plan.config.layers[0]
  sizes = {
    KV_HEADS: (shape.num_kv_heads,),
    QUERIES: (shape.num_kv_heads, shape.queries_per_kv),
    CHANNELS: (shape.mlp_dim,),
  }

  def stack(layers):
    return {
      group: np.stack(
        [
          rng.gamma(rng.uniform(0.2, 0.2 + 4 * spread), size=sizes[group])
          for _ in range(layers)
        ]
      )
      for group in plan.keep
    }

  return stack(5), stack(LAYERS - 5)


@pytest.mark.parametrize(
  'targets',
  [
    {},
    {'target': 0.2},
    {'heads': 'queries'},
    {'heads': 'none', 'channels_multiple_of': 8},
    {'channels': False},
    {'channels': False, 'heads': 'queries', 'target': 0.3},
    {'protect': 'none', 'tensor_parallel': 2, 'channels_multiple_of': 6},
    {'heads_target': 0.5, 'channels_target': 0.25},
    {'unit': 'params', 'target': 0.4},
    {'blocks': 4},
    {'blocks': 2, 'heads': 'queries'},
    {'blocks': 100},
  ],
)
def test_the_total_is_kept_and_every_count_can_be(targets):
  plan, rng = planned(**targets), np.random.default_rng(0)
  assert not plan.decided
  changed = 0
  for spread in (0.0, 0.3, 1.0, 3.0):
    found = decide(plan, scores(plan, rng, spread))
    assert found.decided and found.keep.keys() == plan.keep.keys()
    total = found.pruned_config.num_parameters
    asked = plan.pruned_config.num_parameters
    # A channel has 96 parameters, a query head 768 under all 8 KV heads.
    finest = 96 * max(
      targets.get('channels_multiple_of', 1), targets.get('tensor_parallel', 1)
    )
    if not targets.get('channels', True):
      assert total == asked
    assert abs(total - asked) <= finest / 2
    for group, counts in found.keep.items():
      multiple = {CHANNELS: finest // 96}.get(
        group, targets.get('tensor_parallel', 1)
      )
      whole = plan.keep[group][-1] if targets.get('protect') != 'none' else None
      for layer, count in enumerate(counts):
        if layer in plan.prunable_layers:
          assert count >= 1 and count % multiple == 0
        else:
          assert count == whole
    changed += found.keep != plan.keep
    blocks = min(targets.get('blocks', 8), len(plan.prunable_layers))
    runs = sum(map(len, found.kept_by_depth.values()))
    # One block at most is divided for the total.
    assert runs <= len(plan.keep) * blocks + 1
  assert changed


def test_by_hand():
  # Standardised: three at -0.58 and one at 1.73; -1.34, -0.45, 0.45, 1.34.
  config = of_layers(2)
  plan = planned(config, heads='none', protect='none')
  rows = np.array([[0.0, 10.0, 0.0, 0.0], [2.0, 1.0, 4.0, 3.0]])
  assert decide(plan, ({CHANNELS: rows},)).keep == {CHANNELS: (1, 3)}
  # What all scores of a layer share says nothing.
  rows[0] = 1000 + 7 * rows[0]
  assert decide(plan, ({CHANNELS: rows},)).keep == {CHANNELS: (1, 3)}
  # A layer keeps one, however low its scores are: here -0.58 against -1.34.
  plan = planned(config, heads='none', protect='none', target=0.75)
  assert decide(plan, ({CHANNELS: rows},)).keep == {CHANNELS: (1, 1)}


def test_a_block_is_one_layer_of_mean_scores():
  config = of_layers(4)
  rows = np.array([[0.0, 10, 0, 0], [0, 0, 0, 10], [2, 1, 4, 3], [1, 2, 3, 4]])
  plan = planned(config, heads='none', protect='none', blocks=2)
  assert decide(plan, ({CHANNELS: rows},)).keep == {CHANNELS: (1, 1, 3, 3)}
  plan = planned(config, heads='none', protect='none', blocks=2, target=0.25)
  rows[2:] = [[2, 2, 2, 2], [2, 2, 2, 2]]
  assert decide(plan, ({CHANNELS: rows},)).keep == {CHANNELS: (2, 2, 4, 4)}
  plan = planned(config, heads='none', protect='none', blocks=1, target=0.25)
  assert decide(plan, ({CHANNELS: rows},)).keep == {CHANNELS: (3, 3, 3, 3)}


def test_the_block_whose_turn_it_is_is_divided_for_the_total():
  # Of five channels in all two go from each of two layers, at -1; the three
  # layers at 0 are next, and one of them loses the fifth.
  config = of_layers(5)
  plan = planned(config, heads='none', protect='none', blocks=2, target=0.25)
  rows = np.array([[0.0, 0, 1, 1]] * 2 + [[1.0, 1, 1, 1]] * 3)
  assert decide(plan, ({CHANNELS: rows},)).keep == {CHANNELS: (2, 2, 3, 4, 4)}


def test_heads_and_channels_share_one_budget():
  # Six heads of each layer stand below the channels, which are all alike.
  plan = planned(target=0.25, blocks=LAYERS)
  heads = np.tile([9.0, 9.0, 0, 0, 0, 0, 0, 0], (LAYERS, 1))
  found = decide(plan, ({KV_HEADS: heads, CHANNELS: np.ones((LAYERS, 96))},))
  # 2 heads of 1,024 parameters and 24 channels of 96 in each of ten layers are
  # 42.5 heads: the half is made up of 5.3 channels.
  sizes = {KV_HEADS: 8, CHANNELS: 96}
  gone = {g: sum(sizes[g] - n for n in found.keep[g]) for g in sizes}
  assert gone == {KV_HEADS: 42, CHANNELS: 5}


@pytest.mark.parametrize('heads', ['kv_groups', 'queries'])
def test_scores_that_say_nothing_take_from_all_alike(heads):
  plan = planned(heads=heads)
  nothing = {
    group: np.zeros((LAYERS, *((8, 3) if group == QUERIES else (size,))))
    for group, size in ((g, 8 if g == KV_HEADS else 96) for g in plan.keep)
  }
  for group, counts in decide(plan, (nothing,)).keep.items():
    for i in plan.prunable_layers:
      assert abs(counts[i] - plan.keep[group][i]) <= 1, group


def test_of_query_heads_it_does_not_matter_which_stand_together():
  config = config_of(LayerShape(4, 6, 96))
  plan, rng = planned(config, heads='queries'), np.random.default_rng(0)
  first = scores(plan, rng, 3.0)
  mixed = tuple(
    {**stack, QUERIES: rng.permuted(stack[QUERIES], axis=-1)} for stack in first
  )
  found = decide(plan, first).keep
  assert found != plan.keep
  assert decide(plan, mixed).keep == found


def test_ties_and_multiples_that_divide_no_size_keep_the_order():
  config, rng = config_of(LayerShape(7, 1, 28)), np.random.default_rng(0)
  plan = planned(config, channels_multiple_of=6, heads_multiple_of=2)
  for _ in range(40):
    tied = {
      KV_HEADS: rng.random((LAYERS, 7)) * (rng.random((LAYERS, 7)) > 0.8),
      CHANNELS: rng.random((LAYERS, 28)) * (rng.random((LAYERS, 28)) > 0.8),
    }
    found = decide(plan, (tied,))
    assert {found.keep[CHANNELS][i] for i in plan.prunable_layers} <= {
      *(6, 12, 18, 24, 28)
    }
    total = found.pruned_config.num_parameters
    # Two heads of 512 parameters go together, or six channels of 96, but the
    # first time, when it is one head or four channels.
    assert abs(total - plan.pruned_config.num_parameters) <= 6 * 96 / 2


def test_where_channels_run_out_heads_come_nearest():
  plan = planned(target=0.9)
  for seed in range(20):
    found = decide(plan, scores(plan, np.random.default_rng(seed)))
    total = found.pruned_config.num_parameters
    assert abs(total - plan.pruned_config.num_parameters) <= 1024 / 2


def test_standardised_has_mean_0_and_deviation_1():
  found = standardised(np.random.default_rng(0).gamma(0.3, size=(4, 7)))
  assert found.mean() == pytest.approx(0) and found.std() == pytest.approx(1)
  assert not standardised(np.full(5, 3.0)).any()


def test_a_profile_and_scores_do_not_both_decide():
  with pytest.raises(UserError, match='set one of them'):
    Targets(scope='global', layer_profile='1,2')
  Targets(scope='global', layer_profile='2,2')


def test_of_what_is_asked_the_share_of_parameters_stays():
  plan = planned(protect='none')
  known = decide(plan, scores(plan, np.random.default_rng(0)))
  assert known.targets_by_kind() == {
    'heads': None,
    'channels': None,
    'params': plan.sparsity(plan.keep)['params'],
  }
