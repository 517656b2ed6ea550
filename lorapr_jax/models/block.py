"""One decoder layer: attention and the MLP. Letters: axes.py."""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lorapr_jax.axes import PROJECTIONS, Axes, ProjectionLetters
from lorapr_jax.models.attention import ACTIVATION, causal_attention
from lorapr_jax.models.config import LayerShape, LlamaConfig, LoraConfig
from lorapr_jax.models.layers import (
  BLOCK,
  LoRAEinsum,
  RMSNorm,
  Rotation,
  apply_rope,
  dropout,
)


def _projections(
  part: str,
  config: LlamaConfig,
  shape: LayerShape,
  lora: LoraConfig | None,
  matmul_dtype: Any,
  valid: Array | None,
) -> dict[str, LoRAEinsum]:
  sizes = config.sizes(shape)
  return {
    name: LoRAEinsum(
      spec=spec,
      shape=tuple(sizes[a] for a in Axes.of(ProjectionLetters.of(spec).weight)),
      lora=lora if lora and name in lora.targets else None,
      dtype=matmul_dtype,
      use_bias=part in config.biased,
      valid=valid,
      name=name,
    )
    for name, spec in PROJECTIONS[part].items()
  }


def _lora_input(module: nn.Module, x: Array, lora: LoraConfig | None) -> Array:
  """x with LoRA's dropout where a dropout key was given.

  Projections that read the same input share one draw.
  """
  if lora and lora.dropout and module.has_rng('dropout'):
    return dropout(module.make_rng('dropout'), x, lora.dropout)
  return x


def _activation(x: Array) -> Array:
  return checkpoint_name(x, ACTIVATION)


class Attention(nn.Module):
  """Grouped-query self-attention over tokens, (N, D) or (B, T, D).

  The rotation says how long a sequence is: T.
  """

  config: LlamaConfig
  shape: LayerShape
  lora: LoraConfig | None
  matmul_dtype: Any
  valid: Array | None
  attend: Callable[..., Array]

  @nn.compact
  def __call__(self, x: Array, rotation: Rotation) -> Array:
    sizes = (self.config, self.shape, self.lora, self.matmul_dtype, self.valid)
    project = _projections('self_attn', *sizes)
    lora_x = _lora_input(self, x, self.lora)

    def sequences(tokens: Array) -> Array:
      each = tokens.shape[x.ndim - 1 :]
      return tokens.reshape(-1, rotation.cos.shape[-2], *each)

    q, k, v = (
      sequences(project[name](x, lora_x))
      for name in ('q_proj', 'k_proj', 'v_proj')
    )
    q, k = (_activation(apply_rope(x, rotation)) for x in (q, k))
    with jax.named_scope('attention'):
      out = _activation(self.attend(q, k, v))
    out = out.reshape(*x.shape[:-1], *out.shape[2:])
    return project['o_proj'](out, _lora_input(self, out, self.lora))


class MLP(nn.Module):
  """down(silu(gate(x)) * up(x)) over tokens, (N, D) or (B, T, D)."""

  config: LlamaConfig
  shape: LayerShape
  lora: LoraConfig | None
  matmul_dtype: Any
  valid: Array | None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    sizes = (self.config, self.shape, self.lora, self.matmul_dtype, self.valid)
    project = _projections('mlp', *sizes)
    lora_x = _lora_input(self, x, self.lora)
    gate = project['gate_proj'](x, lora_x)
    hidden = _activation(nn.silu(gate) * project['up_proj'](x, lora_x))
    return project['down_proj'](hidden, _lora_input(self, hidden, self.lora))


class Block(nn.Module):
  """One decoder layer over tokens, (N, D) or (B, T, D).

  Attributes:
    config: the model's numbers and flags.
    shape: the layer's sizes.
    lora: of the adapters; None: there are none.
    matmul_dtype: of the projections' operands; None: x's.
    attend: as `causal_attention`, or one that fills a cache.
    valid: by token, whether it is observed; None: all are.
  """

  config: LlamaConfig
  shape: LayerShape
  lora: LoraConfig | None = None
  matmul_dtype: Any = None
  attend: Callable[..., Array] = causal_attention
  valid: Array | None = None

  @nn.compact
  def __call__(
    self,
    x: Array,
    rotation: Rotation,
    parts: tuple[str, ...] = tuple(PROJECTIONS),
  ) -> Array:
    """The layer's output, or what one of its parts alone makes of x."""
    sizes = (self.config, self.shape, self.lora, self.matmul_dtype, self.valid)
    norm = functools.partial(RMSNorm, self.config.norm_eps)
    x = checkpoint_name(x, BLOCK)
    if 'self_attn' in parts:
      h = _activation(norm(name='input_layernorm')(x))
      x = x + Attention(*sizes, self.attend, name='self_attn')(h, rotation)
    if 'mlp' in parts:
      h = _activation(norm(name='post_attention_layernorm')(x))
      x = x + MLP(*sizes, name='mlp')(h)
    return x
