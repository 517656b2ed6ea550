"""The loss over chunks of tokens: the (N, V) logits never exist."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapr_jax.models.head import Head
from lorapr_jax.runtime.sharding import parts

_PLAIN = Head()


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
  head: Head = _PLAIN,
  teacher: Mapping[str, Array] | None = None,
  distill: float = 0.0,
) -> Array:
  """The negative log-likelihood in nats of each token, times its weight.

  With a teacher it is (1 - d) of that and d KL(teacher || model), times the
  weight: the forward Kullback-Leibler divergence (Hinton et al., arXiv
  1503.02531, at temperature 1) of two distributions over K + 1 outcomes, the
  teacher's top K tokens and all others together.

  The output matrix is part of the frozen base: no gradient flows into it. So
  the gradient with respect to `hidden` is known as soon as a chunk's logits
  are, and the backward pass computes no logits again.

  On a mesh the vocabulary is cut over the axes tensor and fsdp, once, and each
  device multiplies only its own rows: no chunk gathers the matrix. A chunk's
  tokens are cut over data and sequence.

  Args:
    hidden: (N, D).
    weight: (V, D), frozen.
    targets: (N,) ids.
    token_weights: (N,), 0 where a token does not count.
    chunk_size: tokens whose logits exist at the same time.
    dtype: of the products' operands; None: hidden's. Logits are in float32.
    mesh: that the arrays lie on; None: one device.
    head: what becomes of the products with the matrix.
    teacher: {'ids': (N, K), 'log_probs': (N, K)} from `chunked_top_k`. No
      gradient flows into it.
    distill: d.

  Returns:
    (N,), in float32.
  """
  chunk_size = min(chunk_size, hidden.shape[0])
  places = _Places.of(mesh, chunk_size, weight.shape[0])
  weight = _output_matrix(places, weight, dtype or hidden.dtype)

  def loss(hidden, labels):
    return _chunk_loss(places, head, distill, hidden, weight, labels)

  labels = _Labels(targets, token_weights, teacher or {})
  return _by_chunk(places, loss, chunk_size, (hidden, labels))


def chunked_top_k(
  hidden: Array,
  weight: Array,
  k: int,
  chunk_size: int,
  *,
  dtype: Any = None,
  mesh: Mesh | None = None,
  head: Head = _PLAIN,
) -> dict[str, Array]:
  """The K most probable next tokens: {'ids', 'log_probs'}, (N, K) each.

  Args:
    hidden: (N, D).
    weight: (V, D).
    k: K.
    chunk_size: tokens whose logits exist at the same time.
    dtype: as of `chunked_cross_entropy`.
    mesh: as of `chunked_cross_entropy`.
    head: as of `chunked_cross_entropy`.
  """
  chunk_size = min(chunk_size, hidden.shape[0])
  places = _Places.of(mesh, chunk_size, weight.shape[0])
  weight = _output_matrix(places, weight, dtype or hidden.dtype)

  def top(hidden):
    logits = head.logits(_products(places, hidden, weight))
    log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(logits), k)
    return {'ids': ids, 'log_probs': log_probs}

  return _by_chunk(places, top, chunk_size, (hidden,))


def _output_matrix(places: '_Places', weight: Array, dtype: Any) -> Array:
  weight = jax.lax.stop_gradient(weight.astype(dtype))
  return places(weight, places.vocab, None)


def _by_chunk(
  places: '_Places',
  function: Callable[..., Any],
  chunk_size: int,
  inputs: tuple[Any, ...],
) -> Any:
  """function(*chunk) for every chunk of the inputs (N, ...), put together."""
  N = inputs[0].shape[0]
  padding = -N % chunk_size

  def chunked(x: Array) -> Array:
    # A chunk has tokens from everywhere, hence from every device.
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    x = x.reshape(chunk_size, -1, *x.shape[1:]).swapaxes(0, 1)
    if parts(places.mesh, 'length') == 1:
      return x
    # Without this, XLA gathers all that fsdp cuts before the loop.
    return places(x, None, places.rows)

  def together(x: Array) -> Array:
    x = x.swapaxes(0, 1)
    return x.reshape(-1, *x.shape[2:])[:N]

  def body(_, chunk):
    return None, function(*chunk)

  chunks = jax.tree.map(chunked, inputs)
  return jax.tree.map(together, jax.lax.scan(body, None, chunks)[1])


def in_rows(x: Array, mesh: Mesh | None) -> Array:
  """(B, T, ...) as (N, ...): each device keeps its part, as one run of rows."""
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
    """Cuts tokens over data and sequence, the vocabulary over the rest.

    An axis that does not divide is left out.

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


