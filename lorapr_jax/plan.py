"""What a run would need: its functions, compiled for devices ahead of time.

Nothing is loaded or run. The compiler says what each function takes on a
device; what else lies there meanwhile is added from shapes.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from lorapr_jax import optimizer, steps
from lorapr_jax.cut import Base
from lorapr_jax.eval.perplexity import make_window_losses
from lorapr_jax.hlo import Program
from lorapr_jax.inputs import Places, weight_shapes
from lorapr_jax.loop import Functions
from lorapr_jax.models.cost import (
  attention_flops_per_token,
  forward_flops_per_token,
)
from lorapr_jax.phases import phases
from lorapr_jax.settings import RunSettings, split_config
from lorapr_jax.topology import Chip, Topology


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
  ideal_flops: float


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a program takes on each device, as the compiler says.

  Attributes:
    arguments: bytes.
    outputs: bytes, without those that take an argument's place.
    temporaries: bytes.
    flops: of all products, loops counted by their turns; None where the
      compiler's text does not say how often one turns, and so for
    collectives: {kind: {'count', 'bytes'}}.
  """

  arguments: int
  outputs: int
  temporaries: int
  flops: float | None
  collectives: dict[str, dict[str, int]] | None

  @classmethod
  def of(cls, lowered: jax.stages.Lowered) -> 'Compiled':
    """Compiles.

    Raises:
      OutOfMemory: if the compiler finds no way to fit it.
    """
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      message = str(error)
      if 'RESOURCE_EXHAUSTED' not in message or 'hbm' not in message.lower():
        raise
      raise OutOfMemory(refused_bytes(message)) from None
    memory = compiled.memory_analysis()
    program = Program.parse(compiled.as_text())
    try:
      flops, collectives = program.flops(), program.collectives()
    except ValueError:
      flops = collectives = None
    return cls(
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      flops=flops,
      collectives=collectives,
    )

  def received(self) -> int | None:
    """Bytes of all collectives."""
    if self.collectives is None:
      return None
    return sum(x['bytes'] for x in self.collectives.values())

  def roofline(self, chip: Chip) -> dict[str, float] | None:
    """Seconds by each of three limits; nothing is timed.

    products: all at the peak of bfloat16. memory: arguments and outputs cross
    once, temporaries are written and read. interconnect: what is received, at
    the bandwidth of one direction. The longest is a floor where all overlap.
    """
    crossing = self.arguments + self.outputs + 2 * self.temporaries
    if self.flops is None:
      return None
    return {
      'products': self.flops / chip.flops,
      'memory': crossing / chip.hbm_bandwidth,
      'interconnect': self.received() / chip.interconnect,
    }


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


class OutOfMemory(Exception):
  """A program that does not fit.

  Attributes:
    bytes: that it would take, as the compiler says; 0 where it does not.
  """

  def __init__(self, refused: int):
    super().__init__(refused)
    self.bytes = refused


def refused_bytes(message: str) -> int:
  """The first figure with a unit: what would be needed."""
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  found = re.search(r'\b(\d+(?:\.\d+)?)([KMGT])\b', message)
  return round(float(found[1]) * units[found[2]]) if found else 0


def plan_run(
  config: config_dict.ConfigDict, topology: Topology
) -> Iterator[Needs]:
  """The needs of every phase; each is compiled as it is asked for.

  Raises:
    UserError: for a mistake in the config, before anything is compiled.
  """
  for phase in lowered_phases(split_config(config, topology.devices)):
    devices = len(topology.devices)
    known = dict(
      name=phase.name,
      beside=phase.beside,
      ideal_flops=phase.ideal_flops / devices,
    )
    try:
      compiled = Compiled.of(phase.lowered)
    except OutOfMemory as refusal:
      larger = topology.larger()
      settings = split_config(config, larger.devices)
      again = next(x for x in lowered_phases(settings) if x.name == phase.name)
      try:
        compiled = Compiled.of(again.lowered)
      except OutOfMemory:
        compiled = None
      yield Needs(
        **known,
        fits=False,
        refused=refusal.bytes,
        compiled=compiled,
        compiled_for=larger.name,
      )
      continue
    needs = Needs(
      **known,
      fits=None,
      refused=None,
      compiled=compiled,
      compiled_for=topology.name,
    )
    if topology.chip:
      fits = needs.total <= topology.chip.hbm
      needs = dataclasses.replace(needs, fits=fits)
    yield needs


