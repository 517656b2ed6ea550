"""Where a phase begins: at its first step, or as its newest checkpoint says."""

from collections.abc import Callable
import dataclasses
import functools
from pathlib import Path

import jax

from lorapr_jax.models.compute import Compute
from lorapr_jax.pruning.compensation import repaired_of
from lorapr_jax.settings.phases import Phase
from lorapr_jax.training.base import Base, weight_shapes
from lorapr_jax.training.checkpoint import (
  Damaged,
  restore,
  saved_steps,
  set_aside,
)
from lorapr_jax.training.cut import as_saved
from lorapr_jax.training.state import TrainState


def begin(
  folder: Path,
  phase: Phase,
  base: Base,
  new_state: Callable[[Compute], TrainState],
  warn: Callable[[str], None],
) -> tuple[TrainState, Base]:
  """State and base at the step that a phase goes on from.

  Checkpoints that are damaged are set aside once one before them is read. The
  base is as loaded, or as the phase before left it; arrays that were cut on the
  way or repaired are deleted.

  Raises:
    Damaged: if there are checkpoints, and none can be read; it names the
      newest.
  """
  damaged: list[tuple[int, Damaged]] = []
  for step in sorted(saved_steps(folder), reverse=True):
    try:
      found = restored(folder, phase, base, new_state, step)
    except Damaged as error:
      damaged.append((step, error))
      continue
    for newer, _ in damaged:
      warn(set_aside(folder, newer, step))
    return found
  if damaged:
    raise damaged[0][1]
  # device_put would find that NaN differs between processes.
  place = jax.jit(lambda state: state, out_shardings=base.places.state)
  return place(new_state(base.compute)), base


def restored(
  folder: Path,
  phase: Phase,
  base: Base,
  new_state: Callable[[Compute], TrainState],
  step: int,
) -> tuple[TrainState, Base]:
  """State and base of one checkpoint; the arguments are as of `begin`.

  Raises:
    Damaged: if it cannot be read; the base is as it was then.
  """
  compute = _compute_at(phase, base.compute, step)
  shapes = _stored_shapes(phase, base, compute, new_state)
  state = restore(folder, step, shapes, base.places.state)
  return state.replace(repaired=()), as_saved(base, state)


def _compute_at(phase: Phase, compute: Compute, step: int) -> Compute:
  """For the sizes in which a state of `step` steps is stored."""
  if not (phase.pruning and phase.pruning.cuts):
    return compute
  sizes = phase.pruning.milestones.size_at(step, phase.pruning.cuts)
  quantized = compute.config.quantized
  config = dataclasses.replace(sizes, quantized=quantized)
  return dataclasses.replace(compute, config=config)


def _stored_shapes(
  phase: Phase,
  base: Base,
  compute: Compute,
  new_state: Callable[[Compute], TrainState],
) -> TrainState:
  """The shapes of a checkpoint of these sizes; of `base` is the whole."""
  state, whole = (
    jax.eval_shape(functools.partial(new_state, x))
    for x in (compute, base.compute)
  )
  state = state.replace(whole=whole.whole)
  if phase.pruning and phase.pruning.repairs:
    weights = weight_shapes(base.places.mesh, compute.config, base.dtype)
    state = state.replace(repaired=repaired_of(weights))
  return state
