"""Which layers go as a whole at a pruning event."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.models import decoder
from lorapr_jax.models.compute import (
  Compute,
  compiler_options,
  run_model,
  token_losses,
)
from lorapr_jax.pruning.importance import COSINE, SUM
from lorapr_jax.pruning.masks import of_layers, select_mask, with_layers
from lorapr_jax.runtime.sharding import mesh_of
from lorapr_jax.training.base import Places

# The most tokens whose losses are compared. With four times as many, the same
# eight layers of SmolLM2-135M went (docs/method.md).
LOSS_TOKENS = 2**10


def make_choose_layers(
  compute: Compute,
  how: str,
  protected: Sequence[bool],
  places: Places,
) -> Callable[..., Any]:
  """The jitted choice of the layers that go:

    (params, lora, masks, importance, keep, batches) -> (masks, importance)

  Of all layers `keep` stay. What a layer was chosen by is its importance, that
  of its last round. With LOSS (SLEB, arXiv 2402.09025) the one goes without
  which the loss is least, and then all others are measured again; with COSINE
  (ShortGPT, arXiv 2403.03853) all go at once for which 1 - cos of input and
  output, the mean over tokens, is least; with SUM those whose average is.

  Args:
    compute: for the size of the arrays.
    how: LOSS, COSINE or SUM, which reads no batches.
    protected: by layer, whether it stays in any case.
    places: for the size of the arrays.
  """
  place = places.state

  def choose(params, lora, masks, importance, keep, batches):
    mask, old = of_layers(masks), of_layers(importance)
    fixed = jnp.asarray(protected)
    if how == SUM:
      new, scores = select_mask(jnp.where(fixed, jnp.inf, old), mask, keep), old
    else:
      batch = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
      measured = _Measured(compute, place, params, lora, masks)
      if how == COSINE:
        scores = jnp.where((mask > 0) & ~fixed, measured.turned(batch), old)
        new = select_mask(jnp.where(fixed, jnp.inf, scores), mask, keep)
      else:
        new, scores = measured.greedy(_few(batch), mask, ~fixed, keep, old)
    return with_layers(masks, new), with_layers(importance, scores)

  return jax.jit(
    choose, out_shardings=place, compiler_options=compiler_options(place)
  )


def _few(batch: Any) -> Any:
  """Micro-batches of LOSS_TOKENS in all, at equal distances; at least one."""
  count, *shape = batch['tokens'].shape
  few = max(1, min(count, LOSS_TOKENS // (shape[0] * shape[1])))
  return jax.tree.map(lambda x: x[:: count // few][:few], batch)


@dataclasses.dataclass(frozen=True, eq=False)
class _Measured:
  """A model whose layers are measured on micro-batches, (M, B, T).

  Attributes:
    compute: for its sizes.
    place: of small arrays; it has the mesh.
    params: the base.
    lora: the adapters.
    masks: of its groups.
  """

  compute: Compute
  place: Any
  params: Any
  lora: Any
  masks: Any

  def turned(self, batch: Any) -> Array:
    """1 - cos of each layer's input and output, the mean over tokens; (L,)."""

    def of_micro(total: Any, micro: Any) -> tuple[Any, None]:
      segments, tokens = micro.get('segments'), micro['tokens']
      there = jnp.ones(tokens.shape) if segments is None else segments > 0
      there = there.astype(jnp.float32)

      def observe(x: Array, out: Array) -> Array:
        x, out = x.astype(jnp.float32), out.astype(jnp.float32)
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(out, axis=-1)
        cos = jnp.sum(x * out, axis=-1) / jnp.maximum(norms, 1e-30)
        return jnp.sum((1 - cos) * there.reshape(cos.shape))

      _, sums = self.run(micro, observe=observe, masks=self.masks)
      return jax.tree.map(jnp.add, total, (sums, jnp.sum(there))), None

    zeros = jnp.zeros(len(of_layers(self.masks))), jnp.float32(0)
    (sums, count), _ = jax.lax.scan(of_micro, zeros, batch)
    return sums / jnp.maximum(count, 1.0)

  def greedy(
    self, batch: Any, mask: Array, free: Array, keep: Array, old: Array
  ) -> tuple[Array, Array]:
    """Masks of layers, (L,), and the losses that they were chosen by.

    Args:
      batch: what the losses are of.
      mask: of layers before.
      free: whether a layer may go.
      keep: how many stay.
      old: the losses of events before.
    """

    def one_round(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
      mask, losses = state
      is_open = free & (mask > 0)
      found = self.losses_without(batch, mask, is_open)
      # What is no number is worse than all that are.
      found = jnp.where(jnp.isfinite(found), found, jnp.finfo(found.dtype).max)
      losses = jnp.where(is_open, found, losses)
      least = jnp.argmin(jnp.where(is_open, losses, jnp.inf))
      return mask.at[least].set(0.0), losses

    rounds = jnp.sum(mask).astype(jnp.int32) - keep
    return jax.lax.fori_loop(0, rounds, one_round, (mask, old))

  def losses_without(self, batch: Any, mask: Array, is_open: Array) -> Array:
    """The mean loss of a token without each layer too, (L,); 0 if not open.

    What comes before a layer is computed once for all.
    """
    numbers = jnp.arange(len(mask))

    def of_micro(total: Array, micro: Any) -> tuple[Array, None]:
      masks = with_layers(self.masks, mask)
      _, inputs = self.run(
        micro, observe=lambda x, _: x, masks=masks, skips=True
      )

      def without(layer: Array) -> Array:
        behind = with_layers(self.masks, mask * (numbers > layer))
        losses = token_losses(
          self.params,
          micro['tokens'],
          micro['weights'],
          self.compute,
          start=inputs[layer],
          masks=behind,
          skips=True,
          **self.context(micro),
        )
        return jnp.sum(losses)

      def of_layer(layer: Array) -> Array:
        return jax.lax.cond(
          is_open[layer], without, lambda _: jnp.float32(0), layer
        )

      return total + jax.lax.map(of_layer, numbers), None

    total, _ = jax.lax.scan(of_micro, jnp.zeros(len(mask)), batch)
    return total / jnp.maximum(jnp.sum(batch['weights'][..., 1:]), 1.0)

  def run(self, micro: Any, **how: Any) -> Any:
    """`decoder.through_layers` of a micro-batch."""
    return run_model(
      self.params,
      micro['tokens'],
      self.compute,
      run=decoder.through_layers,
      **how,
      **self.context(micro),
    )

  def context(self, micro: Any) -> dict[str, Any]:
    """What `run_model` is told besides."""
    return {
      'mesh': mesh_of(self.place),
      'segments': micro.get('segments'),
      'matmul_dtype': self.compute.matmul_dtype,
      'lora': self.lora,
    }
