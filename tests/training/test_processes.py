"""Runs of two processes with four devices each, and what becomes of them."""

import json
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorapr_jax.cli.main import main
from lorapr_jax.errors import UserError
from lorapr_jax.report.pruning_file import read_pruning
from lorapr_jax.runtime import processes
from tests.runs import ROOT, TIMING, metrics
from tests.xla_flags import environment

STEPS, HEARTBEAT = 16, 10
SETTINGS = {
  'train.steps': STEPS,
  # What is sent takes most of a step.
  'train.batch_size': 8,
  'train.micro_batch_size': 8,
  'train.log_every': 1,
  'train.checkpoint_every': 5,
  'prune.every': 4,
  'prune.compensate': 'ridge',
  'train.distill': 0.5,
  'train.distill_top_k': 8,
  # So that less is compiled, by every process anew, and less is sent.
  'model.sizes.num_hidden_layers': 2,
  'data.eval': '',
  'lora.targets': 'q_proj,gate_proj',
  'prune.protect': 'none',
}
# Whole layers go at each of two events, and each leaves a finished model.
LADDER = SETTINGS | {
  'model.sizes.num_hidden_layers': 6,
  'prune.order': 'prune_then_tune',
  'prune.calibration_steps': 4,
  'prune.layers_target': 0.34,
  # As two devices need it that share heads and channels.
  'prune.heads_multiple_of': 2,
  'prune.channels_multiple_of': 2,
  'export.ladder': '0.6',
}
# As a user's, but that what was killed is missed sooner.
COMMAND = (
  'import sys\n'
  'from lorapr_jax.runtime import processes\n'
  f'processes.HEARTBEAT_SECONDS = {HEARTBEAT}\n'
  'from lorapr_jax.cli.main import main\n'
  'sys.exit(main(sys.argv[1:]))'
)


# Each prints what the first one made, and what went wrong there.
MADE = """
import sys
from lorapr_jax.errors import UserError
from lorapr_jax.runtime import processes
address, index = sys.argv[1:]
processes.connect(address, 2, int(index))
print(processes.from_first(lambda: {'kept': [1, 2], 'by': int(index)}))
def fail():
  raise UserError('no room' if processes.is_first() else 'not asked')
try:
  processes.from_first(fail)
except UserError as error:
  print(error)
"""


