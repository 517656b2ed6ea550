"""A run's folder: the names of its files, and which run it belongs to."""

import json
from pathlib import Path
import secrets
import tempfile
from typing import Any

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import (
  LARGE,
  read_bytes,
  read_json,
  write_bytes,
  write_json,
)
from lorapr_jax.runtime.forms import INDEX, NUMBER, check_form
from lorapr_jax.runtime.leftovers import is_half
from lorapr_jax.runtime.lock import LOCK_FILE
from lorapr_jax.runtime.paths import is_local, make_folder

RUN_FILE = 'run.json'
SUMMARY_FILE = 'summary.json'
METRICS_FILE = 'metrics.jsonl'
REPORT_FILE = 'report.html'

# Settings that may change when a run is resumed: they say how its work is laid
# out over devices and memory.
_FREE = {
  'config.mesh.data',
  'config.mesh.fsdp',
  'config.mesh.sequence',
  'config.mesh.tensor',
  'config.model.attention',
  'config.model.remat',
  'config.model.scan_layers',
  'config.train.compiler_options',
  'config.train.loss_chunk',
  'config.train.micro_batch_size',
}


# What the rest of a run needs of a line of metrics.jsonl.
_RECORD = {'step': INDEX, 'tokens_per_second': NUMBER}


def check_workdir(workdir: Path, run: dict[str, Any]) -> None:
  """Refuses a workdir that is neither new nor of this run.

  `run` is the resolved settings, as in run.json.

  Raises:
    UserError: if the folder holds a finished run, another run, or files of
      something else.
  """
  # orbax, which writes checkpoints, knows no other places.
  if not is_local(workdir) and workdir.protocol != 'gs':
    raise UserError(
      f'{workdir}: checkpoints lie on a disk or in gs://; choose another '
      '--workdir'
    )
  _check_writable(workdir)
  if (workdir / SUMMARY_FILE).exists():
    page = workdir / REPORT_FILE
    report = (
      '' if page.exists() else f', or make its page: lorapr report {workdir}'
    )
    raise UserError(
      f'{workdir} holds a finished run: choose another --workdir{report}'
    )
  path = workdir / RUN_FILE
  if path.exists():
    stored = read_json(path)
    stored = {key: stored.get(key) for key in run}
    for at, old, new in _differences(stored, _plain(run)):
      raise UserError(
        f'{workdir} belongs to a run with another {".".join(at)} ({old!r}, now '
        f'{new!r}): choose another --workdir, or go on with the settings in '
        'its run.json'
      )
  elif workdir.exists() and not _is_empty(workdir):
    raise UserError(
      f'{workdir} exists and is no run of ours: choose another --workdir'
    )


def _is_empty(workdir: Path) -> bool:
  """Whether it is a folder that holds no more than a dead process may leave."""
  return workdir.is_dir() and all(
    path.name == LOCK_FILE or is_half(path) for path in workdir.iterdir()
  )


def _check_writable(workdir: Path) -> None:
  parent = workdir.absolute()
  while is_local(parent) and not parent.exists():
    parent = parent.parent
  try:
    # To try is the only way to know: permissions do not hold for root, and
    # say nothing of a disk that is read-only.
    if is_local(parent):
      tempfile.TemporaryFile(dir=parent).close()
    else:
      probe = parent / f'.{secrets.token_hex(8)}'
      probe.write_bytes(b'')
      probe.unlink()
  except OSError as error:
    raise UserError(
      f'{workdir} cannot be made: {parent} takes no files '
      f'({error.strerror or error}); choose another --workdir'
    ) from None


def claim_workdir(
  workdir: Path, run: dict[str, Any], inputs: dict[str, Any]
) -> None:
  """Makes the workdir and its run.json, or finds that they are of this run.

  Call it after `check_workdir`. `inputs` are hashes of what the run reads,
  {'files': {path: hash}, ...}.

  Raises:
    UserError: naming what the run read when it began, and is another now.
  """
  make_folder(workdir)
  path = workdir / RUN_FILE
  if not path.exists():
    write_json(path, _plain(run | {'inputs': inputs}))
    return
  begun_with = read_json(path).get('inputs')
  if not begun_with:
    raise UserError(
      f'{path} has no hashes of what its run reads, as of an earlier version: '
      'choose another --workdir'
    )
  for at, *_ in _differences(begun_with, inputs):
    raise UserError(
      f'{workdir} was begun with other contents of {at[-1]}: put these back, '
      'or choose another --workdir'
    )


def _plain(run: dict[str, Any]) -> Any:
  return json.loads(json.dumps(run))


def _differences(
  old: Any, new: Any, at: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any, Any]]:
  """(keys on the way, old, new) of each value that is another."""
  if '.'.join(at) in _FREE:
    return []
  if isinstance(old, dict | None) and isinstance(new, dict):
    old = old or {}  # A missing section counts as an empty one.
    return [
      difference
      for key in sorted(old.keys() | new.keys())
      for difference in _differences(old.get(key), new.get(key), (*at, key))
    ]
  return [] if old == new else [(at, old, new)]


def trim_metrics(workdir: Path, step: int) -> None:
  """Removes what was logged at `step` and later."""
  path = workdir / METRICS_FILE
  if not path.exists():
    return
  kept = b''
  for number, line in enumerate(read_bytes(path, LARGE).splitlines(), 1):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      break  # The process was killed while it wrote this line.
    check_form(record, _RECORD, path, f'line {number}')
    if record['step'] >= step:
      break
    kept += line + b'\n'
  write_bytes(path, kept)
