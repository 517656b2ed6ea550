"""Scaled dot-product attention. Letters: axes.py."""

import functools
import math

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

# What a block computes on the way, by a name for rematerialisation policies;
# without the projections' outputs, and without (T, S) scores: none keeps them.
ACTIVATION = 'activation'


def causal_attention(
  q: Array,
  k: Array,
  v: Array,
  segments: Array | None = None,
  *,
  start: Array | None = None,
  cap: float | None = None,
  window: Array | None = None,
) -> Array:
  """Each position attends to itself and to those before it.

  Args:
    q: (B, T, K, G, H). Query head g of KV head k reads that KV head alone.
    k: (B, S, K, H).
    v: (B, S, K, H).
    segments: (B, S): positions attend within their own segment alone.
    start: the key position of the first query; None where S = T.
    cap: as of `attend_where`.
    window: how many tokens each sees, with itself; None: all before it.

  Returns:
    (B, T, K, G, H), in q's dtype; the softmax is in float32.
  """
  T = q.shape[1]
  queries = jnp.arange(T) + (0 if start is None else start)
  keys = jnp.arange(k.shape[1])
  mask = (keys <= queries[:, None])[None]
  if window is not None:
    mask &= keys > queries[:, None] - window
  if segments is not None:
    mask &= same_segment(segments, start, T)
  return attend_where(mask, q, k, v, cap)


def attend_where(
  mask: Array, q: Array, k: Array, v: Array, cap: float | None = None
) -> Array:
  """As `causal_attention`, where a mask says who sees whom.

  Args:
    mask: (B, T, S), or (1, T, S) for all alike.
    q: (B, T, K, G, H).
    k: (B, S, K, H).
    v: (B, S, K, H).
    cap: scores s become cap tanh(s / cap); None: they stay.
  """
  B, T, K, G, H = q.shape
  # The queries of a KV head are one matrix: no head is repeated.
  rows = q.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
  out = _attention(rows, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, cap)
  return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
  q: Array, k: Array, v: Array, mask: Array, cap: float | None
) -> Array:
  """softmax(q k / sqrt(H)) v of a batch of matrices, where `mask` allows.

  What autodiff would make passes over the scores once more: the softmax's
  division and its gradient's sum are taken over rows of H numbers instead.

  Args:
    q: (B, K, G T, H).
    k: (B, K, S, H).
    v: (B, K, S, H).
    mask: (B, T, S), or (1, T, S) for all alike.
    cap: as of `attend_where`.
  """
  return _attention_forward(q, k, v, mask, cap)[0]


def _product(left: Array, right: Array, contracted: tuple[int, int]) -> Array:
  """The product of each KV head's matrices, in float32, of right's dtype."""
  dimensions = ((contracted[0],), (contracted[1],)), ((0, 1), (0, 1))
  return jax.lax.dot_general(
    left.astype(right.dtype),
    right,
    dimensions,
    preferred_element_type=jnp.float32,
  )


def soft_cap(x: Array, cap: float) -> Array:
  """cap tanh(x / cap): x where it is small, never beyond +-cap."""
  return cap * jnp.tanh(x / cap)


def soft_cap_slope(capped: Array, cap: float) -> Array:
  """The derivative of `soft_cap`, from its value y: 1 - (y / cap)^2."""
  return 1.0 - jnp.square(capped / cap)


def _attention_forward(q, k, v, mask, cap):
  scores = _product(q, k, (3, 3)) / math.sqrt(q.shape[-1])
  slope = None
  if cap is not None:
    scores = soft_cap(scores, cap)
    slope = soft_cap_slope(scores, cap)
  heads = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
  lowest = jnp.finfo(jnp.float32).min
  scores = jnp.where(mask[:, None, None], heads, lowest).reshape(scores.shape)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  scale = 1 / jnp.sum(weights, axis=-1, keepdims=True)
  scale = checkpoint_name(scale, ACTIVATION)
  out = checkpoint_name(_product(weights, v, (3, 2)) * scale, ACTIVATION)
  return out.astype(q.dtype), (q, k, v, weights, slope, scale, out)


def _attention_backward(cap, residuals, grad):
  q, k, v, weights, slope, scale, out = residuals
  grad = grad.astype(jnp.float32)
  # The gradient of the softmax: p (dp - sum(p dp)), and that sum is do . o.
  total = jnp.sum(grad * out, axis=-1, keepdims=True)
  errors = _product(grad, v, (3, 3)) - total
  errors = weights * errors * (scale / math.sqrt(q.shape[-1]))
  if cap is not None:
    errors *= slope
  return (
    _product(errors, k, (3, 2)).astype(q.dtype),
    _product(errors, q, (2, 2)).astype(k.dtype),
    _product(weights, (grad * scale).astype(v.dtype), (2, 2)).astype(v.dtype),
    None,
  )


_attention.defvjp(_attention_forward, _attention_backward)


def same_segment(
  segments: Array, start: Array | None = None, T: int | None = None
) -> Array:
  """Whether a query and a key are in one segment: (B, T, S).

  Args:
    segments: (B, S), of the keys.
    start: the key position of the first query; None: queries are as keys.
    T: the number of queries, where there is `start`.
  """
  return queries_of(segments, start, T)[:, :, None] == segments[:, None, :]


def queries_of(x: Array, start: Array | None, T: int | None) -> Array:
  """The T columns of x (B, S) from `start` on; all, if that is None."""
  if start is None:
    return x
  return jax.lax.dynamic_slice_in_dim(x, start, T, axis=1)


def segment_positions(segments: Array) -> Array:
  """The positions (B, T) of tokens in their segments: each starts at 0."""
  index = jnp.arange(segments.shape[1])
  begins = segments != jnp.roll(segments, 1, axis=1)
  first = jnp.where(begins, index, 0)
  return index - jax.lax.cummax(first, axis=1)
