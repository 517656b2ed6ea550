"""The sizes between a model and the smallest that is left of it."""

from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.fit import largest_within
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.planner import layers_plan
from lorapr_jax.pruning.targets import Targets


def plan_sizes(
  config: ModelConfig, targets: Targets, number: int
) -> list[PruningPlan]:
  """Plans of at most `number` sizes, the largest first, the smallest last.

  Heads and channels share the cut as under unit=params. The sizes are an equal
  number of parameters apart, as nearly as counts allow; the model itself is
  none of them, but where whole layers go, the model without these is. Where a
  profile takes more of a layer than it can lose, there is no plan.

  Raises:
    UserError: for a model of which nothing can be pruned.
  """
  plan, choices = layers_plan(config, targets)
  most, first = plan.pruned_config.num_parameters, 0 if plan.keep else 1
  least = plan.alike({c.group: c.fewest for c in choices}).num_parameters
  found = {}
  steps = number - 1 + first
  for i in range(first, steps + 1):
    kept = largest_within(
      choices,
      lambda kept: plan.alike(kept).num_parameters,
      most - (most - least) * i // steps,
    )
    if all(plan.by_layer(c, kept[c.group]) for c in choices):
      smaller = plan.keeping(choices, kept)
      if smaller.keep:
        found[tuple(kept.items())] = smaller
  return list(found.values())
