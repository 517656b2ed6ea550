"""The functions of a run's loop, ready to be compiled, without weights."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import optax

from lorapr_jax.eval.perplexity import batch_rows, make_window_losses
from lorapr_jax.pruning.compensation import repaired_of, without_repaired
from lorapr_jax.runtime import sharding
from lorapr_jax.settings.phases import Pruning
from lorapr_jax.settings.run import split_config
from lorapr_jax.settings.sections import TrainSettings
from lorapr_jax.training import steps
from lorapr_jax.training.base import Base, Places, weight_shapes
from lorapr_jax.training.loop import Functions
from lorapr_jax.training.state import TrainState, init_state


class LoopFunction(NamedTuple):
  """A function of the loop, ready to be compiled.

  Attributes:
    name: the name that is shown.
    lowered: the function with the shapes of its arguments.
    beside: bytes that lie on a device beside the arguments.
  """

  name: str
  lowered: jax.stages.Lowered
  beside: int


class Shapes(NamedTuple):
  """The shapes of what the functions of a loop are called with.

  Attributes:
    base: the weights at the first size.
    state: the state at step 0.
    batch: the batch of a step.
    key: the random key of a step.
  """

  base: Base
  state: TrainState
  batch: Any
  key: Any

  @classmethod
  def of(
    cls,
    base: Base,
    batch: Any,
    groups: tuple[str, ...],
    adamw: optax.GradientTransformation,
  ) -> 'Shapes':
    """With the state at step 0, where `groups` will be masked."""
    key = _replicated(jax.eval_shape(lambda: jax.random.key(0)), base.places)
    init = functools.partial(
      init_state, settings=base.compute, groups=groups, optimizer=adamw
    )
    state = _replicated(jax.eval_shape(init, key), base.places)
    return cls(base, state, batch, key)

  def beside(self, *arguments: Any) -> int:
    """Bytes of the state and a batch on a device, without these arguments."""
    held = bytes_of((self.state, self.batch))
    return held - bytes_of(arguments)


def loop_functions(
  config: config_dict.ConfigDict, devices: Sequence[jax.Device]
) -> Iterator[LoopFunction]:
  """The functions that the loop calls in the phase that ends in the cut.

  They are step, importance, the choice of layers and the pass of a pruning
  event if it has them, optimiser and evaluation. The ranking of groups is left
  out.

  Raises:
    UserError: for a mistake in the config, before anything is lowered.
  """
  settings = split_config(config, devices)
  compute, dtype = settings.compute, settings.base_dtype
  train, data, phase = settings.train, settings.data, settings.until_cut[-1]
  if any(later.learns for later in settings.phases):
    # What learns after the cut is smaller: this bounds it.
    phase = dataclasses.replace(phase, peak=train.learning_rate)
  pruning = phase.pruning
  places = Places.of(settings.mesh, compute.config, dtype, train.micro_batch)
  params = weight_shapes(places.mesh, compute.config, dtype)
  adamw = steps.make_optimizer(phase.learning_rate)
  shapes = Shapes.of(
    Base(params, compute, places),
    _batch(train, data.packing, places),
    tuple(pruning.plan.keep) if pruning else (),
    adamw,
  )
  functions = Functions.of(phase, shapes.base, adamw)
  _, state, batch, key = shapes
  yield LoopFunction(
    'step',
    functions.lora_gradients.lower(params, state.lora, state.masks, batch, key),
    shapes.beside(state.lora, state.masks, batch),
  )
  if pruning:
    grads = pruning.averages and pruning.criterion.needs_base_grads
    yield _importance(functions, shapes, grads)
  if pruning and pruning.layer_events:
    yield _choice(functions, shapes, pruning)
  if pruning and pruning.goes_through_layers:
    yield _event(functions, shapes, pruning)
  ok = _replicated(jax.ShapeDtypeStruct((), jnp.bool_), places)
  yield LoopFunction(
    'optimiser',
    functions.apply_update.lower(state, state.lora, ok),
    shapes.beside(state) + bytes_of(params),
  )
  if data.eval:
    most = train.micro_batch_size
    rows = batch_rows(params, most, data.eval_windows or most)
    yield _evaluation(shapes, rows, data.eval_seq_len)


def _importance(
  functions: Functions, shapes: Shapes, base_grads: bool
) -> LoopFunction:
  base, state, batch, key = shapes
  _, grads, more = jax.eval_shape(
    functions.lora_gradients, base.params, state.lora, state.masks, batch, key
  )
  if base_grads:
    like = {'base_grads': steps.projections(base.params['stacks'])}
    more = jax.tree.map(lambda x, other: _shape(x, other.sharding), more, like)
  else:
    more = _replicated(more, base.places)
  norm = _replicated(jax.ShapeDtypeStruct((), jnp.float32), base.places)
  grads = _replicated(grads, base.places)
  return LoopFunction(
    'importance',
    functions.update_importance.lower(
      *(state.importance, base.params, state.lora, grads),
      *(more, state.masks, norm),
    ),
    shapes.beside(state.importance, state.lora, state.masks),
  )


def _choice(
  functions: Functions, shapes: Shapes, pruning: Pruning
) -> LoopFunction:
  base, state, _, _ = shapes
  texts = _texts(shapes, pruning)
  keep = _replicated(jax.ShapeDtypeStruct((), jnp.int32), base.places)
  return LoopFunction(
    'choice of layers',
    functions.prune.choose_layers.lower(
      *(base.params, state.lora, state.masks, state.importance, keep),
      (texts,) * (pruning.pass_batches if pruning.passes else 0),
    ),
    shapes.beside(state.lora, state.masks, state.importance, texts),
  )


def _texts(shapes: Shapes, pruning: Pruning) -> Any:
  """A batch that an event reads."""
  texts = {name: x for name, x in shapes.batch.items() if name != 'teacher'}
  if len(pruning.texts) > 1:
    texts['sources'] = texts['tokens']
  return texts


def _event(
  functions: Functions, shapes: Shapes, pruning: Pruning
) -> LoopFunction:
  state, params = shapes.state, shapes.base.params
  texts = _texts(shapes, pruning)
  return LoopFunction(
    'pruning event',
    functions.prune.prune_layers.lower(
      *(repaired_of(params), without_repaired(params), state.lora),
      *(state.masks, state.importance),
      # How many stay in each layer of a stack.
      jax.tree.map(
        lambda mask: jax.ShapeDtypeStruct(mask.shape[:1], jnp.int32),
        state.masks,
      ),
      (texts,) * pruning.pass_batches,
    ),
    shapes.beside(state.lora, state.masks, state.importance, texts),
  )


def _evaluation(shapes: Shapes, rows: int, length: int) -> LoopFunction:
  params, compute, _ = shapes.base
  state = shapes.state
  place = sharding.beside(params, ('batch', 'length'))
  tokens, weights = (
    jax.ShapeDtypeStruct((rows, length), dtype, sharding=place)
    for dtype in (jnp.int32, jnp.float32)
  )
  score = make_window_losses(compute, sharding.beside(params, ()))
  return LoopFunction(
    'evaluation',
    score.lower(params, tokens, weights, state.lora, state.masks),
    shapes.beside(state.lora, state.masks),
  )


def _batch(train: TrainSettings, packing: str, places: Places) -> Any:
  """The shapes of a step's batch."""
  accumulated = train.batch_size // train.micro_batch_size
  shape = (accumulated, *train.micro_batch)

  def of(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=places.batch)

  batch = {'tokens': of(jnp.int32), 'weights': of(jnp.float32)}
  if packing == 'documents':
    batch['segments'] = of(jnp.int32)
  if train.distill:
    top = train.distill_top_k
    batch['teacher'] = {
      'ids': of(jnp.int32, top),
      'log_probs': of(jnp.float32, top),
    }
  return batch


def _replicated(tree: Any, places: Places) -> Any:
  """The shapes of arrays that lie whole on each device."""
  return jax.tree.map(lambda x: _shape(x, places.state), tree)


def _shape(x: Any, place: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def bytes_of(tree: Any) -> int:
  """The bytes on each device, of shapes that know where they lie."""

  def each(x: Any) -> int:
    return x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))

  return sum(map(each, jax.tree.leaves(tree)))
