"""The train state: all that training changes."""

import functools
from typing import Any

from flax import struct
import jax
from jax import Array
import jax.numpy as jnp
import optax

from lorapr_jax.models.compute import Compute
from lorapr_jax.models.trees import init_lora
from lorapr_jax.pruning.masks import initial_masks


@struct.dataclass
class TrainState:
  """All that training changes. Checkpointed whole.

  Attributes:
    step: the next step, from 0.
    lora: the adapters, by stack.
    opt_state: optax's state for `lora`.
    masks: {group: 0 or 1}, by stack.
    importance: the moving average, or what the last pruning event scored; as
      `masks`.
    whole: {'masks', 'importance'} of the model before any cut, as the last
      cut on the way left them: a mask is 1 where `masks` still has the group.
    skipped: steps whose gradients or scores were not finite, in all.
    skipped_in_a_row: the same, since the last good step.
    repaired: in a checkpoint, `repaired_of` the base where prune.compensate
      changes it; in the loop these are in the base, and this is ().
    unrepaired: projections that an event of it left as they were, in all,
      because no repair made the error on tokens that were kept out less.
    error_left: the share of that error that the last event's repairs left, by
      text, (S,), the mean over projections; NaN before the first.
  """

  step: Array
  lora: Any
  opt_state: Any
  masks: Any
  importance: Any
  whole: dict[str, Any]
  skipped: Array
  skipped_in_a_row: Array
  repaired: tuple[Any, ...] = ()
  unrepaired: Array | int = 0
  error_left: Any = ()


def carried(state: TrainState) -> dict[str, Any]:
  """The fields with which the next phase that prunes goes on."""
  names = 'lora', 'masks', 'importance', 'unrepaired', 'error_left'
  return {name: getattr(state, name) for name in names}


@functools.partial(
  jax.jit, static_argnames=('settings', 'groups', 'optimizer', 'texts')
)
def init_state(
  key: Array,
  settings: Compute,
  groups: tuple[str, ...],
  optimizer: optax.GradientTransformation,
  texts: int = 1,
) -> TrainState:
  """Step 0: fresh adapters, nothing masked, no importance known.

  `texts` is S of `error_left`.
  """
  config = settings.config
  lora = init_lora(key, config, settings.lora)
  masks = initial_masks(
    groups, tuple((s.size, config.sizes(s.shape)) for s in config.stacks)
  )
  zeros = functools.partial(jax.tree.map, jnp.zeros_like, masks)
  return TrainState(
    step=jnp.int32(0),
    lora=lora,
    opt_state=optimizer.init(lora),
    masks=masks,
    importance=zeros(),
    whole={
      'masks': jax.tree.map(jnp.ones_like, masks),
      'importance': zeros(),
    },
    skipped=jnp.int32(0),
    skipped_in_a_row=jnp.int32(0),
    unrepaired=jnp.int32(0),
    error_left=jnp.full(texts, jnp.nan),
  )
