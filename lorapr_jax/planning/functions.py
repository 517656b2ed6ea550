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
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.models.cost import (
  attention_flops_per_token,
  forward_flops_per_token,
)
from lorapr_jax.runtime import sharding
from lorapr_jax.settings.run import split_config
from lorapr_jax.settings.sections import TrainSettings
from lorapr_jax.training import steps
from lorapr_jax.training.base import Base, Places, weight_shapes
from lorapr_jax.training.loop import Functions
from lorapr_jax.training.state import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class LoopFunction:
  """A function of the loop, ready to be compiled.

  Attributes:
    name: the name that is shown.
    lowered: the function with the shapes of its arguments.
    beside: bytes that lie on a device beside the arguments.
    ideal_flops: operations of all devices, from the model's sizes alone.
  """

  name: str
  lowered: jax.stages.Lowered
  beside: int
  ideal_flops: float = 0.0


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
    compute: Compute,
    base_dtype: Any,
    places: Places,
    batch: Any,
    groups: tuple[str, ...],
    adamw: optax.GradientTransformation,
  ) -> 'Shapes':
    """The shapes of a run.

    Args:
      compute: of the run.
      base_dtype: of the weights that are not quantised.
      places: where the arrays of the run lie.
      batch: the result of `batch_shapes`.
      groups: the kinds of groups that are masked.
      adamw: the optimiser.
    """
    key = replicated(jax.eval_shape(lambda: jax.random.key(0)), places)
    init = functools.partial(
      init_state, settings=compute, groups=groups, optimizer=adamw
    )
    params = weight_shapes(places.mesh, compute.config, base_dtype)
    return cls(
      base=Base(params, compute, places),
      state=replicated(jax.eval_shape(init, key), places),
      batch=batch,
      key=key,
    )

  def beside(self, *arguments: Any) -> int:
    """Bytes of the state and a batch on a device, without these arguments."""
    held = bytes_of((self.state, self.batch))
    return held - bytes_of(arguments)


def loop_functions(
  config: config_dict.ConfigDict, devices: Sequence[jax.Device]
) -> Iterator[LoopFunction]:
  """The functions that the loop of a run's first phase calls.

  They are step, importance, compensation if it is asked for, optimiser and
  evaluation. The ranking of groups is left out.

  Args:
    config: of the run.
    devices: that it is for.

  Raises:
    UserError: for a mistake in the config, before anything is lowered.
  """
  settings = split_config(config, devices)
  phase, train = settings.phases[0], settings.train
  pruning = phase.pruning
  places = Places.of(
    settings.mesh,
    settings.compute.config,
    settings.base_dtype,
    train.micro_batch,
  )
  adamw = steps.make_optimizer(phase.learning_rate)
  shapes = Shapes.of(
    settings.compute,
    settings.base_dtype,
    places,
    batch_shapes(train, settings.data.packing, places),
    tuple(pruning.plan.keep) if pruning else (),
    adamw,
  )
  functions = Functions.of(phase, shapes.base, adamw)
  needs = pruning.criterion.needs if pruning else None
  yield _step(functions, shapes, train, needs)
  if pruning:
    yield _importance(functions, shapes, needs)
  if pruning and pruning.compensation:
    yield _compensation(functions, shapes, pruning.compensation.batches)
  yield _optimiser(functions, shapes)
  if settings.data.eval:
    rows = batch_rows(
      shapes.base.params,
      train.micro_batch_size,
      settings.data.eval_windows or train.micro_batch_size,
    )
    yield _evaluation(shapes, rows, settings.data.eval_seq_len)


def _step(
  functions: Functions,
  shapes: Shapes,
  train: TrainSettings,
  needs: str | None,
) -> LoopFunction:
  base, state, batch, key = shapes
  return LoopFunction(
    'step',
    functions.lora_gradients.lower(
      base.params, state.lora, state.masks, batch, key
    ),
    shapes.beside(state.lora, state.masks, batch),
    train.batch_size
    * train.seq_len
    * _ideal_flops_per_token(base.compute.config, train.seq_len, needs),
  )


def _importance(
  functions: Functions, shapes: Shapes, needs: str | None
) -> LoopFunction:
  base, state, batch, key = shapes
  _, grads, more = jax.eval_shape(
    functions.lora_gradients, base.params, state.lora, state.masks, batch, key
  )
  if needs == 'base_grads':
    like = {needs: steps.projections(base.params['stacks'])}
    more = jax.tree.map(_placed_like, more, like)
  else:
    more = replicated(more, base.places)
  norm = replicated(jax.ShapeDtypeStruct((), jnp.float32), base.places)
  grads = replicated(grads, base.places)
  return LoopFunction(
    'importance',
    functions.update_importance.lower(
      *(state.importance, base.params, state.lora, grads),
      *(more, state.masks, norm),
    ),
    shapes.beside(state.importance, state.lora, state.masks),
  )


def _compensation(
  functions: Functions, shapes: Shapes, batches: int
) -> LoopFunction:
  state = shapes.state
  texts = {name: x for name, x in shapes.batch.items() if name != 'teacher'}
  return LoopFunction(
    'compensation',
    functions.prune.compensate.lower(
      *(shapes.base.params, state.lora, state.masks, state.masks),
      (texts,) * batches,
    ),
    shapes.beside(state.lora, state.masks, texts),
  )


def _optimiser(functions: Functions, shapes: Shapes) -> LoopFunction:
  base, state = shapes.base, shapes.state
  ok = replicated(jax.ShapeDtypeStruct((), jnp.bool_), base.places)
  return LoopFunction(
    'optimiser',
    functions.apply_update.lower(state, state.lora, ok),
    shapes.beside(state) + bytes_of(base.params),
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
    rows * length * forward_flops_per_token(compute.config, length),
  )


def _ideal_flops_per_token(
  config: LlamaConfig, seq_len: int, needs: str | None
) -> float:
  """Operations of a step for one token, if nothing is computed twice.

  The gradients of the activations take as many as the forward pass, but for
  attention, which takes twice as many: its forward pass has two products and
  its backward pass four. Only some criteria need gradients of the base too.
  """
  attention = attention_flops_per_token(config, seq_len)
  forward = forward_flops_per_token(config, seq_len) - attention
  flops = 2 * forward + 3 * attention
  if needs == 'base_grads':  # Of the layers alone.
    layers = forward_flops_per_token(config, seq_len, with_logits=0.0)
    flops += layers - attention
  return flops


def batch_shapes(train: TrainSettings, packing: str, places: Places) -> Any:
  """The shapes of a step's batch.

  Args:
    train: the config's section train.
    packing: data.packing.
    places: where the arrays of the run lie.
  """
  accumulated = train.batch_size // train.micro_batch_size
  shape = (accumulated, train.micro_batch_size, train.seq_len)
  names = {'tokens': jnp.int32, 'weights': jnp.float32}
  if packing == 'documents':
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


def replicated(tree: Any, places: Places) -> Any:
  """The shapes of arrays that lie whole on each device."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places.state),
    tree,
  )


def _placed_like(x: Any, other: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other.sharding)


def bytes_of(tree: Any) -> int:
  """The bytes on each device, of shapes that know where they lie."""

  def each(x: Any) -> int:
    return x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))

  return sum(map(each, jax.tree.leaves(tree)))
