"""The loss over chunks of tokens: the (N, V) logits never exist."""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapr_jax.runtime.sharding import parts


@jax.named_scope('loss')
def chunked_cross_entropy(
  hidden: Array,
  weight: Array,
  targets: Array,
  token_weights: Array,
  chunk_size: int,
  *,
  dtype: Any = None,
  mesh: Mesh | None = None,
  teacher: Mapping[str, Array] | None = None,
  distill: float = 0.0,
) -> Array:
  """The negative log-likelihood in nats of each token, times its weight.

  With a teacher it is (1 - d) of that and d KL(teacher || model), the forward
  Kullback-Leibler divergence of the two distributions over the vocabulary
  (Hinton et al., arXiv 1503.02531, at temperature 1), times the weight. Of a
  teacher's top K alone all other tokens count as one.

  The output matrix is part of the frozen base: no gradient flows into it, so
  the gradient with respect to `hidden` is known as soon as a chunk's logits
  are, and the backward pass computes no logits again.

  On a mesh the vocabulary is cut over the axes tensor and fsdp, once, and each
  device multiplies its own rows alone: no chunk gathers the matrix. A chunk's
  tokens are cut over data and sequence.

  Args:
    hidden: (N, D).
    weight: (V, D), frozen.
    targets: (N,) ids.
    token_weights: (N,), 0 where a token does not count.
    chunk_size: tokens whose logits exist at the same time.
    dtype: of the products' operands; None: hidden's. Logits are in float32.
    mesh: that the arrays lie on; None: one device.
    teacher: {'hidden': (N, D)}, which the same matrix turns into logits, or
      {'ids': (N, K), 'log_probs': (N, K)}. No gradient flows into it.
    distill: d.

  Returns:
    (N,), in float32.
  """
  chunk_size = min(chunk_size, hidden.shape[0])
  places = _Places.of(mesh, chunk_size, weight.shape[0])
  weight = _output_matrix(places, weight, dtype or hidden.dtype)

  def loss(hidden, *rest):
    return _chunk_loss(places, distill, hidden, weight, *rest)

  inputs = (hidden, targets, token_weights, teacher or {})
  return _by_chunk(places, loss, chunk_size, inputs)


def chunked_top_k(
  hidden: Array,
  weight: Array,
  k: int,
  chunk_size: int,
  *,
  dtype: Any = None,
  mesh: Mesh | None = None,
) -> dict[str, Array]:
  """{'ids', 'log_probs'}, (N, K) each, of the K most probable next tokens.

  Args:
    hidden: (N, D).
    weight: (V, D).
    k: K.
    chunk_size: tokens whose logits exist at the same time.
    dtype: as of `chunked_cross_entropy`.
    mesh: as of `chunked_cross_entropy`.
  """
  chunk_size = min(chunk_size, hidden.shape[0])
  places = _Places.of(mesh, chunk_size, weight.shape[0])
  weight = _output_matrix(places, weight, dtype or hidden.dtype)

  def top(hidden):
    logits = _logits(places, hidden, weight)
    log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    return {'ids': ids, 'log_probs': log_probs}

  return _by_chunk(places, top, chunk_size, (hidden,))


def _output_matrix(places, weight, dtype):
  weight = jax.lax.stop_gradient(weight.astype(dtype))
  return places(weight, places.vocab, None)


def _by_chunk(places, function, chunk_size, inputs):
  """function(*chunk) of every chunk of tokens, all of (N, ...), as (N, ...)."""
  N = inputs[0].shape[0]
  padding = -N % chunk_size

  def chunked(x: Array) -> Array:
    # Strided: a chunk has tokens from everywhere, hence from every device.
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    x = x.reshape(chunk_size, -1, *x.shape[1:]).swapaxes(0, 1)
    if parts(places.mesh, 'length') == 1:
      return x
    # Else all that fsdp cuts would be gathered, in front of the loop.
    return places(x, None, places.rows)

  def together(x: Array) -> Array:
    x = x.swapaxes(0, 1)
    return x.reshape(-1, *x.shape[2:])[:N]

  def body(_, chunk):
    return None, function(*chunk)

  chunks = jax.tree.map(chunked, inputs)
  return jax.tree.map(together, jax.lax.scan(body, None, chunks)[1])


