"""RoPE: the angles of positions, and the turn. Letters: axes.py; R: below.

Of a head's H dimensions the first R turn (`ModelConfig.rotated`), in pairs
(i, i + R/2).
"""

import math
from typing import NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.rope import (
  Dynamic,
  Linear,
  Llama3,
  LongRope,
  Rope,
  Scaling,
  Yarn,
)


class Rotation(NamedTuple):
  """The cosine and sine of each position's angles: (T, R/2) or (B, T, R/2).

  Made once, outside the scan over layers: inside, XLA would fuse them into
  what uses them, and compute them anew for every head of every layer. Where
  layers turn in several ways, all are there, along an axis before these.

  Attributes:
    cos: of the angles.
    sin: of the angles.
    scale: by which queries grow, (T,) or (B, T); None: they do not.
  """

  cos: Array
  sin: Array
  scale: Array | None = None

  def of(self, rope: Array | None) -> 'Rotation':
    """That of a layer of this `Kind.rope`."""
    return self if rope is None else jax.tree.map(lambda x: x[rope], self)


def rope_rotation(
  config: ModelConfig, positions: Array, lengths: Array | int | None = None
) -> Rotation:
  """The rotation of positions (..., T), which are float32.

  Args:
    config: the model's numbers.
    positions: in their texts, each of which is a run.
    lengths: the tokens of each position's text, which decide the angles of
      some scalings: a number, or (..., T) or (..., 1). None: as the runs are.
  """
  ropes = [_rotation(rope, config, positions, lengths) for rope in config.ropes]
  if len(ropes) == 1:
    return ropes[0]
  if any(x.scale is not None for x in ropes):
    ones = jnp.ones_like(positions)
    ropes = [
      x if x.scale is not None else x._replace(scale=ones) for x in ropes
    ]
  return jax.tree.map(lambda *x: jnp.stack(x), *ropes)


