"""Workdirs that are taken, damaged checkpoints, and disks."""

from collections.abc import Callable
import json
import os
from pathlib import Path
import shutil
import sys
import threading
import time

from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.runtime.workdir import claim_workdir
from lorapr_jax.settings.run import split_config
from lorapr_jax.training.inputs import reading
from tests.errors.case import Case, Place, train_model, train_tiny, with_argv

# The reason, which safetensors, orbax and NumPy each say in their own words.
FULL = r'(?<=written \().*(?=\): make)'
# Of the run that is finished; small, because it is really run.
RUN = (
  *('train.steps=2', 'train.checkpoint_every=1', 'data.eval='),
  *('train.seq_len=8', 'prune.every=1', 'prune.protect=none'),
  *('lora.targets=q_proj,gate_proj', 'lora.dropout=0'),
)


def _unfinished(run: Path) -> None:
  # As it is when it is killed before its export.
  (run / 'summary.json').unlink()
  shutil.rmtree(run / 'export')


def _run(
  did: str, change: Callable[[Path], None], *overrides: str, **more
) -> Case:
  """The finished run's own command, after `change`."""

  def argv(place: Place) -> list[str]:
    change(place.copy('RUN'))
    return train_tiny(*RUN, *overrides)

  return Case(did, argv, **more)


def damage_checkpoint(run: Path) -> None:
  """Cuts the arrays of the last checkpoint short."""
  for file in (run / 'checkpoints' / '2').rglob('d/*'):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _damaged(run: Path) -> None:
  _unfinished(run)
  damage_checkpoint(run)
  # From one before it the run would go on.
  for folder in (run / 'checkpoints').iterdir():
    if folder.name != '2':
      shutil.rmtree(folder)


def _foreign(run: Path) -> None:
  shutil.rmtree(run)
  run.mkdir()
  (run / 'notes.txt').write_text('mine')


def _file(run: Path) -> None:
  shutil.rmtree(run)
  run.write_text('mine')


def _broken_record(run: Path) -> None:
  _unfinished(run)
  (run / 'run.json').write_text('{"config":')


def _begun(did: str, change: Callable[[Place], None]) -> Case:
  """A run that was stopped while it loaded its base goes on after `change`."""

  def argv(place: Place) -> list[str]:
    place.copy('MODEL')
    place.text()
    command = train_model()
    config, workdir = parse_flags(command[1:])
    sys.modules.pop('config_config')
    settings = split_config(config)
    run = {'config': config.to_dict(), 'resolved': settings.resolved()}
    with reading(settings.model.folder, [settings.data.train]) as inputs:
      claim_workdir(place.folder / workdir, run, inputs().recorded())
    change(place)
    return command

  return Case(did, argv, late=True, leaves=('CACHE', 'CACHE/'))


def _other_weights(place: Place) -> None:
  path = place.folder / 'MODEL' / 'model.safetensors'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


def _running(run: Path) -> None:
  """As if a process of another host were touching the lock."""
  _unfinished(run)
  lock = run / 'run.lock'
  lock.write_text(
    json.dumps({'since': '2026-01-01 12:00:00', 'process': 1, 'host': 'HOST'})
  )

  def touch() -> None:
    for _ in range(1000):
      time.sleep(0.1)
      if not lock.exists():
        break
      os.utime(lock)

  threading.Thread(target=touch, daemon=True).start()


def _packing(place: Place) -> list[str]:
  place.copy('MODEL')
  place.text()
  return train_model()


CASES = [
  _run('`--workdir=RUN` of a run that is finished', lambda run: None),
  _run(
    '`--workdir=RUN` of a run whose report could not be written',
    lambda run: (run / 'report.html').unlink(),
  ),
  _run('`--workdir=RUN` of another run', _unfinished, 'prune.target=0.25'),
  _run('`--workdir=RUN`, a folder with other files', _foreign),
  _run('`--workdir=RUN`, a file', _file),
  _begun(
    'RUN goes on, and its text is another now',
    lambda place: place.text('word ' * 900),
  ),
  _begun('RUN goes on, and its base is another now', _other_weights),
  _run('RUN/run.json is cut short', _broken_record),
  _run('`--workdir=RUN`, in which another process is running', _running),
  _run('The only checkpoint of RUN is damaged', _damaged, late=True),
  Case(
    '`--workdir=/dev/null/RUN`, a file in the way',
    with_argv(*train_tiny(), '--workdir=/dev/null/RUN'),
  ),
  Case(
    '`--workdir=/proc/RUN`, a read-only folder',
    with_argv(*train_tiny(), '--workdir=/proc/RUN'),
  ),
  Case(
    '`--workdir=memory://RUN`, where no checkpoint can be written',
    with_argv(*train_tiny(), '--workdir=memory://RUN'),
  ),
  Case(
    '`--workdir=hub://RUN`, a file system that nothing knows',
    with_argv(*train_tiny(), '--workdir=hub://RUN'),
  ),
  Case(
    'The disk is full when data is packed',
    _packing,
    late=True,
    max_file_bytes=1000,
    leaves=('CACHE', 'CACHE/windows'),
  ),
  _run(
    'The disk is full when the run is exported',
    _unfinished,
    late=True,
    max_file_bytes=50_000,
    varies=FULL,
  ),
  Case(
    'The disk is full when a checkpoint is saved',
    with_argv(*train_tiny(*RUN)),
    late=True,
    max_file_bytes=20_000,
    leaves=('RUN', 'RUN/'),
    varies=FULL,
  ),
]
