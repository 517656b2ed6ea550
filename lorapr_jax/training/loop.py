"""The paper's algorithm: a phase of a run, from its checkpoint to its end."""

import collections
from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from lorapr_jax.errors import Stopped
from lorapr_jax.eval.perplexity import Perplexity
from lorapr_jax.models.compute import Compute
from lorapr_jax.pruning.masks import alive_counts, by_stack, select_stack_masks
from lorapr_jax.pruning.milestones import Milestones
from lorapr_jax.report import metrics, summary
from lorapr_jax.report.display import Display
from lorapr_jax.runtime import interrupt, processes
from lorapr_jax.runtime.workdir import trim_metrics
from lorapr_jax.settings.phases import Phase, total_steps
from lorapr_jax.settings.run import RunSettings
from lorapr_jax.training import checkpoint, steps
from lorapr_jax.training.base import Base, weight_shapes
from lorapr_jax.training.batches import (
  device_batches,
)
from lorapr_jax.training.cut import (
  as_saved,
  cut_on_the_way,
)
from lorapr_jax.training.repair import make_compensate, repaired_of
from lorapr_jax.training.state import TrainState, init_state


class Functions(NamedTuple):
  """What the loop calls, compiled for one size; see steps.py, repair.py."""

  lora_gradients: Callable[..., Any]
  update_importance: Callable[..., Any]
  select_masks: Callable[..., Any]
  apply_update: Callable[..., Any]
  compensate: Callable[..., Any] | None

  @classmethod
  def of(
    cls,
    settings: RunSettings,
    phase: Phase,
    base: Base,
    adamw: optax.GradientTransformation,
  ) -> 'Functions':
    """For the size of `base`."""
    place, compensate = base.places.state, None
    if phase.schedule and settings.compensation:
      compensate = make_compensate(
        base.compute, settings.compensation, base.places.base, place
      )
    return cls(
      steps.make_lora_gradients(
        base.compute,
        place,
        needs=settings.criterion.needs if phase.schedule else None,
        base_sharding=base.places.base,
      ),
      steps.make_update_importance(base.compute, settings.criterion, place),
      jax.jit(select_stack_masks, out_shardings=place),
      steps.make_apply_update(adamw, place),
      compensate,
    )


