"""What a run would need: its functions, compiled for devices ahead of time.

Nothing is loaded or run. The compiler says what each function takes on a
device; what else lies there meanwhile is added from shapes.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import optax

from lorapr_jax.eval.perplexity import batch_rows, make_window_losses
from lorapr_jax.models.cost import (
  attention_flops_per_token,
  forward_flops_per_token,
)
from lorapr_jax.planning.compiled import Compiled, OutOfMemory
from lorapr_jax.planning.topology import Topology
from lorapr_jax.runtime import sharding
from lorapr_jax.settings.phases import phases
from lorapr_jax.settings.run import RunSettings, split_config
from lorapr_jax.training import steps
from lorapr_jax.training.base import (
  Base,
  Places,
  weight_shapes,
)
from lorapr_jax.training.loop import Functions
from lorapr_jax.training.state import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class Phase:
  """A function of the loop, ready to be compiled.

  Attributes:
    name: shown.
    lowered: the function with the shapes of its arguments.
    beside: bytes a device holds meanwhile that are no arguments.
    ideal_flops: of all devices, from the model's sizes alone.
  """

  name: str
  lowered: jax.stages.Lowered
  beside: int
  ideal_flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a phase takes on each device of a topology.

  Attributes:
    name: of the phase.
    beside: bytes of the run that are no arguments.
    ideal_flops: this device's share of 4 N a token and the attention.
    fits: whether all fits the chip's memory; None: a CPU's is not known.
    refused: the bytes that the compiler's refusal names, or 0; None where it
      refused nothing.
    compiled: by the compiler; None where it refuses the largest chips too.
    compiled_for: the topology of that: another, where the asked one is too
      small.
  """

  name: str
  beside: int
  ideal_flops: float
  fits: bool | None
  refused: int | None
  compiled: Compiled | None
  compiled_for: str

  @property
  def total(self) -> int | None:
    """Bytes on a device while the phase runs."""
    if self.compiled is None:
      return None
    own = self.compiled
    return own.arguments + own.outputs + own.temporaries + self.beside


def plan_run(
  config: config_dict.ConfigDict, topology: Topology, *, elsewhere: bool = True
) -> Iterator[Needs]:
  """The needs of every phase; each is compiled as it is asked for.

  Args:
    config: of the run.
    topology: that it is for.
    elsewhere: whether a phase that is too large is compiled for larger chips.

  Raises:
    UserError: for a mistake in the config, before anything is compiled.
  """
  chip, devices = topology.chip, len(topology.devices)
  for phase in lowered_phases(split_config(config, topology.devices)):
    refused, compiled_for = None, topology
    try:
      compiled = Compiled.of(phase.lowered)
    except OutOfMemory as refusal:
      refused, compiled = refusal.bytes, None
      if elsewhere:
        compiled_for = topology.larger()
        compiled = _compiled_on(compiled_for, config, phase.name)
    needs = Needs(
      name=phase.name,
      beside=phase.beside,
      ideal_flops=phase.ideal_flops / devices,
      fits=None if refused is None else False,
      refused=refused,
      compiled=compiled,
      compiled_for=compiled_for.name,
    )
    if chip and refused is None:
      needs = dataclasses.replace(needs, fits=needs.total <= chip.hbm)
    yield needs


def _compiled_on(
  topology: Topology, config: config_dict.ConfigDict, name: str
) -> Compiled | None:
  """The phase of that name there; None where it does not fit either."""
  found = lowered_phases(split_config(config, topology.devices))
  phase = next(phase for phase in found if phase.name == name)
  try:
    return Compiled.of(phase.lowered)
  except OutOfMemory:
    return None


class Shapes(NamedTuple):
  """What the functions of a loop are called with: no arrays, their shapes.

  Attributes:
    params: the base.
    state: of step 0.
    batch: of a step.
    key: of a step.
  """

  params: Any
  state: TrainState
  batch: Any
  key: Any

  @classmethod
  def of(
    cls,
    settings: RunSettings,
    places: Places,
    groups: tuple[str, ...],
    adamw: optax.GradientTransformation,
  ) -> 'Shapes':
    """Of a run with these `groups`."""
    key = replicated(jax.eval_shape(lambda: jax.random.key(0)), places)
    init = functools.partial(
      init_state,
      settings=settings.compute,
      groups=groups,
      optimizer=adamw,
    )
    return cls(
      params=weight_shapes(
        places.mesh, settings.compute.config, settings.base_dtype
      ),
      state=replicated(jax.eval_shape(init, key), places),
      batch=batch_shapes(settings, places),
      key=key,
    )

  def beside(self, *arguments: Any) -> int:
    """Bytes of the state and a batch on a device, without these arguments."""
    held = bytes_of((self.state, self.batch))
    return held - bytes_of(arguments)


