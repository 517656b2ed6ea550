"""X of A X = R for a positive definite A, whole or in blocks over a mesh."""

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Rows that are eliminated at a time.
BLOCK = 256


def spread(x: Array, mesh: Mesh | None, axis: int) -> Array:
  """An axis cut over all devices, where it divides by their number."""
  if mesh is None or x.shape[axis] % mesh.size:
    return x
  axes = [None] * x.ndim
  axes[axis] = mesh.axis_names
  place = NamedSharding(mesh, P(*axes))
  return jax.lax.with_sharding_constraint(x, place)


def _columns(
  matrix: Array, start: Array, block: int, mesh: Mesh | None
) -> Array:
  """A block's, from each device's rows to all devices."""
  columns = jax.lax.dynamic_slice_in_dim(matrix, start, block, axis=1)
  if mesh is None:
    return columns
  columns = spread(columns, mesh, 0)
  return jax.lax.with_sharding_constraint(columns, NamedSharding(mesh, P()))


def solve(matrix: Array, right: Array) -> Array:
  """A (I, I), R (I, O) -> X by Cholesky: LAPACK's on CPUs, cuSOLVER's on GPUs.

  For TPUs XLA writes out every block of 128 columns: 2,048 rows compile for 90
  seconds, 4,096 for five minutes. There `solve_in_blocks` takes its place.
  """
  with jax.default_matmul_precision('highest'):
    return jax.scipy.linalg.cho_solve(
      jax.scipy.linalg.cho_factor(matrix), right
    )


def solve_in_blocks(
  matrix: Array, right: Array, mesh: Mesh | None = None, block: int = BLOCK
) -> Array:
  """As `solve`, by loops whose length does not change what compiles.

  It is the block LDL^T factorisation (Golub and Van Loan, Matrix Computations,
  chapter 4) whose pivots D are solved by Cholesky, then back substitution. Of A
  each device holds some rows and of R some columns. All of them get a block's
  columns, what takes their place, and that again on the way back: 3 I^2 numbers
  in all. `block` rows are eliminated at a time.
  """
  size = len(matrix)
  block = min(block, size)
  count = -(-size // block)
  total = count * block
  # Rows that are added solve an equation of their own.
  added = jnp.diag((jnp.arange(total) >= size).astype(matrix.dtype))
  padding = (0, total - size)
  matrix = spread(jnp.pad(matrix, (padding, padding)) + added, mesh, 0)
  # First as it is made of A's rows, so that A stays where it lies.
  right = spread(jnp.pad(right, (padding, (0, 0))), mesh, 0)
  right = spread(right, mesh, 1)
  rows = jnp.arange(total)[:, None]

  def forward(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
    matrix, right = state
    start = k * block
    columns = _columns(matrix, start, block, mesh)
    pivot = jax.lax.dynamic_slice_in_dim(columns, start, block)
    inverse = solve(pivot, jnp.eye(block, dtype=pivot.dtype))
    below = jnp.where(rows >= start + block, columns, 0)
    lower = below @ inverse  # L, which takes the columns' place.
    solved = jax.lax.dynamic_slice_in_dim(right, start, block)
    matrix = jax.lax.dynamic_update_slice_in_dim(
      matrix - below @ lower.T, spread(lower, mesh, 0), start, axis=1
    )
    right = jax.lax.dynamic_update_slice_in_dim(
      right - lower @ solved, inverse @ solved, start, axis=0
    )
    return spread(matrix, mesh, 0), spread(right, mesh, 1)

  def back(i: Array, right: Array) -> Array:
    start = (count - 1 - i) * block
    lower = _columns(matrix, start, block, mesh)
    solved = jax.lax.dynamic_slice_in_dim(right, start, block) - lower.T @ right
    return jax.lax.dynamic_update_slice_in_dim(right, solved, start, axis=0)

  with jax.default_matmul_precision('highest'):
    matrix, right = jax.lax.fori_loop(0, count, forward, (matrix, right))
    right = jax.lax.fori_loop(0, count, back, right)
  return right[:size]
