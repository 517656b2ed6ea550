"""The cubic ramp and its steps; the target is reached, once, exactly."""

from fractions import Fraction
import math

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.pruning.schedule import PruneSchedule


@pytest.mark.parametrize(
  'step, expected',
  [
    (0, 0.0),
    (10, 0.0),
    (30, 0.578125),  # 1 - (3/4)^3
    (50, 0.875),  # 1 - (1/2)^3
    (70, 0.984375),  # 1 - (1/4)^3
    (90, 1.0),
    (99, 1.0),
  ],
)
def test_the_ramp_is_cubic(step, expected):
  schedule = PruneSchedule(100, every=10, warmup=0.1, cooldown=0.1)
  assert schedule.progress(step) == pytest.approx(expected, abs=1e-12)


def test_the_ramp_without_warmup_and_cooldown():
  # The run ends before the ramp does: its last step takes the rest.
  schedule = PruneSchedule(5, every=1, warmup=0.0, cooldown=0.0)
  values = [schedule.progress(t) for t in range(6)]
  assert values[:4] == [1 - (1 - t / 5) ** 3 for t in range(4)]
  assert values[4:] == [1.0, 1.0]


@pytest.mark.parametrize('every', [1, 3, 7, 10, 1000])
@pytest.mark.parametrize('cooldown', ['0', '0.1', '0.3', '0.85'])
@pytest.mark.parametrize('warmup', ['0', '0.1', '0.07'])
def test_the_first_step_after_the_ramp_prunes_and_is_the_last_to(
  warmup, cooldown, every
):
  for total in [*range(1, 41), 60, 100, 1000]:
    schedule = PruneSchedule(total, every, float(warmup), float(cooldown))
    pruning = [t for t in range(total) if schedule.is_pruning_step(t)]
    ramp_end = (1 - Fraction(cooldown)) * total
    # The run's last step stands in where no step is left.
    end = min(math.ceil(ramp_end), total - 1)
    assert pruning[-1] == end == schedule.ramp_end
    warm = Fraction(warmup) * total
    # At the very end of the warm-up nothing is due yet.
    assert [t for t in pruning[:-1] if t > warm] == [
      t for t in range(end) if t % every == 0 and t > warm
    ]
    assert all(t >= warm for t in pruning[:-1])

    progress = [schedule.progress(t) for t in range(total)]
    assert progress == sorted(progress)
    assert progress[0] >= 0.0
    assert all(value < 1.0 for value in progress[:end])
    assert set(progress[end:]) == {1.0}


def test_the_demos_pruning_steps():
  schedule = PruneSchedule(100, 5, 0.1, 0.1)
  pruning = [t for t in range(100) if schedule.is_pruning_step(t)]
  assert pruning == list(range(10, 91, 5))


def test_an_end_between_two_multiples_is_a_pruning_step_of_its_own():
  schedule = PruneSchedule(50, 10, 0.1, 0.1)
  pruning = [t for t in range(50) if schedule.is_pruning_step(t)]
  assert pruning == [10, 20, 30, 40, 45]


@pytest.mark.parametrize(
  'options, message',
  [
    ({'every': 0}, 'prune.every is 0'),
    ({'warmup': -0.1}, 'prune.warmup -0.1'),
    ({'cooldown': -0.1}, 'prune.cooldown -0.1'),
    ({'warmup': 0.5, 'cooldown': 0.5}, 'less than 1 together'),
    ({'warmup': 1.0}, 'less than 1 together'),
  ],
)
def test_an_impossible_schedule_is_refused(options, message):
  given = {'total_steps': 10, 'every': 2, 'warmup': 0.1, 'cooldown': 0.1}
  with pytest.raises(UserError, match=message):
    PruneSchedule(**{**given, **options})