def lowered_phases(settings: RunSettings) -> Iterator[Phase]:
  """Of a run's first phase, all that it calls in its loop, but for the ranking.

  step, importance, compensation if it is asked for, optimiser, evaluation.
  """
  phase, *_ = phases(settings)
  places = Places.of(
    settings.device_mesh,
    settings.compute.config,
    settings.base_dtype,
    settings.train.micro_batch,
  )
  adamw = steps.make_optimizer(
    steps.learning_rate(
      settings.train.lr_schedule, phase.learning_rate, phase.steps
    )
  )
  groups = tuple(settings.plan.keep) if phase.schedule else ()
  shapes = Shapes.of(settings, places, groups, adamw)
  params, state, batch, key = shapes
  functions = Functions.of(
    settings, phase, Base(params, settings.compute, places), adamw
  )
  needs = settings.criterion.needs if phase.schedule else None
  yield Phase(
    'step',
    functions.lora_gradients.lower(params, state.lora, state.masks, batch, key),
    shapes.beside(state.lora, state.masks, batch),
    _ideal_step_flops(settings, needs),
  )
  if phase.schedule:
    _, grads, more = jax.eval_shape(
      functions.lora_gradients, params, state.lora, state.masks, batch, key
    )
    if needs == 'base_grads':
      like = {needs: steps.projections(params['stacks'])}
      more = jax.tree.map(_placed_like, more, like)
    else:
      more = replicated(more, places)
    norm = replicated(jax.ShapeDtypeStruct((), jnp.float32), places)
    yield Phase(
      'importance',
      functions.update_importance.lower(
        *(state.importance, params, state.lora, replicated(grads, places)),
        *(more, state.masks, norm),
      ),
      shapes.beside(state.importance, state.lora, state.masks),
    )
  if functions.compensate:
    texts = {name: x for name, x in batch.items() if name != 'teacher'}
    batches = (texts,) * settings.compensation.batches
    yield Phase(
      'compensation',
      functions.compensate.lower(
        params, state.lora, state.masks, state.masks, batches
      ),
      shapes.beside(state.lora, state.masks, texts),
    )
  ok = replicated(jax.ShapeDtypeStruct((), jnp.bool_), places)
  yield Phase(
    'optimiser',
    functions.apply_update.lower(state, state.lora, ok),
    shapes.beside(state) + bytes_of(params),
  )
  if settings.data.eval:
    yield _evaluation(settings, shapes)


def _ideal_step_flops(settings: RunSettings, needs: str | None) -> float:
  """Of all devices: twice the forward pass for gradients of activations.

  The base's own are not needed, but for some criteria. Attention's backward
  pass has all four of its products.
  """
  config, seq_len = settings.compute.config, settings.train.seq_len
  attention = attention_flops_per_token(config, seq_len)
  forward = forward_flops_per_token(config, seq_len) - attention
  flops = 2 * forward + 3 * attention
  if needs == 'base_grads':  # Of the layers alone.
    layers = forward_flops_per_token(config, seq_len, with_logits=0.0)
    flops += layers - attention
  return settings.train.batch_size * seq_len * flops


def _evaluation(settings: RunSettings, shapes: Shapes) -> Phase:
  params, state, length = (
    shapes.params,
    shapes.state,
    settings.data.eval_seq_len,
  )
  most = settings.train.micro_batch_size
  rows = batch_rows(params, most, settings.data.eval_windows or most)
  place = sharding.beside(params, ('batch', 'length'))
  tokens, weights = (
    jax.ShapeDtypeStruct((rows, length), dtype, sharding=place)
    for dtype in (jnp.int32, jnp.float32)
  )
  score = make_window_losses(settings.compute, sharding.beside(params, ()))
  return Phase(
    'evaluation',
    score.lower(params, tokens, weights, state.lora, state.masks),
    shapes.beside(state.lora, state.masks),
    rows * length * forward_flops_per_token(settings.compute.config, length),
  )


def replicated(tree: Any, places: Places) -> Any:
  """The shapes, whole on each device."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places.state),
    tree,
  )


def _placed_like(x: Any, other: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other.sharding)


def batch_shapes(settings: RunSettings, places: Places) -> Any:
  """Of a step's batch, as the data's packing makes it."""
  train = settings.train
  accumulated = train.batch_size // train.micro_batch_size
  shape = (accumulated, train.micro_batch_size, train.seq_len)
  names = {'tokens': jnp.int32, 'weights': jnp.float32}
  if settings.data.packing == 'documents':
    names['segments'] = jnp.int32

  def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=places.batch)

  batch = {name: of(shape, dtype) for name, dtype in names.items()}
  if train.distill:
    top = (*shape, train.distill_top_k)
    batch['teacher'] = {
      'ids': of(top, jnp.int32),
      'log_probs': of(top, jnp.float32),
    }
  return batch


def bytes_of(tree: Any) -> int:
  """On each device, of shapes that know where they lie."""

  def each(x: Any) -> int:
    return x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))

  return sum(map(each, jax.tree.leaves(tree)))
