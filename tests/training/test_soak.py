"""Twenty kills at random moments of one run: it ends as if undisturbed."""

import random
import subprocess

import pytest

from tests.runs import assert_same_run, finish, start

pytestmark = pytest.mark.soak

KILLS, STEPS = 20, 2500
SETTINGS = [
  f'--config.train.steps={STEPS}',
  '--config.train.log_every=10',
  '--config.train.checkpoint_every=10',
  '--config.data.eval_every=250',
]


def test_twenty_kills_change_nothing(tmp_path):
  expected = tmp_path / 'undisturbed'
  finish(start(expected, SETTINGS))
  workdir, draw = tmp_path / 'killed', random.Random(0)
  resumed = set()
  for _ in range(KILLS):
    process = start(workdir, SETTINGS)
    # From before the first line to some seconds into the loop.
    try:
      process.wait(draw.uniform(1, 14))
    except subprocess.TimeoutExpired:
      process.kill()
    _, err = process.communicate()
    assert process.returncode == -9, err
    resumed |= {line for line in err.splitlines() if 'resuming' in line}
  _, err = finish(start(workdir, SETTINGS))
  # The kills came in many places, and the last start did not do it all.
  assert len(resumed) > 3 and 'resuming at step' in err
  assert_same_run(workdir, expected, 'checkpoints', STEPS)
