"""The loss over chunks of tokens is the plain loss, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.loss import chunked_cross_entropy

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


def test_the_logits_of_all_tokens_never_exist():
  n, d, v, chunk_size = 2048, 16, 32768, 64

  def loss(hidden, weight, targets, token_weights):
    return jnp.sum(
      chunked_cross_entropy(hidden, weight, targets, token_weights, chunk_size)
    )

  arguments = (
    jax.ShapeDtypeStruct((n, d), jnp.float32),
    jax.ShapeDtypeStruct((v, d), jnp.float32),
    jax.ShapeDtypeStruct((n,), jnp.int32),
    jax.ShapeDtypeStruct((n,), jnp.float32),
  )
  step = jax.jit(jax.value_and_grad(loss))
  memory = step.lower(*arguments).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * n * v / 4
