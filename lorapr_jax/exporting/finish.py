"""The end of a run: merge, and every export that was asked for."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
import time
from typing import Any

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.eval.generation import Sampling, stream_text
from lorapr_jax.eval.latency import paired_latency
from lorapr_jax.eval.perplexity import Perplexity
from lorapr_jax.exporting import routes
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.hf.shards import content_hash
from lorapr_jax.hf.write import parse_size
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import LlamaConfig, LoraConfig
from lorapr_jax.models.lora import merge_adapters
from lorapr_jax.models.quantization import dequantized
from lorapr_jax.pruning.shrink import Kept, shrunk_config
from lorapr_jax.pruning.targets import PruningPlan
from lorapr_jax.report import summary
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.paths import move
from lorapr_jax.settings.run import RunSettings

_LATENCY = {'batch_size': 1, 'seq_len': 128}


def merge(
  params: Any, lora: Any, lora_config: LoraConfig, *, unmerged: bool
) -> routes.Weights:
  """Adds LoRA to the weights: an ordinary LLaMA.

  Args:
    params: the base.
    lora: its adapters, by stack.
    lora_config: of the adapters.
    unmerged: whether the weights without LoRA are held as well.
  """
  if unmerged:  # What is written must come to the same when it is merged.
    params = dequantized(params, params['norm']['weight'].dtype)
  merged = merge_adapters(params, lora, lora_config.scale)
  if not unmerged:
    return routes.Weights(merged)
  return routes.Weights(merged, params, lora, lora_config)


def pruned_model(
  base: Path | None,
  config: LlamaConfig,
  kept: Kept,
  *,
  dtype: str,
  plan: PruningPlan | None,
  settings: dict[str, Any],
) -> routes.Model:
  """What a run's exports say of its model.

  Args:
    base: the base's folder, or None for random weights.
    config: the sizes before the cut, with the biases that compensation added,
      as they are in memory.
    kept: what it left.
    dtype: of the weights, by name.
    plan: what was asked for, of the base as it was.
    settings: the config's section prune.
  """
  name, config = model_name(base), config.dequantized
  origin = {
    'name': name,
    # Many processes would read all of it many times, and one writes it.
    'sha256': content_hash(base) if base and processes.is_first() else None,
    'config': config_to_hf(plan.config if plan else config),
  }
  return routes.Model(
    name=name,
    config=shrunk_config(config, kept),
    dtype=dtype,
    base=base,
    before=config,
    kept=kept,
    pruning=summary.pruning_report(plan, kept, origin, settings),
  )


def side_by_side(
  models: dict[str, tuple[Any, Compute]], settings: RunSettings
) -> list[dict[str, str]]:
  """How each model goes on from report.prompts: [{'prompt', NAME: text}].

  Greedily, so that nothing but the model makes the difference. Empty for
  random weights, which have no tokenizer.

  Args:
    models: name -> (params, settings).
    settings: of the run.
  """
  if settings.model_path is None or not settings.report.prompts:
    return []
  tokenizer = Tokenizer(settings.model_path)
  sampling = Sampling(settings.report.max_new_tokens)

  def go_on(prompt: str, params: Any, step: Compute) -> str:
    pieces = stream_text(
      params, step.config, tokenizer, prompt, sampling, dtype=step.dtype
    )
    return ''.join(pieces)

  return [
    {'prompt': prompt}
    | {name: go_on(prompt, *model) for name, model in models.items()}
    for prompt in settings.report.prompts
  ]


def compare(
  settings: RunSettings,
  params: Any,
  config: LlamaConfig,
  merged: Any,
  measured: dict[str, Perplexity | None],
  perplexity: Callable[..., Perplexity | None],
) -> dict[str, Any]:
  """The dense and the pruned model side by side, as summary.json has it.

  Args:
    settings: of the run.
    params: the dense weights.
    config: the sizes after the cut.
    merged: the weights after it.
    measured: perplexities so far, by name.
    perplexity: of weights; None where there is no held-out text.
  """
  dense = settings.compute
  small = dataclasses.replace(dense, config=config)
  models = {'dense': (params, dense), 'pruned': (merged, small)}
  return {
    'perplexity': summary.perplexity_report(
      **measured, pruned=perplexity(merged, small)
    ),
    'latency': {**paired_latency(models, **_LATENCY), **_LATENCY},
    'generations': side_by_side(models, settings),
  }


def export_run(
  settings: RunSettings,
  workdir: Path,
  model: routes.Model,
  weights: routes.Weights,
) -> dict[str, dict[str, Any]]:
  """Writes every format of export.format: {kind: what was written}.

  Raises:
    RuntimeError: if what was read back computes something else.
  """
  exports = {}
  for kind in settings.export.routes:
    route = run_route(kind, settings, workdir, model)
    # Of this run, killed before its summary was written.
    folder = route.path.parent if kind == 'gguf' else route.path
    if processes.is_first() and folder.exists():
      move(folder, folder.with_name(f'{folder.name}-{time.time_ns()}'))
    processes.wait_for_others(f'make {kind}')
    exports[kind] = routes.write(route, model, weights)
  return exports


def run_route(
  kind: str, settings: RunSettings, workdir: Path, model: routes.Model
) -> routes.Route:
  """Where a run writes a format, and how."""
  export = settings.export
  path = workdir / ('export' if kind == 'hf' else f'export-{kind}')
  route = routes.Route(
    kind=kind,
    path=path,
    layout=export.layout,
    model_type=export.model_type,
    dtype=export.dtype,
    max_shard_bytes=parse_size('export.max_shard_size', export.max_shard_size),
  )
  if kind != 'gguf':
    return route
  if export.gguf_dtype != 'auto':
    route = dataclasses.replace(route, dtype=export.gguf_dtype)
  file = f'{model.name}-{route.stored_dtype(model)}.gguf'
  return dataclasses.replace(route, path=path / file)


def check_counts(plan: PruningPlan | None, config: LlamaConfig) -> None:
  """Checks that a finished run left what was planned.

  Raises:
    RuntimeError: if it did not.
  """
  if plan and config.layers != plan.pruned_config.layers:
    raise RuntimeError(f'masks leave {config}, which was not planned')


def model_name(base: Path | None) -> str:
  """The base's folder's name."""
  return base.resolve().name or 'model' if base else 'random weights'
