"""LoRAPrune from a checkpoint to a smaller checkpoint. Read top to bottom."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from pathlib import Path
import shlex
import sys
from typing import Any

import jax
from ml_collections import config_dict
from rich.console import Console

from lorapr_jax import checkpoint, interrupt, optimizer, steps
from lorapr_jax.eval.perplexity import Perplexity, evaluate_perplexity
from lorapr_jax.files import write_json, write_text
from lorapr_jax.finish import (
  check_counts,
  compare,
  cut,
  export_run,
  kept_of,
  merge,
  model_name,
  pruned_model,
)
from lorapr_jax.hf.gguf_vocabulary import vocabulary
from lorapr_jax.hf.load import Shards, check_tensors
from lorapr_jax.inputs import Places, device_batches, load_base, load_data
from lorapr_jax.phases import Phase, phases, total_steps
from lorapr_jax.pruning.masks import alive_counts
from lorapr_jax.report import metrics, summary
from lorapr_jax.report.display import Display
from lorapr_jax.report.page import REPORT_FILE, render_report
from lorapr_jax.report.run import IMPORTANCE_FILE
from lorapr_jax.report.scores import write_scores
from lorapr_jax.settings import RunSettings, split_config


def run(config: config_dict.ConfigDict, workdir: str | Path) -> dict[str, Any]:
  """Prunes a model by a config; everything it makes lies in `workdir`.

  A run that was cut short goes on from its last checkpoint when it is called
  again with the same config and workdir.

  Args:
    config: see configs/default.py.
    workdir: new, or of the same run.

  Returns:
    What summary.json holds.

  Raises:
    UserError: for a mistake in config, data, model or workdir.
    interrupt.Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
  """
  workdir = Path(workdir)

  # --- Config: every mistake that shows without reading weights or text.
  settings = split_config(config)
  places = Places.of(settings, settings.step.config)
  identity = {'config': config.to_dict(), 'resolved': resolved(settings)}
  checkpoint.check_workdir(workdir, identity)
  if settings.model_path:
    check_tensors(Shards(settings.model_path), settings.step.config)
  metrics.check_writers(settings.log)
  if 'gguf' in settings.export.routes:
    vocabulary(settings.model_path, settings.step.config)

  console, name = Console(stderr=True), model_name(settings.model_path)
  with Display(console, name, total_steps(settings)) as display:
    return run_phases(settings, places, identity, workdir, display)


def run_phases(
  settings: RunSettings,
  places: Places,
  identity: dict[str, Any],
  workdir: Path,
  display: Display,
) -> dict[str, Any]:
  """`run`, once all that can be checked ahead has been."""
  # --- Data: packed once, then memory-mapped; batch t depends on seed and t.
  display.start('data')
  first, *later = phases(settings)
  streams, held_out = load_data(settings, (p.data for p in (first, *later)))
  checkpoint.claim_workdir(workdir, identity)
  summary.print_plan(settings, display.print)

  # --- Model: the base is frozen; the state is small.
  display.start('load')
  load = functools.partial(
    load_base,
    settings.model_path,
    settings.step.config,
    settings.base_dtype,
    places.base,
    settings.train.seed,
  )
  params = load()

  def perplexity(params, step_settings, **adapted):
    if held_out is None:
      return None
    return evaluate_perplexity(
      params,
      held_out,
      step_settings,
      data=settings.data.eval,
      batch_size=settings.train.micro_batch_size,
      **adapted,
    )

  display.start('evaluate')
  measured = {'dense': perplexity(params, settings.step)}

  # --- Prune: groups are masked while LoRA trains, or at once.
  run_phase = functools.partial(
    train_phase,
    settings=settings,
    streams=streams,
    perplexity=perplexity,
    workdir=workdir,
    display=display,
  )
  state = run_phase(first, settings.step, places, params)
  skipped = int(state.skipped)

  # --- Cut: what is left is smaller.
  display.start('cut')
  config, kept = settings.step.config, kept_of(state.masks)
  model = pruned_model(
    settings.model_path,
    config,
    kept,
    dtype=settings.base_dtype.name,
    plan=settings.plan,
    settings=identity['config']['prune'],
  )
  check_counts(settings.plan, model.config)
  small, lora = cut(config, settings.step.lora, params, state.lora, kept)
  if settings.plan:
    write_scores(
      workdir / IMPORTANCE_FILE, state, config, settings.plan.prunable_layers
    )

  # --- Tune: LoRA goes on, on the small arrays; the base makes room.
  if later:
    del params
    small_step = dataclasses.replace(settings.step, config=model.config)
    small_places = Places.of(settings, model.config)
    small = jax.device_put(small, small_places.base)
    display.start('evaluate')
    measured['cut'] = perplexity(small, small_step, lora=lora)
    for phase in later:
      state = run_phase(phase, small_step, small_places, small, lora=lora)
      lora, skipped = state.lora, skipped + int(state.skipped)
    display.start('load')
    params = load()
  if skipped:
    display.warn(
      f'{skipped} of {sum(p.steps for p in (first, *later))} steps changed '
      'nothing: their gradients or scores were not finite'
    )

  # --- Merge and compare: what is left is an ordinary LLaMA.
  display.start('evaluate')
  weights = merge(
    small,
    lora,
    settings.step.lora,
    unmerged='peft' in settings.export.routes,
  )
  del small
  comparison = compare(
    settings, params, model.config, weights.merged, measured, perplexity
  )
  del params
  display.start('export')
  exports = export_run(settings, workdir, model, weights)
  display.stop()

  # --- Summary.
  result = {
    'model': model.name,
    'base': {key: model.pruning['base'][key] for key in ('name', 'sha256')},
    **summary.cost_report(
      dense=config,
      pruned=model.config,
      dtype=exports['hf']['dtype'],
      seq_len=settings.train.seq_len,
    ),
    'sparsity': summary.sparsity_report(settings.plan),
    **comparison,
    'seconds': display.seconds,
    'tokens_per_second': metrics.median_speed(workdir),
    'peak_memory_bytes': summary.peak_memory_bytes(),
    'skipped_steps': skipped,
    'warnings': display.warnings,
    'exports': exports,
    'versions': summary.versions(),
    'command': shlex.join(sys.argv),
  }
  write_json(workdir / checkpoint.SUMMARY_FILE, result)
  write_text(workdir / REPORT_FILE, render_report(workdir))
  return result


def resolved(settings: RunSettings) -> dict[str, Any]:
  """What the config leaves open, and a resumed run must find unchanged."""
  return {
    'base_dtype': settings.base_dtype.name,
    'compute_dtype': settings.step.dtype.name,
    'model': settings.step.config.to_hf(),
  }


def train_phase(
  phase: Phase,
  step_settings: steps.StepSettings,
  places: Places,
  params: Any,
  *,
  settings: RunSettings,
  streams: Mapping[str, Callable[..., Any]],
  perplexity: Callable[..., Perplexity | None],
  workdir: Path,
  display: Display,
  lora: Any = None,
) -> steps.TrainState:
  """The paper's algorithm, from a phase's last checkpoint to its last step.

  Args:
    phase: what it does; without a schedule nothing is masked or ranked.
    step_settings: with the sizes of `params`.
    places: for those sizes.
    params: the base, or what is left of it.
    settings: of the run.
    streams: {spec: the function of `batches`}, from `load_data`.
    perplexity: of weights and adapters; None where there is no held-out text.
    workdir: of the run.
    display: of the run.
    lora: the adapters to go on from; None: new ones.

  Raises:
    interrupt.Stopped: after SIGINT or SIGTERM, once a checkpoint is written.
  """
  display.start('compile')
  train, plan = settings.train, settings.plan
  schedule, config = phase.schedule, step_settings.config
  learning_rate = optimizer.learning_rate(
    train.lr_schedule, phase.learning_rate, phase.steps
  )
  adamw = optimizer.make_optimizer(learning_rate)
  lora_gradients = steps.make_lora_gradients(
    step_settings,
    places.state,
    needs=settings.criterion.needs if schedule else None,
    base_sharding=places.base,
  )
  update_importance = steps.make_update_importance(
    step_settings, settings.criterion, places.state
  )
  select_masks = jax.jit(steps.select_stack_masks, out_shardings=places.state)
  apply_update = steps.make_apply_update(adamw, places.state)
  init_key, step_key = jax.random.split(jax.random.key(train.seed))
  groups = tuple(plan.keep) if schedule else ()
  state = steps.init_state(init_key, step_settings, groups, adamw)
  if lora is not None:
    state = state.replace(lora=lora)
  state = jax.device_put(state, places.state)

  # --- Resume: all is in the state, and the data's position is its step.
  checkpoints = checkpoint.Checkpoints(
    workdir / phase.checkpoints, train.checkpoints_kept
  )
  state = checkpoints.restore(state)
  first_step, total = int(state.step), total_steps(settings)
  if first_step == phase.steps:
    checkpoints.close()
    return state
  first_of_run = phase.first_step + first_step
  checkpoint.trim_metrics(workdir, first_of_run)
  if first_step:
    display.print(f'resuming at step {first_of_run} of {total}')

  # --- Loop. Logging and saving wait for the device; else a step is always
  # queued behind the one that runs, and no more: Ctrl-C waits for the queue.
  signals = interrupt.StopSignals(display.notice_stop)
  log = metrics.Log(workdir, settings, first_of_run)
  previous_loss = state.step
  rest = range(first_step, phase.steps)
  batches = device_batches(
    streams[phase.data],
    places.batch,
    train.micro_batch_size,
    range(phase.first_batch + first_step, phase.first_batch + phase.steps),
  )
  with signals, checkpoints, log, batches as stream:
    for step, batch in zip(rest, stream, strict=True):
      results, grads, more = lora_gradients(
        params,
        state.lora,
        state.masks,
        batch,
        jax.random.fold_in(step_key, phase.first_step + step),
      )
      importance, ok = update_importance(
        state.importance,
        params,
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
        masks = select_masks(importance, masks, steps.by_stack(keep, config))
      state = state.replace(importance=importance, masks=masks)
      state = apply_update(state, grads, ok)
      if step == first_step:
        # Compiling held the first calls up; from here on they only queue.
        display.start(phase.name)
        log.restart_clock()
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
              params, step_settings, lora=state.lora, masks=state.masks
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
        metrics.check_finite(done - 1, state, display.print)
      stopping = signals.signum is not None
      if last or stopping or done % train.checkpoint_every == 0:
        interrupt.wait_for(state.step)
        checkpoints.save(state, step + 1)
      if stopping:
        break
  if signals.signum is not None:
    raise interrupt.Stopped(
      f'stopped at step {phase.first_step + int(state.step)} of {total}',
      signals.signum,
    )
  return state