def lowered_phases(settings: RunSettings) -> Iterator[Phase]:
  """Of a run's first phase, all that it calls in its loop, but for the ranking.

  step, importance, compensation if it is asked for, optimiser, evaluation.
  """
  phase, *_ = phases(settings)
  places = Places.of(settings, settings.step.config)
  params = weight_shapes(settings, settings.step.config)
  adamw = optimizer.make_optimizer(
    optimizer.learning_rate(
      settings.train.lr_schedule, phase.learning_rate, phase.steps
    )
  )
  groups = tuple(settings.plan.keep) if phase.schedule else ()

  def replicated(tree: Any) -> Any:
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places.state),
      tree,
    )

  key = replicated(jax.eval_shape(lambda: jax.random.key(0)))
  state = replicated(
    jax.eval_shape(
      functools.partial(
        steps.init_state,
        settings=settings.step,
        groups=groups,
        optimizer=adamw,
      ),
      key,
    )
  )
  batch = batch_shapes(settings, places)
  functions = Functions.of(
    settings, phase, Base(params, settings.step, places), adamw
  )
  tokens = settings.train.batch_size * settings.train.seq_len
  config, seq_len = settings.step.config, settings.train.seq_len
  forward = forward_flops_per_token(config, seq_len)
  attention = attention_flops_per_token(config, seq_len)
  needs = settings.criterion.needs if phase.schedule else None
  # Twice the forward pass for gradients of activations, where the weights'
  # are not needed; attention's backward pass has all four of its products.
  ideal = 2 * (forward - attention) + 3 * attention
  if needs == 'base_grads':  # Of the layers alone.
    ideal += forward_flops_per_token(config, seq_len, with_logits=0.0)
    ideal -= attention
  whole = _bytes_of(state)
  yield Phase(
    'step',
    functions.lora_gradients.lower(params, state.lora, state.masks, batch, key),
    whole - _bytes_of((state.lora, state.masks)),
    tokens * ideal,
  )
  if phase.schedule:
    more = {}
    if needs == 'base_grads':
      more[needs] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
          x.shape, jnp.float32, sharding=x.sharding
        ),
        steps.projections(params['stacks']),
      )
    elif needs == 'statistics':
      _, _, more = jax.eval_shape(
        functions.lora_gradients, params, state.lora, state.masks, batch, key
      )
      more = replicated(more)
    norm = replicated(jax.ShapeDtypeStruct((), jnp.float32))
    arguments = (state.importance, params, state.lora, state.lora, more)
    yield Phase(
      'importance',
      functions.update_importance.lower(*arguments, state.masks, norm),
      whole
      + _bytes_of(batch)
      - _bytes_of((state.importance, state.lora, state.masks)),
      0.0,
    )
  if functions.compensate:
    count = settings.compensation.batches
    yield Phase(
      'compensation',
      functions.compensate.lower(
        params, state.lora, state.masks, state.masks, (batch,) * count
      ),
      whole - _bytes_of((state.lora, state.masks)),
      0.0,
    )
  yield Phase(
    'optimiser',
    functions.apply_update.lower(
      state, state.lora, replicated(jax.ShapeDtypeStruct((), jnp.bool_))
    ),
    _bytes_of((params, batch)),
    0.0,
  )
  if not settings.data.eval:
    return
  # As many as `evaluate_perplexity` takes at a time.
  rows, length = settings.train.micro_batch_size, settings.data.eval_seq_len
  parts = settings.mesh['data'] * settings.mesh['fsdp']
  rows = -(-min(rows, settings.data.eval_windows or rows) // parts) * parts
  place = jax.sharding.NamedSharding(
    places.batch.mesh, jax.sharding.PartitionSpec(*places.batch.spec[1:])
  )
  tokens, weights = (
    jax.ShapeDtypeStruct((rows, length), dtype, sharding=place)
    for dtype in (jnp.int32, jnp.float32)
  )
  yield Phase(
    'evaluation',
    make_window_losses(settings.step, places.state).lower(
      params, tokens, weights, state.lora, state.masks
    ),
    whole + _bytes_of(batch) - _bytes_of((state.lora, state.masks)),
    rows * length * forward_flops_per_token(config, length),
  )


def batch_shapes(settings: RunSettings, places: Places) -> Any:
  """Of a step's batch, as the data's packing makes it."""
  train = settings.train
  accumulated = train.batch_size // train.micro_batch_size
  shape = (accumulated, train.micro_batch_size, train.seq_len)
  names = {'tokens': jnp.int32, 'weights': jnp.float32}
  if settings.data.packing == 'documents':
    names['segments'] = jnp.int32
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=places.batch)
    for name, dtype in names.items()
  }


def _bytes_of(tree: Any) -> int:
  """On each device, of shapes that know where they lie."""

  def each(x: Any) -> int:
    return x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))

  return sum(map(each, jax.tree.leaves(tree)))
