"""LoRAPrune from a checkpoint to a smaller checkpoint. Read top to bottom."""

import dataclasses
import functools
from pathlib import Path
import shlex
import sys
from typing import Any

from ml_collections import config_dict
from rich.console import Console

from lorapr_jax.eval.perplexity import evaluate_perplexity
from lorapr_jax.eval.remembered import remembered_perplexity
from lorapr_jax.exporting.model import describe_run, merge, model_name
from lorapr_jax.exporting.write import export_run
from lorapr_jax.gguf.vocabulary import vocabulary
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.hf.load import check_tensors, load_or_draw
from lorapr_jax.hf.shards import Shards
from lorapr_jax.report import metrics, summary
from lorapr_jax.report.display import Display
from lorapr_jax.report.page import REPORT_FILE, render_report
from lorapr_jax.report.run import IMPORTANCE_FILE
from lorapr_jax.report.scores import write_scores
from lorapr_jax.report.side_by_side import generations, latencies
from lorapr_jax.runtime import interrupt, processes
from lorapr_jax.runtime.files import write_json, write_text
from lorapr_jax.runtime.paths import path_of
from lorapr_jax.runtime.workdir import (
  RUN_FILE,
  SUMMARY_FILE,
  check_workdir,
  claim_workdir,
)
from lorapr_jax.settings.phases import phases, total_steps
from lorapr_jax.settings.run import RunSettings, split_config
from lorapr_jax.training.base import (
  Base,
  Places,
  kept_of,
)
from lorapr_jax.training.batches import load_data
from lorapr_jax.training.cut import check_counts, finished, widened
from lorapr_jax.training.loop import train_phase
from lorapr_jax.training.teacher import remember_teacher


