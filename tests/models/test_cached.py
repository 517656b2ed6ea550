"""With a cache the forward pass computes what it computes without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.models import cached, decoder
from lorapr_jax.models.config import LayerShape, ModelConfig
from tests.families.cover import TRAITS, each

UNEQUAL = ModelConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=8,
  layers=(
    LayerShape(2, 3, 48),
    LayerShape(1, 5, 40),
    LayerShape(1, 5, 40),
    LayerShape(3, 1, 7),
  ),
)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))
LENGTH = 32


@functools.partial(jax.jit, static_argnames='config', donate_argnames='cache')
def _advance(params, tokens, cache, start, config):
  hidden, cache = cached.hidden_states(
    params, tokens, cache, start, config, length=TOKENS.shape[1]
  )
  return decoder.logits(params, hidden, config), cache


@functools.partial(jax.jit, static_argnames='config')
def _uncached(params, config):
  return decoder.logits(
    params, decoder.hidden_states(params, TOKENS, config), config
  )


def _check(config, params, parts):
  cache = cached.empty_cache(config, 2, LENGTH, jnp.float32)
  results, start = [], 0
  for size in parts:
    part = TOKENS[:, start : start + size]
    logits, cache = _advance(params, part, cache, start, config)
    results.append(logits)
    start += size
  want = _uncached(params, config)
  assert want.std() > 0.5
  np.testing.assert_allclose(
    jnp.concatenate(results, 1), want, rtol=0, atol=1e-4
  )


@pytest.mark.parametrize('kind', each(TRAITS))
def test_logits_are_those_without_a_cache(kind, save_hf, load):
  _check(*load(save_hf(kind)), [12, 12])


@pytest.mark.parametrize('parts', [[10, 14], [1] * 24])
def test_logits_of_unequal_layers_however_the_text_is_cut(random_params, parts):
  _check(UNEQUAL, random_params(UNEQUAL), parts)


def test_a_cache_has_a_part_for_every_run_of_equal_layers():
  cache = cached.empty_cache(UNEQUAL, 2, LENGTH, jnp.bfloat16)
  shapes = [(1, 2, LENGTH, 2, 8), (2, 2, LENGTH, 1, 8), (1, 2, LENGTH, 3, 8)]
  assert [[x.shape for x in kv] for kv in cache] == [[s, s] for s in shapes]
  assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype('bfloat16')}


def test_what_lies_after_the_tokens_is_not_seen(random_params):
  params = random_params(UNEQUAL)
  clean = cached.empty_cache(UNEQUAL, 2, LENGTH, jnp.float32)
  dirty = jax.tree.map(lambda x: x + 7.0, clean)
  want, _ = _advance(params, TOKENS[:, :6], clean, 0, UNEQUAL)
  got, _ = _advance(params, TOKENS[:, :6], dirty, 0, UNEQUAL)
  np.testing.assert_array_equal(got, want)
