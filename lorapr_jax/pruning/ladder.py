"""The ladder: sizes on the way to a run's target, each of which it exports."""

import bisect
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

from lorapr_jax.errors import UserError
from lorapr_jax.pruning.counts import finest_of
from lorapr_jax.pruning.groups import with_kept
from lorapr_jax.pruning.masks import without_layers
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.schedule import Schedule
from lorapr_jax.pruning.targets import choice_of

# How nearly a share of the way is found: no two counts change so near.
_NEAR = 2**-40


class Rung(NamedTuple):
  """A size of a ladder, and the steps of a phase at which it comes and goes.

  Attributes:
    plan: what is left; its `share` is that of the parameters.
    event: the step at which its groups are masked; -1: before the phase.
    end: the step before which it is exported.
  """

  plan: PruningPlan
  event: int
  end: int

  @property
  def name(self) -> str:
    """The share, as people write it: 0.9."""
    return str(self.plan.share)


def parse_ladder(text: str) -> tuple[float, ...]:
  """`export.ladder`: descending shares of the parameters that stay.

  Raises:
    UserError: if it is something else.
  """
  try:
    shares = tuple(float(share) for share in text.split(',')) if text else ()
  except ValueError:
    shares = (0.0,)
  descending = all(a > b for a, b in itertools.pairwise(shares))
  if not descending or not all(0 < share < 1 for share in shares):
    raise UserError(
      f'export.ladder is {text!r}: descending shares of the parameters that '
      'stay, below 1 and above 0, such as 0.9,0.8'
    )
  return shares


def plan_ladder(
  plan: PruningPlan, shares: Sequence[float]
) -> tuple[PruningPlan, ...]:
  """What is left at each share of the parameters, on the way to a plan.

  It is never more than the share. Every group has lost the same part of what
  the plan takes of it, but for the one with the finest steps, which makes up
  the difference. Counts are rounded up to those that may be left. Each size
  keeps all that a smaller one keeps.

  Raises:
    UserError: if a share is not above what the plan leaves, or two sizes come
      to the same counts.
  """
  dense, last = plan.config.num_parameters, plan.pruned_config.num_parameters
  way, gone = _Way.to(plan), dict.fromkeys(plan.keep, 0.0)
  found, before = [], dense
  for share in shares:
    if share * dense <= last:
      raise UserError(
        f'export.ladder: {share} is not above the {last / dense:.4f} of the '
        'parameters that the target leaves, which is the last size: prune '
        'more, or leave it out (--config.export.ladder= for none)'
      )
    gone = way.within(share * dense, gone)
    rung = dataclasses.replace(plan, keep=way.keep_at(gone), share=share)
    size = rung.pruned_config.num_parameters
    if size in (before, last):
      raise UserError(
        f'export.ladder: {share} comes to the counts of the size '
        f'{"above" if size == before else "of the target below"} it, '
        f'{size / dense:.4f} of the parameters: leave it out '
        '(--config.export.ladder= for none)'
      )
    found.append(rung)
    before = size
  return tuple(found)


