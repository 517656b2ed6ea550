"""What a run consists of, by prune.order: prune, calibrate, tune, recover."""

import dataclasses

from lorapr_jax.pruning.schedule import PruneSchedule
from lorapr_jax.settings.run import RunSettings

# Of the phase that ends in the cut, and of those after it in their order.
CHECKPOINTS = 'checkpoints'
CHECKPOINTS_AFTER_CUT = ('checkpoints-tune', 'checkpoints-recover')


@dataclasses.dataclass(frozen=True)
class Phase:
  """Steps on arrays of one size, with one schedule.

  Attributes:
    name: shown.
    checkpoints: the folder of its checkpoints in the workdir.
    first_step: the steps of the run before it.
    steps: its own.
    data: the spec of its text.
    first_batch: the batch of `data` at its first step.
    learning_rate: at its first step; 0 leaves the adapters as they are.
    schedule: of the masks; None where nothing is masked.
    cuts: the steps before which masked groups are cut out on the way.
  """

  name: str
  checkpoints: str
  first_step: int
  steps: int
  data: str
  first_batch: int
  learning_rate: float
  schedule: PruneSchedule | None = None
  cuts: tuple[int, ...] = ()


def phases(settings: RunSettings) -> tuple[Phase, ...]:
  """The phases of a run, in order. After the first comes the cut.

    joint            prune (train.steps), while LoRA trains
    prune_then_tune  calibrate (prune.calibration_steps), with untrained
                     adapters, and prune at once; tune (the rest of
                     train.steps) on what is left
    none             calibrate
    and, with any of them, recover (recover.steps) on what is left.

  All take one batch a step, so that joint and prune_then_tune see the same
  tokens.
  """
  train, recover = settings.train, settings.recover
  calibration = settings.calibration_steps
  tune, recovery = CHECKPOINTS_AFTER_CUT
  rate, result = train.learning_rate, []

  spec = settings.data.train

  def add(name, folder, steps, rate, schedule=None, data=spec, cuts=()):
    first = sum(phase.steps for phase in result)
    # Data of its own starts from its beginning; else the stream goes on.
    start = first if data == spec else 0
    result.append(
      Phase(name, folder, first, steps, data, start, rate, schedule, cuts)
    )

  if settings.order == 'joint':
    schedule = settings.schedule if settings.plan else None
    add('prune', CHECKPOINTS, train.steps, rate, schedule, cuts=settings.cuts)
  else:
    once = PruneSchedule.once(calibration)
    add('calibrate', CHECKPOINTS, calibration, 0.0, once)
  if settings.order == 'prune_then_tune':
    add('tune', tune, train.steps - calibration, rate)
  if recover.steps:
    rate = recover.learning_rate or rate
    data = recover.data or spec
    add('recover', recovery, recover.steps, rate, data=data)
  return tuple(result)


def total_steps(settings: RunSettings) -> int:
  """Of all phases together."""
  return sum(phase.steps for phase in phases(settings))
