"""The forward pass of a text that goes on in several ways. Letters: axes.py.

A row holds a trunk and, one behind the other, its branches. A token sees the
trunk and its own branch, and stands where it would without the others, so the
trunk is computed once for all of them.
"""

from typing import Any

from jax import Array
import jax.numpy as jnp

from lorapr_jax.models import decoder
from lorapr_jax.models.attention import attend_where
from lorapr_jax.models.config import ModelConfig

TRUNK = 0


def hidden_states(
  params: Any,
  tokens: Array,
  positions: Array,
  branches: Array,
  config: ModelConfig,
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
  of_key, of_query = branches[:, None, :], branches[:, :, None]
  mask = (of_key == TRUNK) | (of_key == of_query)
  mask &= jnp.tri(tokens.shape[1], dtype=bool)

  def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    cap: float | None = None,
    window: Array | None = None,
  ) -> Array:
    seen = mask
    if window is not None:
      seen &= positions[:, :, None] - positions[:, None, :] < window
    return attend_where(seen, q, k, v, cap)

  return decoder.hidden_states(
    params,
    tokens,
    config,
    positions=positions,
    # A trunk is of several texts: it turns as in the longest.
    lengths=jnp.max(positions, axis=-1, keepdims=True) + 1,
    attend=attend,
    dtype=dtype,
  )
