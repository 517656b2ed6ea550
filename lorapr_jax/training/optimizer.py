"""The optimiser of the LoRA weights: AdamW without weight decay."""

import optax

from lorapr_jax.errors import UserError
from lorapr_jax.settings.sections import LR_SCHEDULES


def learning_rate(name: str, peak: float, steps: int) -> optax.Schedule:
  """The learning rate by step: from `peak` down to 0 after `steps` steps.

  Raises:
    UserError: if `name` is not one of LR_SCHEDULES.
  """
  if name == 'linear':
    return optax.linear_schedule(peak, 0.0, steps)
  if name == 'cosine':
    return optax.cosine_decay_schedule(peak, steps)
  if name == 'constant':
    return optax.constant_schedule(peak)
  raise UserError(
    f'train.lr_schedule is {name!r}: choose from {", ".join(LR_SCHEDULES)}'
  )


def make_optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW with its usual moments; gradients come in clipped."""
  return optax.adamw(schedule, weight_decay=0.0)
