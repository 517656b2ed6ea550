"""Global budgets: what each layer loses, by the scores of all layers."""

from collections.abc import Mapping
import dataclasses
from typing import NamedTuple

import numpy as np

from lorapr_jax.pruning.groups import member_parameters
from lorapr_jax.pruning.targets import PruningPlan, group_choices


class _Removal(NamedTuple):
  """Members that can go from a layer together, the least important first."""

  score: float
  # How many removals of that layer come before it.
  index: int
  layer: int
  group: str
  kept: int
  parameters: int


def standardised(scores: np.ndarray) -> np.ndarray:
  """(x - mean) / deviation over a layer's members of one group.

  As FLAP does to compare layers and kinds (arXiv 2312.11983, section 3.3).
  Zeros where all are alike.
  """
  scores = np.asarray(scores, np.float64)
  deviation = scores.std()
  return (scores - scores.mean()) / (deviation if deviation else 1.0)


def decided(
  plan: PruningPlan, importance: tuple[Mapping[str, np.ndarray], ...]
) -> PruningPlan:
  """The plan with counts by layer: `prune.scope=global`.

  Standardised scores are ranked over all layers and kinds that are pruned, and
  the lowest go until as many parameters would be gone as the plan's equal
  counts remove. Members go by multiples, whose score is the mean of theirs; of
  query heads, one under every KV head counts as one. The fewest that a layer
  can keep stay. The kind whose steps are finest ends within half a step of the
  total.

  Args:
    plan: whose counts are the same in every layer that is pruned.
    importance: {group: (L, ...)}, by stack of the model before any cut.
  """
  choices = {choice.group: choice for choice in group_choices(plan)}
  shape = plan.config.layers[0]
  cost = {g: member_parameters(plan.config, shape, g) for g in plan.keep}
  rows = {
    group: [row for stack in importance for row in np.asarray(stack[group])]
    for group in plan.keep
  }
  removals = []
  for group in plan.keep:
    counts = choices[group].counts
    for layer in plan.prunable_layers:
      ascending = np.sort(standardised(rows[group][layer]), axis=-1)
      scores = ascending.reshape(-1, ascending.shape[-1]).mean(axis=0)
      ways = zip(counts[::-1], counts[-2::-1], strict=False)
      for index, (before, kept) in enumerate(ways):
        gone = slice(counts[-1] - before, counts[-1] - kept)
        parameters = (before - kept) * cost[group]
        score = float(scores[gone].mean())
        removals.append(_Removal(score, index, layer, group, kept, parameters))
  finest = min(plan.keep, key=lambda g: choices[g].multiple * cost[g])
  left = plan.config.num_parameters - plan.pruned_config.num_parameters
  keep = {g: [choices[g].size] * len(plan.config.layers) for g in plan.keep}
  full = set()
  for removal in sorted(removals):
    place = (removal.group, removal.layer)
    # To the nearest with what is finest, and never beyond with the others.
    least = removal.parameters / (2 if removal.group == finest else 1)
    if place in full or least > left:
      full.add(place)
      continue
    keep[removal.group][removal.layer] = removal.kept
    left -= removal.parameters
  return dataclasses.replace(
    plan, keep={g: tuple(counts) for g, counts in keep.items()}, decided=True
  )
