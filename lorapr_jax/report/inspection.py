"""What is pruned together, and what a target would leave, as plain values."""

from typing import Any

from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.groups import (
  CHANNELS,
  KV_HEADS,
  QUERIES,
  couplings,
  group_size,
  kind,
  member_parameters,
  protected_layers,
)
from lorapr_jax.pruning.targets import Targets, plan_pruning


def describe(
  config: ModelConfig, protect: str, bytes_each: int
) -> dict[str, Any]:
  """Every group: its tensors with the axis that shrinks, counts and bytes."""
  tree = block_axes(config)['params']
  shapes = dict.fromkeys(config.layers)
  return {
    'parameters': config.num_parameters,
    'bytes': bytes_each * config.num_parameters,
    'layers': len(config.layers),
    'protected_layers': sorted(protected_layers(len(config.layers), protect)),
    'groups': {
      group: {
        'kind': kind(group),
        'tensors': {name: list(axes) for name, axes in couplings(tree, group)},
        'per_layer': [group_size(config, s, group) for s in config.layers],
        'bytes_each': [
          bytes_each * member_parameters(config, s, group) for s in shapes
        ],
      }
      for group in (KV_HEADS, QUERIES, CHANNELS)
    },
  }


def describe_plan(
  config: ModelConfig, targets: Targets, bytes_each: int
) -> dict[str, Any]:
  """What a target would leave, asked and reached."""
  plan = plan_pruning(config, targets)
  return {
    'kept_per_layer': plan.keep,
    'kept_by_depth': plan.kept_by_depth,
    'parameters': plan.pruned_config.num_parameters,
    'bytes': bytes_each * plan.pruned_config.num_parameters,
    'target': plan.targets_by_kind(),
    'achieved': plan.sparsity(plan.keep),
  }
