"""Global budgets: what each layer loses, by the scores of all layers."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from lorapr_jax.pruning.groups import group_size, member_parameters
from lorapr_jax.pruning.targets import PruningPlan, group_choices


class _Removal(NamedTuple):
  """Members that can go from a layer together, the least important first.

  Attributes:
    score: the mean of theirs, no lower than of those before them.
    share: of the layer's removals that come before it: ties go from all alike.
    layer: of the model.
    group: theirs.
    kept: by the layer, once they are gone.
    parameters: that go with them.
  """

  score: float
  share: float
  layer: int
  group: str
  kept: int
  parameters: int

  @property
  def place(self) -> tuple[str, int]:
    """Whose removals go in their order."""
    return self.group, self.layer


def standardised(scores: np.ndarray) -> np.ndarray:
  """(x - mean) / deviation over a layer's members of one group.

  As FLAP does to compare layers and kinds (arXiv 2312.11983, section 3.3).
  Zeros where all are alike.
  """
  scores = np.asarray(scores, np.float64)
  deviation = scores.std()
  return (scores - scores.mean()) / (deviation if deviation else 1.0)


def decide(
  plan: PruningPlan, importance: Sequence[Mapping[str, np.ndarray]]
) -> PruningPlan:
  """The plan with counts by layer: `prune.scope=global`.

  Standardised scores are ranked over all layers and kinds that the plan prunes,
  and the lowest go until as many parameters would be gone as the plan's equal
  counts remove. Members go by multiples, whose score is the mean of theirs; of
  query heads, one under every KV head counts as one. The fewest that a layer
  can keep stay. The total comes within half of the least that can go at a time,
  or, where too little of that is left, of what can.

  Args:
    plan: whose counts are the same in every layer that is pruned.
    importance: {group: (L, ...)}, by stack of the model before any cut.
  """
  removals = sorted(_removals(plan, importance))
  sizes = {
    g: group_size(plan.config, plan.config.layers[0], g) for g in plan.keep
  }
  keep = {g: [size] * len(plan.config.layers) for g, size in sizes.items()}
  left = plan.config.num_parameters - plan.pruned_config.num_parameters
  # By place, the first that no longer fits.
  beyond: dict[tuple[str, int], _Removal] = {}
  for removal in removals:
    if removal.place in beyond or removal.parameters > left:
      beyond.setdefault(removal.place, removal)
      continue
    keep[removal.group][removal.layer] = removal.kept
    left -= removal.parameters
  # The smallest of these comes nearest.
  last = min(beyond.values(), key=lambda r: (r.parameters, r), default=None)
  if last and last.parameters < 2 * left:
    keep[last.group][last.layer] = last.kept
  return dataclasses.replace(
    plan, keep={g: tuple(counts) for g, counts in keep.items()}, decided=True
  )


def _removals(
  plan: PruningPlan, importance: Sequence[Mapping[str, np.ndarray]]
) -> Iterator[_Removal]:
  """All that can go, of every group and layer that is pruned."""
  shape = plan.config.layers[0]
  for choice in group_choices(plan):
    if choice.group not in plan.keep:
      continue
    cost = member_parameters(plan.config, shape, choice.group)
    rows = [row for stack in importance for row in stack[choice.group]]
    # From all that a layer has to the fewest that it can keep.
    counts = np.array(choice.counts[::-1])
    gone = -np.diff(counts)
    starts = choice.size - counts[:-1]
    for layer in plan.prunable_layers:
      ascending = np.sort(standardised(rows[layer]), axis=-1)
      scores = ascending.reshape(-1, choice.size).mean(axis=0)
      scores = scores[: choice.size - choice.fewest]
      # Rounding must not undo their order.
      means = np.maximum.accumulate(np.add.reduceat(scores, starts) / gone)
      for i, (mean, members) in enumerate(zip(means, gone, strict=True)):
        yield _Removal(
          score=float(mean),
          share=i / len(gone),
          layer=layer,
          group=choice.group,
          kept=int(counts[i + 1]),
          parameters=int(members) * cost,
        )
