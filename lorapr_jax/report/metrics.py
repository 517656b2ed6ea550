"""Writes what a run logs: metrics.jsonl, TensorBoard, Weights & Biases."""

from collections.abc import Callable, Iterator
import contextlib
import importlib.util
import json
from pathlib import Path
import secrets
import statistics
import time
from typing import Any

from lorapr_jax.errors import UserError
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.files import naming, read_json, write_json, write_text
from lorapr_jax.runtime.paths import is_local
from lorapr_jax.runtime.workdir import METRICS_FILE, RUN_FILE
from lorapr_jax.settings.sections import LogSettings

MAX_SKIPPED_IN_A_ROW = 5
TENSORBOARD_FOLDER = 'tensorboard'
WANDB_FILE = 'wandb.json'

# The section of a chart for each value; the others are in `train`.
_SECTIONS = {
  'heads_sparsity': 'prune',
  'channels_sparsity': 'prune',
  'layers_sparsity': 'prune',
  'params_kept': 'prune',
  'perplexity': 'eval',
  'seconds': 'speed',
  'tokens_per_second': 'speed',
}


class Log:
  """Completes the record of every logged step and writes it.

  It is written to metrics.jsonl, and to what else `log.*` asks for. Only the
  first process writes.
  """

  def __init__(
    self, workdir: Path, log: LogSettings, step_tokens: int, first_step: int
  ):
    """Goes on with the log of the steps before `first_step` in the workdir."""
    self._tokens = step_tokens
    self._last, self._next_step = time.perf_counter(), first_step
    self._path, self._charts = workdir / METRICS_FILE, []
    if processes.is_first() and log.tensorboard:
      self._charts.append(_TensorBoard(workdir, first_step))
    if processes.is_first() and log.wandb:
      self._charts.append(_Wandb(workdir, log.wandb))

  def __enter__(self) -> 'Log':
    return self

  def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
    for chart in self._charts:
      chart.close(failed=error is not None)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Keeps the time of its `with` block out of the next record."""
    start = time.perf_counter()
    yield
    self._last += time.perf_counter() - start

  def write(self, step: int, **record: float) -> dict[str, float]:
    """Logs a step that is done.

    Adds `tokens` (of the whole run so far), `seconds` (of a step, the mean
    since the last logged step) and `tokens_per_second`.

    Returns:
      The whole record.
    """
    now = time.perf_counter()
    seconds = (now - self._last) / (step + 1 - self._next_step)
    self._last, self._next_step = now, step + 1
    record = {
      'step': step,
      **record,
      'tokens': (step + 1) * self._tokens,
      'seconds': seconds,
      'tokens_per_second': self._tokens / seconds,
    }
    if processes.is_first():
      _append(self._path, json.dumps(record) + '\n')
    for chart in self._charts:
      chart.write(record)
    return record


def _append(path: Path, line: str) -> None:
  """Writes a line whole and at once."""
  if is_local(path):
    with naming(path), path.open('a', encoding='utf-8') as file:
      file.write(line)
  else:  # Such stores cannot append.
    before = path.read_text(encoding='utf-8') if path.exists() else ''
    write_text(path, before + line)


class _TensorBoard:
  """Writes event files to workdir/tensorboard, without TensorFlow."""

  def __init__(self, workdir: Path, first_step: int):
    from tensorboardX import SummaryWriter

    # TensorBoard hides what older files hold of this step and later ones.
    self._writer = SummaryWriter(
      str(workdir / TENSORBOARD_FOLDER), purge_step=first_step or None
    )
    if not first_step:
      text = (workdir / RUN_FILE).read_text(encoding='utf-8')
      self._writer.add_text('config', f'```\n{text}```')

  def write(self, record: dict[str, float]) -> None:
    for name, value in _scalars(record).items():
      self._writer.add_scalar(name, value, record['step'])
    self._writer.flush()

  def close(self, failed: bool) -> None:
    self._writer.close()


class _Wandb:
  """Writes to a run of Weights & Biases, whose id lies in the workdir.

  A resumed run goes on with the same one, which keeps the steps that it has.
  """

  def __init__(self, workdir: Path, project: str):
    import wandb

    path = workdir / WANDB_FILE
    if not path.exists():
      write_json(path, {'id': secrets.token_hex(8)})
    try:
      self._run = wandb.init(
        project=project,
        id=read_json(path)['id'],
        name=workdir.resolve().name,
        resume='allow',
        dir=workdir if is_local(workdir) else None,
        config=read_json(workdir / RUN_FILE),
        # Our panel has standard error for itself.
        settings=wandb.Settings(console='off'),
      )
    except wandb.Error as error:
      raise _refused(project, error) from None

  def write(self, record: dict[str, float]) -> None:
    self._run.log(_scalars(record), step=record['step'])

  def close(self, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))


def _scalars(record: dict[str, float]) -> dict[str, float]:
  """{'loss': 2.0} to {'train/loss': 2.0}, for charts over steps."""
  return {
    f'{_SECTIONS.get(name, "train")}/{name}': value
    for name, value in record.items()
    if name != 'step'
  }


def median_speed(workdir: Path) -> float:
  """The median of the logged tokens per second."""
  lines = (workdir / METRICS_FILE).read_text(encoding='utf-8').splitlines()
  return statistics.median(json.loads(x)['tokens_per_second'] for x in lines)


def check_writers(log: LogSettings, workdir: Path) -> None:
  """Checks, before any work, that all that `log.*` asks for can be written to.

  Raises:
    UserError: if a package is missing, if TensorBoard's files cannot be written
      to the workdir, or if W&B knows no user or project.
  """
  if log.tensorboard and not is_local(workdir):
    raise UserError(
      f'log.tensorboard writes to a disk, not to {workdir}: turn it off, or '
      'use log.wandb'
    )
  for key, asked, package in (
    ('tensorboard', log.tensorboard, 'tensorboardX'),
    ('wandb', log.wandb, 'wandb'),
  ):
    if asked and importlib.util.find_spec(package) is None:
      raise UserError(
        f'log.{key} needs the package {package}: pip install {package}'
      )
  if log.wandb and processes.is_first():
    import wandb

    try:
      wandb.Settings(project=log.wandb)
      if wandb.setup().settings.mode == 'online':
        wandb.login()
    except (wandb.Error, ValueError) as error:
      raise _refused(log.wandb, error) from None


def _refused(project: str, error: Exception) -> UserError:
  reason = ' '.join(str(error).split())
  return UserError(
    f'log.wandb={project}: {reason} (WANDB_MODE=offline needs no login)'
  )


def check_finite(
  step: int,
  skipped: int,
  skipped_in_a_row: int,
  print_line: Callable[[str], None],
) -> None:
  """Prints how many steps were skipped in all, if the last one was.

  Raises:
    UserError: after MAX_SKIPPED_IN_A_ROW steps without finite gradients.
  """
  if not skipped_in_a_row:
    return
  print_line(
    f'step {step}: gradients or scores are not finite, or none of its tokens '
    f'counts in the loss; {skipped} steps skipped so far'
  )
  if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
    raise UserError(
      f'{skipped_in_a_row} steps in a row without finite gradients or scores, '
      f'up to step {step}: lower train.learning_rate, or use '
      'model.compute_dtype=float32'
    )
