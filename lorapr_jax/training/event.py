"""The pruning event: groups are chosen and masked, the rest is repaired."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lorapr_jax.pruning.masks import by_stack, select_stack_masks
from lorapr_jax.settings.phases import Pruning
from lorapr_jax.training.base import Base
from lorapr_jax.training.repair import make_compensate
from lorapr_jax.training.state import TrainState


class PruningEvent(NamedTuple):
  """A pruning step's masks and repair, compiled for one size of the arrays.

  Attributes:
    pruning: what is masked when, and how.
    select_masks: (importance, masks, counts) -> masks.
    compensate: from `make_compensate`; None where nothing is repaired.
  """

  pruning: Pruning
  select_masks: Callable[..., Any]
  compensate: Callable[..., Any] | None

  @classmethod
  def of(cls, pruning: Pruning, base: Base) -> 'PruningEvent':
    """For the size of `base`."""
    place, compensate = base.places.state, None
    if pruning.compensation:
      compensate = make_compensate(
        base.compute, pruning.compensation, base.places.base, place
      )
    select = jax.jit(select_stack_masks, out_shardings=place)
    return cls(pruning, select, compensate)

  def __call__(
    self, state: TrainState, base: Base, step: int, batches: Sequence[Any]
  ) -> tuple[TrainState, Base]:
    """State and base after the event.

    Args:
      state: with the importance of this step.
      base: whose repaired weights are donated.
      step: of the phase.
      batches: the newest, whose tokens the repair is fitted to.
    """
    keep = self.pruning.plan.keep_at(self.pruning.schedule.progress(step))
    counts = by_stack(keep, base.compute.config)
    masks = self.select_masks(state.importance, state.masks, counts)
    if self.compensate and step in self.pruning.milestones.maskings:
      params, failed = self.compensate(
        base.params, state.lora, state.masks, masks, tuple(batches)
      )
      base = base._replace(params=params)
      state = state.replace(unrepaired=state.unrepaired + failed)
    return state.replace(masks=masks), base
