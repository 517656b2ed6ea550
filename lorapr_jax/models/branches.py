"""The forward pass of a text that goes on in several ways. Letters: axes.py.

A row holds a trunk and, one behind the other, its branches. A token sees the
trunk and its own branch, and stands where it would without the others, so the
trunk is computed once for all of them.
"""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.models import llama
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.models.layers import RMSNorm

TRUNK = 0


def hidden_states(
  params: Any,
  tokens: Array,
  positions: Array,
  branches: Array,
  config: LlamaConfig,
  *,
  dtype: Any = jnp.float32,
) -> Array:
  """The last layer's normalised output, (B, T, D).

  Args:
    params: the weights, without adapters.
    tokens: (B, T) ids.
    positions: (B, T), each token's place in its own text.
    branches: (B, T), TRUNK or the number of a branch. Padding at the end is
      seen by nothing before it, whatever its number.
    config: the sizes.
    dtype: of the computation.
  """

  def row(tokens, positions, branches):
    angles = llama.rope_angles(config, positions.astype(jnp.float32))
    T = jnp.arange(tokens.shape[0])
    seen = (branches == TRUNK) | (branches == branches[:, None])
    mask = (seen & (T[:, None] >= T))[None, None]

    def attend(q, k, v):
      heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
      out = jax.nn.dot_product_attention(heads, k, v, mask=mask)
      return out.reshape(q.shape)

    x = params['embed_tokens']['weight'][tokens].astype(dtype)
    for weights, stack in zip(params['stacks'], config.stacks, strict=True):
      block = llama.Block(config, stack.shape, attend=attend)

      def layer(x, weights, block=block):
        return block.apply({'params': weights}, x, angles), None

      x, _ = jax.lax.scan(layer, x, weights)
    norm = RMSNorm(config.norm_eps)
    return norm.apply({'params': params['norm']}, x)

  return jax.vmap(row)(tokens, positions, branches)
