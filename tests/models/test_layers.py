"""Dropout: its share, its scale, each element by itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.models.layers import dropout


@pytest.mark.parametrize('rate', [0.0, 0.05, 0.5])
def test_dropout_keeps_its_share_and_rescales_it(rate):
  x = jnp.ones((200, 500))
  out = dropout(jax.random.key(0), x, rate)
  kept = out != 0
  # Five standard deviations of a share of 100,000 draws.
  tolerance = 5 * math.sqrt(rate * (1 - rate) / x.size)
  assert float(kept.mean()) == pytest.approx(1 - rate, abs=tolerance + 1e-5)
  np.testing.assert_allclose(out[kept], 1 / (1 - rate), rtol=1e-3)


def test_dropout_decides_each_element_alone():
  # Two elements share a word of random bits; an odd width leaves half a word.
  kept = dropout(jax.random.key(0), jnp.ones((400, 501)), 0.5) != 0
  assert kept.shape == (400, 501)
  for neighbours in (kept[:, 1:] & kept[:, :-1], kept[1:] & kept[:-1]):
    share = float(neighbours.mean())
    assert share == pytest.approx(0.25, abs=5 * math.sqrt(1 / 4 / kept.size))


def test_dropout_keeps_the_dtype():
  x = jnp.ones(64, jnp.bfloat16)
  assert dropout(jax.random.key(0), x, 0.5).dtype == jnp.bfloat16
