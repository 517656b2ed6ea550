"""Global budgets: what each layer loses, by the scores of all layers."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from lorapr_jax.pruning.groups import group_size, member_parameters
from lorapr_jax.pruning.profile import block_lengths
from lorapr_jax.pruning.targets import PruningPlan, group_choices


class _Removal(NamedTuple):
  """Members that can go from a block together, the least important first.

  Attributes:
    score: the mean of theirs, no lower than of those before them.
    share: of the block's removals that come before it: ties go from all alike.
    layers: of the model, each of which loses as many.
    group: theirs.
    kept: by each layer, once they are gone.
    parameters: that go with them from one layer.
  """

  score: float
  share: float
  layers: tuple[int, ...]
  group: str
  kept: int
  parameters: int

  @property
  def place(self) -> tuple[str, tuple[int, ...]]:
    """Whose removals go in their order."""
    return self.group, self.layers


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
  counts remove. The layers are divided into `prune.blocks` of neighbours: the
  n-th lowest of each of a block's layers go together, at the mean of their
  scores. So do multiples and, of query heads, one under every KV head. The
  fewest that a layer can keep stay. For the total, which comes within half of
  the least that can go from a layer at a time (or, where too little of that is
  left, of what can), one block at most is divided.

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
  beyond: dict[tuple[str, tuple[int, ...]], _Removal] = {}
  for removal in removals:
    total = removal.parameters * len(removal.layers)
    if removal.place in beyond or total > left:
      beyond.setdefault(removal.place, removal)
      continue
    for layer in removal.layers:
      keep[removal.group][layer] = removal.kept
    left -= total
  # The smallest of these comes nearest, in as many of its layers as fit best.
  last = min(beyond.values(), key=lambda r: (r.parameters, r), default=None)
  if last:
    fit = math.ceil(left / last.parameters - 0.5)
    for layer in last.layers[:fit]:
      keep[last.group][layer] = last.kept
  return dataclasses.replace(
    plan, keep={g: tuple(counts) for g, counts in keep.items()}, decided=True
  )


def _removals(
  plan: PruningPlan, importance: Sequence[Mapping[str, np.ndarray]]
) -> Iterator[_Removal]:
  """All that can go, of every group and block that is pruned."""
  shape, layers = plan.config.layers[0], plan.prunable_layers
  parts = min(plan.targets.blocks, len(layers))
  ends = itertools.accumulate(block_lengths(len(layers), parts), initial=0)
  blocks = [tuple(layers[a:b]) for a, b in itertools.pairwise(ends)]
  for choice in group_choices(plan):
    if choice.group not in plan.keep:
      continue
    cost = member_parameters(plan.config, shape, choice.group)
    rows = [row for stack in importance for row in stack[choice.group]]
    # From all that a layer has to the fewest that it can keep.
    counts = np.array(choice.counts[::-1])
    gone = -np.diff(counts)
    starts = choice.size - counts[:-1]
    for block in blocks:
      ascending = [np.sort(standardised(rows[layer])) for layer in block]
      scores = np.reshape(ascending, (-1, choice.size)).mean(axis=0)
      scores = scores[: choice.size - choice.fewest]
      # Rounding must not undo their order.
      means = np.maximum.accumulate(np.add.reduceat(scores, starts) / gone)
      for i, (mean, members) in enumerate(zip(means, gone, strict=True)):
        yield _Removal(
          score=float(mean),
          share=i / len(gone),
          layers=block,
          group=choice.group,
          kept=int(counts[i + 1]),
          parameters=int(members) * cost,
        )
