"""Cross-entropy over chunks of tokens: the (N, V) logits never exist."""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapr_jax.sharding import parts


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
) -> Array:
  """The negative log-likelihood in nats of each token, times its weight.

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

  Returns:
    (N,), in float32.
  """
  N = hidden.shape[0]
  chunk_size = min(chunk_size, N)
  padding = -N % chunk_size

  def chunked(x: Array) -> Array:
    # Strided: a chunk has tokens from everywhere, hence from every device.
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    x = x.reshape(chunk_size, -1, *x.shape[1:]).swapaxes(0, 1)
    if parts(mesh, 'length') == 1:
      return x
    # Else all that fsdp cuts would be gathered, in front of the loop.
    return places(x, None, places.rows)

  places = _Places.of(mesh, chunk_size, weight.shape[0])
  chunks = [chunked(x) for x in (hidden, targets, token_weights)]
  weight = jax.lax.stop_gradient(weight.astype(dtype or hidden.dtype))
  weight = places(weight, places.vocab, None)

  def body(_, chunk):
    hidden, targets, token_weights = chunk
    return None, _chunk_loss(places, hidden, weight, targets, token_weights)

  losses = jax.lax.scan(body, None, tuple(chunks))[1]
  return losses.T.reshape(-1)[:N]


def in_rows(x: Array, mesh: Mesh | None) -> Array:
  """(B, T, ...) as (N, ...), of which each device has a run of its own."""
  B, T, *rest = x.shape
  rows, lengths = parts(mesh, 'batch'), parts(mesh, 'length')
  if lengths > 1:
    x = x.reshape(rows, B // rows, lengths, T // lengths, *rest).swapaxes(1, 2)
  return x.reshape(B * T, *rest)


def out_of_rows(x: Array, shape: tuple[int, int], mesh: Mesh | None) -> Array:
  """(N,) from `in_rows` as (B, T)."""
  B, T = shape
  rows, lengths = parts(mesh, 'batch'), parts(mesh, 'length')
  if lengths > 1:
    x = x.reshape(rows, lengths, B // rows, T // lengths).swapaxes(1, 2)
  return x.reshape(B, T)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunk_loss(places, hidden, weight, targets, token_weights):
  return _loss_and_error(places, hidden, weight, targets, token_weights)[0]


def _loss_and_error(places, hidden, weight, targets, token_weights):
  hidden = places(hidden, places.tokens, None)
  logits = _product('ND,VD->NV', hidden, weight)
  logits = places(logits, places.tokens, places.vocab)
  top = jnp.max(logits, axis=-1, keepdims=True)
  total = jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)
  target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
  log_total = jnp.log(total) + top
  loss = (log_total - target)[:, 0] * token_weights
  softmax = jnp.exp(logits - log_total)
  # By a comparison: a scatter would copy the logits.
  one_hot = targets[:, None] == jnp.arange(weight.shape[0])
  return loss, (softmax - one_hot) * token_weights[:, None]


def _product(spec: str, x: Array, weight: Array) -> Array:
  return jnp.einsum(
    spec, x.astype(weight.dtype), weight, preferred_element_type=jnp.float32
  )


def _chunk_forward(places, hidden, weight, targets, token_weights):
  loss, error = _loss_and_error(places, hidden, weight, targets, token_weights)
  grad = _product('NV,VD->ND', error, weight).astype(hidden.dtype)
  return loss, places(grad, places.rows, None)


def _chunk_backward(places, grad_hidden, grad_loss):
  grad = grad_hidden * grad_loss[:, None].astype(grad_hidden.dtype)
  return grad, None, None, None


_chunk_loss.defvjp(_chunk_forward, _chunk_backward)