def free_address():
  """Where the processes may meet."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return f'localhost:{free.getsockname()[1]}'


class Run:
  """The processes of one start of a run."""

  def __init__(
    self, workdir, count, devices, last=(), settings=SETTINGS, **mesh
  ):
    """`last` are flags of the last process."""
    settings = settings | {f'mesh.{axis}': n for axis, n in mesh.items()}
    flags = [f'--config.{key}={value}' for key, value in settings.items()]
    self.metrics = workdir / 'metrics.jsonl'
    address = free_address()
    self._logs, self.processes = [], []
    for index in range(count):
      more = []
      if count > 1:
        more += [f'--coordinator_address={address}', f'--process_id={index}']
        more += [f'--num_processes={count}']
      if index == count - 1:
        more += last
      log = workdir.with_name(f'{workdir.name}-{index}.log')
      self._logs.append(log)
      with open(log, 'w') as file:
        self.processes.append(
          subprocess.Popen(
            [
              *(sys.executable, '-c', COMMAND, 'train'),
              *('--config=configs/tiny.py', f'--workdir={workdir}'),
              *(*flags, *more),
            ],
            cwd=ROOT,
            env=environment(devices, LORAPR_CACHE=f'{workdir}-cache'),
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
          )
        )

  def until(self, step):
    """Returns once a step is logged."""
    while not self.metrics.exists() or not any(
      f'"step": {step},' in line for line in self.metrics.open()
    ):
      for process in self.processes:
        assert process.poll() is None, self.errors()
      time.sleep(0.05)

  def end(self, *statuses):
    """Waits for all of them; what each printed."""
    printed = [process.communicate()[0] for process in self.processes]
    ended = [process.returncode for process in self.processes]
    assert ended == list(statuses), (ended, self.errors())
    return printed

  def errors(self):
    """What each wrote to standard error."""
    return [log.read_text() for log in self._logs]


def _assert_same(workdir, expected):
  ours, theirs = metrics(workdir), metrics(expected)
  assert [r['step'] for r in ours] == list(range(STEPS))
  for mine, other in zip(ours, theirs, strict=True):
    assert mine.keys() == other.keys()
    for key in mine.keys() - set(TIMING):
      np.testing.assert_allclose(mine[key], other[key], rtol=1e-5, err_msg=key)
  mine, other = (
    load_file(w / 'importance.safetensors') for w in (workdir, expected)
  )
  assert mine.keys() == other.keys()
  for name, array in mine.items():
    if name.endswith('.mask'):
      np.testing.assert_array_equal(array, other[name])
      assert 0 < array.mean() < 1
  mine, other = (
    load_file(w / 'export' / 'model.safetensors') for w in (workdir, expected)
  )
  assert mine.keys() == other.keys()
  for name, array in mine.items():
    np.testing.assert_allclose(array, other[name], rtol=0, atol=1e-4)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The workdir of one process with eight devices."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  Run(workdir, 1, 8, fsdp=4, tensor=2).end(0)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize('axis', ['fsdp', 'sequence'])
def test_two_processes_end_as_one(alone, tmp_path, axis):
  run = Run(tmp_path / 'run', 2, 4, **{'fsdp': 1, axis: 4}, tensor=2)
  first, second = run.end(0, 0)
  # Collectives on CPUs print lines of their own.
  assert 'parameters' in first and 'parameters' not in second
  _assert_same(tmp_path / 'run', alone)


@pytest.mark.slow
def test_what_one_process_began_two_end(alone, tmp_path):
  workdir = tmp_path / 'run'
  run = Run(workdir, 1, 4, fsdp=2, tensor=2)
  run.until(6)
  run.processes[0].terminate()
  run.end(128 + signal.SIGTERM)
  Run(workdir, 2, 4, fsdp=2, data=2, tensor=2).end(0, 0)
  _assert_same(workdir, alone)


@pytest.mark.slow
def test_meshes_and_processes_leave_the_same_sizes_without_whole_layers(
  tmp_path,
):
  Run(tmp_path / 'alone', 1, 1, settings=LADDER).end(0)
  mesh = {'settings': LADDER, 'fsdp': 4, 'tensor': 2}
  Run(tmp_path / 'mesh', 1, 8, **mesh).end(0)
  Run(tmp_path / 'processes', 2, 4, **mesh).end(0, 0)
  for export, gone in ('rungs/0.6/export', 1), ('export', 2):
    alone = tmp_path / 'alone' / export
    layers = read_pruning(alone / 'pruning.json').kept
    assert sum(not kept['mlp'].size for kept in layers) == gone
    for name in 'mesh', 'processes':
      folder = tmp_path / name / export
      found = read_pruning(folder / 'pruning.json').kept
      jax.tree.map(np.testing.assert_array_equal, found, layers)
      ours, theirs = (
        load_file(x / 'model.safetensors') for x in (folder, alone)
      )
      assert ours.keys() == theirs.keys()
      for key, array in ours.items():
        np.testing.assert_allclose(array, theirs[key], rtol=0, atol=1e-4)


def test_what_is_killed_or_moved_to_other_devices_ends_as_undisturbed(
  alone, tmp_path
):
  # Each of two processes has half of the rows.
  workdir = tmp_path / 'run'
  run = Run(workdir, 2, 4, fsdp=4, tensor=2)
  run.until(6)
  run.processes[1].kill()
  killed = time.monotonic()
  run.end(-signal.SIGABRT, -signal.SIGKILL)
  assert time.monotonic() - killed < 2 * HEARTBEAT
  ours = [x for x in run.errors()[0].splitlines() if x.startswith('step ')]
  assert 'run the same command again on all of them' in ours[-1]
  # A connection is lost, or a machine is to be taken away, of which SIGTERM
  # tells: all stop after the same step, and save. Now each process has all
  # rows, and half of their tokens.
  hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # Not as by nohup.
  run = Run(workdir, 2, 4, sequence=4, fsdp=1, tensor=2)
  signal.signal(signal.SIGHUP, hangup)
  run.until(8)
  run.processes[1].send_signal(signal.SIGHUP)
  run.end(*[128 + signal.SIGTERM] * 2)
  assert f'resuming at step 5 of {STEPS}' in run.errors()[0]
  stopped = len(metrics(workdir))
  assert 8 < stopped < STEPS
  assert (workdir / 'checkpoints' / str(stopped)).is_dir()
  # One process with half of the devices goes on.
  run = Run(workdir, 1, 4, fsdp=2, tensor=2)
  run.end(0)
  assert f'resuming at step {stopped} of {STEPS}' in run.errors()[0]
  _assert_same(workdir, alone)


def test_processes_that_would_not_do_the_same_end_at_once(tmp_path):
  run = Run(tmp_path / 'run', 2, 4, last=('--config.train.seed=1',))
  run.end(1, 1)
  for error in run.errors():
    assert 'error: settings differ between processes' in error
  assert not (tmp_path / 'run').exists()


def test_what_the_first_process_makes_all_have():
  address = free_address()
  both = [
    subprocess.Popen(
      [sys.executable, '-c', MADE, address, str(index)],
      cwd=ROOT,
      env=environment(1),
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in (0, 1)
  ]
  for process in both:
    printed = process.communicate(timeout=300)[0].splitlines()
    # Collectives on CPUs print lines of their own.
    assert printed[-2:] == ["{'kept': [1, 2], 'by': 0}", 'no room']


@pytest.mark.parametrize(
  'given, message',
  [
    ((None, None, 1), 'go together'),
    (('host', 2, 0), '--coordinator_address=host: HOST:PORT'),
    (('host:x', 2, 0), '--coordinator_address=host:x: HOST:PORT'),
    (('host:1', 2, 2), '--process_id=2: a number from 0, below --num_proc'),
    (('host:1', 2, -1), '--process_id=-1: a number from 0'),
  ],
)
def test_flags_that_cannot_be_are_refused(given, message):
  with pytest.raises(UserError, match=message):
    processes.connect(*given)


def test_a_workdir_that_others_do_not_see_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  monkeypatch.setattr(processes, 'VISIBLE_SECONDS', 1)
  processes.check_shared(tmp_path)
  with pytest.raises(UserError, match='a file system that they share'):
    processes.check_shared(tmp_path / 'nowhere')


def test_the_environment_says_whether_there_are_others(monkeypatch):
  called = []
  monkeypatch.setattr(processes.jax.config, 'update', lambda *_: None)
  monkeypatch.setattr(
    processes.jax.distributed, 'initialize', lambda **kw: called.append(kw)
  )
  processes.connect()
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
  processes.connect()
  assert not called
  monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
  processes.connect()
  assert called == [
    dict.fromkeys(
      ('heartbeat_timeout_seconds', 'shutdown_timeout_seconds'),
      processes.HEARTBEAT_SECONDS,
    )
  ]


@pytest.mark.mesh
def test_a_run_goes_on_with_another_mesh_but_not_with_other_counts(
  alone, tmp_path, capsys
):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  run = json.loads((alone / 'run.json').read_text())
  run['resolved']['keep']['mlp'][0] -= 8
  (workdir / 'run.json').write_text(json.dumps(run))
  flags = [f'--config.{key}={value}' for key, value in SETTINGS.items()]
  argv = ['train', '--config=tiny', f'--workdir={workdir}', *flags]
  assert main([*argv, '--config.mesh.sequence=2']) == 1
  assert 'a run with another resolved.keep.mlp' in capsys.readouterr().err
