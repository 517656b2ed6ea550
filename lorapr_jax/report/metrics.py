"""What a run shows while it goes: metrics.jsonl and a line with progress."""

from datetime import timedelta
import json
from pathlib import Path
import time
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
)

from lorapr_jax.errors import UserError
from lorapr_jax.settings import TrainSettings
from lorapr_jax.steps import TrainState

MAX_SKIPPED_IN_A_ROW = 5


class Log:
  """Writes a JSON line and moves the bar for every logged step.

  On a terminal the bar lives in place; elsewhere each logged step is a line.
  """

  def __init__(
    self, path: Path, train: TrainSettings, first_step: int, console: Console
  ):
    """Appends to `path`; the run begins at `first_step`."""
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115
    self._steps = train.steps
    self._tokens = train.batch_size * train.seq_len
    self._last, self._next_step = time.perf_counter(), first_step
    self._console = console
    self._bar = Progress(
      TextColumn('prune'),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn('{task.fields[text]}'),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._bar.add_task(
      '', total=train.steps, completed=first_step, text='compiling'
    )

  def __enter__(self) -> 'Log':
    self._bar.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._bar.stop()
    self._file.close()

  def write(self, step: int, **record: Any) -> None:
    """Logs a step that is done.

    Adds `tokens` (of the run so far), `seconds` (of a step, the mean since
    the last logged one) and `tokens_per_second`.
    """
    now = time.perf_counter()
    seconds = (now - self._last) / (step + 1 - self._next_step)
    self._last, self._next_step = now, step + 1
    speed = self._tokens / seconds
    record |= {
      'tokens': (step + 1) * self._tokens,
      'seconds': seconds,
      'tokens_per_second': speed,
    }
    self._file.write(json.dumps({'step': step, **record}) + '\n')
    self._file.flush()
    left = timedelta(seconds=round(seconds * (self._steps - step - 1)))
    text = (
      f'loss {record["loss"]:.3f}  heads -{record["heads_sparsity"]:.1%}  '
      f'channels -{record["channels_sparsity"]:.1%}  {speed:,.0f} tokens/s  '
      f'{left} left'
    )
    self._bar.update(self._task, completed=step + 1, text=text)
    if not self._console.is_terminal:
      self._console.print(f'{step + 1}/{self._steps}  {text}', soft_wrap=True)


def check_finite(step: int, state: TrainState, console: Console) -> None:
  """Warns of skipped steps, and stops after a few in a row.

  Raises:
    UserError: after MAX_SKIPPED_IN_A_ROW steps without finite gradients.
  """
  in_a_row = int(state.skipped_in_a_row)
  if not in_a_row:
    return
  console.print(
    f'step {step}: gradients or scores are not finite; {int(state.skipped)} '
    'steps skipped so far'
  )
  if in_a_row >= MAX_SKIPPED_IN_A_ROW:
    raise UserError(
      f'{in_a_row} steps in a row without finite gradients or scores, up to '
      f'step {step}: lower train.learning_rate, or use '
      'model.compute_dtype=float32'
    )


class Clock:
  """Adds up the seconds of each phase, and says when one starts."""

  def __init__(self, console: Console):
    self.seconds: dict[str, float] = {}
    self._console = console
    self._phase: str | None = None
    self._begin = 0.0

  def start(self, phase: str) -> None:
    """Ends the phase before and starts this one."""
    self.stop()
    self._console.print(f'[bold]{phase}[/bold]')
    self._phase, self._begin = phase, time.perf_counter()

  def stop(self) -> None:
    """Ends the phase."""
    if self._phase:
      spent = time.perf_counter() - self._begin
      self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + spent
    self._phase = None
