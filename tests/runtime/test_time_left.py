"""The time that is left: steady, and silent about what is not known yet."""

import pytest

from lorapr_jax.runtime.time_left import TimeLeft


def test_it_is_the_mean_of_a_step_times_the_steps_that_are_left():
  left = TimeLeft(100)
  left.add(10, 1.0, compiled=False)
  assert left.seconds() == pytest.approx(90.0)
  # Thirty steps count three times as much as ten: 100 s for 40 steps.
  left.add(40, 3.0, compiled=False)
  assert left.seconds() == pytest.approx(2.5 * 60)
  left.add(100, 1.0, compiled=False)
  assert left.seconds() == 0.0


def test_what_included_compiling_does_not_count():
  left = TimeLeft(1000)
  assert left.seconds() is None
  left.add(8, 225.0, compiled=True)
  assert left.seconds() is None
  left.add(16, 1.0, compiled=False)
  assert left.seconds() == pytest.approx(984.0)
  left.add(24, 225.0, compiled=True)
  assert left.seconds() == pytest.approx(976.0)


def test_slow_steps_among_others_do_not_make_it_jump():
  left, estimates = TimeLeft(200), []
  for done in range(2, 200, 2):
    # Every fifth step masks groups and takes five times as long.
    slow = sum(step % 5 == 0 for step in (done - 1, done))
    left.add(done, 1 + 2.0 * slow, compiled=False)
    estimates.append(left.seconds())
  later = estimates[10:]
  # Two steps less are left each time; the truth is 1.8 s a step.
  for i, seconds in enumerate(later):
    assert seconds == pytest.approx(1.8 * (200 - 2 * (i + 11)), rel=0.15)


def test_it_follows_when_all_steps_become_faster():
  left = TimeLeft(100)
  for done in range(1, 41):
    left.add(done, 4.0, compiled=False)
  assert left.seconds() == pytest.approx(4.0 * 60)
  for done in range(41, 61):
    left.add(done, 1.0, compiled=False)
  assert left.seconds() == pytest.approx(40.0)
