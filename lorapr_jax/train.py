"""LoRAPrune from a checkpoint to a smaller checkpoint. Read top to bottom."""

from collections.abc import Callable
import functools
import json
from pathlib import Path
import shlex
import statistics
import sys
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_dict
import numpy as np
from rich.console import Console

from lorapr_jax import checkpoint, optimizer, sharding, steps
from lorapr_jax.data import pipeline
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError
from lorapr_jax.eval.latency import paired_latency
from lorapr_jax.eval.perplexity import evaluate_perplexity
from lorapr_jax.files import write_json
from lorapr_jax.finish import (
  check_counts,
  cut,
  export_run,
  kept_of,
  model_name,
)
from lorapr_jax.hf.gguf_vocabulary import vocabulary
from lorapr_jax.hf.load import (
  Shards,
  check_tensors,
  load_params,
)
from lorapr_jax.models import llama
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.pruning.masks import alive_counts
from lorapr_jax.pruning.shrink import shrunk_config
from lorapr_jax.report import metrics, summary
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
  """
  workdir = Path(workdir)
  console = Console(stderr=True, highlight=False)
  clock = metrics.Clock(console)

  # --- Config: every mistake that shows without reading weights or text.
  settings = split_config(config)
  places = Places.of(settings)
  identity = {'config': config.to_dict(), 'resolved': resolved(settings)}
  checkpoint.check_workdir(workdir, identity)
  if settings.model_path:
    check_tensors(Shards(settings.model_path), settings.step.config)
  if 'gguf' in settings.export.routes:
    vocabulary(settings.model_path, settings.step.config)

  # --- Data: packed once, then memory-mapped; batch t depends on seed and t.
  clock.start('data')
  batch_at, held_out = load_data(settings)
  checkpoint.claim_workdir(workdir, identity)
  summary.print_plan(settings, console)

  # --- Model: the base is frozen; the state is small.
  clock.start('load')
  params = load_base(
    settings.model_path,
    settings.step.config,
    settings.base_dtype,
    places.base,
    settings.train.seed,
  )

  def perplexity(params, step_settings):
    if held_out is None:
      return None
    return evaluate_perplexity(
      params,
      held_out,
      step_settings,
      data=settings.data.eval,
      batch_size=settings.train.micro_batch_size,
    )

  clock.start('evaluate')
  dense = perplexity(params, settings.step)

  clock.start('prune')
  state = train_and_prune(settings, places, params, batch_at, workdir, console)

  # --- Cut and merge: what is left is a smaller, ordinary LLaMA.
  clock.start('cut')
  kept = kept_of(state.masks)
  small = cut(
    settings.step.config,
    settings.step.lora,
    params,
    state.lora,
    kept,
    unmerged='peft' in settings.export.routes,
  )
  small_config = shrunk_config(settings.step.config, kept)
  check_counts(settings.plan, small_config)
  small_step = steps.StepSettings(small_config, dtype=settings.step.dtype)

  clock.start('evaluate')
  pruned = perplexity(small.merged, small_step)
  latency = paired_latency(
    {'dense': (params, settings.step), 'pruned': (small.merged, small_step)},
    **_LATENCY,
  )

  del params
  clock.start('export')
  exports = export_run(settings, workdir, small, kept, config.prune.to_dict())
  clock.stop()

  # --- Summary.
  log = (workdir / checkpoint.METRICS_FILE).read_text().splitlines()
  speeds = [json.loads(line)['tokens_per_second'] for line in log]
  result = {
    'model': model_name(settings.model_path),
    'params_dense': settings.step.config.num_parameters,
    'params_pruned': small_config.num_parameters,
    'sparsity': summary.sparsity_report(settings.plan),
    'perplexity': summary.perplexity_report(dense=dense, pruned=pruned),
    'latency': {**latency, **_LATENCY},
    'seconds': clock.seconds,
    'tokens_per_second': statistics.median(speeds),
    'peak_memory_bytes': summary.peak_memory_bytes(),
    'exports': exports,
    'versions': summary.versions(),
    'command': shlex.join(sys.argv),
  }
  write_json(workdir / checkpoint.SUMMARY_FILE, result)
  return result


def load_data(
  settings: RunSettings,
) -> tuple[Callable[[int], Any], np.ndarray | None]:
  """The function t -> batch t, and the held-out windows if there are any."""
  train, data = settings.train, settings.data
  path, vocab = settings.model_path, settings.step.config.vocab_size
  tokenizer = Tokenizer(path) if path else None
  batch_at = pipeline.batches(
    pipeline.training_windows(data.train, tokenizer, train.seq_len, vocab),
    batch_size=train.batch_size,
    micro_batch_size=train.micro_batch_size,
    seed=train.seed,
    shuffle=data.shuffle,
  )
  if not data.eval:
    return batch_at, None
  held_out = pipeline.evaluation_windows(
    data.eval, tokenizer, data.eval_seq_len, vocab
  )
  return batch_at, held_out[: data.eval_windows or None]


def resolved(settings: RunSettings) -> dict[str, Any]:
  """What the config leaves open, and a resumed run must find unchanged."""
  return {
    'base_dtype': settings.base_dtype.name,
    'compute_dtype': settings.step.dtype.name,
    'model': settings.step.config.to_hf(),
  }


class Places(NamedTuple):
  """Where things lie on the mesh.

  Attributes:
    base: a sharding for every tensor of the base.
    batch: of (micro-batches, sequences, tokens).
    state: replicated: the state is small.
  """

  base: Any
  batch: NamedSharding
  state: NamedSharding

  @classmethod
  def of(cls, settings: RunSettings) -> 'Places':
    """Refuses sizes that the mesh does not divide, before any work."""
    mesh = sharding.make_mesh(settings.mesh)
    config, train = settings.step.config, settings.train
    parts = settings.mesh['data'] * settings.mesh['fsdp']
    if train.micro_batch_size % parts:
      raise UserError(
        f'train.micro_batch_size {train.micro_batch_size} is not a multiple '
        f'of mesh.data * mesh.fsdp = {parts}'
      )
    return cls(
      base=sharding.shardings(
        mesh,
        llama.logical_axes(config)['params'],
        llama.param_shapes(config, settings.base_dtype),
      ),
      batch=sharding.sharding(
        mesh,
        ('accumulation', 'batch', 'length'),
        (1, train.micro_batch_size, train.seq_len),
      ),
      state=NamedSharding(mesh, P()),
    )


def load_base(
  path: Path | None,
  config: LlamaConfig,
  dtype: Any,
  shardings: Any,
  seed: int,
) -> Any:
  """The frozen weights, sharded: from the folder, or random."""
  if path:
    return load_params(path, config, shardings, dtype)
  init = jax.jit(
    functools.partial(llama.init_params, config=config, dtype=dtype),
    out_shardings=shardings,
  )
  return init(jax.random.key(seed))


def train_and_prune(
  settings: RunSettings,
  places: Places,
  params: Any,
  batch_at: Callable[[int], Any],
  workdir: Path,
  console: Console,
) -> steps.TrainState:
  """The paper's algorithm, from the last checkpoint to the last step."""
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
    console.print(f'resuming at step {first_step} of {train.steps}')
  path = workdir / checkpoint.METRICS_FILE
  log = metrics.Log(path, train, first_step, console)

  # --- Loop. Nothing in it waits for the device but the logging.
  with checkpoints, log:
    for step in range(first_step, train.steps):
      batch = jax.device_put(batch_at(step), places.batch)
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

      last = step + 1 == train.steps
      if last or (step + 1) % train.log_every == 0:
        log.write(
          step,
          lr=float(learning_rate(step - int(state.skipped))),
          **{name: float(value) for name, value in results.items()},
          **summary.sparsity_entry(plan, alive_counts(state.masks)),
          skipped=int(state.skipped),
        )
        metrics.check_finite(step, state, console)
      if last or (step + 1) % train.checkpoint_every == 0:
        checkpoints.save(state, step + 1)
  return state
