"""Files that were bent are refused in one line, soon and with little memory."""

import fnmatch
import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

from tests.errors.kinds import KINDS
from tests.errors.survive import ACCEPTED


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
  """{kind: {what was done: (what is wrong, what was answered)}}."""
  folder = tmp_path_factory.mktemp('bent')
  run = subprocess.run(
    [sys.executable, '-m', 'tests.errors.survive', folder, *KINDS],
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'LORAPR_CACHE': str(folder / 'cache'),
    },
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  found = {kind: {} for kind in KINDS}
  for line in run.stdout.splitlines():
    kind, did, *answer = json.loads(line)
    found[kind][did] = answer
  assert run.returncode == 0, (found, run.stderr)
  return found


@pytest.mark.parametrize('kind', KINDS)
def test_a_bent_file_is_refused_in_one_line(kind, answers):
  accepts = KINDS[kind].accepts
  accepted = [did for did, (x, _) in answers[kind].items() if x == ACCEPTED]
  wrong = {
    did: answer
    for did, answer in answers[kind].items()
    if answer[0] and not (did in accepted and _matching(did, accepts))
  }
  assert wrong == {}
  assert {p for did in accepted for p in _matching(did, accepts)} == {*accepts}
  assert len(answers[kind]) - len(accepted) >= 20


def _matching(did, patterns):
  return [p for p in patterns if fnmatch.fnmatchcase(did, p)]
