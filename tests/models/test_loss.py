"""The loss over chunks of tokens is the plain loss, and so is its gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapr_jax.models.head import Head
from lorapr_jax.models.loss import chunked_cross_entropy, chunked_top_k
from lorapr_jax.runtime.sharding import make_mesh, sharding

N, D, V = 12, 8, 17


def _inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(N, D)).astype(dtype)
  weight = rng.normal(size=(V, D)).astype(dtype)
  targets = rng.integers(0, V, N, dtype=np.int32)
  # Some tokens do not count, some count for more than one.
  token_weights = np.array([0, 1, 2, 0.5] * 3, np.float32)
  return hidden, weight, targets, token_weights


PLAIN = Head()


@functools.partial(jax.jit, static_argnames='head')
def _plain(hidden, weight, targets, token_weights, head=PLAIN):
  log_probabilities = jax.nn.log_softmax(head.logits(hidden @ weight.T))
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


# A scale and a cap under which most logits are bent.
@pytest.mark.parametrize('head', [PLAIN, Head(0.7, 1.5)])
def test_gradient_is_that_of_the_plain_loss(chunk_size, head):
  hidden, *rest = _inputs()
  # Not the plain sum: each token's loss must get its own factor.
  factors = np.linspace(-1.0, 2.0, N, dtype=np.float32)

  def chunked(h):
    losses = chunked_cross_entropy(h, *rest, chunk_size, head=head)
    return jnp.sum(losses * factors)

  def plain(h):
    return jnp.sum(_plain(h, *rest, head=head) * factors)

  got, want = (jax.jit(jax.grad(f))(hidden) for f in (chunked, plain))
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def _teacher():
  return np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)


def _mixed(hidden, teacher, distill, tops):
  """The plain loss; the tokens outside the teacher's tops are one."""
  weight, targets, token_weights = _inputs()[1:]
  log_p, log_q = (jax.nn.log_softmax(x @ weight.T) for x in (teacher, hidden))
  order = jnp.argsort(-log_p, axis=-1)

  def lumped(x):
    x = jnp.take_along_axis(x, order, axis=-1)
    rest = jax.nn.logsumexp(x[:, tops:], axis=-1, keepdims=True)
    return jnp.concatenate([x[:, :tops], rest], axis=-1)

  log_p, log_q = lumped(log_p), lumped(log_q)
  divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
  plain = _plain(hidden, weight, targets, token_weights)
  return (1 - distill) * plain + distill * divergence * token_weights


def _taught(teacher, tops):
  return chunked_top_k(teacher, _inputs()[1], tops, 5)


@pytest.mark.parametrize('tops', [1, 3, V - 1])
@pytest.mark.parametrize('distill', [0.3, 1.0])
def test_a_teachers_divergence_is_the_plain_one_and_so_is_its_gradient(
  tops, distill, chunk_size
):
  hidden, *rest = _inputs()
  factors = np.linspace(-1.0, 2.0, N, dtype=np.float32)
  teacher = _teacher()

  def chunked(h):
    losses = chunked_cross_entropy(
      h, *rest, chunk_size, teacher=_taught(teacher, tops), distill=distill
    )
    return jnp.sum(losses * factors), losses

  def plain(h):
    losses = _mixed(h, teacher, distill, tops)
    return jnp.sum(losses * factors), losses

  got, losses = jax.jit(jax.grad(chunked, has_aux=True))(hidden)
  want, expected = jax.grad(plain, has_aux=True)(hidden)
  np.testing.assert_allclose(losses, expected, rtol=0, atol=2e-6)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  assert np.abs(want).max() > 0.1


def test_from_itself_nothing_diverges():
  hidden, *rest = _inputs()

  def loss(h):
    return jnp.sum(
      chunked_cross_entropy(
        h, *rest, 5, teacher=_taught(hidden, 4), distill=1.0
      )
    )

  value, grad = jax.jit(jax.value_and_grad(loss))(hidden)
  assert abs(value) < 1e-5 and np.abs(grad).max() < 1e-5


def test_a_teacher_that_knows_all_but_nothing_is_finite():
  # Of a rest that has no probability left nothing is infinite.
  hidden, weight, *rest = _inputs()
  sure = chunked_top_k(1000 * _teacher(), weight, 3, 5)

  def loss(h):
    return jnp.sum(
      chunked_cross_entropy(h, weight, *rest, 5, teacher=sure, distill=1.0)
    )

  value, grad = jax.jit(jax.value_and_grad(loss))(1000 * hidden)
  assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_a_student_that_is_sure_of_the_top_is_pulled_back():
  # All but 1e-7 of its probability is on the teacher's top, which has 0.7.
  logits = np.full((1, 1000), -np.log(1e10))
  logits[0, 0] = 0.0
  teacher = {
    'ids': np.zeros((1, 1), np.int32),
    'log_probs': np.log(np.full((1, 1), 0.7, np.float32)),
  }
  hidden, weights = np.ones((1, 1), np.float32), np.ones(1, np.float32)
  targets = np.zeros(1, np.int32)

  def loss(hidden, matrix):
    losses = chunked_cross_entropy(
      hidden, matrix, targets, weights, 1, teacher=teacher, distill=1.0
    )
    return losses[0]

  matrix = logits.T.astype(np.float32)
  rest = 999e-10
  value, grad = jax.jit(jax.value_and_grad(loss))(hidden, matrix)
  want = 0.7 * np.log(0.7) + 0.3 * (np.log(0.3) - np.log(rest))
  assert value == pytest.approx(want, rel=1e-4)
  # 0.3 is pulled from the top to all others alike.
  assert grad[0, 0] == pytest.approx(0.3 * np.log(1e10), rel=1e-4)


