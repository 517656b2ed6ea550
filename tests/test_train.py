"""The whole way on configs/tiny.py: undisturbed, killed, and stopped."""

import json
import math
import signal
import time

import numpy as np
import pytest

from lorapr_jax.cli.main import main
from lorapr_jax.hf.load import load_config
from lorapr_jax.models.config import LayerShape
from tests.runs import (
  COMMAND,
  SETTINGS,
  assert_same_run,
  final_state,
  finish,
  metrics,
  start,
)


@pytest.fixture(autouse=True, scope='module')
def not_ignored():
  """As in the background of a shell, or by nohup: processes inherit that."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGINT, old)
  signal.signal(signal.SIGHUP, hangup)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run') / 'undisturbed'
  return workdir, *finish(start(workdir))


def test_a_run_prunes_exactly_what_was_asked_and_exports_it(undisturbed):
  workdir, out, err = undisturbed
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['sparsity']['heads'] == {'target': 0.5, 'achieved': 0.5}
  assert summary['sparsity']['channels'] == {'target': 0.5, 'achieved': 0.5}
  assert summary['params_pruned'] < summary['params_dense']
  # Training on the made-up language helps more than the cut harms.
  perplexity = summary['perplexity']
  assert perplexity['pruned']['value'] < 0.9 * perplexity['dense']['value']
  dense = perplexity['dense']
  assert dense['value'] == pytest.approx(math.exp(dense['nll']))
  assert dense | {'value': 0, 'nll': 0} == {
    'value': 0,
    'nll': 0,
    'data': 'synthetic:1?windows=32',
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
  assert records[-1]['tokens'] == 60 * 8 * 32
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


def test_stopped_twice_and_killed_equals_undisturbed_bit_for_bit(
  undisturbed, tmp_path
):
  workdir, command = tmp_path / 'run', ' '.join([*COMMAND, *SETTINGS])
  folder = workdir / 'checkpoints'

  def stop(signum, steps):
    wait_for_steps(process, workdir, steps)
    process.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == 128 + signum, err
    assert out == ''
    # It is saved, wherever it was stopped.
    stopped_at = max(int(path.name) for path in folder.iterdir())
    assert steps <= stopped_at < 60
    return stopped_at, err

  process = start(workdir)
  stopped_at, err = stop(signal.SIGINT, 5)
  last = err.splitlines()[-1]
  assert 'resuming' not in err and 'Traceback' not in err
  assert last == (
    f'stopped at step {stopped_at} of 60; to go on, run the same command '
    f'again: {command} --workdir={workdir}'
  )
  process = start(workdir)
  while f'resuming at step {stopped_at} of 60\n' != process.stderr.readline():
    assert process.poll() is None
  # The connection is lost, and with it the reader of standard error.
  process.stderr.close()
  process.stderr = None
  stop(signal.SIGHUP, 15)
  process = start(workdir)
  wait_for_steps(process, workdir, 36)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert (workdir / 'run.lock').exists()  # Of a dead process of this host.
  with open(workdir / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 36, "lo')  # A line cut short by the kill.
  # What cannot be read is set aside, and the one before it is used.
  before, newest = sorted(int(path.name) for path in folder.iterdir())[-2:]
  assert newest == 30
  for path in (folder / str(newest)).rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[:10])
  process = start(workdir)
  _, err = process.communicate()
  assert process.returncode == 0, err
  damaged = workdir / 'checkpoints-damaged' / str(newest)
  assert f'is damaged: it is now {damaged}, and the run goes on from' in err
  assert f'resuming at step {before} of 60' in err
  assert damaged.is_dir()
  assert_same_run(workdir, undisturbed[0])
  assert not (workdir / 'run.lock').exists()


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
  assert 'config.prune.target (None, now 0.25)' in err
  assert err.count('\n') == 1


@pytest.mark.parametrize('record', [{}, {'config': {'data': 1}}])
def test_a_run_json_without_sections_is_refused(tmp_path, capsys, record):
  (tmp_path / 'run.json').write_text(json.dumps(record))
  arguments = [*COMMAND[2:], *SETTINGS, f'--workdir={tmp_path}']
  assert main(['train', *arguments]) == 1
  err = capsys.readouterr().err
  assert 'belongs to a run with another config.data' in err
  assert err.count('\n') == 1


def test_a_folder_with_other_files_is_refused(tmp_path, capsys):
  (tmp_path / 'notes.txt').write_text('mine')
  arguments = [*COMMAND[2:], f'--workdir={tmp_path}']
  assert main(['train', *arguments]) == 1
  assert 'no run of ours' in capsys.readouterr().err
