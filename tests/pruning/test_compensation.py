"""Ridge updates against NumPy's least squares."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.pruning.compensation import (
  DAMPINGS,
  best_update,
  ridge_update,
)

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


def held_out_error(x):
  """By text: the first half of the tokens, and the second."""
  halves = np.array_split(x, 2)
  return lambda missing: jnp.stack([((y @ missing) ** 2).sum() for y in halves])


def test_the_ridge_that_leaves_least_on_other_tokens_is_taken(arrays):
  x, weight = arrays
  fitted, other = x[:30], x[30:]  # So few that a large ridge is better.
  gone, stays = (rows.astype(np.float32) for rows in (GONE, STAYS))
  found, errors = best_update(
    *(weight, fitted.T @ fitted, gone, stays, held_out_error(other))
  )
  lost = np.where(GONE[:, None], weight, 0)
  nothing = held_out_error(other)(lost)
  tried = {c: update(fitted, weight, c) for c in DAMPINGS}
  left = {c: held_out_error(other)(lost - x) for c, x in tried.items()}
  best = min(left, key=lambda c: left[c].sum())
  np.testing.assert_allclose(found, tried[best], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(errors, [nothing, left[best]], rtol=1e-4)
  assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize('broken', [1.0, np.inf, np.nan])
def test_where_nothing_helps_nothing_is_added(arrays, broken):
  x, weight = arrays
  weight = weight * np.where(GONE, broken, 1.0)[:, None].astype(np.float32)
  # What the other tokens hold is the opposite of what was fitted.
  other = np.where(GONE, -x, x)
  gone, stays = (rows.astype(np.float32) for rows in (GONE, STAYS))
  found, errors = best_update(
    *(weight, x.T @ x, gone, stays, held_out_error(other))
  )
  np.testing.assert_array_equal(found, 0)
  np.testing.assert_array_equal(*errors)
