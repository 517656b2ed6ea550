"""The paper's algorithm: the steps of one phase of a run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from lorapr_jax.models.compute import Compute
from lorapr_jax.pruning.ladder import Rung
from lorapr_jax.settings.phases import Phase
from lorapr_jax.training import steps
from lorapr_jax.training.base import Base
from lorapr_jax.training.batches import Batches
from lorapr_jax.training.cut import cut_on_the_way
from lorapr_jax.training.event import PruningEvent
from lorapr_jax.training.resume import begin, restored
from lorapr_jax.training.state import TrainState, init_state
from lorapr_jax.training.watch import Watch


class Functions(NamedTuple):
  """What the loop calls, compiled for one size; see steps.py and event.py."""

  lora_gradients: Callable[..., Any]
  update_importance: Callable[..., Any] | None
  prune: PruningEvent | None
  apply_update: Callable[..., Any]

  @classmethod
  def of(
    cls, phase: Phase, base: Base, adamw: optax.GradientTransformation
  ) -> 'Functions':
    """For the size of `base`."""
    place, pruning = base.places.state, phase.pruning
    criterion = pruning.criterion if pruning and pruning.averages else None
    base_grads = criterion and criterion.needs_base_grads
    return cls(
      steps.make_lora_gradients(
        base.compute,
        place,
        learns=phase.learns,
        base_sharding=base.places.base if base_grads else None,
      ),
      steps.make_update_importance(base.compute, criterion, place),
      pruning and PruningEvent.of(pruning, base),
      steps.make_apply_update(adamw, place),
    )


def train_phase(
  phase: Phase,
  base: Base,
  start: Mapping[str, Any],
  *,
  seed: int,
  batches: Batches,
  watch: Watch,
  leave: Callable[[Rung, TrainState, Base], Base | None],
) -> tuple[TrainState, Base]:
  """Trains LoRA on the base and, if the phase prunes, masks groups.

  Arrays of the base that are cut or repaired are deleted. The state and the
  base that come back have the last size.

  Args:
    phase: what is done.
    base: as loaded, or as the phase before left it.
    start: fields of the first state that a phase before left; adapters that
      are not among them are drawn.
    seed: for these and for dropout.
    batches: of all phases.
    watch: what goes on around the steps.
    leave: exports a rung; where it deleted the base, it gives it as loaded.

  Raises:
    Stopped: after SIGINT, SIGTERM or SIGHUP, once a checkpoint is written.
  """
  watch.display.start('compile')
  adamw = steps.make_optimizer(phase.learning_rate)
  init_key, step_key = jax.random.split(jax.random.key(seed))
  pruning, groups, texts = phase.pruning, (), 1
  if pruning:
    groups, texts = tuple(pruning.plan.keep), len(pruning.texts)

  def new_state(compute: Compute) -> TrainState:
    return init_state(init_key, compute, groups, adamw, texts)

  folder, warn = watch.workdir / phase.checkpoints, watch.display.warn
  state, base = begin(folder, phase, base, new_state, warn)
  if (first := int(state.step)) == phase.steps:
    return state, base
  if not first:
    state = state.replace(**start)

  functions = Functions.of(phase, base, adamw)
  compiling = phase.compiling(first)
  with (
    watch.over(phase, state, compiling) as watching,
    batches.of(phase, base.places.batch, first) as stream,
  ):
    for step, (batch, to_measure) in watching.steps(first, stream):
      rung = pruning and pruning.rung_before.get(step)
      if rung and (loaded := leave(rung, state, base)):
        state, base = restored(folder, phase, loaded, new_state, step)
      if pruning and step in pruning.cuts:
        state, base = cut_on_the_way(state, base, pruning, step)
        functions = Functions.of(phase, base, adamw)
        watch.display.start('compile')
      key = jax.random.fold_in(step_key, phase.first_step + step)
      results, grads, more = functions.lora_gradients(
        base.params, state.lora, state.masks, batch, key
      )
      importance, ok = functions.update_importance(
        *(state.importance, base.params, state.lora, grads, more),
        *(state.masks, results['grad_norm']),
      )
      del more  # A gradient of the base would stay through the next step.
      state = state.replace(importance=importance)
      if pruning and pruning.schedule.is_pruning_step(step):
        state, base = functions.prune(state, base, step, to_measure)
      state = functions.apply_update(state, grads, ok)
      watching.after(step, state, base, results)
  return state, base
