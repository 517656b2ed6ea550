"""Compensation: what survives makes up for what is masked, in closed form.

Here are the formula for one projection and what of the base it changes;
training/repair.py goes through a model.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.errors import UserError
from lorapr_jax.pruning.solve import solve

NONE, RIDGE = 'none', 'ridge'
# By part of a block, the projection that reads the pruned groups.
REPAIRED = {'self_attn': 'o_proj', 'mlp': 'down_proj'}


@dataclasses.dataclass(frozen=True)
class Compensation:
  """How it is done.

  Attributes:
    damping: c of `ridge_update`.
    batches: how many of the newest batches the inputs are taken from.
  """

  damping: float
  batches: int

  def __post_init__(self):
    if not self.damping > 0:
      raise UserError(
        f'prune.compensate_damping is {self.damping}: it must be positive'
      )
    if self.batches < 1:
      raise UserError(
        f'prune.compensate_batches is {self.batches}: it must be positive'
      )


def repaired_part(block: Any) -> Any:
  """The weights of REPAIRED, of a tree like a block's."""
  return {
    part: {name: {'weight': block[part][name]['weight']}}
    for part, name in REPAIRED.items()
  }


def with_part(block: Any, new: Any) -> Any:
  """The block with the weights of a `repaired_part` in their places."""
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
  """The `repaired_part` of every stack, of a tree like the base's."""
  return tuple(map(repaired_part, params['stacks']))


def without_repaired(params: Any) -> Any:
  """The tree without what is in `repaired_of`."""
  return {**params, 'stacks': tuple(map(_without_part, params['stacks']))}


def with_repaired(params: Any, repaired: Sequence[Any]) -> Any:
  """The tree with another `repaired_of`."""
  pairs = zip(params['stacks'], repaired, strict=True)
  return {**params, 'stacks': tuple(with_part(*pair) for pair in pairs)}


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
  outer = stays[:, None] * stays
  ridge = damping * jnp.sum(jnp.diagonal(gram) * stays) / jnp.sum(stays)
  # The rows outside S make equations of their own, whose solution is zero.
  system = gram * outer + jnp.diag(jnp.where(stays > 0, ridge, 1.0))
  with jax.default_matmul_precision('highest'):
    lost = stays[:, None] * (gram @ (gone[:, None] * weight))
  return solve(system, lost)
