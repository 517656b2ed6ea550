"""The whole way on configs/tiny.py: undisturbed, killed, and stopped."""

import json
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
from jax.experimental.compilation_cache import (
  compilation_cache as compilation_cache_lib,
)
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load, load_file

from lorapr_jax.cli.main import main
from lorapr_jax.hf.load import load_config
from lorapr_jax.models.config import LayerShape

ROOT = Path(__file__).parent.parent
# One device, whatever the other tests simulate: as a user's process would.
COMMAND = [sys.executable, 'train.py', '--config=configs/tiny.py']
SETTINGS = ['--config.train.log_every=1', '--config.train.checkpoint_every=30']
TIMING = ('seconds', 'tokens_per_second')
# The runs compile the same functions again and again.
CACHE = tempfile.TemporaryDirectory(prefix='xla-')


@pytest.fixture(autouse=True, scope='module')
def compilation_cache():
  """For the runs in this process."""
  jax.config.update('jax_compilation_cache_dir', CACHE.name)
  yield
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache_lib.reset_cache()


@pytest.fixture(autouse=True, scope='module')
def sigint():
  """Not ignored, as in the background of a shell: processes inherit that."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


def start(workdir, settings=SETTINGS):
  return subprocess.Popen(
    [*COMMAND, *settings, f'--workdir={workdir}'],
    cwd=ROOT,
    env={
      'PATH': '/usr/bin:/bin',
      'LORAPR_CACHE': str(workdir) + '-cache',
      'JAX_COMPILATION_CACHE_DIR': CACHE.name,
    },
    stderr=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def finish(process):
  """What a run that must succeed prints."""
  out, err = process.communicate()
  assert process.returncode == 0, err
  return out, err


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'undisturbed'
  return workdir, *finish(start(workdir))


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


def test_a_run_prunes_exactly_what_was_asked_and_exports_it(undisturbed):
  workdir, out, err = undisturbed
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['sparsity']['heads'] == {'target': 0.5, 'achieved': 0.5}
  assert summary['sparsity']['channels'] == {'target': 0.5, 'achieved': 0.5}
  assert summary['params_pruned'] < summary['params_dense']
  # Training on the made-up language helps more than the cut harms.
  perplexity = summary['perplexity']
  assert perplexity['pruned']['value'] < 0.9 * perplexity['dense']['value']
  assert perplexity['dense'] | {'value': 0} == {
    'value': 0,
    'data': 'synthetic:1?windows=32',
    'split': None,
    'seq_len': 32,
    'windows': 32,
  }
  assert summary['exports'] == {
    'hf': {
      'path': str(workdir / 'export'),
      'layout': 'two_shape',
      'dtype': 'float32',
      'max_logit_difference': 0.0,
    }
  }
  assert summary['peak_memory_bytes'] > 1e8
  assert summary['versions']['jax']
  assert summary['tokens_per_second'] > 0
  assert list(summary['seconds']) == [
    *('data', 'load', 'evaluate', 'compile', 'prune', 'cut', 'export')
  ]
  assert summary['skipped_steps'] == 0 and summary['warnings'] == []
  config = load_config(workdir / 'export')
  small, full = LayerShape(2, 2, 64), LayerShape(4, 2, 128)
  assert config.layers == (small, small, small, full)
  assert 'parameters' in out and 'heads removed: 50.00%' in out
  assert 'kv_heads: 2 of 4 kept in each layer' in err


def test_the_log_has_every_field_and_follows_the_ramp(undisturbed):
  records = metrics(undisturbed[0])
  assert [record['step'] for record in records] == list(range(60))
  assert set(records[0]) == {
    *('step', 'loss', 'lr', 'grad_norm', 'heads_sparsity', 'tokens'),
    *('channels_sparsity', 'params_kept', 'seconds', 'tokens_per_second'),
    'skipped',
  }
  channels = [record['channels_sparsity'] for record in records]
  assert channels == sorted(channels)
  # Warm-up, and the end of the ramp at 54 of 60 steps.
  assert channels[5] == 0.0 and channels[44] < 0.5 and channels[54] == 0.5
  assert records[-1]['tokens'] == 60 * 16 * 32
  assert records[0]['lr'] == pytest.approx(1e-2)


def test_pruning_json_speaks_of_the_base_model(undisturbed):
  workdir = undisturbed[0]
  pruning = json.loads((workdir / 'export' / 'pruning.json').read_text())
  masks = final_state(workdir)['masks'][0]
  for layer, kept in enumerate(pruning['kept']):
    for group in ('kv_heads', 'mlp'):
      assert kept[group] == np.flatnonzero(masks[group][layer]).tolist()
  assert pruning['sparsity']['channels']['achieved'] == 0.5
  assert pruning['base']['config']['num_key_value_heads'] == 4
  assert pruning['base']['config']['intermediate_size'] == 128
  assert pruning['settings']['criterion'] == 'lora'


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(
  undisturbed, tmp_path
):
  workdir = tmp_path / 'killed'
  process = start(workdir)
  wait_for_steps(process, workdir, 36)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not (workdir / 'checkpoints' / '60').exists()
  with open(workdir / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 36, "lo')  # A line cut short by the kill.

  resumed = start(workdir)
  _, err = resumed.communicate()
  assert resumed.returncode == 0, err
  assert 'resuming at step 30 of 60' in err
  assert_same_run(workdir, undisturbed[0])


def test_stopped_twice_and_resumed_equals_undisturbed_bit_for_bit(
  undisturbed, tmp_path
):
  workdir, command = tmp_path / 'stopped', ' '.join([*COMMAND, *SETTINGS])
  resumed_at = 0
  for signum, status, steps in (
    (signal.SIGINT, 130, 5),
    (signal.SIGTERM, 143, 40),
  ):
    process = start(workdir)
    wait_for_steps(process, workdir, steps)
    process.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == status, err
    *lines, last = err.splitlines()
    assert (f'resuming at step {resumed_at} of 60' in lines) == bool(resumed_at)
    # It is saved, wherever it was stopped.
    resumed_at = max(int(p.name) for p in (workdir / 'checkpoints').iterdir())
    assert steps <= resumed_at < 60
    assert last == (
      f'stopped at step {resumed_at} of 60; to go on, run the same command '
      f'again: {command} --workdir={workdir}'
    )
    assert out == '' and 'Traceback' not in err
  process = start(workdir)
  _, err = process.communicate()
  assert process.returncode == 0, err
  assert f'resuming at step {resumed_at} of 60' in err
  assert_same_run(workdir, undisturbed[0])


def test_ctrl_c_outside_the_loop_says_how_to_go_on(tmp_path):
  process = start(tmp_path / 'run')
  lines = iter(process.stderr.readline, '')
  assert 'load\n' in lines  # It has read this far, and no further.
  process.send_signal(signal.SIGINT)
  out, err = process.communicate()
  assert process.returncode == 130 and out == ''
  assert [line for line in err.splitlines() if line != 'evaluate'] == [
    'stopped; to go on, run the same command again: '
    + ' '.join([*COMMAND, *SETTINGS, f'--workdir={tmp_path}/run'])
  ]


def wait_for_steps(process, workdir, steps):
  """Waits until so many steps are logged, and every checkpoint before."""
  log = workdir / 'metrics.jsonl'
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    saved = steps < 30 or (workdir / 'checkpoints' / '30').exists()
    if saved and log.exists() and len(log.read_text().splitlines()) >= steps:
      return
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.01)
  raise AssertionError(f'no {steps} steps in time')


def assert_same_run(workdir, expected, *checkpoint):
  def without_times(records):
    return [
      {k: v for k, v in record.items() if k not in TIMING} for record in records
    ]

  assert without_times(metrics(workdir)) == without_times(metrics(expected))
  ours, theirs = (
    dict(flatten(final_state(w, *checkpoint))) for w in (workdir, expected)
  )
  assert ours.keys() == theirs.keys()
  assert any('/lora/' in key for key in ours)
  for key, value in ours.items():
    np.testing.assert_array_equal(value, theirs[key], err_msg=key)


def test_a_finished_run_is_not_written_over(undisturbed, capsys):
  arguments = [*COMMAND[2:], *SETTINGS, f'--workdir={undisturbed[0]}']
  assert main(['train', *arguments]) == 1
  assert 'holds a finished run' in capsys.readouterr().err


def test_a_workdir_of_another_config_is_refused(undisturbed, tmp_path, capsys):
  workdir = tmp_path / 'other'
  workdir.mkdir()
  run = (undisturbed[0] / 'run.json').read_text()
  (workdir / 'run.json').write_text(run)
  arguments = [*COMMAND[2:], *SETTINGS, f'--workdir={workdir}']
  assert main(['train', *arguments, '--config.prune.target=0.25']) == 1
  err = capsys.readouterr().err
  assert 'config.prune.target (0.5, now 0.25)' in err
  assert err.count('\n') == 1


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
  (tmp_path / 'notes.txt').write_text('mine')
  arguments = [*COMMAND[2:], f'--workdir={tmp_path}']
  assert main(['train', *arguments]) == 1
  assert 'no run of ours' in capsys.readouterr().err


@pytest.mark.parametrize(
  'override',
  [
    '--config.prune.heads=queries',
    '--config.prune.target=0',
    '--config.prune.order=none',
    '--config.prune.criterion=gradient',
    '--config.prune.criterion=activation',
    '--config.prune.protect=none',
    '--config.prune.criterion=magnitude',
  ],
)
def test_other_ways_to_prune_run_to_the_end(override, tmp_path, capsys):
  arguments = [
    *('--config=configs/tiny.py', f'--workdir={tmp_path / "run"}'),
    *('--config.train.steps=12', '--config.prune.every=3', override),
    '--config.mesh.data=-1',
    '--config.mesh.fsdp=1',
  ]
  assert main(['train', *arguments]) == 0, capsys.readouterr().err
  costs = 'holds a gradient of the base' in capsys.readouterr().err
  assert costs == override.endswith('=gradient')
  config = load_config(tmp_path / 'run' / 'export')
  layer = {
    '--config.prune.heads=queries': LayerShape(4, 1, 64),
    '--config.prune.target=0': LayerShape(4, 2, 128),
  }.get(override, LayerShape(2, 2, 64))
  assert config.layers[0] == layer


PHASES = [
  *('--config.train.steps=9', '--config.train.log_every=1'),
  '--config.train.checkpoint_every=2',
  *('--config.prune.order=prune_then_tune', '--config.recover.steps=4'),
  *('--config.prune.calibration_steps=3', '--config.recover.data=synthetic:9'),
  *('--config.export.format=hf,peft', '--config.recover.learning_rate=0.003'),
]


@pytest.fixture(scope='module')
def phased(tmp_path_factory):
  """A run that calibrates, tunes and recovers."""
  workdir = tmp_path_factory.mktemp('phases') / 'run'
  finish(start(workdir, PHASES))
  return workdir


def test_pruned_at_once_then_tuned_then_recovered(phased):
  records = metrics(phased)
  assert [record['step'] for record in records] == list(range(13))
  assert [record['tokens'] for record in records[-2:]] == [6144, 6656]
  channels = [record['channels_sparsity'] for record in records]
  assert channels == [0.0, 0.0] + [0.5] * 11
  rates = [record['lr'] for record in records]
  assert rates[:3] == [0.0] * 3
  assert rates[3] == pytest.approx(1e-2) and rates[9] == pytest.approx(3e-3)
  # Calibration changes nothing, and tuning helps.
  summary = json.loads((phased / 'summary.json').read_text())
  values = {k: v['value'] for k, v in summary['perplexity'].items()}
  assert list(values) == ['dense', 'cut', 'pruned']
  assert values['pruned'] < values['cut']
  assert summary['seconds'].keys() >= {'calibrate', 'tune', 'recover'}
  small = LayerShape(2, 2, 64)
  assert load_config(phased / 'export').layers[0] == small
  assert load_config(phased / 'export-peft' / 'base').layers[0] == small


@pytest.mark.parametrize(
  'phase, last', [('checkpoints-tune', 5), ('checkpoints-recover', 3)]
)
def test_a_run_cut_short_in_any_phase_goes_on_bit_for_bit(
  phased, tmp_path, capsys, phase, last
):
  workdir = tmp_path / 'run'
  shutil.copytree(phased, workdir)
  # As a kill would have left it after this phase's step `last`.
  if phase == 'checkpoints-tune':
    shutil.rmtree(workdir / 'checkpoints-recover')
  for step in (workdir / phase).iterdir():
    if int(step.name) > last:
      shutil.rmtree(step)
  (workdir / 'summary.json').unlink()
  _, err = finish(start(workdir, PHASES))
  done = {'checkpoints-tune': 3, 'checkpoints-recover': 9}[phase] + last
  assert f'resuming at step {done} of 13' in err
  assert_same_run(workdir, phased, 'checkpoints-recover', 4)
  # The cut arrays are those that were exported, and export finds them again.
  again = ['export', str(workdir), str(tmp_path / 'again'), '--format', 'hf']
  assert main(again) == 0, capsys.readouterr().err
  name = 'model.safetensors'
  exported = (phased / 'export' / name).read_bytes()
  assert (workdir / 'export' / name).read_bytes() == exported
  # Here, on eight devices, the sums of the merge are in another order.
  expected, found = load(exported), load_file(tmp_path / 'again' / name)
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, atol=1e-6, err_msg=key)
