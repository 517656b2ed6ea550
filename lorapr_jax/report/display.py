"""What people see while a run goes: a live panel, or plain lines."""

from collections.abc import Mapping
import contextlib
import logging
import time
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorapr_jax.report import units
from lorapr_jax.runtime.terminal import PlainConsole, one_line
from lorapr_jax.runtime.time_left import TimeLeft


class Display(contextlib.AbstractContextManager):
  """Shows the phases of a run, the progress of its steps, and warnings.

  On a terminal it draws a panel and updates it in place. Elsewhere it prints a
  line for each phase and for each logged step. It prints the warnings that the
  package's modules log meanwhile, and keeps them for the summary.

  Attributes:
    seconds: the time spent in each phase that has ended.
    warnings: each warning once.
  """

  def __init__(
    self, console: PlainConsole, title: str, steps: int, hint: str = ''
  ):
    """For a run of so many steps; the hint is shown with every logged one."""
    self.seconds: dict[str, float] = {}
    self.warnings: list[str] = []
    self._console, self._title, self._steps = console, one_line(title), steps
    self._hint = hint
    self._left = TimeLeft(steps)
    self._compiled = False
    self._phase: str | None = None
    self._begin = 0.0
    self._batches, self._last_batch = '', 0.0
    self._batches_left = TimeLeft(0)
    self._step: int | None = None
    self._lines: list[str] = []
    self._notice: str | None = None
    self._live: Live | None = None
    if console.is_interactive and not console.quiet:
      self._live = Live(console=console, get_renderable=self._panel)
    self._handler = _Warnings(self)
    self._logger = logging.getLogger(__name__.partition('.')[0])

  def __enter__(self) -> 'Display':
    self._logger.addHandler(self._handler)
    # The root logger's handlers would print them a second time.
    self._logger.propagate = False
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self.stop()
    if self._live:
      self._live.stop()
    self._logger.propagate = True
    self._logger.removeHandler(self._handler)

  def start(self, phase: str) -> None:
    """Ends the phase before and starts this one, where it is another."""
    if phase == self._phase:
      return
    self.stop()
    self._begin, self._phase = time.perf_counter(), phase
    self._compiled = self._compiled or phase == 'compile'
    if not self._live:
      self.print(phase)

  def stop(self) -> None:
    """Ends the phase."""
    self.seconds, self._phase, self._batches = self._times(), None, ''

  def show_batches(self, done: int, total: int) -> None:
    """Shows how many batches of this phase are done.

    Elsewhere than on a terminal it is a line each time a tenth is done, where
    all of them take more than a minute.
    """
    self._batches, now = f'batch {done} of {total}', time.perf_counter()
    if done == 1:
      self._batches_left = TimeLeft(total)
    seconds, self._last_batch = now - self._last_batch, now
    self._batches_left.add(done, seconds, compiled=done == 1)
    if not (left := self._batches_left.seconds()):
      return
    self._batches += f'  {units.duration(left)} left'
    is_tenth = done * 10 // total > (done - 1) * 10 // total
    is_long = left * total > 60 * (total - done)
    if not self._live and is_tenth and is_long:
      self.print(self._batches)

  def show(self, record: Mapping[str, float], memory_bytes: int) -> None:
    """Shows a logged step: a line of metrics.jsonl, and the peak of memory."""
    self._step = int(record['step']) + 1
    self._left.add(self._step, record['seconds'], compiled=self._compiled)
    self._compiled = False
    quality = f'loss {record["loss"]:.3f}'
    if 'perplexity' in record:
      quality += f'  perplexity {record["perplexity"]:.2f}'
    cost = (
      f'{record["tokens_per_second"]:,.0f} tokens/s  '
      f'memory {memory_bytes / 1e9:.2f} GB'
    )
    if left := self._left.seconds():
      cost += f'  {units.duration(left)} left'
    layers = ''
    if 'layers_sparsity' in record:
      layers = f'layers {record["layers_sparsity"]:.1%}, '
    self._lines = [
      quality,
      f'pruned: {layers}heads {record["heads_sparsity"]:.1%}, '
      f'channels {record["channels_sparsity"]:.1%}, '
      f'parameters {1 - record["params_kept"]:.1%}',
      cost,
      *([self._hint] if self._hint else []),
    ]
    if not self._live:
      self.print('  '.join([self._progress(), *self._lines]))

  def print(self, text: str) -> None:
    """A line of its own, above the panel."""
    self._console.print(one_line(text), soft_wrap=True)

  def warn(self, text: str) -> None:
    """Prints a warning and keeps it, unless it is known already."""
    if text not in self.warnings:
      self.warnings.append(text)
      self.print(f'warning: {text}')

  def notice_stop(self) -> None:
    """Says that the run will stop. For a signal handler: it prints nothing.

    The panel shows it when it is next drawn.
    """
    self._notice = 'stopping after this step; Ctrl-C again stops at once'

  def _times(self) -> dict[str, float]:
    """The seconds of each phase, those of the present one included."""
    times = dict(self.seconds)
    if self._phase:
      spent = time.perf_counter() - self._begin
      times[self._phase] = times.get(self._phase, 0.0) + spent
    return times

  def _progress(self) -> str:
    return f'step {self._step} of {self._steps}'

  def _panel(self) -> RenderableType:
    """The panel as it is now; called in a thread of its own."""
    phase = self._phase
    parts: list[RenderableType] = [
      Text('  ').join(
        Text(f'{name} {seconds:.0f} s', 'bold' if name == phase else 'dim')
        for name, seconds in self._times().items()
      )
    ]
    if self._batches:
      parts.append(Text(self._batches))
    if self._step is not None:
      progress = Table.grid(padding=(0, 1), expand=True)
      progress.add_column(no_wrap=True)
      progress.add_column(ratio=1)
      progress.add_row(
        self._progress(),
        ProgressBar(total=self._steps, completed=self._step),
      )
      parts += [progress, *(Text(line) for line in self._lines)]
    if self._notice:
      parts.append(Text(self._notice, 'yellow'))
    return Panel(Group(*parts), title=Text(self._title), title_align='left')


class _Warnings(logging.Handler):
  """Hands the warnings that are logged to a display."""

  def __init__(self, display: Display):
    super().__init__(logging.WARNING)
    self._display = display

  def emit(self, record: logging.LogRecord) -> None:
    self._display.warn(record.getMessage())