def in_rows(x: Array, mesh: Mesh | None) -> Array:
  """(B, T, ...) as (N, ...), of which each device has a run of its own."""
  B, T, *rest = x.shape
  rows, lengths = parts(mesh, 'batch'), parts(mesh, 'length')
  if lengths > 1:
    x = x.reshape(rows, B // rows, lengths, T // lengths, *rest).swapaxes(1, 2)
  return x.reshape(B * T, *rest)


def out_of_rows(x: Array, shape: tuple[int, int], mesh: Mesh | None) -> Array:
  """(N, ...) from `in_rows` as (B, T, ...)."""
  (B, T), rest = shape, x.shape[1:]
  rows, lengths = parts(mesh, 'batch'), parts(mesh, 'length')
  if lengths > 1:
    x = x.reshape(rows, lengths, B // rows, T // lengths, *rest).swapaxes(1, 2)
  return x.reshape(B, T, *rest)


@dataclasses.dataclass(frozen=True)
class _Places:
  """Where a chunk's arrays lie.

  Attributes:
    mesh: None: on one device.
    rows: the mesh axes that share a chunk's hidden states.
    tokens: those that share its tokens while there are logits.
    vocab: those that share the vocabulary.
  """

  mesh: Mesh | None = None
  rows: tuple[str, ...] = ()
  tokens: tuple[str, ...] = ()
  vocab: tuple[str, ...] = ()

  @classmethod
  def of(cls, mesh: Mesh | None, chunk_size: int, vocab_size: int) -> '_Places':
    """Tokens over data and sequence, vocabulary over the rest, where they fit.

    Where fsdp does not divide the vocabulary, it shares the tokens too.
    """
    if mesh is None:
      return cls()

    def divisors(size: int, axes: tuple[str, ...]) -> tuple[str, ...]:
      taken: tuple[str, ...] = ()
      for axis in axes:
        if size % math.prod(mesh.shape[a] for a in (*taken, axis)) == 0:
          taken = (*taken, axis)
      return taken

    rows = divisors(chunk_size, ('data', 'fsdp', 'sequence'))
    vocab = divisors(vocab_size, ('tensor', 'fsdp'))
    tokens = tuple(axis for axis in rows if axis not in vocab)
    return cls(mesh, rows, tokens, vocab)

  def __call__(self, x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """x, cut over these mesh axes."""
    if self.mesh is None:
      return x
    place = NamedSharding(self.mesh, P(*axes))
    return jax.lax.with_sharding_constraint(x, place)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunk_loss(
  places, distill, hidden, weight, targets, token_weights, taught
):
  return _loss_and_error(
    places, distill, hidden, weight, targets, token_weights, taught
  )[0]


def _loss_and_error(
  places, distill, hidden, weight, targets, token_weights, taught
):
  logits = _logits(places, hidden, weight)
  top = jnp.max(logits, axis=-1, keepdims=True)
  total = jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)
  target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
  log_total = jnp.log(total) + top
  loss = (log_total - target)[:, 0]
  softmax = jnp.exp(logits - log_total)
  # By a comparison: a scatter would copy the logits.
  one_hot = targets[:, None] == jnp.arange(weight.shape[0])
  error = softmax - one_hot
  if taught:
    if 'hidden' in taught:
      teacher = _logits(places, taught['hidden'], weight)
      distance, pull = _divergence(teacher, logits - log_total, softmax)
    else:
      distance, pull = _divergence_of_top(
        taught['ids'], taught['log_probs'], logits - log_total, softmax
      )
    loss = (1 - distill) * loss + distill * distance
    error = (1 - distill) * error + distill * pull
  return loss * token_weights, error * token_weights[:, None]


def _divergence(teacher, log_softmax, softmax):
  """KL(p || q), and its gradient with respect to q's logits: q - p."""
  log_p = jax.nn.log_softmax(teacher)
  p = jnp.exp(log_p)
  return jnp.sum(p * (log_p - log_softmax), axis=-1), softmax - p


def _divergence_of_top(ids, log_p, log_softmax, softmax):
  """The same, where all tokens outside the top K are one, of probability r.

  The gradient is q - p in the top K and (1 - r_p / r_q) q outside.
  """
  p, log_q = jnp.exp(log_p), jnp.take_along_axis(log_softmax, ids, axis=-1)
  q, rows = jnp.exp(log_q), jnp.arange(len(ids))[:, None]
  outside = softmax.at[rows, ids].set(0)
  rest_q = jnp.maximum(jnp.sum(outside, axis=-1, keepdims=True), 1e-30)
  # What rounding leaves of a rest that is nothing.
  rest_p = jnp.maximum(1 - jnp.sum(p, axis=-1, keepdims=True), 1e-6)
  distance = jnp.sum(p * (log_p - log_q), axis=-1, keepdims=True)
  distance += rest_p * (jnp.log(rest_p) - jnp.log(rest_q))
  pull = ((1 - rest_p / rest_q) * outside).at[rows, ids].add(q - p)
  return distance[:, 0], pull


def _logits(places, hidden, weight):
  hidden = places(hidden, places.tokens, None)
  logits = _product('ND,VD->NV', hidden, weight)
  return places(logits, places.tokens, places.vocab)


def _product(spec: str, x: Array, weight: Array) -> Array:
  return jnp.einsum(
    spec, x.astype(weight.dtype), weight, preferred_element_type=jnp.float32
  )


def _chunk_forward(places, distill, hidden, *rest):
  weight, *_ = rest
  loss, error = _loss_and_error(places, distill, hidden, *rest)
  grad = _product('NV,VD->ND', error, weight).astype(hidden.dtype)
  return loss, places(grad, places.rows, None)


def _chunk_backward(places, distill, grad_hidden, grad_loss):
  grad = grad_hidden * grad_loss[:, None].astype(grad_hidden.dtype)
  return grad, None, None, None, None


_chunk_loss.defvjp(_chunk_forward, _chunk_backward)
