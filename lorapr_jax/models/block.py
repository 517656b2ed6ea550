"""One decoder layer: attention and the MLP. Letters: axes.py."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lorapr_jax.axes import LAYERS, PROJECTIONS, Axes, ProjectionLetters
from lorapr_jax.models.attention import ACTIVATION, causal_attention
from lorapr_jax.models.config import (
  AFTER_ATTENTION,
  AFTER_MLP,
  BEFORE_ATTENTION,
  BEFORE_MLP,
  QK_NORMS,
  LayerShape,
  LoraConfig,
  ModelConfig,
)
from lorapr_jax.models.kinds import with_window
from lorapr_jax.models.layers import (
  ALIVE,
  BLOCK,
  LoRAEinsum,
  dropout,
  rms_norm,
  scaled,
)
from lorapr_jax.models.rotation import Rotation, apply_rope, turn_queries

# By part, the norm of what it gives.
AFTER = {'self_attn': AFTER_ATTENTION, 'mlp': AFTER_MLP}
# By ModelConfig's `activation`.
ACTIVATIONS = {
  'silu': nn.silu,
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
}


def _activation(x: Array) -> Array:
  return checkpoint_name(x, ACTIVATION)


class _Part(nn.Module):
  """What attention and the MLP share; attributes as of `Block`."""

  config: ModelConfig
  shape: LayerShape
  lora: LoraConfig | None
  matmul_dtype: Any

  def projections(self, part: str) -> dict[str, LoRAEinsum]:
    """Those of a part of a block, by name."""
    sizes, lora = self.config.sizes(self.shape), self.lora
    axes = {
      name: Axes.of(ProjectionLetters.of(spec).weight)
      for name, spec in PROJECTIONS[part].items()
    }
    return {
      name: LoRAEinsum(
        spec=spec,
        shape=tuple(sizes[a] for a in axes[name]),
        lora=lora if lora and name in lora.targets else None,
        dtype=self.matmul_dtype,
        use_bias=name in self.config.biases,
        name=name,
      )
      for name, spec in PROJECTIONS[part].items()
    }

  def lora_input(self, x: Array) -> Array:
    """x with LoRA's dropout where a dropout key was given.

    Projections that read the same input share one draw.
    """
    if self.lora and self.lora.dropout and self.has_rng('dropout'):
      return dropout(self.make_rng('dropout'), x, self.lora.dropout)
    return x


class Attention(_Part):
  """Grouped-query self-attention over tokens, (N, D) or (B, T, D).

  The rotation says how long a sequence is: T.
  """

  attend: Callable[..., Array]

  @nn.compact
  def __call__(self, x: Array, rotation: Rotation) -> Array:
    project, lora_x = self.projections('self_attn'), self.lora_input(x)

    def sequences(tokens: Array) -> Array:
      each = tokens.shape[x.ndim - 1 :]
      return tokens.reshape(-1, rotation.cos.shape[-2], *each)

    q, k, v = (
      sequences(project[name](x, lora_x))
      for name in ('q_proj', 'k_proj', 'v_proj')
    )
    if self.config.qk_norm in ('head', 'heads'):
      q, k = self._normed(q, k)
    q, k = turn_queries(q, rotation), apply_rope(k, rotation)
    if self.config.qk_norm == 'head_after_rope':
      q, k = self._normed(q, k)
    q, k = _activation(scaled(q, self.config.query_scale)), _activation(k)
    with jax.named_scope('attention'):
      out = _activation(self.attend(q, k, v, cap=self.config.attention_cap))
    out = out.reshape(*x.shape[:-1], *out.shape[2:])
    return project['o_proj'](out, self.lora_input(out))

  def _normed(self, q: Array, k: Array) -> tuple[Array, Array]:
    """Queries (B, T, K, G, H) and keys (B, T, K, H), normed."""
    axes = (3, 2) if self.config.qk_norm == 'heads' else (1, 1)
    q_norm, k_norm = (
      rms_norm(self.config, name, n)
      for name, n in zip(QK_NORMS, axes, strict=True)
    )
    return q_norm(q), k_norm(k)


class MLP(_Part):
  """down(f(gate(x)) * up(x)) over tokens, (N, D) or (B, T, D)."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    project, lora_x = self.projections('mlp'), self.lora_input(x)
    gate = project['gate_proj'](x, lora_x)
    hidden = _activation(
      ACTIVATIONS[self.config.activation](gate) * project['up_proj'](x, lora_x)
    )
    return project['down_proj'](hidden, self.lora_input(hidden))


class Block(nn.Module):
  """One decoder layer over tokens, (N, D) or (B, T, D).

  Where there is the variable `layers` of the collection ALIVE, what the layer
  adds to the stream is multiplied by it: with 0 the layer hands on its input.

  Attributes:
    config: the model's numbers and flags.
    shape: the layer's sizes.
    lora: of the adapters; None: there are none.
    matmul_dtype: of the projections' operands; None: x's.
    attend: as `causal_attention`, or one that fills a cache.
  """

  config: ModelConfig
  shape: LayerShape
  lora: LoraConfig | None = None
  matmul_dtype: Any = None
  attend: Callable[..., Array] = causal_attention

  @nn.compact
  def __call__(
    self,
    x: Array,
    rotation: Rotation,
    parts: tuple[str, ...] = tuple(PROJECTIONS),
    window: Array | None = None,
  ) -> Array:
    """The layer's output, or what one of its parts alone makes of x.

    Args:
      x: the tokens.
      rotation: the layer's, of the positions of a sequence.
      parts: of the block.
      window: how many tokens each sees; None: all before it.
    """
    sizes = (self.config, self.shape, self.lora, self.matmul_dtype)
    x = checkpoint_name(x, BLOCK)
    if 'self_attn' in parts:
      h = _activation(self._normed(BEFORE_ATTENTION, x))
      attend = with_window(self.attend, window)
      out = Attention(*sizes, attend, name='self_attn')(h, rotation)
      x = x + self._added(self._normed(AFTER_ATTENTION, out))
    if 'mlp' in parts:
      h = _activation(self._normed(BEFORE_MLP, x))
      out = self._normed(AFTER_MLP, MLP(*sizes, name='mlp')(h))
      x = x + self._added(out)
    return x

  def _added(self, out: Array) -> Array:
    out = scaled(out, self.config.residual_scale)
    if not self.has_variable(ALIVE, LAYERS):
      return out
    return out * self.get_variable(ALIVE, LAYERS).astype(out.dtype)

  def _normed(self, name: str, x: Array) -> Array:
    """x through one of NORMS, or as it is where the block has not that one."""
    if name not in self.config.norms:
      return x
    return rms_norm(self.config, name)(x)


def added(config: ModelConfig, part: str, params: Any, out: Array) -> Array:
  """What a part adds to the stream where its last projection gives `out`.

  Args:
    config: the model's numbers.
    part: of the block.
    params: the block's.
    out: (..., D).
  """
  if AFTER[part] in config.norms:
    out = rms_norm(config).apply({'params': params[AFTER[part]]}, out)
  return scaled(out, config.residual_scale)
