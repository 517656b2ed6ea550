"""The sizes of a ladder: exact, nested, and known before the first step."""

import pytest

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES, with_kept
from lorapr_jax.pruning.ladder import (
  at_once,
  on_the_ramp,
  parse_ladder,
  parse_rung_steps,
  plan_ladder,
)
from lorapr_jax.pruning.milestones import Milestones
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.schedule import AtOnce, PruneSchedule
from lorapr_jax.pruning.targets import Targets

CONFIG = ModelConfig(
  vocab_size=64,
  embed_dim=16,
  head_dim=8,
  layers=(LayerShape(4, 2, 96),) * 5,
)
DENSE = CONFIG.num_parameters
# Those of one channel in each layer that is not protected.
CHANNEL = 4 * 3 * 16
WAYS = {
  'groups': {},
  'query heads': {'heads': 'queries', 'heads_target': 0.4},
  'channels alone': {'heads': 'none'},
  'parameters': {'unit': 'params', 'target': 0.4},
  'bytes': {'fit': '50KB', 'fit_context': 16},
  'a profile': {'layer_profile': '0.5,1.5', 'protect': 'none'},
  'layers too': {'layers_target': 0.5, 'target': 0.25},
}


def ladder(shares, **targets):
  plan = plan_pruning(CONFIG, Targets(**targets))
  return plan, plan_ladder(plan, shares)


def size(keep):
  return with_kept(CONFIG, keep).num_parameters


@pytest.mark.parametrize('way', WAYS)
def test_sizes_are_at_most_their_shares_and_nested(way):
  least = plan_pruning(CONFIG, Targets(**WAYS[way])).pruned_config
  last = least.num_parameters / DENSE
  shares = [last + (1 - last) * part for part in (0.8, 0.6, 0.4, 0.2)]
  plan, rungs = ladder(shares, **WAYS[way])
  sizes = [DENSE, *(size(rung.keep) for rung in rungs), size(plan.keep)]
  assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 6
  for rung, share in zip(rungs, shares, strict=True):
    assert size(rung.keep) <= share * DENSE and rung.share == share
    # One channel more in each layer is too much, but where the size above has
    # as few of them already.
    if way in ('groups', 'channels alone', 'parameters', 'bytes'):
      assert size(rung.keep) + CHANNEL > share * DENSE
  for larger, smaller in zip(rungs, [*rungs[1:], plan], strict=True):
    assert larger.keep.keys() == smaller.keep.keys() == plan.keep.keys()
    for group, kept in smaller.keep.items():
      assert all(map(int.__ge__, larger.keep[group], kept)), group


def test_the_finest_group_makes_up_what_a_coarse_step_is_off_by():
  # Half of the heads are two; the first goes at two fifths of the way.
  plan, rungs = ladder([0.9, 0.83, 0.7])
  assert [rung.keep[KV_HEADS][0] for rung in rungs] == [4, 3, 2]
  # Of the second, 76 would do, but the first has 74 already.
  assert [rung.keep[CHANNELS][0] for rung in rungs] == [74, 74, 64]


def test_counts_are_multiples_as_at_the_end():
  multiples = {'channels_multiple_of': 8, 'heads_multiple_of': 2}
  plan, rungs = ladder([0.9, 0.8, 0.7], **multiples, target=0.75)
  for rung in rungs:
    assert all(n % 8 == 0 for n in rung.keep[CHANNELS])
    assert all(n % 2 == 0 for n in rung.keep[KV_HEADS])
  # Query heads count under each KV head.
  _, (rung,) = ladder([0.9], heads='queries', channels_multiple_of=16)
  assert {n % 16 for n in rung.keep[CHANNELS]} == {0} and QUERIES in rung.keep


def test_what_a_rung_asks_for_is_its_share():
  _, (rung,) = ladder([0.8], layers_target=0.25)
  assert rung.targets_by_kind() == {
    **{'heads': None, 'channels': None, 'params': 0.2},
    LAYERS: None,
  }
  assert rung.sparsity(rung.keep)['params'] >= 0.2


