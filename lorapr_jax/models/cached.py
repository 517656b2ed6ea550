"""The forward pass of tokens that follow those in a cache. Letters: axes.py.

A cache holds the keys and values of S positions, of which the first are
filled: (k, v) for each stack, both (L, B, S, K, H).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Sharding

from lorapr_jax.models.attention import causal_attention
from lorapr_jax.models.block import Block
from lorapr_jax.models.config import LayerShape, ModelConfig, Stack
from lorapr_jax.models.decoder import embedded
from lorapr_jax.models.kinds import kinds
from lorapr_jax.models.layers import rms_norm
from lorapr_jax.models.quantization import dequantized
from lorapr_jax.models.rotation import Rotation, rope_rotation

Cache = tuple[tuple[Array, Array], ...]


def empty_cache(
  config: ModelConfig, B: int, S: int, dtype: Any, place: Sharding | None = None
) -> Cache:
  """Room for S positions of B sequences, at `place`."""

  def zeros(stack: Stack) -> Array:
    K, H = stack.shape.num_kv_heads, config.head_dim
    return jnp.zeros((stack.size, B, S, K, H), dtype, device=place)

  return tuple((zeros(stack), zeros(stack)) for stack in config.stacks)


def hidden_states(
  params: Any,
  tokens: Array,
  cache: Cache,
  start: Array,
  config: ModelConfig,
  *,
  length: Array | None = None,
  dtype: Any = jnp.float32,
) -> tuple[Array, Cache]:
  """As `decoder.hidden_states`, for positions start to start + T - 1.

  Args:
    params: the weights, without adapters.
    tokens: (B, T) ids.
    cache: filled before `start`; start + T must not exceed its S.
    start: a scalar.
    config: the sizes.
    length: the tokens of the text so far; None: start + T.
    dtype: of the computation.

  Returns:
    The last layer's normalised output, (B, T, D), and the cache with these
    positions filled.
  """
  B, T = tokens.shape
  positions = start + jnp.arange(T, dtype=jnp.float32)
  lengths = start + T if length is None else length
  rotation = rope_rotation(config, positions, lengths)
  S = cache[0][0].shape[2]
  table = params['embed_tokens']['weight']
  x = embedded(table, tokens.reshape(B * T), config, dtype)
  filled = []
  for i, stack in enumerate(config.stacks):
    layer = _layer(config, stack.shape, rotation, start)
    index = jnp.arange(stack.size)
    inputs = (params['stacks'][i], index, kinds(config, stack, S))
    # The scan carries the cache and writes it in place: an output is a copy.
    (x, kv), _ = jax.lax.scan(layer, (x, cache[i]), inputs)
    filled.append(kv)
  norm = rms_norm(config)
  x = norm.apply({'params': params['norm']}, x).reshape(B, T, -1)
  return x, tuple(filled)


def _layer(
  config: ModelConfig, shape: LayerShape, rotation: Rotation, start: Array
) -> Callable[..., Any]:
  def layer(carry, inputs):
    x, kv = carry
    weights, i, kind = inputs

    def attend(q, *new, **more):
      nonlocal kv
      kv = tuple(
        jax.lax.dynamic_update_slice(old, x[None], (i, 0, start, 0, 0))
        for old, x in zip(kv, new, strict=True)
      )
      k, v = (x[i] for x in kv)
      return causal_attention(q, k, v, start=start, **more)

    block = Block(config, shape, attend=attend)
    params = {'params': dequantized(weights, x.dtype)}
    x = block.apply(params, x, rotation.of(kind.rope), window=kind.window)
    return (x, kv), None

  return layer