def run(config: config_dict.ConfigDict, workdir: str | Path) -> dict[str, Any]:
  """Prunes a model by a config; everything it makes lies in `workdir`.

  A run that was cut short goes on from its last checkpoint when it is called
  again with the same config and workdir.

  Args:
    config: see configs/default.py.
    workdir: new, or of the same run.

  Returns:
    What summary.json holds; {} on all processes but the first.

  Raises:
    UserError: for a mistake in config, data, model or workdir.
    Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
  """
  workdir = path_of(workdir)

  # --- Config: every mistake that shows without reading weights or text.
  settings = split_config(config)
  places = Places.of(
    settings.device_mesh,
    settings.compute.config,
    settings.base_dtype,
    settings.train.micro_batch,
  )
  identity = {'config': config.to_dict(), 'resolved': resolved(settings)}
  processes.check_same(identity, 'settings')
  if processes.is_first():
    check_workdir(workdir, identity)
  if settings.model_path:
    check_tensors(Shards(settings.model_path), settings.dense)
  metrics.check_writers(settings.log, workdir)
  if 'gguf' in settings.export.routes:
    vocabulary(settings.model_path, settings.compute.config)

  console = Console(stderr=True, quiet=not processes.is_first())
  name = model_name(settings.model_path)
  steps, hint = total_steps(settings), processes.hint()
  with Display(console, name, steps, hint) as display:
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
  if processes.is_first():
    claim_workdir(workdir, identity)
  processes.wait_for_others('claim the workdir')
  processes.check_shared(workdir / RUN_FILE)
  summary.print_plan(settings, display.print)

  # --- Model: the base is frozen, but for what compensation repairs; the state
  # is small.
  display.start('load')
  load = functools.partial(
    load_or_draw,
    settings.model_path,
    settings.compute.config,
    places.base,
    settings.base_dtype,
    settings.train.seed,
  )
  base = Base(load(), settings.compute, places)

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
  measured = {
    'dense': remembered_perplexity(
      settings,
      held_out,
      functools.partial(perplexity, base.params, settings.compute),
    )
  }

  # --- Teacher: the dense model is asked while it is there.
  teacher = None
  if settings.train.distill:
    display.start('teacher')
    teacher = remember_teacher(
      base,
      (first, *later),
      top_k=settings.train.distill_top_k,
      micro_batch_size=settings.train.micro_batch_size,
      streams=streams,
      workdir=workdir,
    )

  # --- Prune: groups are masked while LoRA trains, or at once. Where some are
  # cut out on the way, what comes back is smaller than what went in.
  run_phase = functools.partial(
    train_phase,
    streams=streams,
    perplexity=perplexity,
    workdir=workdir,
    display=display,
    teacher=teacher,
  )
  state, base = run_phase(first, base, settings=settings)
  skipped = int(state.skipped)
  if unrepaired := int(state.unrepaired):
    display.warn(
      f'prune.compensate found no finite repair for {unrepaired} projections, '
      'which stay as they were'
    )

  # --- Cut: what is left is smaller, and the larger base makes room.
  display.start('cut')
  whole, dense = settings.compute.config, settings.dense
  groups = widened(state, whole)
  model = describe_run(
    settings.model_path,
    whole,
    kept_of(groups['masks']),
    dtype=settings.base_dtype.name,
    plan=settings.plan,
    settings=identity['config']['prune'],
  )
  check_counts(settings.plan, model.config)
  if settings.plan and processes.is_first():
    layers = settings.plan.prunable_layers
    write_scores(workdir / IMPORTANCE_FILE, groups, dense, layers)
  lora, base = finished(state, base)

  # --- Tune: LoRA goes on, on the small arrays.
  if later:
    display.start('evaluate')
    measured['cut'] = perplexity(base.params, base.compute, lora=lora)
  for phase in later:
    state, base = run_phase(phase, base, settings=settings, lora=lora)
    lora, skipped = state.lora, skipped + int(state.skipped)
  interrupt.let_sigterm_end()
  if skipped:
    display.warn(
      f'{skipped} of {sum(p.steps for p in (first, *later))} steps changed '
      'nothing: their gradients or scores were not finite'
    )

  # --- Merge and compare: what is left is an ordinary LLaMA.
  display.start('evaluate')
  weights = merge(
    base.params,
    lora,
    settings.compute.lora,
    unmerged='peft' in settings.export.routes,
  )
  del base
  display.start('load')
  params = load()
  display.start('evaluate')
  small = dataclasses.replace(settings.compute, config=model.config)
  measured['pruned'] = perplexity(weights.merged, small)
  models = {
    'dense': (params, settings.compute),
    'pruned': (weights.merged, small),
  }
  comparison = {
    'perplexity': summary.perplexity_report(**measured),
    'latency': latencies(models),
    'generations': generations(
      models,
      settings.model_path,
      settings.report.prompts,
      settings.report.max_new_tokens,
    ),
  }
  del params, models
  display.start('export')
  exports = export_run(settings.export, workdir, model, weights)
  display.stop()
  if not processes.is_first():
    return {}

  # --- Summary.
  result = {
    'model': model.name,
    'base': {key: model.pruning['base'][key] for key in ('name', 'sha256')},
    **summary.cost_report(
      dense=dense,
      pruned=model.config,
      dtype=exports['hf']['dtype'],
      seq_len=settings.train.seq_len,
    ),
    'sparsity': summary.sparsity_report(settings.plan),
    'cuts_on_the_way': list(settings.cuts),
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
  write_json(workdir / SUMMARY_FILE, result)
  write_text(workdir / REPORT_FILE, render_report(workdir))
  return result


def resolved(settings: RunSettings) -> dict[str, Any]:
  """What the config leaves open, and a resumed run must find unchanged."""
  plan = settings.plan
  return {
    'base_dtype': settings.base_dtype.name,
    'compute_dtype': settings.compute.dtype.name,
    'matmul_dtype': settings.compute.matmul_dtype.name,
    'model': config_to_hf(settings.compute.config),
    # With another mesh.tensor other counts may be the nearest.
    'keep': plan.keep if plan else {},
    'cuts': settings.cuts,
    # Sizes on the way follow from them.
    'multiples': plan.multiples if settings.cuts else {},
  }