class _Labels(NamedTuple):
  """What a chunk's tokens are measured by; see `chunked_cross_entropy`."""

  targets: Array
  weights: Array
  teacher: Mapping[str, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunk_loss(
  places: _Places,
  head: Head,
  distill: float,
  hidden: Array,
  weight: Array,
  labels: _Labels,
) -> Array:
  return _loss_and_error(places, head, distill, hidden, weight, labels)[0]


def _loss_and_error(
  places: _Places,
  head: Head,
  distill: float,
  hidden: Array,
  weight: Array,
  labels: _Labels,
) -> tuple[Array, Array]:
  """The loss (N,), and its gradient with respect to the products (N, V)."""
  logits = head.logits(_products(places, hidden, weight))
  top = jnp.max(logits, axis=-1, keepdims=True)
  total = jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)
  target = jnp.take_along_axis(logits, labels.targets[:, None], axis=-1)
  log_total = jnp.log(total) + top
  loss = (log_total - target)[:, 0]
  softmax = jnp.exp(logits - log_total)
  # A comparison, because a scatter would copy the logits.
  one_hot = labels.targets[:, None] == jnp.arange(weight.shape[0])
  error = softmax - one_hot
  if labels.teacher:
    distance, pull = _divergence(labels.teacher, logits - log_total, softmax)
    loss = (1 - distill) * loss + distill * distance
    error = (1 - distill) * error + distill * pull
  error = head.pulled_back(logits, error * labels.weights[:, None])
  return loss * labels.weights, error


def _divergence(
  teacher: Mapping[str, Array], log_softmax: Array, softmax: Array
) -> tuple[Array, Array]:
  """KL(p || q) (N,), and its gradient with respect to q's logits (N, V).

  p is the teacher's distribution and q the model's. All tokens outside the top
  K are one outcome, of probability r. The gradient is q - p for a token of the
  top K, and (1 - r_p / r_q) q for one outside.
  """
  ids, log_p = teacher['ids'], teacher['log_probs']
  p, log_q = jnp.exp(log_p), jnp.take_along_axis(log_softmax, ids, axis=-1)
  q, rows = jnp.exp(log_q), jnp.arange(len(ids))[:, None]
  outside = softmax.at[rows, ids].set(0)
  rest_q = jnp.maximum(jnp.sum(outside, axis=-1, keepdims=True), 1e-30)
  # Where the teacher has no rest, rounding leaves about this, or less than 0.
  rest_p = jnp.maximum(1 - jnp.sum(p, axis=-1, keepdims=True), 1e-6)
  distance = jnp.sum(p * (log_p - log_q), axis=-1, keepdims=True)
  distance += rest_p * (jnp.log(rest_p) - jnp.log(rest_q))
  pull = ((1 - rest_p / rest_q) * outside).at[rows, ids].add(q - p)
  return distance[:, 0], pull


def _products(places: _Places, hidden: Array, weight: Array) -> Array:
  hidden = places(hidden, places.tokens, None)
  products = _product('ND,VD->NV', hidden, weight)
  return places(products, places.tokens, places.vocab)


def _product(spec: str, x: Array, weight: Array) -> Array:
  return jnp.einsum(
    spec, x.astype(weight.dtype), weight, preferred_element_type=jnp.float32
  )


def _chunk_forward(places, head, distill, hidden, weight, labels):
  loss, error = _loss_and_error(places, head, distill, hidden, weight, labels)
  grad = _product('NV,VD->ND', error, weight).astype(hidden.dtype)
  return loss, places(grad, places.rows, None)


def _chunk_backward(places, head, distill, grad_hidden, grad_loss):
  grad = grad_hidden * grad_loss[:, None].astype(grad_hidden.dtype)
  return grad, None, None


_chunk_loss.defvjp(_chunk_forward, _chunk_backward)
