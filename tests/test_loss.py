"""The loss over chunks of tokens is the plain loss, and so is its gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapr_jax.loss import chunked_cross_entropy
from lorapr_jax.sharding import make_mesh, sharding

N, D, V = 12, 8, 17


def _inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(N, D)), dtype)
  weight = jnp.asarray(rng.normal(size=(V, D)), dtype)
  targets = jnp.asarray(rng.integers(0, V, N))
  # Some tokens do not count, some count for more than one.
  token_weights = jnp.asarray([0, 1, 2, 0.5] * 3, jnp.float32)
  return hidden, weight, targets, token_weights


@jax.jit
def _plain(hidden, weight, targets, token_weights):
  log_probabilities = jax.nn.log_softmax(hidden @ weight.T)
  return -log_probabilities[jnp.arange(N), targets] * token_weights


@pytest.fixture(params=[4, 5, 100])
def chunk_size(request):
  """Sizes that divide N, that do not, and that exceed it."""
  return request.param


def test_loss_is_the_plain_loss(chunk_size):
  inputs = _inputs()
  losses = chunked_cross_entropy(*inputs, chunk_size)
  assert losses.shape == (N,)
  assert losses.dtype == jnp.float32
  np.testing.assert_allclose(losses, _plain(*inputs), rtol=0, atol=1e-6)


def test_gradient_is_that_of_the_plain_loss(chunk_size):
  hidden, *rest = _inputs()
  # Not the plain sum: each token's loss must get its own factor.
  factors = jnp.linspace(-1.0, 2.0, N)
  got = jax.grad(
    lambda h: jnp.sum(chunked_cross_entropy(h, *rest, chunk_size) * factors)
  )(hidden)
  want = jax.grad(lambda h: jnp.sum(_plain(h, *rest) * factors))(hidden)
  assert jnp.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_tokens_of_weight_zero_lose_nothing_and_pull_at_nothing():
  hidden, weight, targets, token_weights = _inputs()
  value, grad = jax.value_and_grad(
    lambda h: jnp.sum(
      chunked_cross_entropy(h, weight, targets, token_weights, 5)
    )
  )(hidden.at[token_weights == 0].multiply(100.0))
  assert jnp.all(grad[token_weights == 0] == 0)
  assert jnp.all(jnp.any(grad[token_weights > 0] != 0, axis=-1))
  expected = jnp.sum(_plain(*_inputs()))
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_nothing_flows_into_the_output_matrix():
  hidden, weight, *rest = _inputs()

  def loss(hidden, weight):
    return jnp.sum(chunked_cross_entropy(hidden, weight, *rest, 5))

  grad_hidden, grad_weight = jax.grad(loss, argnums=(0, 1))(hidden, weight)
  assert jnp.any(grad_hidden != 0)
  assert jnp.all(grad_weight == 0)


def test_logits_beyond_the_range_of_exp_are_no_trouble():
  hidden, weight, *rest = _inputs()
  losses = chunked_cross_entropy(1000 * hidden, weight, *rest, 5)
  want = _plain(1000 * hidden, weight, *rest)
  assert jnp.max(want) > 1000
  np.testing.assert_allclose(losses, want, rtol=1e-5)


def test_bf16_hidden_states_give_a_float32_loss_and_bf16_gradients():
  hidden, weight, *rest = _inputs(jnp.bfloat16)
  losses, vjp = jax.vjp(
    lambda h: chunked_cross_entropy(h, weight, *rest, 5), hidden
  )
  (grad,) = vjp(jnp.ones(N))
  assert (losses.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)
  exact = hidden.astype(jnp.float32), weight.astype(jnp.float32), *rest
  # Products of bf16 numbers are exact in float32, in which they are summed.
  np.testing.assert_allclose(losses, _plain(*exact), rtol=0, atol=1e-5)
  want = jax.grad(lambda h: jnp.sum(_plain(h, *exact[1:])))(exact[0])
  np.testing.assert_allclose(
    grad.astype(jnp.float32), want, rtol=0.02, atol=0.02
  )


def _shapes(n, d, v, places=(None,) * 4):
  """Abstract inputs: hidden, weight, targets, token_weights."""
  shapes = ((n, d), (v, d), (n,), (n,))
  dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
  return [
    jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for shape, dtype, place in zip(shapes, dtypes, places, strict=True)
  ]


def test_the_logits_of_all_tokens_never_exist():
  # Those of Llama 3, with eight sequences of 2048 tokens.
  n, v = 8 * 2048, 128256

  def chunked(*inputs):
    return jnp.sum(chunked_cross_entropy(*inputs, 128))

  def plain(hidden, weight, targets, token_weights):
    logits = hidden @ weight.T
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, targets
    )
    return jnp.sum(losses * token_weights)

  held = {}
  for loss in (chunked, plain):
    step = jax.jit(jax.value_and_grad(loss)).lower(*_shapes(n, 64, v))
    held[loss] = step.compile().memory_analysis().temp_size_in_bytes
  assert held[plain] > 4 * n * v
  assert held[chunked] < 0.05 * held[plain]


def test_on_a_mesh_the_loss_is_the_plain_loss_and_gathers_no_vocabulary():
  mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  n, d, v, chunk_size = 64, 16, 4096, 16

  def loss(hidden, *rest):
    losses = chunked_cross_entropy(hidden, *rest, chunk_size, mesh=mesh)
    return jnp.sum(losses), losses

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  axes = (('batch', 'head_dim'), ('vocab', 'embed'), ('batch',), ('batch',))
  places = [sharding(mesh, names) for names in axes]
  text = step.lower(*_shapes(n, d, v, places)).compile().as_text()
  gathered = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather', text)
  assert gathered
  for shape in gathered:
    # At most a chunk's hidden states.
    assert np.prod([int(x) for x in shape.split(',')]) <= chunk_size * d

  rng = np.random.default_rng(0)
  inputs = (
    rng.normal(size=(n, d)).astype(np.float32),
    rng.normal(size=(v, d)).astype(np.float32),
    rng.integers(0, v, n).astype(np.int32),
    np.ones(n, np.float32),
  )
  (_, losses), grad = step(*jax.device_put(inputs, tuple(places)))
  one = functools.partial(chunked_cross_entropy, chunk_size=chunk_size)
  np.testing.assert_allclose(losses, one(*inputs), rtol=1e-5)
  want = jax.grad(lambda h: jnp.sum(one(h, *inputs[1:])))(inputs[0])
  np.testing.assert_allclose(grad, want, rtol=0, atol=1e-5)


def test_a_vocabulary_that_the_mesh_does_not_divide_is_no_trouble():
  mesh = make_mesh({'data': 2, 'fsdp': 4, 'tensor': 1})
  inputs = _inputs()

  def loss(hidden, *rest):
    return jnp.sum(chunked_cross_entropy(hidden, *rest, 8, mesh=mesh))

  grad = jax.jit(jax.grad(loss))(*inputs)
  want = jax.grad(lambda h: jnp.sum(_plain(h, *inputs[1:])))(inputs[0])
  np.testing.assert_allclose(grad, want, rtol=0, atol=1e-6)


def test_products_of_bf16_operands_are_close_and_sums_stay_in_float32():
  inputs = _inputs()
  losses = chunked_cross_entropy(*inputs, 5, dtype=jnp.bfloat16)
  assert losses.dtype == jnp.float32
  want = _plain(*inputs)
  np.testing.assert_allclose(losses, want, rtol=0.02, atol=0.02)
  assert np.abs(losses - want).max() > 1e-5
