"""The forward pass: a scan over the layers of each stack.

The trees are those of models/trees.py. Letters: axes.py.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.axes import LAYERS
from lorapr_jax.models.attention import ACTIVATION, causal_attention
from lorapr_jax.models.block import Block
from lorapr_jax.models.config import LoraConfig, ModelConfig, Stack
from lorapr_jax.models.head import Head
from lorapr_jax.models.kinds import kinds
from lorapr_jax.models.layers import (
  BLOCK,
  DROPOUT,
  PROJECTION,
  rms_norm,
)
from lorapr_jax.models.quantization import dequantized, is_quantized
from lorapr_jax.models.rotation import Rotation, rope_rotation
from lorapr_jax.models.trees import block_axes, masked

# What the backward pass keeps of a block's forward pass. In a loop over layers
# no policy keeps the masked weights: they would be a second copy of the model.
_keep = jax.checkpoint_policies.save_only_these_names
REMAT_POLICIES = {
  'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[BLOCK],
    offload_src='device',
    offload_dst='pinned_host',
  ),
  'blocks': jax.checkpoint_policies.nothing_saveable,
  'dots': _keep(PROJECTION, DROPOUT),
  'none': _keep(PROJECTION, DROPOUT, ACTIVATION),
}


def hidden_states(
  params: Any, tokens: Array, config: ModelConfig, **how: Any
) -> Array:
  """The last layer's normalised output, (B, T, D), computed in `dtype`.

  The arguments are those of `through_layers`.
  """
  x, _ = through_layers(params, tokens, config, **how)
  x = rms_norm(config).apply({'params': params['norm']}, x)
  return x.reshape(*tokens.shape, -1)


def through_layers(
  params: Any,
  tokens: Array,
  config: ModelConfig,
  *,
  start: Array | None = None,
  observe: Callable[[Array, Array], Any] | None = None,
  skips: bool = False,
  positions: Array | None = None,
  lengths: Array | None = None,
  attend: Callable[..., Array] = causal_attention,
  lora: Any = None,
  lora_config: LoraConfig | None = None,
  masks: Any = None,
  valid: Array | None = None,
  dropout_key: Array | None = None,
  remat: str = 'blocks',
  scan_layers: bool = True,
  flat: bool = True,
  dtype: Any = jnp.float32,
  matmul_dtype: Any = None,
) -> tuple[Array, Any]:
  """The last layer's output, (N, D) or (B, T, D), and what was observed.

  Args:
    params: the frozen base.
    tokens: (B, T) ids.
    config: the sizes, of which `config.stacks` follows the trees.
    start: the first layer's input; None: the tokens' embeddings.
    observe: (a layer's input, its output) -> what is to come back of it, with
      all layers of the model in front; None: nothing.
    skips: whether a layer that is masked as a whole is left out, not computed
      and multiplied by 0: for passes without gradients.
    positions: (B, T): where each token stands in its text; None: a row is one
      text.
    lengths: as of `rope_rotation`.
    attend: as `causal_attention`: which tokens of a row see which.
    lora: adapters, with `lora_config`; None runs the base alone.
    masks: None where nothing is masked.
    valid: (B, T), False where there is padding. None: there is none.
    dropout_key: None for no dropout.
    remat: a key of REMAT_POLICIES.
    scan_layers: whether a stack is a loop; else each layer is compiled apart.
    flat: whether the layers see (N, D), not (B, T, D): a mesh that cuts B and
      T can cut no axis of both. XLA's CPU backend is faster with N.
    dtype: of the activations.
    matmul_dtype: of the operands of the projections; None: as `dtype`.
  """
  B, T = tokens.shape
  positions = jnp.arange(T) if positions is None else positions
  rotation = rope_rotation(config, positions.astype(jnp.float32), lengths)
  nothing = tuple({} for _ in config.stacks)
  masks = nothing if masks is None else masks
  if lora is None:
    lora_config, lora = None, nothing
  axes = block_axes(config.dequantized, lora_config)
  table = params['embed_tokens']['weight']
  tokens = tokens.reshape(B * T) if flat else tokens
  x, seen = start, []
  if x is None:
    x = embedded(table, tokens, config, dtype, valid)
  for i, stack in enumerate(config.stacks):
    layers = {'params': _squeezed(params['stacks'][i]), 'lora': lora[i]}
    keys = _dropout_keys(dropout_key, stack)
    inputs = (layers, masks[i], keys, kinds(config, stack, T))
    block = Block(config, stack.shape, lora_config, matmul_dtype, attend)
    layer = _layer(block, axes, rotation, observe, skips)
    x, found = _run_stack(layer, x, inputs, stack.size, remat, scan_layers)
    seen.append(found)
  return x, jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *seen)


def embedded(
  table: Array,
  tokens: Array,
  config: ModelConfig,
  dtype: Any,
  valid: Array | None = None,
) -> Array:
  """The first layer's input, (..., D), for tokens (...).

  Args:
    table: (V, D).
    tokens: ids.
    config: the model's numbers.
    dtype: of the result, in which `config.embed_scale` is rounded too.
    valid: False where there is padding, which becomes zero, in as many places
      as there are tokens. None: there is none.
  """
  x = table[tokens].astype(dtype)
  if config.embed_scale != 1.0:
    x = x * jnp.asarray(config.embed_scale, dtype)
  if valid is None:
    return x
  return jnp.where(valid.reshape(*tokens.shape, 1), x, 0)


def _dropout_keys(key: Array | None, stack: Stack) -> Array | None:
  """A key for each layer of a stack."""
  if key is None:
    return None
  return jax.random.split(jax.random.fold_in(key, stack.start), stack.size)


def _run_stack(
  layer: Callable[..., Any],
  x: Array,
  inputs: Any,
  size: int,
  remat: str,
  scan_layers: bool,
) -> tuple[Array, Any]:
  """x through the layers of a stack, rematerialised; what was observed."""
  # Without a loop around them XLA would find both computations of a block, and
  # keep what they share. The barriers against that cost time, and where all is
  # kept there is nothing to compute twice.
  layer = jax.checkpoint(
    layer,
    policy=REMAT_POLICIES[remat],
    prevent_cse=not scan_layers and remat != 'none',
  )
  return jax.lax.scan(layer, x, inputs, unroll=1 if scan_layers else size)


def _squeezed(stack: Any) -> Any:
  """The weights without axes of size 1, such as queries_per_kv often is.

  XLA for TPU pads such an axis, and for that copies the stack out of its loop.
  """

  def squeeze(node: Any) -> Any:
    ones = [i for i, size in enumerate(node.shape) if i and size == 1]
    return jax.tree.map(lambda x: jnp.squeeze(x, ones), node)

  return jax.tree.map(squeeze, stack, is_leaf=is_quantized)


def _layer(
  block: Block,
  axes: Any,
  rotation: Rotation,
  observe: Callable[[Array, Array], Any] | None,
  skips: bool,
) -> Callable[..., Any]:
  sizes = block.config.sizes(block.shape)

  def run(x, inputs):
    trees, masks, key, kind = inputs
    params = jax.tree.map(
      lambda weight, axes: weight.reshape([sizes[a] for a in axes]),
      dequantized(trees['params'], x.dtype),
      axes['params'],
    )
    trees = {'params': params, 'lora': trees['lora']}
    variables = masked(trees, masks, axes, block.config, block.shape)
    rngs = None if key is None else {'dropout': key}
    turn, window = rotation.of(kind.rope), kind.window
    return block.apply(variables, x, turn, window=window, rngs=rngs)

  def layer(x, inputs):
    masks = inputs[1]
    if skips and LAYERS in masks:
      out = jax.lax.cond(masks[LAYERS] > 0, run, lambda x, _: x, x, inputs)
    else:
      out = run(x, inputs)
    return out, observe(x, out) if observe else None

  return layer


def logits(params: Any, hidden: Array, config: ModelConfig) -> Array:
  """(..., D) hidden states to (..., V) logits, in float32."""
  weight = output_weight(params).astype(hidden.dtype)
  products = jnp.einsum(
    '...D,VD->...V', hidden, weight, preferred_element_type=jnp.float32
  )
  return Head.of(config).logits(products)


def output_weight(params: Any) -> Array:
  """The (V, D) matrix that turns hidden states into logits."""
  return params.get('lm_head', params['embed_tokens'])['weight']
