"""What is written: metrics.jsonl, TensorBoard's files, a W&B run."""

import json
from pathlib import Path
import struct
import sys
import time

import pytest

from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.errors import UserError
from lorapr_jax.report.metrics import Log, check_finite, check_writers
from lorapr_jax.runtime.files import write_json
from lorapr_jax.settings.run import split_config
from lorapr_jax.settings.sections import LogSettings

TINY = Path(__file__).parents[2] / 'configs' / 'tiny.py'
RECORD = {'loss': 2.5, 'heads_sparsity': 0.25, 'params_kept': 0.75}


@pytest.fixture
def open_log(tmp_path):
  """Opens the log of a run in tmp_path that begins at a step."""

  def open_log(first_step, *overrides):
    flags = [f'--config={TINY}', f'--workdir={tmp_path}', *overrides]
    config, _ = parse_flags(flags)
    write_json(tmp_path / 'run.json', {'config': config.to_dict()})
    settings = split_config(config)
    step_tokens = settings.train.batch_size * settings.train.seq_len
    return Log(tmp_path, settings.log, step_tokens, first_step)

  return open_log


def test_a_line_has_the_record_and_the_speed(open_log, tmp_path):
  with open_log(0) as log:
    with log.paused():
      time.sleep(0.5)  # Such as for compiling.
    time.sleep(0.02)
    first = log.write(1, **RECORD)
    second = log.write(2, **RECORD)
  with open_log(3) as log:
    log.write(3, **RECORD)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert records[:2] == [first, second]
  assert [record['step'] for record in records] == [1, 2, 3]
  assert [record['tokens'] for record in records] == [1024, 1536, 2048]
  assert records[0] | RECORD == records[0]
  # Two steps, and without the pause.
  assert 0.01 <= first['seconds'] < 0.25
  assert first['tokens_per_second'] == pytest.approx(512 / first['seconds'])
  assert set(tmp_path.iterdir()) == {
    tmp_path / 'run.json',
    tmp_path / 'metrics.jsonl',
  }


def read_events(path):
  """The events of a file of TFRecords: length, checksum, data, checksum."""
  from tensorboardX.proto.event_pb2 import Event

  data, at = path.read_bytes(), 0
  while at < len(data):
    (length,) = struct.unpack_from('<Q', data, at)
    yield Event.FromString(data[at + 12 : at + 12 + length])
    at += 12 + length + 4


def test_tensorboard_gets_scalars_and_the_config_and_purges_on_resume(
  open_log, tmp_path
):
  flag = '--config.log.tensorboard=true'
  for first_step, steps in ((0, range(5)), (3, range(3, 6))):
    with open_log(first_step, flag) as log:
      for step in steps:
        log.write(step, **RECORD, perplexity=30.0)
    time.sleep(1)  # The files' names have seconds.
  files = sorted((tmp_path / 'tensorboard').iterdir())
  first, second = (list(read_events(file)) for file in files)

  def scalars(events):
    return [
      (event.step, value.tag, value.simple_value)
      for event in events
      for value in event.summary.value
      if value.HasField('simple_value')
    ]

  assert {
    (0, 'train/loss', 2.5),
    (4, 'prune/heads_sparsity', 0.25),
    (4, 'prune/params_kept', 0.75),
    (4, 'eval/perplexity', 30.0),
    (4, 'train/tokens', 5 * 512.0),
  } <= set(scalars(first))
  assert {tag for _, tag, _ in scalars(first)} == {
    *('train/loss', 'train/tokens', 'prune/heads_sparsity', 'eval/perplexity'),
    *('prune/params_kept', 'speed/seconds', 'speed/tokens_per_second'),
  }
  [text] = [
    value.tensor.string_val[0].decode()
    for event in first
    for value in event.summary.value
    if value.tag.startswith('config')
  ]
  assert '"learning_rate": 0.01' in text
  # TensorBoard drops the steps from here on of the files before.
  starts = [e.step for e in second if e.session_log.status == 1]
  assert starts == [3]
  assert not [e for e in first if e.session_log.status == 1]
  assert {step for step, _, _ in scalars(second)} == {3, 4, 5}


def test_a_wandb_run_is_the_same_one_when_resumed(
  open_log, tmp_path, monkeypatch
):
  pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  check_writers(LogSettings(tensorboard=False, wandb='pruning'), tmp_path)
  for first_step in (0, 1):
    with open_log(first_step, '--config.log.wandb=pruning') as log:
      log.write(first_step, **RECORD)
    time.sleep(1)  # The folders' names have seconds.
  folders = sorted((tmp_path / 'wandb').glob('offline-run-*'))
  run_id = json.loads((tmp_path / 'wandb.json').read_text())['id']
  assert len(folders) == 2
  for folder in folders:
    assert folder.name.endswith(run_id)
    written = (folder / f'run-{run_id}.wandb').read_bytes()
    assert b'prune/heads_sparsity' in written and b'learning_rate' in written


def test_an_impossible_wandb_project_is_refused(monkeypatch, tmp_path):
  pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  with pytest.raises(UserError, match='log.wandb=a/b: Invalid project name'):
    check_writers(LogSettings(tensorboard=False, wandb='a/b'), tmp_path)


@pytest.mark.parametrize(
  'key, package', [('tensorboard', 'tensorboardX'), ('wandb', 'wandb')]
)
def test_a_package_that_is_missing_is_named(
  key, package, monkeypatch, tmp_path
):
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  monkeypatch.delitem(sys.modules, package, raising=False)
  log = LogSettings(**{'tensorboard': False, 'wandb': '', key: 'x'})
  with pytest.raises(UserError) as error:
    check_writers(log, tmp_path)
  assert str(error.value) == (
    f'log.{key} needs the package {package}: pip install {package}'
  )


def test_nothing_is_needed_where_nothing_was_asked(monkeypatch, tmp_path):
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  check_writers(LogSettings(tensorboard=False, wandb=''), tmp_path)


def test_skipped_steps_are_told_and_too_many_stop_the_run():
  lines = []
  check_finite(3, 7, 0, lines.append)
  assert lines == []
  check_finite(3, 7, 4, lines.append)
  assert len(lines) == 1 and '7 steps skipped so far' in lines[0]
  with pytest.raises(UserError, match='5 steps in a row'):
    check_finite(3, 7, 5, lines.append)
