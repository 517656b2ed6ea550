"""The pieces of a block: RMSNorm, RoPE, LoRAEinsum. Letters: axes.py."""

import math

from flax import linen as nn
import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lorapr_jax.models.axes import ProjectionLetters
from lorapr_jax.models.config import LoraConfig, RopeScaling

# The name of the projections' outputs, for rematerialisation policies.
PROJECTION = 'projection'
# The name of dropout's masks, likewise.
DROPOUT = 'dropout'
# The collection of what a caller may observe of the projections' inputs.
STATISTICS = 'statistics'


class RMSNorm(nn.Module):
  """x / rms(x) * weight over the last axis, computed in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    weight = self.param('weight', nn.initializers.ones, x.shape[-1:])
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(mean_square + self.eps)
    return (x32 * weight.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None
) -> Array:
  """Angles per position, (H/2,) in radians, with Llama 3's scaling if any.

  theta^(-2i/H) for i < H/2 (RoFormer, arXiv 2104.09864, section 3.2). Llama 3
  divides the frequencies whose wavelength exceeds the context it was first
  trained on by `factor`, keeps the short ones, and blends those in between.
  """
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies = 1.0 / theta**exponents
  if scaling is None:
    return frequencies
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
  keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
  return frequencies * (keep + (1.0 - keep) / scaling.factor)


def apply_rope(x: Array, angles: Array) -> Array:
  """Rotates pairs (i, i + H/2) of the head by each position's angles.

  Args:
    x: (B, T, ..., H), in Hugging Face's half-split layout.
    angles: (T, H/2), or (B, T, H/2), in radians.
  """
  heads = (1,) * (x.ndim - 3)
  shape = (-1, x.shape[1], *heads, x.shape[-1] // 2)
  cos, sin = jnp.cos(angles).reshape(shape), jnp.sin(angles).reshape(shape)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def dropout(key: Array, x: Array, rate: float) -> Array:
  """Zeroes a share `rate` of x, to 1/65536, and rescales the rest.

  Sixteen random bits an element, two elements a word, not a float's thirty-two:
  JAX's generator spends as much on a uint16 as on a uint32, and on a CPU that
  is a visible part of the step (docs/method.md has the figures).
  """
  dropped = round(rate * 65536)
  *rows, columns = x.shape
  words = jax.random.bits(key, (*rows, -(-columns // 2)), jnp.uint32)
  bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*rows, -1)
  keep = checkpoint_name(bits[..., :columns] >= dropped, DROPOUT)
  return jnp.where(keep, x * (65536 / (65536 - dropped)), 0).astype(x.dtype)


class LoRAEinsum(nn.Module):
  """y = x W + s (x A) B for the tokens of a projection.

  The shapes of A and B follow from the einsum: A takes W's contracted axes to
  the rank, B the rank to W's other axes. W is in the collection `params`, A
  and B in `lora`, in float32 whatever W's dtype. Where the collection
  STATISTICS is mutable, it gets the sum over tokens of x^2, as `squares`.

  Attributes:
    spec: x, W -> y; one of config.PROJECTIONS.
    shape: W's shape.
    lora: None for a projection without an adapter.
  """

  spec: str
  shape: tuple[int, ...]
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x: Array, lora_x: Array) -> Array:
    """`lora_x` is the adapter's input: x, or x with dropout."""
    split = len(ProjectionLetters.of(self.spec).inputs)
    inputs, outputs = self.shape[:split], self.shape[split:]
    fan_in = math.prod(inputs)
    weight = self.param('weight', nn.initializers.normal(0.02), self.shape)
    if self.is_mutable_collection(STATISTICS):
      squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0)
      self.put_variable(STATISTICS, 'squares', squares)

    # Each einsum as a product of two matrices, which XLA's CPU backend does
    # faster than it contracts several axes.
    def matmul(x: Array, matrix: Array, rows: int) -> Array:
      return x.reshape(-1, rows) @ matrix.reshape(rows, -1).astype(x.dtype)

    y = matmul(x, weight, fan_in)
    if self.lora is not None:
      a = self._adapter('a', (*inputs, self.lora.rank), fan_in)
      b = self._adapter('b', (self.lora.rank, *outputs), None)
      low = checkpoint_name(matmul(lora_x, a, fan_in), PROJECTION)
      y = y + matmul(low * self.lora.scale, b, self.lora.rank)
    return checkpoint_name(y, PROJECTION).reshape(-1, *outputs)

  def _adapter(
    self, name: str, shape: tuple[int, ...], fan_in: int | None
  ) -> Array:
    def init():
      if fan_in is None:
        return jnp.zeros(shape, jnp.float32)
      # Kaiming-uniform with a = sqrt(5), as PEFT does: bound 1/sqrt(fan_in).
      bound = 1 / math.sqrt(fan_in)
      key = self.make_rng('lora')
      return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    value = self.variable('lora', name, init).value
    # Linen checks the shapes of `params` but not of other collections.
    if value.shape != shape:
      raise ValueError(
        f'{"/".join(self.path)}/{name} is {value.shape}, expected {shape}'
      )
    return value
