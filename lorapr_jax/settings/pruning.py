"""What the phases of a run mask, when, and on how many tokens."""

import dataclasses

from lorapr_jax.data.sources import parse_mixture
from lorapr_jax.errors import UserError
from lorapr_jax.models.cost import (
  forward_flops_per_token,
  pass_flops_per_token,
)
from lorapr_jax.pruning.importance import OBS
from lorapr_jax.pruning.ladder import at_once, on_the_ramp, parse_rung_steps
from lorapr_jax.pruning.milestones import END, parse_shrink
from lorapr_jax.pruning.schedule import AtOnce
from lorapr_jax.settings.model import PlannedModel, PruneSettings
from lorapr_jax.settings.phases import Pruning
from lorapr_jax.settings.sections import TrainSettings

# What the passes of all pruning events may cost, as a share of the steps'
# operations; and the most tokens of one, if two batches are not more.
EVENT_SHARE = 0.25
EVENT_TOKENS = 2**17


def plan_prunings(
  planned: PlannedModel, train: TrainSettings, text: str
) -> tuple[Pruning, ...]:
  """What each of the phases masks that mask anything, in their order.

  `text` is data.train.

  Raises:
    UserError: naming the key whose value is impossible.
  """
  prune, plan, criterion = planned.prune, planned.plan, planned.prune.ranking()
  _check_steps(planned, train)
  shrink = _shrink(planned)
  if plan is None:
    return ()
  own = prune.compensate_data
  texts = tuple(spec.text for _, spec in parse_mixture(own or text))
  # What a layer that goes adds to the stream is in nobody's inputs.
  repairs = prune.repairs and plan.within_layers
  schedule = prune.schedule(train.steps)
  whole = Pruning(*(plan, schedule, criterion, repairs, 1, texts, own))
  found = _with_rungs(whole, planned, train)
  passes = sum(len(pruning.passes) for pruning in found)
  if own and not passes:
    raise UserError(
      f'prune.compensate_data is {own!r}, but with '
      f'prune.compensate={prune.compensate} and '
      f'prune.criterion={criterion.name} no text is measured or repaired on: '
      'leave it empty'
    )
  batches = prune.compensate_batches
  batches = batches or _event_batches(whole, passes, prune, train)
  found = [dataclasses.replace(x, batches=batches) for x in found]
  micro_batches = train.batch_size // train.micro_batch_size
  fits = plan.within_layers and (repairs or criterion.name == OBS)
  if fits and found[0].pass_batches * micro_batches < 2:
    raise UserError(
      'a pruning event keeps one micro-batch out of what it is fitted to, and '
      'the first one has no other: raise prune.compensate_batches or '
      f'prune.{"warmup" if prune.order == "joint" else "calibration_steps"}, '
      'or lower train.micro_batch_size'
    )
  if shrink != END:
    cuts = found[0].milestones.cuts(shrink, train.seq_len)
    found[0] = dataclasses.replace(found[0], cuts=cuts)
  return tuple(found)


def _check_steps(planned: PlannedModel, train: TrainSettings) -> None:
  """Refuses what the order of the phases has no steps for."""
  prune, criterion = planned.prune, planned.prune.ranking()
  if planned.config.quantized and criterion.needs_base_grads:
    raise UserError(
      f'prune.criterion={criterion.name} needs gradients of the base, which '
      'model.base_dtype=int8 has none of: use prune.criterion=obs, or lora'
    )
  tunes = planned.plan and prune.order == 'prune_then_tune'
  if tunes and train.steps <= prune.calibration_steps:
    raise UserError(
      f'prune.calibration_steps {prune.calibration_steps} leaves none of '
      f'train.steps {train.steps} to tune: raise train.steps, or lower it'
    )
  if planned.ladder and prune.order == 'none':
    raise UserError(
      'export.ladder has sizes that are trained one after the other, and under '
      'prune.order=none nothing is trained: use prune.order=prune_then_tune, '
      'the command explore, or --config.export.ladder= for none'
    )
  if prune.rung_steps and not (planned.ladder and prune.order != 'joint'):
    raise UserError(
      f'prune.rung_steps is {prune.rung_steps!r}, but '
      + (
        'under prune.order=joint the ramp says when a rung comes'
        if planned.ladder
        else 'export.ladder is empty'
      )
      + ': leave it out'
    )


def _shrink(planned: PlannedModel) -> str | tuple[float, ...]:
  """`prune.shrink`, or END where nothing is cut on a ramp."""
  prune, reason = planned.prune, ''
  shrink = parse_shrink(prune.shrink)
  if planned.plan is None or prune.order != 'joint':
    reason = 'there is no ramp: use prune.shrink=end, or prune.order=joint'
  elif prune.criterion == 'random':
    reason = 'scores are drawn for the sizes at the start: use prune.shrink=end'
  if reason and isinstance(shrink, tuple):
    raise UserError(f'prune.shrink is {prune.shrink!r}, but {reason}')
  return END if reason else shrink


def _with_rungs(
  pruning: Pruning, planned: PlannedModel, train: TrainSettings
) -> tuple[Pruning, ...]:
  """The same with the rungs of export.ladder.

  At once, the first rung is masked after the calibration. The next ones and the
  last size are masked while what is left is tuned, and cut at once.
  """
  ladder, prune = planned.ladder, planned.prune
  if not ladder:
    return (pruning,)
  if prune.order == 'joint':
    rungs = on_the_ramp(pruning.plan, ladder, pruning.schedule)
    return (dataclasses.replace(pruning, rungs=rungs),)
  steps = train.steps - prune.calibration_steps
  rungs = at_once(
    ladder, parse_rung_steps(prune.rung_steps, len(ladder), steps)
  )
  first = dataclasses.replace(pruning, plan=ladder[0])
  events = tuple(rung.end for rung in rungs)
  later = dataclasses.replace(
    pruning,
    schedule=AtOnce(steps, events),
    rungs=rungs,
    cuts=(0, *(event + 1 for event in events if event + 1 < steps)),
    first_step=prune.calibration_steps,
    first_pass=len(first.passes),
  )
  return first, later


def _event_batches(
  pruning: Pruning, passes: int, prune: PruneSettings, train: TrainSettings
) -> int:
  """The batches that a pruning event reads, where the config leaves it open.

  So many that all `passes` together take EVENT_SHARE of the operations of the
  steps, which are three forward passes each. With prune.order=none there are no
  such steps, and all that were read before the event are taken. What solving
  costs does not depend on the number, and is left out.
  """
  config, tokens = pruning.plan.config, train.batch_size * train.seq_len
  step = 3 * forward_flops_per_token(config, train.seq_len)
  each = pass_flops_per_token(config, train.seq_len)
  share = EVENT_SHARE * train.steps * step / each
  number = int(share / max(1, passes))
  if prune.order == 'none':
    number = prune.calibration_steps
  return max(2, min(number, EVENT_TOKENS // tokens))
