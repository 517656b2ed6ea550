"""Milestones: the steps before which the masked groups are really cut out.

The masks do not depend on them. A run may have several, so that most of its
steps are taken by a smaller model, or none: then the cut is at the end.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.cost import forward_flops_per_token
from lorapr_jax.pruning.groups import with_kept
from lorapr_jax.pruning.ladder import Rung
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.schedule import Schedule

END, AUTO = 'end', 'auto'
# What a cut on the way costs, in steps at full size: it is compiled anew. The
# figures behind it are in docs/performance.md.
CUT_STEPS = 20


def parse_shrink(text: str) -> str | tuple[float, ...]:
  """`prune.shrink`: 'end', 'auto' or ascending shares of the ramp.

  Raises:
    UserError: if it is none of these.
  """
  if text in (END, AUTO):
    return text
  try:
    shares = tuple(float(share) for share in text.split(','))
  except ValueError:
    shares = ()
  ascending = all(a < b for a, b in zip(shares, shares[1:], strict=False))
  if not shares or not ascending or not 0 < shares[0] <= shares[-1] <= 1:
    raise UserError(
      f'prune.shrink is {text!r}: end, auto, or ascending shares of the ramp '
      'above 0 and at most 1, such as 0.5,0.8'
    )
  return shares


@dataclasses.dataclass(frozen=True)
class Milestones:
  """Which sizes the arrays of a run can have on the way, and from when on.

  Attributes:
    plan: what will be left.
    schedule: when groups are masked.
    rungs: sizes that are met exactly on the way, the largest first.
  """

  plan: PruningPlan
  schedule: Schedule
  rungs: tuple[Rung, ...] = ()

  def alive(self, step: int) -> dict[str, tuple[int, ...]]:
    """Counts after the event of `step`, by group and layer.

    -1: before the first step. They are those of the schedule, but no fewer than
    a rung's up to its event, and no more from then on.
    """
    keep = self.plan.keep_at(self.schedule.progress(step))
    for rung in self.rungs:
      for group, own in rung.plan.keep.items():
        if step <= rung.event:
          keep[group] = tuple(map(max, keep[group], own))
        if step >= rung.event:
          keep[group] = tuple(map(min, keep[group], own))
    return keep

  def present(self, step: int) -> dict[str, tuple[int, ...]]:
    """Counts in arrays that are cut just before `step`, by group and layer.

    What is alive then, rounded up to what mesh and hardware need, with masked
    groups as the filler.
    """
    schedule, multiples = self.schedule, self.plan.multiples
    past = (s for s in reversed(range(step)) if schedule.is_pruning_step(s))
    alive = self.alive(next(past, -1))
    return {
      group: tuple(
        min(size, -(-count // multiples[group]) * multiples[group])
        for count, size in zip(counts, self.plan.sizes(group), strict=True)
      )
      for group, counts in alive.items()
    }

  def cuts(
    self, shrink: str | tuple[float, ...], seq_len: int
  ) -> tuple[int, ...]:
    """The steps before which masked groups are cut out on the way.

    `shrink` is from `parse_shrink`.
    """
    if shrink == END:
      return ()
    return self.fastest(seq_len) if shrink == AUTO else self.at(shrink)

  @functools.cached_property
  def maskings(self) -> tuple[int, ...]:
    """The steps at which there are fewer alive than before."""
    return self._steps_with_fewer(lambda alive: alive)

  @functools.cached_property
  def layer_maskings(self) -> tuple[int, ...]:
    """The steps at which whole layers are masked."""
    return self._steps_with_fewer(lambda alive: alive.get(LAYERS))

  def _steps_with_fewer(
    self, of: Callable[[dict[str, tuple[int, ...]]], Any]
  ) -> tuple[int, ...]:
    """The steps at which what counts of those alive changes."""
    found, before = [], of(self.alive(-1))
    for step in range(self.schedule.total_steps):
      if self.schedule.is_pruning_step(step):
        alive = of(self.alive(step))
        if alive != before:
          found.append(step)
        before = alive
    return tuple(found)

  def size(self, step: int) -> ModelConfig:
    """The sizes of arrays that are cut just before `step`."""
    return with_kept(self.plan.config, self.present(step))

  def size_at(self, step: int, cuts: tuple[int, ...]) -> ModelConfig:
    """The sizes in which a state of `step` steps is stored.

    A state that is about to be cut is stored as it was before.
    """
    past = [cut for cut in cuts if cut < step]
    return self.size(past[-1]) if past else self.plan.config

  def at(self, shares: tuple[float, ...]) -> tuple[int, ...]:
    """The cuts at shares of the ramp, each after the next masking.

    Where nothing has been masked since the cut before, there is none.
    """
    schedule = self.schedule
    start = schedule.warmup * schedule.total_steps
    cuts: list[int] = []
    for share in shares:
      due = round(start + share * (schedule.ramp_end - start), 6)
      steps = [step for step in self._after_masking() if step - 1 >= due]
      before = self.size(cuts[-1]) if cuts else self.plan.config
      if steps and self.size(steps[0]) != before:
        cuts.append(steps[0])
    return tuple(cuts)

  def candidates(self) -> list[int]:
    """The steps before which there is more to cut than ever before."""
    found, before = [], self.plan.config
    for step in self._after_masking():
      size = self.size(step)
      if size != before:
        found.append(step)
      before = size
    return found

  def _after_masking(self) -> list[int]:
    steps = range(1, self.schedule.total_steps)
    return [s for s in steps if self.schedule.is_pruning_step(s - 1)]

  def fastest(
    self, seq_len: int, cut_steps: float = CUT_STEPS
  ) -> tuple[int, ...]:
    """The cuts with which a run ends first.

    A step's time is taken as proportional to its floating-point operations,
    and a cut's as the same wherever it is. The best way on from a cut does not
    depend on the way to it, so that they are found from the last one back.

    `cut_steps` is the price of a cut, in steps at full size.
    """
    sizes = {0: self.plan.config}
    sizes |= {step: self.size(step) for step in self.candidates()}
    full = forward_flops_per_token(sizes[0], seq_len)
    end = self.schedule.total_steps
    # For each cut: the time from there on, in steps, and the cuts after it.
    best: dict[int, tuple[float, tuple[int, ...]]] = {}
    for begin, size in reversed(sizes.items()):
      each = forward_flops_per_token(size, seq_len) / full
      ways = {end: each * (end - begin)}
      for cut, (rest, _) in best.items():
        ways[cut] = each * (cut - begin) + cut_steps + rest
      first = min(ways, key=ways.__getitem__)
      later = () if first == end else (first, *best[first][1])
      best[begin] = ways[first], later
    return best[0][1]
