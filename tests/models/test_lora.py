"""The guided gradient is a step of A B; a merged model is the same model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.axes import PROJECTIONS
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.lora import (
  lora_guided_gradient,
  lora_product,
  merge_lora,
  terms_of,
)

CONFIG = ModelConfig(
  vocab_size=40,
  embed_dim=16,
  head_dim=8,
  layers=(LayerShape(2, 2, 24), LayerShape(2, 2, 24), LayerShape(1, 3, 12)),
)


def _factors(inputs, outputs, rank=2):
  rng = np.random.default_rng(0)
  a_shape, b_shape = (*inputs, rank), (rank, *outputs)
  return [rng.normal(size=s) for s in (a_shape, b_shape, a_shape, b_shape)]


def _product(a, b):
  """A B in float64, one element of the sum after the other."""
  matrix = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
  return matrix.reshape(*a.shape[:-1], *b.shape[1:])


# Those of mlp.up_proj, q_proj and o_proj.
SHAPES = pytest.mark.parametrize(
  'inputs, outputs', [((5,), (4,)), ((5,), (2, 3, 4)), ((2, 3, 4), (5,))]
)

# As a product of matrices, and as a sum of outer products.
FUSED = pytest.mark.parametrize('fused', [False, True])


@SHAPES
@FUSED
def test_product_has_the_axes_of_the_weight(inputs, outputs, fused):
  a, b, _, _ = _factors(inputs, outputs)
  got = lora_product(jnp.asarray(a), jnp.asarray(b), fused=fused)
  assert got.shape == (*inputs, *outputs)
  np.testing.assert_allclose(got, _product(a, b), rtol=0, atol=1e-5)


@SHAPES
@FUSED
def test_guided_gradient_is_the_step_that_the_product_takes(
  inputs, outputs, fused
):
  a, b, grad_a, grad_b = factors = _factors(inputs, outputs)
  want = _product(a, b) - _product(a - grad_a, b - grad_b)
  got = lora_guided_gradient(*map(jnp.asarray, factors), fused=fused)
  assert got.shape == (*inputs, *outputs)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@FUSED
def test_own_terms_keep_what_is_a_groups_apart(fused):
  """Of a gradient in one row (column), gA B (A gB) is zero elsewhere."""
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(6, 2)), rng.normal(size=(2, 5))
  for axis, name in ((0, 'down_proj'), (1, 'up_proj')):
    gradient = np.zeros((6, 5))
    gradient[(3, slice(None)) if axis == 0 else (slice(None), 3)] = 1.0
    got = lora_guided_gradient(
      *map(jnp.asarray, (a, b, gradient @ b.T, a.T @ gradient)),
      terms=terms_of('own', 'mlp', name),
      fused=fused,
    )
    alone = np.flatnonzero(np.abs(got).sum(1 - axis) > 1e-6)
    assert alone.tolist() == [3]


@functools.partial(jax.jit, static_argnames='lora_config')
def _logits(params, lora=None, lora_config=None):
  tokens = jnp.asarray(np.random.default_rng(2).integers(0, 40, (2, 12)))
  hidden = decoder.hidden_states(
    params, tokens, CONFIG, lora=lora, lora_config=lora_config
  )
  return decoder.logits(params, hidden, CONFIG)


def _merged(params, lora, lora_config):
  stacks = tuple(
    merge_lora(stack, adapters, lora_config.scale)
    for stack, adapters in zip(params['stacks'], lora, strict=True)
  )
  return {**params, 'stacks': stacks}


@pytest.mark.parametrize(
  'lora_config',
  [
    LoraConfig(rank=2, alpha=3.0, dropout=0.0),
    LoraConfig(
      rank=2, alpha=3.0, dropout=0.0, targets=('v_proj', 'o_proj', 'down_proj')
    ),
  ],
)
def test_merged_logits_are_the_unmerged(
  lora_config, random_params, random_lora
):
  params = random_params(CONFIG)
  lora = random_lora(CONFIG, lora_config)
  want = _logits(params, lora, lora_config)
  assert jnp.abs(want - _logits(params)).max() > 0.1
  got = _logits(_merged(params, lora, lora_config))
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_merging_leaves_what_has_no_adapter(random_params, random_lora):
  lora_config = LoraConfig(rank=2, alpha=16.0, dropout=0.0, targets=('q_proj',))
  config = CONFIG.with_biases(PROJECTIONS['self_attn'])
  params = random_params(config)
  merged = _merged(params, random_lora(config, lora_config), lora_config)
  changed = jax.tree.map(
    lambda new, old: bool(jnp.any(new != old)),
    merged['stacks'],
    params['stacks'],
  )
  for path, different in jax.tree_util.tree_leaves_with_path(changed):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    assert different == name.endswith('q_proj.weight'), name


def test_a_bf16_weight_is_rounded_once():
  rng = np.random.default_rng(0)
  # Multiples of 1/16, of which float32 holds every product and sum exactly.
  weight = jnp.asarray(rng.integers(-64, 64, (2, 16, 24)) / 16, jnp.bfloat16)
  a = rng.integers(-32, 32, (2, 16, 2)) / 16
  b = rng.integers(-32, 32, (2, 2, 24)) / 16
  merged = merge_lora(
    {'mlp': {'up_proj': {'weight': weight}}},
    {'mlp': {'up_proj': {'a': jnp.asarray(a), 'b': jnp.asarray(b)}}},
    0.5,
  )['mlp']['up_proj']['weight']
  update = 0.5 * np.stack([_product(a[i], b[i]) for i in range(2)])
  exact = np.asarray(weight, np.float64) + update
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))
  twice = weight + jnp.asarray(update, jnp.bfloat16)
  assert jnp.any(twice != merged)
