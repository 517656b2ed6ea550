"""The pieces of a block: RMSNorm, dropout, LoRAEinsum. Letters: axes.py."""

import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lorapr_jax.axes import ProjectionLetters
from lorapr_jax.models.config import LoraConfig, ModelConfig

# Names for rematerialisation policies, beside attention.ACTIVATION: a block's
# input, the projections' outputs, dropout's masks.
BLOCK = 'block'
PROJECTION = 'projection'
DROPOUT = 'dropout'
# A collection that a caller may ask for: the projections' inputs.
INPUTS = 'inputs'
# A collection that says which groups are not masked.
ALIVE = 'alive'


def scaled(x: Array, factor: float) -> Array:
  """x times a number, computed in float32."""
  if factor == 1.0:
    return x
  return (x.astype(jnp.float32) * factor).astype(x.dtype)


class RMSNorm(nn.Module):
  """x / rms(x) * weight over the last axes, computed in float32.

  Where there is the variable `heads` of the collection ALIVE, with the axes
  before the last, the mean is over those for which it is 1, not 0.

  Attributes:
    eps: what is added to the mean square.
    axes: how many of the last axes are normed together, which all have weights.
    offset: whether it is 1 + weight that multiplies.
  """

  eps: float
  offset: bool = False
  axes: int = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:
    neutral = nn.initializers.zeros if self.offset else nn.initializers.ones
    shape, axes = x.shape[-self.axes :], tuple(range(-self.axes, 0))
    weight = self.param('weight', neutral, shape).astype(jnp.float32)
    if self.offset:
      weight = 1.0 + weight
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
    if self.has_variable(ALIVE, 'heads'):
      alive = self.get_variable(ALIVE, 'heads')
      mean_square *= alive.size / jnp.sum(alive)
    x32 = x32 * jax.lax.rsqrt(mean_square + self.eps)
    return (x32 * weight).astype(x.dtype)


def rms_norm(
  config: ModelConfig, name: str | None = None, axes: int = 1
) -> RMSNorm:
  """A norm of this model, over the last axes."""
  return RMSNorm(config.norm_eps, config.norm_offset, axes, name=name)


@jax.named_scope('dropout')
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Array, weight: Array, dtype: Any) -> Array:
  """x W in x's dtype, of operands in `dtype`; the gradients' products as well.

  Sums are in float32 wherever a product's result is: on GPU and TPU they are
  for bfloat16 operands, and XLA's CPU backend multiplies bfloat16 by the
  processor's own instructions only where it may leave the sums as they are.

  Args:
    x: (..., I).
    weight: (I, O), of any dtype, in which its gradient comes back.
    dtype: of the operands.
  """
  return _product(x, weight, ((x.ndim - 1,), (0,)), x.dtype, dtype)


def _matmul_forward(x, weight, dtype):
  return matmul(x, weight, dtype), (x, weight)


def _matmul_backward(dtype, operands, grad):
  x, weight = operands
  tokens = tuple(range(x.ndim - 1))
  return (
    _product(grad, weight, ((len(tokens),), (1,)), x.dtype, dtype),
    _product(x, grad, (tokens, tokens), weight.dtype, dtype),
  )


matmul.defvjp(_matmul_forward, _matmul_backward)


def _product(
  left: Array,
  right: Array,
  contracted: tuple[tuple[int, ...], tuple[int, ...]],
  out: Any,
  dtype: Any,
) -> Array:
  """The product of two arrays, summed over these axes of each."""
  dimensions = (contracted, ((), ()))

  def product(left, right, result):
    return jax.lax.dot_general(
      left, right, dimensions, preferred_element_type=result
    ).astype(out)

  left, right = left.astype(dtype), right.astype(dtype)
  result = jnp.promote_types(out, dtype)
  if result == jnp.float32:
    return product(left, right, result)
  return jax.lax.platform_dependent(
    left,
    right,
    cpu=functools.partial(product, result=jnp.float32),
    default=functools.partial(product, result=result),
  )


class LoRAEinsum(nn.Module):
  """y = x W + s (x A) B, or with + b, for the tokens of a projection.

  Tokens are x's first axes: N, or B and T (`decoder.hidden_states`).
  The shapes of A and B follow from the einsum: A takes W's contracted axes to
  the rank, B the rank to W's other axes, which are those of b. W and b are in
  the collection `params`, A and B in `lora`, in float32 whatever W's dtype.
  Where the collection INPUTS is mutable, it gets x, as `inputs`.

  Attributes:
    spec: x, W -> y; one of axes.PROJECTIONS.
    shape: W's shape.
    lora: None for a projection without an adapter.
    dtype: of the products' operands; None: x's.
    use_bias: whether there is b.
  """

  spec: str
  shape: tuple[int, ...]
  lora: LoraConfig | None = None
  dtype: Any = None
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Array, lora_x: Array) -> Array:
    """`lora_x` is the adapter's input: x, or x with dropout."""
    split = len(ProjectionLetters.of(self.spec).inputs)
    inputs, outputs = self.shape[:split], self.shape[split:]
    fan_in, tokens = math.prod(inputs), x.shape[:-split]
    weight = self.param('weight', nn.initializers.normal(0.02), self.shape)
    if self.is_mutable_collection(INPUTS):
      self.put_variable(INPUTS, 'inputs', x)

    # Each einsum is a product of two matrices: XLA's CPU backend does that
    # faster than it contracts several axes.
    def project(x: Array, matrix: Array, rows: int) -> Array:
      dtype = self.dtype or x.dtype
      return matmul(x.reshape(*tokens, rows), matrix.reshape(rows, -1), dtype)

    y = project(x, weight, fan_in)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, outputs)
      y = y + bias.reshape(-1).astype(y.dtype)
    if self.lora is not None:
      a = self._adapter('a', (*inputs, self.lora.rank), fan_in)
      b = self._adapter('b', (self.lora.rank, *outputs), None)
      low = checkpoint_name(project(lora_x, a, fan_in), PROJECTION)
      y = y + project(low * self.lora.scale, b, self.lora.rank)
    return checkpoint_name(y, PROJECTION).reshape(*tokens, *outputs)

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
