"""Groups chosen by what is lost when they go and the rest is repaired."""

from collections.abc import Callable

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.pruning.compensation import damped, ridge_update
from lorapr_jax.pruning.masks import select_mask
from lorapr_jax.pruning.solve import solve

# The damping c while groups are chosen; the repair that follows has its own.
DAMPING = 0.1
# A group's loss depends on which others are gone: they go in so many rounds.
ROUNDS = 8


def choose_by_loss(
  weight: Array,
  gram: Array,
  mask: Array,
  keep: Array,
  solve: Callable[[Array, Array], Array] = solve,
) -> tuple[Array, Array]:
  """Masks the groups whose loss is least, an equal part of them in each round.

  The loss of group P with rows W_P of the weight is the squared error of the
  output that is left after the best repair,

    tr(W_P^T ([H_d^-1]_PP)^-1 W_P),   H_d = H + c mean(diag H) I

  over the rows that are alive (optimal brain surgeon, Hassibi and Stork, 1993;
  for groups as in ZipLM, arXiv 2302.04089). After each round the rows that stay
  are repaired, so that a group whose double has gone costs more.

  Args:
    weight: (I, O).
    gram: (I, I), H = X^T X over tokens' inputs X; float32.
    mask: of the groups, of which each has I / mask.size neighbouring rows.
    keep: how many stay along the last axis; it must not exceed what is alive.
    solve: as of `ridge_update`.

  Returns:
    The new mask, and the loss of every group in the last round that it saw.
  """
  size = len(gram) // mask.size
  alive = jnp.sum(mask, axis=-1).ravel()[0].astype(jnp.int32)

  def rows(mask: Array) -> Array:
    return jnp.repeat(mask.ravel(), size)

  def one_round(carry: tuple[Array, Array, Array], number: Array):
    mask, weight, losses = carry
    inverse = solve(damped(gram, rows(mask), DAMPING), jnp.eye(len(gram)))
    blocks = inverse.reshape(mask.size, size, mask.size, size)
    blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)
    own = weight.reshape(mask.size, size, -1)
    loss = jnp.sum(own * jnp.linalg.solve(blocks, own), axis=(1, 2))
    losses = jnp.where(mask > 0, loss.reshape(mask.shape), losses)
    gone = -(-(alive - keep) * (number + 1) // ROUNDS)
    new = select_mask(losses, mask, alive - gone)
    update = ridge_update(
      weight, gram, rows(mask - new), rows(new), DAMPING, solve
    )
    weight = (weight + update) * rows(new)[:, None]
    return (new, weight, losses), None

  first = mask, weight * rows(mask)[:, None], jnp.zeros_like(mask)
  (mask, _, losses), _ = jax.lax.scan(one_round, first, jnp.arange(ROUNDS))
  return mask, losses
