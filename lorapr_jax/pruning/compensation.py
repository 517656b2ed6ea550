"""Compensation: what survives makes up for what is masked, in closed form.

Here are the formula for one projection and what of the base it changes;
training/layer_pass.py goes through a model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.pruning.solve import solve

NONE, RIDGE = 'none', 'ridge'
# By part of a block, the projection that reads the pruned groups.
REPAIRED = {'self_attn': 'o_proj', 'mlp': 'down_proj'}
# c of `ridge_update`: what `best_update` tries.
DAMPINGS = (0.03, 0.1, 0.3, 1.0)


def with_part(block: Any, new: Any) -> Any:
  """The block with the weights of one of `repaired_of` in their places."""
  for part, name in REPAIRED.items():
    projection = block[part][name] | new[part][name]
    block = block | {part: block[part] | {name: projection}}
  return block


def _without_part(block: Any) -> Any:
  for part, name in REPAIRED.items():
    rest = {k: x for k, x in block[part][name].items() if k != 'weight'}
    block = block | {part: block[part] | {name: rest}}
  return block


def repaired_of(params: Any) -> tuple[Any, ...]:
  """The weights of REPAIRED by stack, of a tree like the base's."""
  return tuple(
    {
      part: {name: {'weight': stack[part][name]['weight']}}
      for part, name in REPAIRED.items()
    }
    for stack in params['stacks']
  )


def without_repaired(params: Any) -> Any:
  """The tree without what is in `repaired_of`."""
  return {**params, 'stacks': tuple(map(_without_part, params['stacks']))}


def with_repaired(params: Any, repaired: Sequence[Any]) -> Any:
  """The tree with another `repaired_of`."""
  pairs = zip(params['stacks'], repaired, strict=True)
  return {**params, 'stacks': tuple(with_part(*pair) for pair in pairs)}


def damped(gram: Array, stays: Array, damping: float) -> Array:
  """H_SS + c mean(diag H_SS) I, with equations of their own for other rows.

  The arguments are those of `ridge_update`.
  """
  outer = stays[:, None] * stays
  ridge = damping * jnp.sum(jnp.diagonal(gram) * stays) / jnp.sum(stays)
  return gram * outer + jnp.diag(jnp.where(stays > 0, ridge, 1.0))


def ridge_update(
  weight: Array,
  gram: Array,
  gone: Array,
  stays: Array,
  damping: float,
  solve: Callable[[Array, Array], Array] = solve,
) -> Array:
  """What is added to the rows that stay, to do the work of those that go.

  (H_SS + c mean(diag H_SS) I)^-1 H_SP W_P. This is the ridge regression of what
  the rows P contributed to the output on the inputs of the rows S: optimal
  brain surgeon (Hassibi and Stork, 1993) for groups, as in SlimGPT (arXiv
  2412.18110). Rows outside S get zero.

  Args:
    weight: (I, O). Its rows in P are read.
    gram: (I, I), H = X^T X over tokens' inputs X; float32.
    gone: (I,), 1 for a row of P.
    stays: (I,), 1 for a row of S.
    damping: c.
    solve: (A, R) -> X of A X = R, A positive definite.
  """
  lost = _correlation(weight, gram, gone, stays)
  return solve(damped(gram, stays, damping), lost)


def _correlation(
  weight: Array, gram: Array, gone: Array, stays: Array
) -> Array:
  """H_SP W_P, with zeros in other rows."""
  with jax.default_matmul_precision('highest'):
    return stays[:, None] * (gram @ (gone[:, None] * weight))


def best_update(
  weight: Array,
  gram: Array,
  gone: Array,
  stays: Array,
  held_out_error: Callable[[Array], Array],
  solve: Callable[[Array, Array], Array] = solve,
) -> tuple[Array, Array]:
  """The `ridge_update` that leaves the least error on other tokens, or none.

  Every c of DAMPINGS is tried, at the price of one factorisation each. Nothing
  is added where that leaves less than all of them, or none is finite. What
  counts is the sum over texts.

  Args:
    weight, gram, gone, stays, solve: as of `ridge_update`.
    held_out_error: what goes missing in the weight, (I, O) -> the squared error
      of the output of tokens that are not in `gram`, by text, (S,).

  Returns:
    The update, and the errors before and after it, (2, S).
  """
  lost = gone[:, None] * weight
  nothing = held_out_error(lost)
  correlation = _correlation(weight, gram, gone, stays)

  def attempt(best: tuple[Array, Array], damping: Array) -> tuple[Any, None]:
    update = solve(damped(gram, stays, damping), correlation)
    error = held_out_error(lost - update)
    better = jnp.sum(error) < jnp.sum(best[1])  # NaN is not.
    return jax.tree.map(
      lambda new, old: jnp.where(better, new, old), (update, error), best
    ), None

  first = jnp.zeros_like(lost), nothing
  (update, error), _ = jax.lax.scan(attempt, first, jnp.asarray(DAMPINGS))
  return update, jnp.stack([nothing, error])
