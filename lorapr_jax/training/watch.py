"""What goes on around the steps: clocks, log, checkpoints, signals."""

from collections.abc import Callable, Collection, Iterable, Iterator
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from lorapr_jax.errors import Stopped
from lorapr_jax.eval.perplexity import HeldOut
from lorapr_jax.pruning.compensation import repaired_of
from lorapr_jax.pruning.masks import alive_counts
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.report import metrics, summary
from lorapr_jax.report.display import Display
from lorapr_jax.runtime import interrupt, processes
from lorapr_jax.runtime.workdir import trim_metrics
from lorapr_jax.settings.phases import Phase
from lorapr_jax.settings.sections import (
  DataSettings,
  LogSettings,
  TrainSettings,
)
from lorapr_jax.training.base import Base
from lorapr_jax.training.checkpoint import Checkpoints
from lorapr_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Watch:
  """What all phases of a run are watched with.

  Attributes:
    workdir: of the run.
    display: what people see.
    steps: of the run in all.
    plan: what will be left; None if nothing is pruned.
    held_out: the text that data.eval_every measures on, if it is set.
    data: says when the perplexity is measured.
    train: says when is logged and saved.
    log: where else is logged.
    check_lock: checks that no other process writes to the workdir.
  """

  workdir: Path
  display: Display
  steps: int
  plan: PruningPlan | None
  held_out: HeldOut | None
  data: DataSettings
  train: TrainSettings
  log: LogSettings
  check_lock: Callable[[], None]

  @contextlib.contextmanager
  def over(
    self,
    phase: Phase,
    state: TrainState,
    compiling: Collection[int],
  ) -> Iterator['PhaseWatch']:
    """Watches the steps of its block; all is saved when it ends.

    `state` is that of the first step. At the steps in `compiling`, calls
    compile: their time is counted apart.

    Raises:
      Stopped: after SIGINT, SIGTERM or SIGHUP, once a checkpoint is written.
    """
    first_of_run = phase.first_step + int(state.step)
    if processes.is_first():
      trim_metrics(self.workdir, first_of_run)
    if int(state.step):
      self.display.print(f'resuming at step {first_of_run} of {self.steps}')
    folder = self.workdir / phase.checkpoints
    checkpoints = Checkpoints(folder, self.train.checkpoints_kept)
    signals = interrupt.StopSignals(self.display.notice_stop)
    tokens = self.train.batch_size * self.train.seq_len
    log = metrics.Log(self.workdir, self.log, tokens, first_of_run)
    with signals, checkpoints, log:
      watch = PhaseWatch(self, phase, checkpoints, log, signals, compiling)
      watch.before(int(state.step), state)
      yield watch
    if signals.signum is not None:
      raise Stopped(
        f'stopped at step {watch.done} of {self.steps}', signals.signum
      )


class PhaseWatch:
  """Watches one phase.

  Logging and saving wait for the device. Else one step is always queued behind
  the one that runs, and no more: Ctrl-C waits for the queue.

  Attributes:
    done: steps of the run that are done.
  """

  def __init__(
    self,
    run: Watch,
    phase: Phase,
    checkpoints: Checkpoints,
    log: metrics.Log,
    signals: interrupt.StopSignals,
    compiling: Collection[int],
  ):
    """See `Watch.over`."""
    self.done = 0
    self._run, self._phase = run, phase
    self._checkpoints, self._log, self._signals = checkpoints, log, signals
    self._compiling = compiling
    self._apart = contextlib.ExitStack()
    self._loss_before: Any = None
    self._stops = False

  def steps(self, first: int, batches: Iterable[Any]) -> Iterator[Any]:
    """(step, batch) from `first` on, until the phase ends or a signal stops."""
    steps = range(first, self._phase.steps)
    for step, batch in zip(steps, batches, strict=True):
      yield step, batch
      if self._stops:
        return

  def before(self, step: int, state: TrainState) -> None:
    """Stops the clocks where the calls of the step compile.

    Compiling holds the calls up. After that they only queue.
    """
    if step in self._compiling:
      pruning = self._phase.pruning
      cut = pruning and step in pruning.cuts
      interrupt.wait_for(state.step)
      self._apart.enter_context(self._log.paused())
      self._run.display.start('cut' if cut else 'compile')

  def after(
    self, step: int, state: TrainState, base: Base, results: dict[str, Any]
  ) -> None:
    """Logs, evaluates and saves where it is time, once a step is queued.

    `results` are 'loss' and 'grad_norm' of the step.
    """
    run, phase = self._run, self._phase
    if step in self._compiling:
      self._apart.close()
      run.display.start(phase.name)
    else:
      interrupt.wait_for(self._loss_before)
    self._loss_before = results['loss']
    last = step + 1 == phase.steps
    self.done = done = phase.first_step + step + 1
    every = run.data.eval_every
    evaluates = every > 0 and done % every == 0
    if last or evaluates or done % run.train.log_every == 0:
      interrupt.wait_for(state.step)
      self._write(state, results, self._evaluate(state, base, evaluates))
    self._stops = self._signals.stops()
    rung = phase.pruning and step + 1 in phase.pruning.rung_before
    saves = rung or done % run.train.checkpoint_every == 0
    if last or self._stops or saves:
      interrupt.wait_for(state.step)
      self._save(state, base)
    if rung:  # It is exported, and the run goes on from what was saved.
      self._checkpoints.wait()
    if not last and not self._stops:
      self.before(step + 1, state)

  def _evaluate(
    self, state: TrainState, base: Base, evaluates: bool
  ) -> dict[str, float]:
    if not evaluates:
      return {}
    run = self._run
    run.display.start('evaluate')
    with self._log.paused():
      found = run.held_out.perplexity(
        base.params, base.compute, lora=state.lora, masks=state.masks
      )
    run.display.start(self._phase.name)
    return {'perplexity': found.perplexity}

  def _write(
    self,
    state: TrainState,
    results: dict[str, Any],
    quality: dict[str, float],
  ) -> None:
    run, plan, skipped = self._run, self._run.plan, int(state.skipped)
    masks = self._phase.pruning is not None
    alive = alive_counts(state.masks) if masks else plan and plan.keep
    record = self._log.write(
      self.done - 1,
      **quality,
      lr=float(self._phase.learning_rate(int(state.step) - 1 - skipped)),
      **{name: float(value) for name, value in results.items()},
      **summary.sparsity_entry(plan, alive),
      skipped=skipped,
    )
    run.display.show(record, summary.peak_memory_bytes())
    metrics.check_finite(
      self.done - 1, skipped, int(state.skipped_in_a_row), run.display.print
    )

  def _save(self, state: TrainState, base: Base) -> None:
    self._run.check_lock()
    pruning = self._phase.pruning
    if pruning and pruning.repairs:
      state = state.replace(repaired=repaired_of(base.params))
    self._checkpoints.save(int(state.step), state)
