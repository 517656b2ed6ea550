"""Ridge updates against NumPy's least squares."""

import numpy as np
import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.pruning.compensation import Compensation, ridge_update

ROWS, COLUMNS, TOKENS = 12, 5, 200
GONE = np.isin(np.arange(ROWS), [2, 7, 8])
DEAD = np.isin(np.arange(ROWS), [4])
STAYS = ~(GONE | DEAD)


@pytest.fixture
def arrays():
  generator = np.random.default_rng(0)
  mixing = generator.normal(size=(ROWS, ROWS))
  x = generator.normal(size=(TOKENS, ROWS)) @ mixing
  weight = generator.normal(size=(ROWS, COLUMNS))
  return x.astype(np.float32), weight.astype(np.float32)


def update(x, weight, damping):
  gone, stays = (rows.astype(np.float32) for rows in (GONE, STAYS))
  return np.asarray(ridge_update(weight, x.T @ x, gone, stays, damping))


@pytest.mark.parametrize('damping', [1e-3, 0.2, 1.0])
def test_it_is_the_ridge_regression_of_what_went(arrays, damping):
  x, weight = arrays
  there, lost = x[:, STAYS], x[:, GONE] @ weight[GONE]
  # Ridge as least squares: sqrt(lambda) I below X, zeros below what it fits.
  ridge = damping * (there**2).sum(axis=0).mean()
  below = np.sqrt(ridge) * np.eye(there.shape[1])
  expected, *_ = np.linalg.lstsq(
    np.vstack([there, below]),
    np.vstack([lost, np.zeros((len(below), COLUMNS))]),
    rcond=None,
  )
  found = update(x, weight, damping)
  np.testing.assert_allclose(found[STAYS], expected, rtol=1e-3, atol=1e-4)
  np.testing.assert_array_equal(found[~STAYS], 0)


def test_rows_that_others_make_up_go_without_a_trace(arrays):
  x, weight = arrays
  mixture = np.random.default_rng(1).normal(size=(STAYS.sum(), GONE.sum()))
  x[:, GONE] = x[:, STAYS] @ mixture
  before = x[:, ~DEAD] @ weight[~DEAD]
  after = x[:, STAYS] @ (weight + update(x, weight, 1e-7))[STAYS]
  np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-2)
  lost = np.abs(x[:, GONE] @ weight[GONE]).max()
  assert np.abs(after - before).max() < 1e-3 * lost


def test_settings_are_checked():
  for damping, batches, key in ((0.0, 1, 'damping'), (0.1, 0, 'batches')):
    with pytest.raises(UserError, match=f'prune.compensate_{key} is'):
      Compensation(damping, batches)
