"""Runs of train.py on configs/tiny.py as a user starts them."""

import contextlib
import io
import json
from pathlib import Path
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp

from lorapr_jax.cli.main import main
from tests.xla_flags import environment

ROOT = Path(__file__).parent.parent
# One device, whatever the other tests simulate: as a user's process would.
COMMAND = [sys.executable, 'train.py', '--config=configs/tiny.py']
SETTINGS = [
  *('--config.train.log_every=1', '--config.train.checkpoint_every=30'),
  *('--config.train.batch_size=8', '--config.train.micro_batch_size=4'),
  '--config.lora.targets=q_proj,down_proj',
]
TIMING = ('seconds', 'tokens_per_second')


def start(workdir, settings=SETTINGS, **env):
  return subprocess.Popen(
    [*COMMAND, *settings, f'--workdir={workdir}'],
    cwd=ROOT,
    env=environment(LORAPR_CACHE=f'{workdir}-cache') | env,
    stderr=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def train(workdir, settings=SETTINGS):
  """The same in this process, to its end; what it prints on standard error."""
  err = io.StringIO()
  flags = ['--config=configs/tiny.py', *settings, f'--workdir={workdir}']
  with contextlib.redirect_stderr(err):
    status = main(['train', *flags])
  assert status == 0, err.getvalue()
  return err.getvalue()


def finish(process):
  """What a run that must succeed prints."""
  out, err = process.communicate()
  assert process.returncode == 0, err
  return out, err


def metrics(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def final_state(workdir, folder='checkpoints', step=60):
  manager = ocp.CheckpointManager(workdir / folder)
  return manager.restore(step, args=ocp.args.StandardRestore())


def flatten(tree, path=''):
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from flatten(value, f'{path}/{key}')
  elif isinstance(tree, list | tuple):
    for key, value in enumerate(tree):
      yield from flatten(value, f'{path}/{key}')
  elif tree is not None:
    yield path, np.asarray(tree)


def without_times(records):
  return [
    {k: v for k, v in record.items() if k not in TIMING} for record in records
  ]


def assert_same_run(workdir, expected, *checkpoint):
  assert without_times(metrics(workdir)) == without_times(metrics(expected))
  ours, theirs = (
    dict(flatten(final_state(w, *checkpoint))) for w in (workdir, expected)
  )
  assert ours.keys() == theirs.keys()
  assert any('/lora/' in key for key in ours)
  for key, value in ours.items():
    np.testing.assert_array_equal(value, theirs[key], err_msg=key)