def train_phase(
  phase: Phase,
  base: Base,
  *,
  settings: RunSettings,
  streams: Mapping[str, Callable[..., Any]],
  perplexity: Callable[..., Perplexity | None],
  workdir: Path,
  display: Display,
  teacher: Callable[..., Any] | None,
  lora: Any = None,
) -> tuple[TrainState, Base]:
  """Trains LoRA on the base and, if there is a schedule, masks groups.

  Args:
    phase: what it does; without a schedule nothing is masked or ranked.
    base: the weights, or what is left of them. Arrays that are cut on the way
      or repaired are deleted.
    settings: of the run.
    streams: {spec: the function of `batches`}, from `load_data`.
    perplexity: of weights and adapters; None where there is no held-out text.
    workdir: of the run.
    display: of the run.
    teacher: from `remember_teacher`; None where none is remembered.
    lora: the adapters to go on from; None: new ones.

  Returns:
    The last state, and the weights in its size.

  Raises:
    Stopped: after SIGINT or SIGTERM, once a checkpoint is written.
  """
  display.start('compile')
  train, plan, schedule = settings.train, settings.plan, phase.schedule
  learning_rate = steps.learning_rate(
    train.lr_schedule, phase.learning_rate, phase.steps
  )
  adamw = steps.make_optimizer(learning_rate)
  init_key, step_key = jax.random.split(jax.random.key(train.seed))

  def new_state(size: Compute) -> TrainState:
    groups = tuple(plan.keep) if schedule else ()
    return init_state(init_key, size, groups, adamw)

  # --- Resume: all is in the state, and the data's position is its step.
  checkpoints = checkpoint.Checkpoints(
    workdir / phase.checkpoints, train.checkpoints_kept
  )
  resumed = resume(checkpoints, base, phase, new_state, settings, display)
  if resumed:
    state, base = resumed
  else:
    state = new_state(base.compute)
    if lora is not None:
      state = state.replace(lora=lora)
    state = jax.device_put(state, base.places.state)
  first_step, total = int(state.step), total_steps(settings)
  if first_step == phase.steps:
    checkpoints.close()
    return state, base
  first_of_run = phase.first_step + first_step
  if processes.is_first():
    trim_metrics(workdir, first_of_run)
  if first_step:
    display.print(f'resuming at step {first_of_run} of {total}')

  # --- Loop. Logging and saving wait for the device; else a step is always
  # queued behind the one that runs, and no more: Ctrl-C waits for the queue.
  signals = interrupt.StopSignals(display.notice_stop)
  step_tokens = train.batch_size * train.seq_len
  log = metrics.Log(workdir, settings.log, step_tokens, first_of_run)
  functions = Functions.of(settings, phase, base, adamw)
  milestones = Milestones(plan, schedule) if schedule else None
  first_repair = True
  previous_loss = state.step
  # Of the newest batches no more than there are when masking begins.
  most = settings.compensation.batches if functions.compensate else 0
  begin = milestones.maskings[0] if milestones else 0
  newest = collections.deque(maxlen=min(most, begin + 1))
  # What a run that was not cut short would have kept at this step.
  seen = min(first_step, newest.maxlen)
  batches = device_batches(
    streams[phase.data],
    base.places.batch,
    train.micro_batch_size,
    range(
      phase.first_batch + first_step - seen, phase.first_batch + phase.steps
    ),
  )
  with signals, checkpoints, log, batches as stream:
    newest.extend(itertools.islice(stream, seen))
    for step, batch in zip(range(first_step, phase.steps), stream, strict=True):
      newest.append(batch)
      if teacher:
        batch = {**batch, 'teacher': teacher(phase, step)}
      cutting = step in phase.cuts
      repairing = functions.compensate and step in milestones.maskings
      compiling = cutting or step == first_step or (repairing and first_repair)
      if compiling:
        interrupt.wait_for(state.step)
      # Compiling holds the calls up; after that they only queue.
      with log.paused() if compiling else contextlib.nullcontext():
        if cutting:
          display.start('cut')
          present = milestones.present(step)
          state, base = cut_on_the_way(state, base, present, settings)
          functions = Functions.of(settings, phase, base, adamw)
          first_repair = True
          display.start('compile')
        results, grads, more = functions.lora_gradients(
          base.params,
          state.lora,
          state.masks,
          batch,
          jax.random.fold_in(step_key, phase.first_step + step),
        )
        importance, ok = functions.update_importance(
          state.importance,
          base.params,
          state.lora,
          grads,
          more,
          state.masks,
          results['grad_norm'],
        )
        del more  # A gradient of the base would stay through the next step.
        masks = state.masks
        if schedule and schedule.is_pruning_step(step):
          keep = plan.keep_at(schedule.progress(step))
          counts = by_stack(keep, base.compute.config)
          masks = functions.select_masks(importance, masks, counts)
        if repairing:
          if first_repair:
            display.start('compile')
          first_repair = False
          params, failed = functions.compensate(
            base.params, state.lora, state.masks, masks, tuple(newest)
          )
          base = base._replace(params=params)
          state = state.replace(unrepaired=state.unrepaired + failed)
        state = state.replace(importance=importance, masks=masks)
        state = functions.apply_update(state, grads, ok)
      if compiling:
        display.start(phase.name)
      else:
        interrupt.wait_for(previous_loss)
      previous_loss = results['loss']

      last, done = step + 1 == phase.steps, phase.first_step + step + 1
      measured = settings.data.is_evaluation_step(done - 1)
      if last or measured or done % train.log_every == 0:
        interrupt.wait_for(state.step)
        quality = {}
        if measured:
          display.start('evaluate')
          with log.paused():
            quality['perplexity'] = perplexity(
              base.params, base.compute, lora=state.lora, masks=state.masks
            ).perplexity
          display.start(phase.name)
        alive = alive_counts(state.masks) if schedule else plan and plan.keep
        record = log.write(
          done - 1,
          **quality,
          lr=float(learning_rate(step - int(state.skipped))),
          **{name: float(value) for name, value in results.items()},
          **summary.sparsity_entry(plan, alive),
          skipped=int(state.skipped),
        )
        display.show(record, summary.peak_memory_bytes())
        metrics.check_finite(
          done - 1,
          int(state.skipped),
          int(state.skipped_in_a_row),
          display.print,
        )
      stopping = signals.stops()
      if last or stopping or done % train.checkpoint_every == 0:
        interrupt.wait_for(state.step)
        repaired = ()
        if functions.compensate:
          repaired = repaired_of(base.params)
        checkpoints.save(step + 1, state.replace(repaired=repaired))
      if stopping:
        break
  if signals.signum is not None:
    raise Stopped(
      f'stopped at step {phase.first_step + int(state.step)} of {total}',
      signals.signum,
    )
  return state, base


def resume(
  checkpoints: checkpoint.Checkpoints,
  base: Base,
  phase: Phase,
  new_state: Callable[[Compute], TrainState],
  settings: RunSettings,
  display: Display,
) -> tuple[TrainState, Base] | None:
  """What a phase goes on from: its newest checkpoint that can be read.

  Damaged ones after it are set aside.

  Args:
    checkpoints: of the phase.
    base: as loaded. Arrays that were cut on the way or repaired are deleted.
    phase: of the run.
    new_state: the state at the start, of a size.
    settings: of the run.
    display: of the run.

  Returns:
    The state, and the base cut and repaired as it was then. None if there is
    no checkpoint.

  Raises:
    checkpoint.Damaged: if there is but one, and it cannot be read.
  """
  repaired = phase.schedule and settings.compensation
  while True:
    try:
      if (step := checkpoints.newest()) is None:
        return None
      size = base.compute
      if phase.cuts:
        milestones = Milestones(settings.plan, phase.schedule)
        layers = milestones.size_at(step, phase.cuts).layers
        config = dataclasses.replace(size.config, layers=layers)
        size = dataclasses.replace(size, config=config)
      shapes, uncut = (
        jax.eval_shape(functools.partial(new_state, x))
        for x in (size, base.compute)
      )
      shapes = shapes.replace(whole=uncut.whole)
      if repaired:
        shapes = shapes.replace(
          repaired=repaired_of(
            weight_shapes(base.places.mesh, size.config, base.dtype)
          )
        )
      state = checkpoints.restore(step, shapes, base.places.state)
      break
    except checkpoint.Damaged:
      if (done := checkpoints.set_newest_aside()) is None:
        raise
      display.warn(done)
  base = as_saved(base, state)
  return state.replace(repaired=()), base
