"""What a run consists of, by prune.order: prune, calibrate, tune, recover."""

from collections.abc import Sequence
import dataclasses
import functools
import itertools

import optax

from lorapr_jax.pruning.importance import SUM, Criterion
from lorapr_jax.pruning.ladder import Rung
from lorapr_jax.pruning.milestones import Milestones
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.schedule import Schedule
from lorapr_jax.settings.sections import (
  DataSettings,
  RecoverSettings,
  TrainSettings,
)

# Of the phase that ends in the cut, of the one before it where there is one,
# and of those after it in their order.
CHECKPOINTS, CHECKPOINTS_BEFORE = 'checkpoints', 'checkpoints-calibrate'
CHECKPOINTS_AFTER_CUT = ('checkpoints-tune', 'checkpoints-recover')


@dataclasses.dataclass(frozen=True)
class Pruning:
  """What a phase masks, when, and how.

  Attributes:
    plan: what is left at its end.
    schedule: when groups are masked.
    criterion: which ones.
    repairs: whether what survives is repaired.
    batches: the most batches whose tokens an event measures and repairs on.
    texts: the specs that these batches are drawn from.
    data: the mixture of an event's own batches; empty: the newest batches.
    cuts: the steps before which masked groups are cut out of the arrays.
    rungs: the sizes that are exported on the way.
    first_step: the steps of the run before this phase.
    first_pass: the passes of the run before this phase.
  """

  plan: PruningPlan
  schedule: Schedule
  criterion: Criterion
  repairs: bool
  batches: int
  texts: tuple[str, ...] = ('',)
  data: str = ''
  cuts: tuple[int, ...] = ()
  rungs: tuple[Rung, ...] = ()
  first_step: int = 0
  first_pass: int = 0

  @functools.cached_property
  def milestones(self) -> Milestones:
    """The sizes on the way."""
    return Milestones(self.plan, self.schedule, self.rungs)

  @functools.cached_property
  def rung_before(self) -> dict[int, Rung]:
    """The rungs, by the step before which each is exported."""
    return {rung.end: rung for rung in self.rungs}

  @property
  def averages(self) -> bool:
    """Whether scores are averaged over the steps."""
    ranked = self.plan.within_layers or self.criterion.layers == SUM
    return self.criterion.averaged and ranked

  @property
  def goes_through_layers(self) -> bool:
    """Whether events measure or repair groups within layers."""
    without = self.criterion.averaged and not self.repairs
    return self.plan.within_layers and not without

  @property
  def layer_events(self) -> tuple[int, ...]:
    """The steps at which whole layers are masked."""
    return self.milestones.layer_maskings

  @property
  def passes(self) -> tuple[int, ...]:
    """The steps whose events read tokens, to measure or repair."""
    if self.goes_through_layers:
      return self.milestones.maskings
    return () if self.criterion.layers == SUM else self.layer_events

  @property
  def pass_batches(self) -> int:
    """The batches that a pass takes.

    Of the newest no more than there are at the first one.
    """
    if not self.passes:
      return 0
    if self.data:
      return self.batches
    return min(self.batches, self.first_step + min(self.passes) + 1)

  def own_batches(self, step: int) -> range:
    """The batches of `data` that the event of a step reads."""
    if not self.data or step not in self.passes:
      return range(0)
    first = (self.first_pass + self.passes.index(step)) * self.batches
    return range(first, first + self.batches)


@dataclasses.dataclass(frozen=True)
class Phase:
  """Steps with one learning rate, and one schedule of the masks.

  Attributes:
    name: shown.
    checkpoints: the folder of its checkpoints in the workdir.
    first_step: the steps of the run before it.
    steps: its own.
    data: the spec of its text.
    first_batch: the batch of `data` at its first step.
    peak: the learning rate at its first step; 0 leaves the adapters as they
      are.
    lr_schedule: one of LR_SCHEDULES.
    pruning: None where nothing is masked.
    restarts: the steps at which the learning rate is at its peak again.
  """

  name: str
  checkpoints: str
  first_step: int
  steps: int
  data: str
  first_batch: int
  peak: float
  lr_schedule: str
  pruning: Pruning | None = None
  restarts: tuple[int, ...] = ()

  @property
  def learning_rate(self) -> optax.Schedule:
    """By step: from the peak, down to 0 after the last step.

    It is so anew from each restart on.
    """
    ends = itertools.pairwise((0, *self.restarts, self.steps))
    falling = [self._falling(end - begin) for begin, end in ends]
    return optax.join_schedules(falling, self.restarts)

  def _falling(self, steps: int) -> optax.Schedule:
    if self.lr_schedule == 'linear':
      return optax.linear_schedule(self.peak, 0.0, steps)
    if self.lr_schedule == 'cosine':
      return optax.cosine_decay_schedule(self.peak, steps)
    return optax.constant_schedule(self.peak)

  @property
  def learns(self) -> bool:
    """Whether gradients are needed, for the adapters or for the scores."""
    return self.peak > 0 or bool(self.pruning and self.pruning.averages)

  def compiling(self, first: int) -> frozenset[int]:
    """The steps from `first` on whose calls compile.

    The first one, those before which is cut, and after each of these the first
    with a pass, and the first at which layers are masked. Also those before
    which a rung is exported.
    """
    if self.pruning is None:
      return frozenset([first])
    sizes = [first, *(cut for cut in self.pruning.cuts if cut > first)]
    events = [
      next((step for step in steps if step >= size), first)
      for steps in (self.pruning.passes, self.pruning.layer_events)
      for size in sizes
    ]
    return frozenset([*sizes, *events, *self.pruning.rung_before])


def make_phases(
  order: str,
  prunings: Sequence[Pruning],
  train: TrainSettings,
  recover: RecoverSettings,
  data: DataSettings,
) -> tuple[Phase, ...]:
  """The phases of a run, in order.

    joint            prune (train.steps), while LoRA trains
    prune_then_tune  calibrate (prune.calibration_steps), with untrained
                     adapters, and prune at once; tune (the rest of
                     train.steps) on what is left
    none             calibrate
    and, with any of them, recover (recover.steps) on what is left.

  After the last one that prunes comes the cut. With a ladder, tune prunes too.
  Where nothing is pruned they are those of joint. All take one batch a step, so
  that joint and prune_then_tune see the same tokens. `order` is prune.order;
  `prunings` are what the first phases mask.
  """
  tune, recovery = CHECKPOINTS_AFTER_CUT
  rate, result = train.learning_rate, []

  def add(
    name, folder, steps, rate, pruning=None, spec=data.train, restarts=()
  ):
    first = sum(phase.steps for phase in result)
    # Data of its own starts from its beginning; else the stream goes on.
    start = first if spec == data.train else 0
    args = (name, folder, first, steps, spec, start, rate, train.lr_schedule)
    result.append(Phase(*args, pruning, restarts))

  if order == 'joint' or not prunings:
    add('prune', CHECKPOINTS, train.steps, rate, *prunings)
  else:
    first, *rungs = prunings
    calibration = first.schedule.total_steps
    folder = CHECKPOINTS_BEFORE if rungs else CHECKPOINTS
    add('calibrate', folder, calibration, 0.0, first)
    for later in rungs:
      ends, steps = later.schedule.events, later.schedule.total_steps
      add('tune', CHECKPOINTS, steps, rate, later, restarts=ends)
    if order == 'prune_then_tune' and not rungs:
      add('tune', tune, train.steps - calibration, rate)
  if recover.steps:
    rate, spec = recover.learning_rate or rate, recover.data or data.train
    add('recover', recovery, recover.steps, rate, spec=spec)
  return tuple(result)