def test_the_top_tokens_are_those_of_the_whole(chunk_size):
  hidden, weight, *_ = _inputs()
  head = Head(0.7, 1.5)
  found = chunked_top_k(hidden, weight, 3, chunk_size, head=head)
  log_probs = np.asarray(jax.nn.log_softmax(head.logits(hidden @ weight.T)))
  np.testing.assert_array_equal(
    found['ids'], np.argsort(-log_probs, axis=-1)[:, :3]
  )
  np.testing.assert_allclose(
    found['log_probs'], -np.sort(-log_probs, axis=-1)[:, :3], atol=1e-6
  )


def test_tokens_of_weight_zero_lose_nothing_and_pull_at_nothing():
  hidden, weight, targets, token_weights = _inputs()
  hidden[token_weights == 0] *= 100.0

  def loss(h):
    losses = chunked_cross_entropy(h, weight, targets, token_weights, 5)
    return jnp.sum(losses)

  value, grad = jax.device_get(jax.jit(jax.value_and_grad(loss))(hidden))
  assert np.all(grad[token_weights == 0] == 0)
  assert np.all(np.any(grad[token_weights > 0] != 0, axis=-1))
  expected = np.sum(_plain(*_inputs()))
  np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_nothing_flows_into_the_output_matrix():
  hidden, weight, *rest = _inputs()

  def loss(hidden, weight):
    return jnp.sum(chunked_cross_entropy(hidden, weight, *rest, 5))

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, weight)
  grad_hidden, grad_weight = jax.device_get(grads)
  assert np.any(grad_hidden != 0)
  assert np.all(grad_weight == 0)


def test_logits_beyond_the_range_of_exp_are_no_trouble():
  hidden, weight, *rest = _inputs()
  losses = chunked_cross_entropy(1000 * hidden, weight, *rest, 5)
  want = _plain(1000 * hidden, weight, *rest)
  assert np.max(want) > 1000
  np.testing.assert_allclose(losses, want, rtol=1e-5)


def test_bf16_hidden_states_give_a_float32_loss_and_bf16_gradients():
  hidden, weight, *rest = _inputs(jnp.bfloat16)

  def loss(h):
    losses = chunked_cross_entropy(h, weight, *rest, 5)
    return jnp.sum(losses), losses

  grad, losses = jax.jit(jax.grad(loss, has_aux=True))(hidden)
  assert (losses.dtype, grad.dtype) == (jnp.float32, jnp.bfloat16)
  exact = hidden.astype(np.float32), weight.astype(np.float32), *rest
  # Products of bf16 numbers are exact in float32, in which they are summed.
  np.testing.assert_allclose(losses, _plain(*exact), rtol=0, atol=1e-5)
  plain = jax.jit(jax.grad(lambda h: jnp.sum(_plain(h, *exact[1:]))))
  np.testing.assert_allclose(
    np.asarray(grad, np.float32), plain(exact[0]), rtol=0.02, atol=0.02
  )


def _shapes(n, d, v):
  """Abstract inputs: hidden, weight, targets, token_weights."""
  shapes = ((n, d), (v, d), (n,), (n,))
  dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
  return [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in zip(shapes, dtypes, strict=True)
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


@pytest.mark.mesh
@pytest.mark.parametrize('tops', [0, 8])
def test_on_a_mesh_the_loss_is_the_plain_loss_and_gathers_no_vocabulary(tops):
  mesh = make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  n, d, v, chunk_size = 64, 16, 4096, 16

  def loss(hidden, weight, targets, token_weights, teacher, *, mesh=mesh):
    losses = chunked_cross_entropy(
      hidden,
      weight,
      targets,
      token_weights,
      chunk_size,
      mesh=mesh,
      teacher=teacher,
      distill=0.5,
    )
    return jnp.sum(losses), losses

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  rng = np.random.default_rng(0)
  hidden, taught = rng.normal(size=(2, n, d)).astype(np.float32)
  weight = rng.normal(size=(v, d)).astype(np.float32)
  targets = rng.integers(0, v, n).astype(np.int32)
  teacher = chunked_top_k(taught, weight, tops, chunk_size) if tops else {}
  inputs = (hidden, weight, targets, np.ones(n, np.float32), teacher)
  rows, vocabulary = (
    sharding(mesh, ('batch',)),
    sharding(mesh, ('vocab', 'embed')),
  )
  places = (rows, vocabulary, rows, rows, rows)
  inputs = tuple(map(jax.device_put, inputs, places))
  text = step.lower(*inputs).compile().as_text()
  gathered = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather', text)
  assert gathered
  for shape in gathered:
    # At most a chunk's hidden states.
    assert np.prod([int(x) for x in shape.split(',')]) <= chunk_size * d

  (_, losses), grad = step(*inputs)
  one = jax.value_and_grad(functools.partial(loss, mesh=None), has_aux=True)
  (_, expected), want = jax.jit(one)(*jax.device_get(inputs))
  np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(grad, want, rtol=0, atol=1e-5)


@pytest.mark.mesh
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
