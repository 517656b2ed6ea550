"""LoRAPrune from a checkpoint to a smaller checkpoint. Read top to bottom."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
from pathlib import Path
import shlex
import sys
from typing import Any

from ml_collections import config_dict

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.eval.generation import check_prompt, stop_ids
from lorapr_jax.eval.remembered import remembered_perplexity
from lorapr_jax.exporting.ladder import Ladder
from lorapr_jax.exporting.model import (
  Description,
  describe_run,
  merge,
  model_name,
)
from lorapr_jax.exporting.write import export_run
from lorapr_jax.gguf.archs import architecture
from lorapr_jax.gguf.vocabulary import vocabulary
from lorapr_jax.hf.load import check_tensors, load_or_draw
from lorapr_jax.hf.shards import Shards
from lorapr_jax.hf.write import check_companions
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.shrink import Kept
from lorapr_jax.report import metrics, summary
from lorapr_jax.report.display import Display
from lorapr_jax.report.page import render_report
from lorapr_jax.report.run import IMPORTANCE_FILE
from lorapr_jax.report.scores import write_scores
from lorapr_jax.report.side_by_side import generations, latencies
from lorapr_jax.runtime import interrupt, processes
from lorapr_jax.runtime.files import write_json, write_text
from lorapr_jax.runtime.lock import holding
from lorapr_jax.runtime.paths import path_of
from lorapr_jax.runtime.terminal import PlainConsole
from lorapr_jax.runtime.workdir import (
  REPORT_FILE,
  RUN_FILE,
  SUMMARY_FILE,
  check_workdir,
  claim_workdir,
)
from lorapr_jax.settings.files import read_run_json
from lorapr_jax.settings.run import split_config
from lorapr_jax.training.base import Base, Places, kept_of
from lorapr_jax.training.batches import Batches, load_held_out
from lorapr_jax.training.cut import check_counts, finished, widened
from lorapr_jax.training.inputs import reading
from lorapr_jax.training.loop import train_phase
from lorapr_jax.training.state import carried
from lorapr_jax.training.teacher import remember_teacher
from lorapr_jax.training.watch import Watch


def _lock(
  workdir: Path, display: Display
) -> contextlib.AbstractContextManager[Callable[[], None]]:
  """Held by the process that writes; see `holding`."""
  if processes.is_first():
    return holding(workdir, display.print)
  return contextlib.nullcontext(lambda: None)


def _measured(
  config: config_dict.ConfigDict, workdir: Path
) -> dict[str, list[int]] | None:
  """The counts that this run measured when it began; None if it is new."""
  check_workdir(workdir, {'config': config.to_dict()})
  path = workdir / RUN_FILE
  if not path.exists():
    return None
  return read_run_json(path)['resolved']['keep']


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
    Stopped: after SIGINT, SIGTERM or SIGHUP, with a checkpoint to go on from.
  """
  workdir = path_of(workdir)

  # --- Config: every mistake that shows without reading weights or text.
  processes.check_same(config.to_dict())
  measured = None
  if config.prune.speedup is not None:
    measured = processes.from_first(lambda: _measured(config, workdir))
  settings = split_config(config, measured=measured)
  folder, compute, plan = settings.model.folder, settings.compute, settings.plan
  data, train, dense = settings.data, settings.train, settings.compute.config
  places = Places.of(
    settings.mesh, dense, settings.base_dtype, train.micro_batch
  )
  identity = {'config': config.to_dict(), 'resolved': settings.resolved()}
  processes.check_same(identity)
  if processes.is_first():
    check_workdir(workdir, identity)
  if folder:
    check_tensors(Shards(folder), dense.dequantized)
    check_companions(folder)
    stop_ids(folder)
  metrics.check_writers(settings.log, workdir)
  if 'gguf' in settings.export.routes:
    for exported in settings.exported:
      architecture(exported)
    vocabulary(folder, dense)

  console = PlainConsole(stderr=True, quiet=not processes.is_first())
  hint = processes.hint()
  with (
    Display(console, model_name(folder), settings.steps, hint) as display,
    _lock(workdir, display) as check_lock,
  ):
    if processes.is_first():  # Until now, another process may have run in it.
      check_workdir(workdir, identity)

    # --- Data: packed once, then memory-mapped; batch t depends on seed and t.
    display.start('data')
    specs = [phase.data for phase in settings.phases]
    if settings.pruning and settings.pruning.data:
      specs.append(settings.pruning.data)
    texts = dict.fromkeys([*specs, *filter(None, [data.eval])])
    with reading(folder, texts) as inputs_read:
      tokenizer = Tokenizer(folder) if folder else None
      for prompt in settings.report.prompts if tokenizer else ():
        check_prompt(tokenizer.encode(prompt), dense)
      batches = Batches.load(specs, tokenizer, dense.vocab_size, data, train)
      held_out = load_held_out(
        tokenizer, dense.vocab_size, data, train.micro_batch_size
      )
      inputs = inputs_read()
    if processes.is_first():
      claim_workdir(workdir, identity, inputs.recorded())
    processes.wait_for_others('claim the workdir')
    processes.check_shared(workdir / RUN_FILE)
    summary.print_plan(dense, settings.pruning, display.print)

    # --- Model: the base is frozen, but for what compensation repairs; the
    # state is small.
    display.start('load')

    def load() -> Base:
      params = load_or_draw(
        folder, dense, places.base, settings.base_dtype, train.seed
      )
      inputs.check_base()
      return Base(params, compute, places)

    base = load()
    display.start('evaluate')
    measured = {}
    if held_out:
      measured['dense'] = remembered_perplexity(
        held_out, inputs.sha256, base.params, compute
      )

    # --- Teacher: the dense model is asked while it is there.
    if train.distill:
      display.start('teacher')
      teacher = remember_teacher(
        *(base, settings.phases, batches, train.distill_top_k, workdir),
        show=display.show_batches,
      )
      batches = dataclasses.replace(batches, teacher=teacher)

    # --- Prune: groups are masked while LoRA trains, or at once. Where some are
    # cut out on the way, what comes back is smaller than what went in. Rungs
    # are exported on the way.
    def describe(kept: Kept, plan: PruningPlan | None) -> Description:
      return describe_run(
        folder,
        dense,
        kept,
        sha256=inputs.sha256,
        dtype=settings.base_dtype.name,
        plan=plan,
        settings=identity['config']['prune'],
      )

    watch = Watch(
      workdir,
      display,
      steps=settings.steps,
      plan=plan,
      held_out=held_out,
      data=data,
      train=train,
      log=settings.log,
      check_lock=check_lock,
    )
    go_on = functools.partial(
      generations,
      folder=folder,
      prompts=settings.report.prompts,
      max_new_tokens=settings.report.max_new_tokens,
    )
    ladder = Ladder(
      *(workdir, compute, settings.pruning, settings.export, train.seq_len),
      *(describe, load, go_on, held_out, display, check_lock),
    )
    run_phase = functools.partial(
      train_phase,
      seed=train.seed,
      batches=batches,
      watch=watch,
      leave=ladder.leave,
    )
    start, skipped = {}, 0
    for phase in settings.until_cut:
      state, base = run_phase(phase, base, start)
      start, skipped = carried(state), skipped + int(state.skipped)
    repair = summary.repair_report(
      settings.pruning, int(state.unrepaired), state.error_left.tolist()
    )
    if unrepaired := repair.get('unrepaired'):
      display.warn(
        f'{unrepaired} projections were left as they were where groups of '
        'their inputs were masked: no repair lessens the error on other tokens'
      )

    # --- Cut: what is left is smaller, and the larger base makes room.
    display.start('cut')
    groups = widened(state, dense)
    model = describe(kept_of(groups['masks']), plan)
    check_counts(plan, model.config)
    if plan and processes.is_first():
      path = workdir / IMPORTANCE_FILE
      write_scores(path, groups, dense, plan.prunable_layers)
    lora, base = finished(state, base)

    # --- Tune: LoRA goes on, on the small arrays.
    if settings.after_cut and held_out:
      display.start('evaluate')
      measured['cut'] = held_out.perplexity(
        base.params, base.compute, lora=lora
      )
    for phase in settings.after_cut:
      state, base = run_phase(phase, base, {'lora': lora})
      lora, skipped = state.lora, skipped + int(state.skipped)
    interrupt.let_sigterm_end()
    if skipped:
      display.warn(
        f'{skipped} of {settings.steps} steps changed nothing: their gradients '
        'or scores were not finite'
      )

    # --- Merge: what is left is an ordinary LLaMA, beside the dense one.
    display.start('evaluate')
    unmerged = 'peft' in settings.export.routes
    weights = merge(base.params, lora, compute.lora, unmerged=unmerged)
    del base
    display.start('load')
    pruned = dataclasses.replace(compute, config=model.config)
    models = {
      'dense': (load().params, compute),
      'pruned': (weights.merged, pruned),
    }
    display.start('evaluate')
    if held_out:
      measured['pruned'] = held_out.perplexity(*models['pruned'])
    comparison = {
      'perplexity': summary.perplexity_report(**measured),
      'latency': latencies(models),
      'generations': go_on(models),
    }
    del models

    # --- Export: every format is read back, and its logits are compared.
    display.start('export')
    check_lock()
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
        seq_len=train.seq_len,
      ),
      'sparsity': summary.sparsity_report(plan),
      'repair': repair,
      'cuts_on_the_way': settings.cuts,
      'rungs': ladder.report(),
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
