"""When masked groups are cut out on the way, and what is left then."""

import itertools

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.cost import forward_flops_per_token
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS
from lorapr_jax.pruning.milestones import (
  AUTO,
  CUT_STEPS,
  END,
  Milestones,
  parse_shrink,
)
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.schedule import AtOnce, PruneSchedule
from lorapr_jax.pruning.targets import Targets

CONFIG = ModelConfig(
  vocab_size=11,
  embed_dim=8,
  head_dim=4,
  layers=(LayerShape(4, 1, 16),) * 4,
)
SCHEDULE = PruneSchedule(40, every=4, warmup=0.1, cooldown=0.1)


def milestones(schedule=SCHEDULE, **targets):
  return Milestones(plan_pruning(CONFIG, Targets(**targets)), schedule)


def test_what_the_key_may_be():
  assert parse_shrink('end') == 'end' and parse_shrink('auto') == 'auto'
  assert parse_shrink('0.5') == (0.5,)
  assert parse_shrink('0.5, 0.8,1') == (0.5, 0.8, 1.0)


@pytest.mark.parametrize(
  'text', ['', 'never', '0.5,', '0.8,0.5', '0.5,0.5', '0', '1.1', '-0.5', 'nan']
)
def test_what_it_may_not_be(text):
  with pytest.raises(UserError, match=r'prune\.shrink is .*0\.5,0\.8'):
    parse_shrink(text)


def test_a_share_of_the_ramp_is_the_next_step_after_a_masking():
  found = milestones()
  # The ramp is steps 4 to 36, groups are masked every fourth step, and what is
  # masked at step t can be cut before step t + 1.
  assert found.at((1.0,)) == (37,)
  assert found.at((0.5,)) == (21,)
  assert found.at((0.51,)) == (25,)
  assert found.at((0.2, 0.21, 0.22)) == (13,)
  # After step 25 nothing more is masked.
  assert found.candidates() == [9, 13, 17, 21, 25]
  assert found.at((0.6, 0.9, 1.0)) == (25,)
  assert found.at((0.5, 0.9, 1.0)) == (21, 37)


def test_a_masking_is_a_step_at_which_something_goes():
  # At step 4 the ramp begins, and from 28 on all is gone that will go.
  found = milestones()
  assert found.maskings == tuple(x - 1 for x in found.candidates())
  once = milestones(AtOnce(3, (2,)))
  assert once.maskings == (2,)


def test_arrays_hold_what_is_alive_then():
  found = milestones()
  for step in found.candidates():
    alive = found.plan.keep_at(SCHEDULE.progress(step - 1))
    assert found.present(step) == alive
  # Between maskings nothing goes, though the ramp goes on.
  assert found.present(14) == found.present(15) == found.present(13)
  assert found.present(16) != found.present(17)
  # The last layer is protected.
  assert found.present(37) == {
    KV_HEADS: (2, 2, 2, 4),
    CHANNELS: (8, 8, 8, 16),
  }


def test_masked_groups_fill_up_what_must_be_a_multiple():
  found = milestones(heads_multiple_of=2, channels_multiple_of=8)
  for step in found.candidates():
    alive = found.plan.keep_at(SCHEDULE.progress(step - 1))
    for group, many in ((KV_HEADS, 2), (CHANNELS, 8)):
      for there, count in zip(
        found.present(step)[group], alive[group], strict=True
      ):
        assert there % many == 0 and 0 <= there - count < many
  # 16 channels become 8 at once, when the last of the eight has gone.
  sizes = {found.present(step)[CHANNELS][0] for step in found.candidates()}
  assert sizes <= {8, 16}
  assert len(found.candidates()) == 2


def test_a_state_has_the_size_of_the_last_cut_before_it():
  found = milestones()
  cuts = found.at((0.5, 1.0))
  assert cuts == (21, 37)
  steps = (0, 21, 22, 37, 38)
  shapes = [found.size_at(step, cuts).layers[0] for step in steps]
  full, half, end = (
    LayerShape(4, 1, 16),
    LayerShape(
      found.present(21)[KV_HEADS][0], 1, found.present(21)[CHANNELS][0]
    ),
    LayerShape(2, 1, 8),
  )
  assert half not in (full, end)
  assert shapes == [full, full, half, half, end]


def duration(found, cuts, cut_steps):
  """What all steps take with these cuts, in steps at full size."""
  full = forward_flops_per_token(found.plan.config, 32)
  steps = range(found.schedule.total_steps)
  flops = (
    forward_flops_per_token(found.size_at(step + 1, cuts), 32) for step in steps
  )
  return sum(flops) / full + cut_steps * len(cuts)


@pytest.mark.parametrize('cut_steps', [0.0, 0.3, 1.0, 3.0, 100.0])
def test_the_fastest_cuts_are_those_of_all_subsets(cut_steps):
  found = milestones()
  best = found.fastest(32, cut_steps)
  candidates = found.candidates()
  subsets = itertools.chain.from_iterable(
    itertools.combinations(candidates, n) for n in range(len(candidates) + 1)
  )
  least = min(duration(found, s, cut_steps) for s in subsets)
  assert set(best) <= set(candidates)
  assert duration(found, best, cut_steps) == pytest.approx(least)
  if cut_steps == 0.0:
    assert best == tuple(candidates)
  if cut_steps == 100.0:
    assert best == ()


def test_the_key_says_which_cuts():
  found = milestones(PruneSchedule(400, every=4, warmup=0.1, cooldown=0.1))
  assert found.cuts(END, 32) == ()
  assert found.cuts((0.5,), 32) == found.at((0.5,))
  auto = found.cuts(AUTO, 32)
  assert auto == found.fastest(32, CUT_STEPS) and auto
  # A long run can pay for more of them.
  assert milestones().cuts(AUTO, 32) == ()
