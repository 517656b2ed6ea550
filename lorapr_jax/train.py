"""LoRAPrune from a checkpoint to a smaller checkpoint. Read top to bottom."""

from collections.abc import Callable
from pathlib import Path
import shlex
import sys
from typing import Any

import jax
from ml_collections import config_dict
from rich.console import Console

from lorapr_jax import checkpoint, interrupt, optimizer, steps
from lorapr_jax.eval.latency import paired_latency
from lorapr_jax.eval.perplexity import Perplexity, evaluate_perplexity
from lorapr_jax.files import write_json, write_text
from lorapr_jax.finish import (
  check_counts,
  cut,
  export_run,
  kept_of,
  model_name,
  pruned_model,
  side_by_side,
)
from lorapr_jax.hf.gguf_vocabulary import vocabulary
from lorapr_jax.hf.load import Shards, check_tensors
from lorapr_jax.inputs import Places, device_batches, load_base, load_data
from lorapr_jax.pruning.masks import alive_counts
from lorapr_jax.report import metrics, summary
from lorapr_jax.report.display import Display
from lorapr_jax.report.page import REPORT_FILE, render_report
from lorapr_jax.report.run import IMPORTANCE_FILE
from lorapr_jax.report.scores import write_scores
from lorapr_jax.settings import RunSettings, split_config

_LATENCY = {'batch_size': 1, 'seq_len': 128}


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
  places = Places.of(settings)
  identity = {'config': config.to_dict(), 'resolved': resolved(settings)}
  checkpoint.check_workdir(workdir, identity)
  if settings.model_path:
    check_tensors(Shards(settings.model_path), settings.step.config)
  metrics.check_writers(settings.log)
  if 'gguf' in settings.export.routes:
    vocabulary(settings.model_path, settings.step.config)

  console = Console(stderr=True)
  with Display(
    console, model_name(settings.model_path), settings.train.steps
  ) as display:
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
  batch_at, held_out = load_data(settings)
  checkpoint.claim_workdir(workdir, identity)
  summary.print_plan(settings, display.print)

  # --- Model: the base is frozen; the state is small.
  display.start('load')
  params = load_base(
    settings.model_path,
    settings.step.config,
    settings.base_dtype,
    places.base,
    settings.train.seed,
  )

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
  dense = perplexity(params, settings.step)

  state = train_and_prune(
    settings, places, params, batch_at, perplexity, workdir, display
  )
  skipped = int(state.skipped)
  if skipped:
    display.warn(
      f'{skipped} of {settings.train.steps} steps changed nothing: their '
      'gradients or scores were not finite'
    )

  # --- Cut and merge: what is left is a smaller, ordinary LLaMA.
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
  small = cut(
    config,
    settings.step.lora,
    params,
    state.lora,
    kept,
    unmerged='peft' in settings.export.routes,
  )
  small_step = steps.StepSettings(model.config, dtype=settings.step.dtype)
  if settings.plan:
    write_scores(
      workdir / IMPORTANCE_FILE, state, config, settings.plan.prunable_layers
    )

  # --- Compare.
  display.start('evaluate')
  models = {
    'dense': (params, settings.step),
    'pruned': (small.merged, small_step),
  }
  pruned = perplexity(small.merged, small_step)
  latency = paired_latency(models, **_LATENCY)
  generations = side_by_side(models, settings)

  del params, models
  display.start('export')
  exports = export_run(settings, workdir, model, small)
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
    'perplexity': summary.perplexity_report(dense=dense, pruned=pruned),
    'latency': {**latency, **_LATENCY},
    'generations': generations,
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


def train_and_prune(
  settings: RunSettings,
  places: Places,
  params: Any,
  batch_at: Callable[..., Any],
  perplexity: Callable[..., Perplexity | None],
  workdir: Path,
  display: Display,
) -> steps.TrainState:
  """The paper's algorithm, from the last checkpoint to the last step.

  Raises:
    interrupt.Stopped: after SIGINT or SIGTERM, once a checkpoint is written.
  """
  display.start('compile')
  train, plan = settings.train, settings.plan
  learning_rate = optimizer.learning_rate(
    train.lr_schedule, train.learning_rate, train.steps
  )
  adamw = optimizer.make_optimizer(learning_rate)
  lora_gradients = steps.make_lora_gradients(settings.step, places.state)
  update_importance = steps.make_update_importance(
    settings.step, settings.criterion, places.state
  )
  select_masks = jax.jit(steps.select_stack_masks, out_shardings=places.state)
  apply_update = steps.make_apply_update(adamw, places.state)
  init_key, step_key = jax.random.split(jax.random.key(train.seed))
  state = steps.init_state(
    init_key, settings.step, tuple(plan.keep) if plan else (), adamw
  )
  state = jax.device_put(state, places.state)

  # --- Resume: all is in the state, and the data's position is its step.
  checkpoints = checkpoint.Checkpoints(workdir, train.checkpoints_kept)
  state = checkpoints.restore(state)
  first_step = int(state.step)
  checkpoint.trim_metrics(workdir, first_step)
  if first_step:
    display.print(f'resuming at step {first_step} of {train.steps}')

  # --- Loop. Logging and saving wait for the device; else a step is always
  # queued behind the one that runs, and no more: Ctrl-C waits for the queue.
  signals = interrupt.StopSignals(display.notice_stop)
  log = metrics.Log(workdir, settings, first_step)
  previous_loss = state.step
  rest = range(first_step, train.steps)
  stream = device_batches(batch_at, places.batch, train.micro_batch_size, rest)
  with signals, checkpoints, log, stream as batches:
    for step, batch in zip(rest, batches, strict=True):
      results, grads = lora_gradients(
        params,
        state.lora,
        state.masks,
        batch,
        jax.random.fold_in(step_key, step),
      )
      importance, ok = update_importance(
        state.importance,
        params,
        state.lora,
        grads,
        state.masks,
        results['grad_norm'],
      )
      masks = state.masks
      if plan and settings.schedule.is_pruning_step(step):
        keep = plan.keep_at(settings.schedule.progress(step))
        masks = select_masks(
          importance, masks, steps.by_stack(keep, settings.step.config)
        )
      state = state.replace(importance=importance, masks=masks)
      state = apply_update(state, grads, ok)
      if step == first_step:
        # Compiling held the first calls up; from here on they only queue.
        display.start('prune')
        log.restart_clock()
      else:
        interrupt.wait_for(previous_loss)
      previous_loss = results['loss']

      last = step + 1 == train.steps
      measured = settings.data.is_evaluation_step(step)
      if last or measured or (step + 1) % train.log_every == 0:
        interrupt.wait_for(state.step)
        quality = {}
        if measured:
          display.start('evaluate')
          with log.paused():
            quality['perplexity'] = perplexity(
              params, settings.step, lora=state.lora, masks=state.masks
            ).perplexity
          display.start('prune')
        record = log.write(
          step,
          **quality,
          lr=float(learning_rate(step - int(state.skipped))),
          **{name: float(value) for name, value in results.items()},
          **summary.sparsity_entry(plan, alive_counts(state.masks)),
          skipped=int(state.skipped),
        )
        display.show(record, summary.peak_memory_bytes())
        metrics.check_finite(step, state, display.print)
      stopping = signals.signum is not None
      if last or stopping or (step + 1) % train.checkpoint_every == 0:
        interrupt.wait_for(state.step)
        checkpoints.save(state, step + 1)
      if stopping:
        break
  if signals.signum is not None:
    raise interrupt.Stopped(
      f'stopped at step {int(state.step)} of {train.steps}', signals.signum
    )
  return state
