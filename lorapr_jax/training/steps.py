"""The jitted functions of the loop: gradients, importance, masks, update.

Each is made once from the run's static settings and compiled once: the state
comes out with the sharding it goes in with. The base is an argument: never
differentiated, never donated, never in the state, but for what a pruning event
repairs.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Sharding
import optax

from lorapr_jax.axes import PROJECTIONS
from lorapr_jax.models.compute import Compute, compiler_options, token_losses
from lorapr_jax.models.quantization import dequantized
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning import importance as importance_lib
from lorapr_jax.pruning.block_sums import block_sums, runs_on
from lorapr_jax.runtime.sharding import mesh_of, platform

# Of rank 8, XLA for TPU estimates outer products at 0.7 of the cycles of dots,
# and their operations grow with the rank. Nothing was timed on a TPU, and on a
# GPU rank 8.
_LARGEST_FUSED_RANK = 16


def projections(stacks: Any) -> Any:
  """Of a tree with an entry for each stack, the parts that are pruned."""
  return tuple({part: stack[part] for part in PROJECTIONS} for stack in stacks)


def make_lora_gradients(
  settings: Compute,
  out_sharding: Sharding,
  *,
  learns: bool = True,
  base_sharding: Any = None,
) -> Callable[..., Any]:
  """The jitted step: params, lora, masks, batch, key -> metrics, grads, more.

  `batch` is {'tokens', 'weights'}, with 'segments' where documents share a
  window, each (M, B, T): M micro-batches whose gradients are summed inside, so
  that one micro-batch's activations exist at a time. Where the dense model
  teaches it also has 'teacher', (M, B, T, ...), for `token_losses`. The loss is
  the mean over all the batch's target tokens, and not a number where it has
  none. `grads` has the structure of `lora`, clipped to `clip_norm`; `metrics`
  has `loss` and `grad_norm` (before clipping). `more` is {} or, with a sharding
  of the base, {'base_grads': the gradients of `projections(params)`}, in
  float32, clipped as `grads`. Without `learns` gradients are zeros.
  """
  more_sharding = {}
  if base_sharding is not None:
    more_sharding['base_grads'] = projections(base_sharding['stacks'])
  places, structure = jax.tree.flatten(more_sharding)
  return _gradients(settings, out_sharding, learns, tuple(places), structure)


@functools.cache
def _gradients(
  settings: Compute,
  out_sharding: Sharding,
  learns: bool,
  places: tuple[Sharding, ...],
  structure: Any,
) -> Callable[..., Any]:
  """`make_lora_gradients`, compiled once for all runs of a process.

  `places` are the leaves of a tree of `structure`: the shardings of `more`.
  """
  mesh = mesh_of(out_sharding)
  more_sharding = jax.tree.unflatten(structure, places)

  def gradients(params, lora, masks, batch, key):
    # Without a target there is no mean: what is not finite changes nothing.
    count = jnp.sum(batch['weights'][..., 1:])
    trained = {'lora': lora}
    if more_sharding:
      trained['base'] = projections(params['stacks'])

    def loss(trained, micro, key):
      losses = token_losses(
        _with_trained(params, trained),
        micro['tokens'],
        micro['weights'],
        settings,
        mesh=mesh,
        segments=micro.get('segments'),
        matmul_dtype=settings.matmul_dtype,
        teacher=micro.get('teacher'),
        lora=trained['lora'],
        masks=masks,
        dropout_key=key if settings.lora.dropout > 0 else None,
        scan_layers=settings.scan_layers,
      )
      return jnp.sum(losses) / count

    value, grads = _summed(loss, trained, batch, key, learns)
    norm = optax.tree.norm(grads['lora'])
    clip = jnp.minimum(1.0, settings.clip_norm / (norm + 1e-6))
    grads = jax.tree.map(lambda g: g * clip, grads)
    more = {'base_grads': grads['base']} if more_sharding else {}
    return {'loss': value, 'grad_norm': norm}, grads['lora'], more

  return jax.jit(
    gradients,
    out_shardings=(out_sharding, out_sharding, more_sharding),
    compiler_options=compiler_options(out_sharding)
    | dict(settings.compiler_options),
  )


def _with_trained(params: Any, trained: dict[str, Any]) -> Any:
  """The base, with the projections that gradients are taken of, if any are."""
  base = trained.get('base', params['stacks'])
  stacks = zip(params['stacks'], base, strict=True)
  return {**params, 'stacks': tuple(stack | new for stack, new in stacks)}


def _summed(
  loss: Callable[..., Any], trained: Any, batch: Any, key: Array, learns: bool
) -> Any:
  """The loss and its gradients, summed over micro-batches, one at a time."""
  value_and_grads = jax.value_and_grad(loss)
  if not learns:

    def value_and_grads(trained, *inputs):
      return loss(trained, *inputs), jax.tree.map(jnp.zeros_like, trained)

  def accumulate(total, inputs):
    new = value_and_grads(trained, *inputs)
    return jax.tree.map(jnp.add, total, new), None

  keys = jax.random.split(key, batch['tokens'].shape[0])
  # A gradient has the shape of its array: nothing is traced to know it.
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
  total, _ = jax.lax.scan(accumulate, (jnp.float32(0), zeros), (batch, keys))
  return total


@functools.cache
def make_update_importance(
  settings: Compute,
  criterion: importance_lib.Criterion | None,
  out_sharding: Sharding,
) -> Callable[..., Any]:
  """The jitted update of the average, from what the step returned:

    (importance, params, lora, grads, more, masks, grad_norm)
      -> (importance, ok)

  The moving average goes layer by layer, so that the dense scores of one layer
  exist at a time; on NVIDIA GPUs a kernel sums them up and there are none
  (pruning/block_sums.py). Where the gradients or the new scores are not finite,
  the old average stays and `ok` is False. It also stays where the criterion is
  not averaged, or None because no average is needed. The old one is donated.
  """
  average_stack = None
  if criterion and criterion.averaged:
    average_stack = _stack_average(settings, criterion, out_sharding)

  def update(importance, params, lora, grads, more, masks, grad_norm):
    new = importance
    if average_stack:
      new = tuple(
        average_stack(
          importance[i],
          importance_lib.Signals(
            params['stacks'][i],
            lora[i],
            grads[i],
            stack.start + jnp.arange(stack.size),
            **{name: value[i] for name, value in more.items()},
          ),
          masks[i],
        )
        for i, stack in enumerate(settings.config.stacks)
      )
    ok = jnp.isfinite(grad_norm)
    for leaf in jax.tree.leaves(new):
      ok &= jnp.all(jnp.isfinite(leaf))
    return _where(ok, new, importance), ok

  return jax.jit(
    update,
    donate_argnums=0,
    out_shardings=out_sharding,
    compiler_options=compiler_options(out_sharding),
  )


def _stack_average(
  settings: Compute, criterion: importance_lib.Criterion, place: Sharding
) -> Callable[..., Any]:
  """(the old average, Signals, masks) of a stack -> its new average."""
  axes = block_axes(settings.config.dequantized, settings.lora)
  # On accelerators XLA makes one pass of a few outer products and what is
  # summed of them; on CPU a product of matrices is many times as fast.
  small = settings.lora.rank <= _LARGEST_FUSED_RANK
  fused = small and platform(place) != 'cpu'
  # The kernel reads arrays.
  kernel = (
    small
    and criterion.name == 'lora'
    and not settings.config.quantized
    and runs_on(place)
  )
  options = importance_lib.Options(criterion, settings.lora.scale, fused)

  def average(inputs):
    old, scores, masks = inputs
    return importance_lib.update_importance(
      old, scores, masks, axes['params'], criterion
    )

  def update_layer(inputs):
    old, signals, masks = inputs
    signals = signals._replace(params=dequantized(signals.params, jnp.float32))
    scores = importance_lib.element_scores(signals, options)
    return average((old, scores, masks))

  def update_stack(old, signals, masks):
    if not kernel:
      return jax.lax.map(update_layer, (old, signals, masks))
    sums = block_sums(signals, options, axes, mesh=mesh_of(place))
    return jax.vmap(average)((old, sums, masks))

  return update_stack


def make_apply_update(
  optimizer: optax.GradientTransformation, out_sharding: Sharding
) -> Callable[..., Any]:
  """(state, grads, ok) -> the state after one optimiser step. Donates.

  Where `ok` is False the adapters and moments stay, and that is counted.
  """

  def apply(state, grads, ok):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
    lora = optax.apply_updates(state.lora, updates)
    lora, opt_state = _where(
      ok, (lora, opt_state), (state.lora, state.opt_state)
    )
    bad = (~ok).astype(jnp.int32)
    return state.replace(
      step=state.step + 1,
      lora=lora,
      opt_state=opt_state,
      skipped=state.skipped + bad,
      skipped_in_a_row=bad * (state.skipped_in_a_row + 1),
    )

  return jax.jit(apply, donate_argnums=0, out_shardings=out_sharding)


def _where(condition: Array, new: Any, old: Any) -> Any:
  return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def make_optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW with its usual moments; gradients come in clipped."""
  return optax.adamw(schedule, weight_decay=0.0)