class _Way(NamedTuple):
  """The sizes between a model and what a plan leaves of it.

  Attributes:
    plan: the last of them.
    counts: {group: those that may be left in a layer}.
    finest: the group of the finest steps; '' where whole layers alone go.
  """

  plan: PruningPlan
  counts: dict[str, list[int]]
  finest: str

  @classmethod
  def to(cls, plan: PruningPlan) -> '_Way':
    groups = without_layers(plan.keep)
    choices = [choice_of(plan.config, plan.targets, group) for group in groups]
    counts = {choice.group: choice.counts for choice in choices}
    return cls(plan, counts, finest_of(choices).group if choices else '')

  def keep_at(self, progress: Mapping[str, float]) -> dict[str, Any]:
    """Counts where of each group such a share of what goes has gone."""
    keep = {g: self.plan.keep_at(share)[g] for g, share in progress.items()}
    for group, allowed in self.counts.items():
      places = (bisect.bisect_left(allowed, count) for count in keep[group])
      keep[group] = tuple(allowed[place] for place in places)
    return keep

  def size_at(self, progress: Mapping[str, float]) -> int:
    """The parameters of `keep_at`."""
    return with_kept(self.plan.config, self.keep_at(progress)).num_parameters

  def within(self, most: float, gone: Mapping[str, float]) -> dict[str, float]:
    """The progress of the largest size of at most so many parameters.

    `gone` is the least by group.
    """
    alike = _least(
      lambda share: self.size_at(dict.fromkeys(gone, share)) <= most, 0.0
    )
    found = []
    for share in (alike, alike - _NEAR):
      progress = {group: max(share, least) for group, least in gone.items()}
      if self.finest:
        progress[self.finest] = _least(
          lambda own, others=progress: (
            self.size_at({**others, self.finest: own}) <= most
          ),
          gone[self.finest],
        )
      if self.size_at(progress) <= most:
        found.append(progress)
    # Of equal sizes, that in which all have lost most nearly alike.
    return max(
      found,
      key=lambda x: (self.size_at(x), -abs(x.get(self.finest, alike) - alike)),
    )


def _least(fits: Callable[[float], bool], low: float) -> float:
  """The least number from `low` to 1 that fits, where all above it do.

  1 where none does.
  """
  if fits(low):
    return low
  high = 1.0
  while high - low > _NEAR:
    middle = (low + high) / 2
    low, high = (low, middle) if fits(middle) else (middle, high)
  return high


def on_the_ramp(
  plan: PruningPlan, ladder: Sequence[PruningPlan], schedule: Schedule
) -> tuple[Rung, ...]:
  """The rungs of a ramp to `plan`: each is exported right after its event.

  That is the first event at which the ramp leaves no more than the share, and
  that no rung has yet.

  Raises:
    UserError: if there is none before the ramp ends.
  """
  events = filter(schedule.is_pruning_step, range(schedule.ramp_end))

  def left_at(step: int) -> int:
    keep = plan.keep_at(schedule.progress(step))
    return with_kept(plan.config, keep).num_parameters

  rungs = []
  for size in ladder:
    most = size.share * plan.config.num_parameters
    event = next((step for step in events if left_at(step) <= most), None)
    if event is None:
      raise UserError(
        f'export.ladder: {size.share:g} has no step of its own at which groups '
        f'are masked before step {schedule.ramp_end}, where the ramp ends: '
        'lower prune.every, or leave it out'
      )
    rungs.append(Rung(size, event, event + 1))
  return tuple(rungs)


def at_once(
  ladder: Sequence[PruningPlan], steps: Sequence[int]
) -> tuple[Rung, ...]:
  """The rungs of a phase that begins with the first one masked.

  Each is trained for its `steps`, and then the next one is masked.
  """
  ends = [*itertools.accumulate(steps)]
  events = [-1, *ends[:-1]]
  return tuple(map(Rung, ladder, events, ends))


def parse_rung_steps(text: str, rungs: int, steps: int) -> tuple[int, ...]:
  """`prune.rung_steps`: the steps of each rung, of `steps` in all.

  Empty: an equal share for each rung and for the last size, which has the rest.

  Raises:
    UserError: if it is something else, or leaves none for the last size.
  """
  if text:
    try:
      found = tuple(int(number) for number in text.split(','))
    except ValueError:
      found = (0,)
    if min(found) < 1:
      raise UserError(
        f'prune.rung_steps is {text!r}: a number of steps for each rung of '
        'export.ladder, such as 100,100'
      )
  else:
    found = (steps // (rungs + 1),) * rungs
  if len(found) != rungs:
    raise UserError(
      f'prune.rung_steps has {len(found)} numbers for the {rungs} rungs of '
      'export.ladder: give one for each'
    )
  if min(found) < 1 or sum(found) >= steps:
    raise UserError(
      f'of the {steps} steps after prune.calibration_steps, the {rungs} rungs '
      f'of export.ladder take {sum(found)} (prune.rung_steps): each of them '
      'needs at least one, and so does the last size '
      '(--config.export.ladder= for no rungs)'
    )
  return found
