"""The end of a run: cut, merge, export, and reading the export back."""

import functools
from pathlib import Path
import time
from typing import Any

import jax

from lorapr_jax import steps
from lorapr_jax.hf.export import export_model
from lorapr_jax.hf.load import content_hash, load_config, load_params
from lorapr_jax.lora import merge_lora
from lorapr_jax.models import llama
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.pruning.shrink import Kept, kept_groups, shrink, shrunk_config
from lorapr_jax.report import summary
from lorapr_jax.settings import RunSettings

# Tokens on which an export that was read back is compared.
_CHECK_LENGTH = 32


def cut(
  settings: RunSettings, params: Any, state: steps.TrainState
) -> tuple[Any, LlamaConfig, Kept]:
  """Takes the masked groups away and merges LoRA: smaller dense weights."""
  config, lora_config = settings.step.config, settings.step.lora
  axes = llama.block_axes(lora_config)
  stacks, lora, kept = params['stacks'], state.lora, ()
  small_config = config
  if settings.plan:
    kept = kept_groups(state.masks)
    small_config = shrunk_config(config, kept)
    if small_config != settings.plan.pruned_config:
      raise RuntimeError(f'masks leave {small_config}, which was not planned')
    stacks = shrink(stacks, axes['params'], kept, config)
    lora = shrink(lora, axes['lora'], kept, config)
  merge = jax.jit(merge_lora, static_argnums=2)
  stacks = tuple(
    merge(stack, adapters, lora_config.scale)
    for stack, adapters in zip(stacks, lora, strict=True)
  )
  return {**params, 'stacks': stacks}, small_config, kept


def export_and_compare(
  settings: RunSettings,
  workdir: Path,
  params: Any,
  config: LlamaConfig,
  kept: Kept,
  prune_settings: dict[str, Any],
) -> dict[str, Any]:
  """Writes workdir/export, reads it back and compares its logits.

  Raises:
    RuntimeError: if what was read back computes something else.
  """
  folder, base = workdir / 'export', settings.model_path
  name, dtype = model_name(settings), settings.export.dtype
  if dtype == 'auto':
    dtype = settings.base_dtype.name
  if folder.exists():  # Of this run, killed before its summary was written.
    folder.rename(folder.with_name(f'export-{time.time_ns()}'))
  export_model(
    folder,
    params,
    config,
    layout=settings.export.layout,
    model_type=settings.export.model_type,
    dtype=dtype,
    base=base,
    pruning=summary.pruning_report(
      settings.plan,
      kept,
      {'name': name, 'sha256': base and content_hash(base)},
      prune_settings,
    ),
    card=summary.model_card(name, settings.plan, config),
  )
  read_config = load_config(folder)
  places = jax.tree.map(lambda x: x.sharding, params)
  read = load_params(folder, read_config, places, settings.base_dtype)
  tokens = jax.random.randint(
    jax.random.key(0), (1, _CHECK_LENGTH), 0, config.vocab_size
  )

  @functools.partial(jax.jit, compiler_options=steps.compiler_options())
  def logits(params):
    hidden = llama.hidden_states(
      params, tokens, config, dtype=settings.step.dtype
    )
    return llama.logits(params, hidden)

  expected = logits(params)
  difference = float(abs(logits(read) - expected).max())
  # Another dtype than the base's rounds the weights once.
  exact = dtype == settings.base_dtype.name
  tolerance = 1e-4 if exact else 0.05 * float(abs(expected).max())
  if read_config != config or not difference <= tolerance:
    raise RuntimeError(
      f'{folder} was written, but read back its logits differ by {difference}'
    )
  return {
    'folder': str(folder),
    'dtype': dtype,
    'max_logit_difference': difference,
  }


def model_name(settings: RunSettings) -> str:
  """The base's folder's name."""
  path = settings.model_path
  return path.resolve().name if path else 'random weights'
