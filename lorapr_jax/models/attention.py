"""Scaled dot-product attention; letters in models/axes.py."""

import jax
from jax import Array


def causal_attention(q: Array, k: Array, v: Array) -> Array:
  """Each position attends to itself and to those before it.

  Args:
    q: (B, T, K, G, H). Query head g of KV head k reads that KV head alone.
    k: (B, S, K, H), with S = T.
    v: (B, S, K, H).

  Returns:
    (B, T, K, G, H), in q's dtype; the softmax is in float32.
  """
  B, T, K, G, H = q.shape
  out = jax.nn.dot_product_attention(
    q.reshape(B, T, K * G, H), k, v, is_causal=True
  )
  return out.reshape(q.shape)
