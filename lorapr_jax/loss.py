"""Cross-entropy over chunks of tokens: the (N, V) logits never exist."""

import jax
from jax import Array
import jax.numpy as jnp


def chunked_cross_entropy(
  hidden: Array,
  weight: Array,
  targets: Array,
  token_weights: Array,
  chunk_size: int,
) -> Array:
  """The negative log-likelihood in nats of each token, times its weight.

  The output matrix is part of the frozen base: no gradient flows into it, so
  the gradient with respect to `hidden` is known as soon as a chunk's logits
  are, and the backward pass computes no logits again.

  Args:
    hidden: (N, D).
    weight: (V, D), frozen.
    targets: (N,) ids.
    token_weights: (N,), 0 where a token does not count.
    chunk_size: tokens whose logits exist at the same time.

  Returns:
    (N,), in float32.
  """
  N = hidden.shape[0]
  chunk_size = min(chunk_size, N)
  padding = -N % chunk_size

  def chunked(x: Array) -> Array:
    # Strided: a chunk has tokens from everywhere, hence from every device.
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(chunk_size, -1, *x.shape[1:]).swapaxes(0, 1)

  chunks = [chunked(x) for x in (hidden, targets, token_weights)]
  weight = jax.lax.stop_gradient(weight.astype(hidden.dtype))

  def body(_, chunk):
    return None, _chunk_loss(chunk[0], weight, *chunk[1:])

  losses = jax.lax.scan(body, None, tuple(chunks))[1]
  return losses.T.reshape(-1)[:N]


@jax.custom_vjp
def _chunk_loss(hidden, weight, targets, token_weights):
  return _loss_and_softmax(hidden, weight, targets, token_weights)[0]


def _loss_and_softmax(hidden, weight, targets, token_weights):
  logits = jnp.einsum(
    'ND,VD->NV', hidden, weight, preferred_element_type=jnp.float32
  )
  top = jnp.max(logits, axis=-1, keepdims=True)
  total = jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)
  target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
  loss = (jnp.log(total) + top - target)[:, 0] * token_weights
  return loss, jnp.exp(logits - top) / total


def _chunk_forward(hidden, weight, targets, token_weights):
  loss, softmax = _loss_and_softmax(hidden, weight, targets, token_weights)
  # Softmax minus one-hot, by a comparison: a scatter would copy the logits.
  one_hot = targets[:, None] == jnp.arange(weight.shape[0])
  error = (softmax - one_hot) * token_weights[:, None]
  return loss, jnp.einsum('NV,VD->ND', error.astype(hidden.dtype), weight)


def _chunk_backward(grad_hidden, grad_loss):
  grad = grad_hidden * grad_loss[:, None].astype(grad_hidden.dtype)
  return grad, None, None, None


_chunk_loss.defvjp(_chunk_forward, _chunk_backward)