def _rotation(
  rope: Rope | None,
  config: ModelConfig,
  positions: Array,
  lengths: Array | int | None,
) -> Rotation:
  if rope is None:
    shape = (*positions.shape, config.rotated // 2)
    return Rotation(jnp.ones(shape), jnp.zeros(shape))
  scaling = rope.scaling
  if isinstance(scaling, Dynamic | LongRope):
    lengths = text_lengths(positions) if lengths is None else lengths
    lengths = jnp.asarray(lengths)[..., None]
  frequencies = rope_frequencies(
    config.rotated, rope, lengths, config.max_positions
  )
  angles = positions[..., None] * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  factor = magnitude(scaling, config.max_positions)
  if factor != 1.0:
    cos, sin = cos * factor, sin * factor
  return Rotation(cos, sin, _query_scale(scaling, positions))


def text_lengths(positions: Array) -> Array:
  """The tokens of each position's text, (..., T): of its run of positions."""
  T = positions.shape[-1]
  follows = positions[..., 1:] == positions[..., :-1] + 1
  last = jnp.concatenate(
    [~follows, jnp.ones_like(positions[..., :1], bool)], axis=-1
  )
  index = jnp.where(last, jnp.arange(T), T)
  ends = jax.lax.cummin(index, axis=index.ndim - 1, reverse=True)
  return positions + 1 + (ends - jnp.arange(T))


def rope_frequencies(
  size: int, rope: Rope, lengths: Array | int | None, max_positions: int
) -> Array:
  """Angles per position, in radians: (R/2,), or (..., T, R/2).

  theta^(-2i/R) for i < R/2 (RoFormer, arXiv 2104.09864, section 3.2), scaled
  as the model's `rope.scaling` says.

  Args:
    size: R.
    rope: theta and the scaling.
    lengths: the tokens of a position's text, a number or (..., T, 1); no
      matter but for Dynamic and LongRope.
    max_positions: the model's.
  """
  theta, scaling = rope.theta, rope.scaling
  exponents = jnp.arange(0, size, 2, dtype=jnp.float32) / size
  if isinstance(scaling, Dynamic):
    grown = jnp.maximum(lengths, max_positions) / max_positions
    grown = scaling.factor * grown - (scaling.factor - 1)
    theta = theta * grown ** (size / (size - 2))
  frequencies = 1.0 / theta**exponents
  match scaling:
    case Linear():
      return frequencies / scaling.factor
    case Llama3():
      keep = _kept_by_llama3(scaling, frequencies)
    case Yarn():
      keep = _kept_by_yarn(scaling, size, theta)
    case LongRope():
      is_long = lengths > scaling.original_max_position_embeddings
      short, long = (
        jnp.asarray(x, jnp.float32)
        for x in (scaling.short_factor, scaling.long_factor)
      )
      return frequencies / jnp.where(is_long, long, short)
    case _:
      return frequencies
  return frequencies * (keep + (1.0 - keep) / scaling.factor)


def _kept_by_llama3(scaling: Llama3, frequencies: Array) -> Array:
  """The share of each frequency that is not divided.

  Llama 3 divides the frequencies whose wavelength exceeds the context it was
  first trained on, keeps the short ones, and blends those in between.
  """
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
  return jnp.clip((turns - low) / (high - low), 0.0, 1.0)


def _kept_by_yarn(scaling: Yarn, size: int, theta: float) -> Array:
  """The share of each frequency that is not divided (arXiv 2309.00071).

  It falls in a straight line from the pair that turns `beta_fast` times in the
  original positions to the one that turns `beta_slow` times.
  """

  def pair(turns: float) -> float:
    length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return size * math.log(length) / (2 * math.log(theta))

  first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
  if scaling.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, size - 1)
  if first == last:
    last += 0.001
  pairs = jnp.arange(size // 2, dtype=jnp.float32)
  return 1.0 - jnp.clip((pairs - first) / (last - first), 0.0, 1.0)


def magnitude(scaling: Scaling | None, max_positions: int) -> float:
  """By how much cosine and sine grow."""
  if not isinstance(scaling, Yarn | LongRope):
    return 1.0
  if scaling.attention_factor is not None:
    return scaling.attention_factor
  if isinstance(scaling, LongRope):
    original = scaling.original_max_position_embeddings
    grown = math.log(max(max_positions / original, 1.0))
    return math.sqrt(1.0 + grown / math.log(original))
  over, under = scaling.mscale, scaling.mscale_all_dim
  if over is None or under is None:
    over, under = 1.0, 0.0
  grown = 0.1 * math.log(max(scaling.factor, 1.0))
  return (over * grown + 1.0) / (under * grown + 1.0)


def _query_scale(scaling: Scaling | None, positions: Array) -> Array | None:
  if not isinstance(scaling, Yarn) or scaling.llama_4_scaling_beta is None:
    return None
  rounds = jnp.floor(positions / scaling.original_max_position_embeddings)
  return 1.0 + scaling.llama_4_scaling_beta * jnp.log1p(rounds)


@jax.named_scope('rope')
def turn_queries(q: Array, rotation: Rotation) -> Array:
  """Queries (B, T, K, G, H), turned and scaled as their positions say."""
  q = apply_rope(q, rotation)
  if rotation.scale is None:
    return q
  scale = rotation.scale.reshape(-1, q.shape[1], 1, 1, 1)
  return (q * scale).astype(q.dtype)


@jax.named_scope('rope')
def apply_rope(x: Array, rotation: Rotation) -> Array:
  """Rotates pairs (i, i + R/2) of the head by each position's angles.

  Args:
    x: (B, T, ..., H), in Hugging Face's half-split layout.
    rotation: of the T positions.
  """
  heads = (1,) * (x.ndim - 3)
  half = rotation.cos.shape[-1]
  shape = (-1, x.shape[1], *heads, half)
  cos, sin = (part.reshape(shape) for part in (rotation.cos, rotation.sin))
  x32 = x.astype(jnp.float32)
  first, second, *rest = jnp.split(x32, (half, 2 * half), axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([*rotated, *rest], axis=-1).astype(x.dtype)
