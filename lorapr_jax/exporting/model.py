"""What is exported: a model's weights, and what is known of it besides them."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lorapr_jax.exporting.cards import pruning_report
from lorapr_jax.hf.config import model_to_hf
from lorapr_jax.models.config import LoraConfig, ModelConfig
from lorapr_jax.models.lora import merge_adapters
from lorapr_jax.models.quantization import dequantized
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.shrink import Kept, pad, shrunk_config


@dataclasses.dataclass(frozen=True)
class Description:
  """What is known of a model to be exported, besides its weights.

  Attributes:
    name: the name of the model that was pruned.
    config: its sizes now.
    dtype: the name of the weights' dtype.
    base: the folder whose tokenizer and licence are copied, or None.
    before: the sizes before the cut; None if they are not known.
    kept: what the cut kept of them; None if it is not known.
    pruning: the contents of pruning.json, or None.
  """

  name: str
  config: ModelConfig
  dtype: str
  base: Path | None
  before: ModelConfig | None = None
  kept: Kept | None = None
  pruning: dict[str, Any] | None = None


class Weights(NamedTuple):
  """A model's weights.

  Attributes:
    merged: the weights with LoRA merged.
    base: the weights without LoRA; None if no route needs them.
    lora: the adapters, if there is a `base`.
    lora_config: the config of the adapters.
  """

  merged: Any
  base: Any = None
  lora: Any = None
  lora_config: LoraConfig | None = None


def describe_run(
  base: Path | None,
  config: ModelConfig,
  kept: Kept,
  *,
  sha256: str | None,
  dtype: str,
  plan: PruningPlan | None,
  settings: dict[str, Any],
) -> Description:
  """What a run's exports say of its model.

  `config` has the sizes before the cut, as they are in memory; `sha256` is of
  the base as it was loaded (`hf.files.content_hash`); `settings` are the
  config's section prune.
  """
  name, config = model_name(base), config.dequantized
  origin = {
    'name': name,
    'sha256': sha256,
    'config': model_to_hf(config),
  }
  return Description(
    name=name,
    config=shrunk_config(config, kept),
    dtype=dtype,
    base=base,
    before=config,
    kept=kept,
    pruning=pruning_report(plan, kept, origin, settings),
  )


def model_name(base: Path | None) -> str:
  """The name of the base's folder; of a snapshot of the Hub, ORG/NAME."""
  if base is None:
    return 'random weights'
  folder = base.resolve()
  repository, above = folder.parent.parent.name, folder.parent.name
  if above == 'snapshots' and repository.startswith('models--'):
    return repository.removeprefix('models--').replace('--', '/')
  return folder.name or 'model'


def merge(
  params: Any, lora: Any, lora_config: LoraConfig, *, unmerged: bool
) -> Weights:
  """Adds LoRA to the weights; the result is an ordinary LLaMA.

  With `unmerged` the weights without LoRA are kept as well.
  """
  if unmerged:  # What is written must come to the same when it is merged.
    params = dequantized(params, params['norm']['weight'].dtype)
  merged = merge_adapters(params, lora, lora_config.scale)
  if not unmerged:
    return Weights(merged)
  return Weights(merged, params, lora, lora_config)


def padded(weights: Weights, model: Description) -> Weights:
  """The weights at the sizes before the cut, with zeros in what was cut."""
  if model.config == model.before:  # Nothing was cut, or it is padded.
    return weights
  axes = block_axes(model.config, weights.lora_config)

  def widen(stacks: Any, kind: str) -> Any:
    return jax.jit(
      lambda stacks: pad(stacks, axes[kind], model.kept, model.before)
    )(stacks)

  def widen_params(params: Any) -> Any:
    return {**params, 'stacks': widen(params['stacks'], 'params')}

  if weights.lora is None:
    return Weights(widen_params(weights.merged))
  return weights._replace(
    merged=widen_params(weights.merged),
    base=widen_params(weights.base),
    lora=widen(weights.lora, 'lora'),
  )
