"""Scaled dot-product attention; letters in models/axes.py."""

import jax
from jax import Array
import jax.numpy as jnp


def causal_attention(
  q: Array,
  k: Array,
  v: Array,
  start: Array | None = None,
  segments: Array | None = None,
  *,
  implementation: str = 'xla',
) -> Array:
  """Each position attends to itself and to those before it.

  Args:
    q: (B, T, K, G, H). Query head g of KV head k reads that KV head alone.
    k: (B, S, K, H).
    v: (B, S, K, H).
    start: the key position of the first query; None where S = T.
    segments: (B, T), S = T: positions attend within their own segment alone.
    implementation: xla or cudnn.

  Returns:
    (B, T, K, G, H), in q's dtype; the softmax is in float32.
  """
  B, T, K, G, H = q.shape
  mask = None
  if start is not None:
    queries = start + jnp.arange(T)
    mask = (jnp.arange(k.shape[1]) <= queries[:, None])[None, None]
  elif segments is not None:
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
  out = jax.nn.dot_product_attention(
    q.reshape(B, T, K * G, H),
    k,
    v,
    mask=mask,
    is_causal=start is None,
    implementation=implementation,
  )
  return out.reshape(q.shape)


def segment_positions(segments: Array) -> Array:
  """The positions (B, T) of tokens in their segments: each starts at 0."""
  index = jnp.arange(segments.shape[1])
  begins = segments != jnp.roll(segments, 1, axis=1)
  first = jnp.where(begins, index, 0)
  return index - jax.lax.cummax(first, axis=1)