@pytest.mark.parametrize(
  'shares, targets, message',
  [
    ([0.9, 0.5], {}, '0.5 is not above the 0.6219'),
    ([0.9], {'target': 0.0}, '0.9 is not above the 1.0000'),
    ([0.99, 0.985], {'channels_multiple_of': 32}, 'of the size above it'),
    (
      [0.9],
      {'channels': False, 'heads_multiple_of': 2},
      'of the size of the target below it',
    ),
  ],
)
def test_what_is_no_size_of_its_own_is_refused(shares, targets, message):
  with pytest.raises(UserError, match=message):
    ladder(shares, **targets)


@pytest.mark.parametrize(
  'text', ['0.8,0.9', '0.9,0.9', '1', '0.9,0', '-0.5', 'half', '0.9,', 'nan']
)
def test_what_the_key_may_not_be(text):
  with pytest.raises(UserError, match=r'export\.ladder is .*such as 0\.9,0\.8'):
    parse_ladder(text)
  assert parse_ladder('') == () and parse_ladder('0.9, 0.85') == (0.9, 0.85)


SCHEDULE = PruneSchedule(100, every=4, warmup=0.1, cooldown=0.1)


def test_the_ramp_meets_every_rung_exactly_and_goes_on():
  plan, sizes = ladder([0.9, 0.8, 0.7])
  rungs = on_the_ramp(plan, sizes, SCHEDULE)
  found, plain = Milestones(plan, SCHEDULE, rungs), Milestones(plan, SCHEDULE)
  events = [s for s in range(100) if SCHEDULE.is_pruning_step(s)]
  for rung in rungs:
    assert found.alive(rung.event) == rung.plan.keep
    assert rung.end == rung.event + 1
    before = max(s for s in events if s < rung.event)
    most = rung.plan.share * DENSE
    assert size(plain.alive(before)) > most >= size(plain.alive(rung.event))
  alive = [found.alive(step) for step in (-1, *events)]
  for first, then in zip(alive, alive[1:], strict=False):
    for group, kept in then.items():
      assert all(map(int.__ge__, first[group], kept))
  assert size(alive[0]) == DENSE and alive[-1] == plan.keep
  # Far from the rungs it is the ramp that it was.
  far = events[events.index(rungs[-1].event) + 2]
  assert found.alive(far) == plain.alive(far)


def test_two_rungs_never_share_an_event():
  plan, sizes = ladder([0.9, 0.895, 0.89])
  rungs = on_the_ramp(plan, sizes, SCHEDULE)
  assert [
    b.event - a.event for a, b in zip(rungs, rungs[1:], strict=False)
  ] == [
    4,
    4,
  ]
  found = Milestones(plan, SCHEDULE, rungs)
  assert [found.alive(r.event) for r in rungs] == [r.keep for r in sizes]
  with pytest.raises(UserError, match=r'0\.89 has no step .* before step 90'):
    on_the_ramp(plan, sizes, PruneSchedule(100, 30, 0.1, 0.1))


def test_at_once_each_rung_has_its_own_steps():
  plan, sizes = ladder([0.9, 0.8])
  rungs = at_once(sizes, (5, 7))
  assert [(rung.event, rung.end) for rung in rungs] == [(-1, 5), (5, 12)]
  found = Milestones(plan, AtOnce(20, (5, 12)), rungs)
  expected = {-1: sizes[0], 4: sizes[0], 5: sizes[1], 11: sizes[1], 12: plan}
  for step, kept in expected.items():
    assert found.alive(step) == kept.keep
  assert found.maskings == (5, 12)
  assert found.present(0) == sizes[0].keep
  assert found.size_at(13, (0, 6, 13)) == sizes[1].pruned_config
  assert found.size_at(14, (0, 6, 13)) == plan.pruned_config


def test_steps_that_are_not_given_are_shared_equally():
  assert parse_rung_steps('', 2, 50) == (16, 16)
  assert parse_rung_steps('10, 30', 2, 50) == (10, 30)


@pytest.mark.parametrize(
  'text, rungs, steps, message',
  [
    ('10', 2, 50, 'has 1 numbers for the 2 rungs'),
    ('10,0', 2, 50, "is '10,0': a number of steps for each rung"),
    ('10,x', 2, 50, 'such as 100,100'),
    ('20,30', 2, 50, 'take 50 .* so does the last size'),
    ('', 3, 3, 'take 0 .* so does the last size'),
  ],
)
def test_steps_that_cannot_be_are_refused(text, rungs, steps, message):
  with pytest.raises(UserError, match=message):
    parse_rung_steps(text, rungs, steps)
