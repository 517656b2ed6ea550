"""A X = R in blocks: NumPy's solution, whatever the block and the mesh."""

import jax
import numpy as np
import pytest

from lorapr_jax.pruning.solve import solve, solve_in_blocks
from lorapr_jax.runtime.sharding import make_mesh, mesh_sizes


def problem(size, outputs, damping=0.2):
  """A damped X^T X whose inputs differ in size, and what to solve for."""
  rng = np.random.default_rng(size)
  x = rng.normal(size=(2 * size, size)) * rng.gamma(0.5, size=size)
  gram = x.T @ x
  matrix = gram + damping * np.trace(gram) / size * np.eye(size)
  return matrix, rng.normal(size=(size, outputs))


# Blocks that divide the rows and that do not; rows and columns that the eight
# devices divide and that they do not.
@pytest.mark.parametrize(
  'sizes',
  [
    None,
    pytest.param((1, -1, 1), marks=pytest.mark.mesh),
    pytest.param((2, 2, 2), marks=pytest.mark.mesh),
  ],
)
@pytest.mark.parametrize(
  'size, outputs, block', [(64, 16, 16), (50, 7, 16), (48, 24, 7), (20, 3, 256)]
)
def test_equal_to_numpy(sizes, size, outputs, block):
  matrix, right = problem(size, outputs)
  expected = np.linalg.solve(matrix, right)
  mesh = sizes and make_mesh(mesh_sizes(*sizes))
  found = jax.jit(
    lambda a, r: (solve(a, r), solve_in_blocks(a, r, mesh, block))
  )(matrix.astype(np.float32), right.astype(np.float32))
  for x in found:
    np.testing.assert_allclose(
      x, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_what_is_not_positive_definite_is_not_finite():
  matrix, right = problem(12, 2)
  matrix[9, 9] = -1.0
  assert not np.isfinite(solve_in_blocks(matrix, right, block=4)).all()
  assert not np.isfinite(solve(matrix, right)).all()
