"""The trees of a model: their axes, their shapes, their first values.

Trees:
  params  {'embed_tokens', 'norm' and, untied, 'lm_head': {'weight'},
           'stacks': (block, ...)}: frozen
  lora    (block, ...): the adapters, in the same places as `params['stacks']`
  masks   ({group: array}, ...): see pruning/groups.py
A stack's arrays have the axis `layers` in front. Letters: axes.py.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.axes import (
  LAYERS,
  PROJECTIONS,
  Axes,
  ProjectionLetters,
  apply_masks,
)
from lorapr_jax.models.block import Block
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.layers import ALIVE, rms_norm
from lorapr_jax.models.quantization import quantized_axes, quantized_like
from lorapr_jax.models.rotation import rope_rotation


def block_axes(
  config: ModelConfig, lora_config: LoraConfig | None = None
) -> dict[str, Any]:
  """The axis names of one block: {'params': ..., 'lora': ...}.

  Args:
    config: says what there is, and which projections are quantised.
    lora_config: of the adapters; None: there are none.
  """
  params: dict[str, Any] = {
    name: {'weight': Axes.of('D')} for name in config.norms
  }
  lora: dict[str, Any] = {}
  for part, specs in PROJECTIONS.items():
    letters = {n: ProjectionLetters.of(spec) for n, spec in specs.items()}
    params[part] = {
      n: {
        'weight': quantized_axes(n)
        if n in config.quantized
        else Axes.of(p.weight)
      }
      for n, p in letters.items()
    }
    for n, p in letters.items():
      if n in config.biases:
        params[part][n]['bias'] = Axes.of(p.outputs)
    if part == 'self_attn':
      for n, norm in config.qk_norms.items():
        params[part][n] = {'weight': Axes.of(norm)}
    adapters = {
      n: {'a': Axes.of(p.inputs + 'r'), 'b': Axes.of('r' + p.outputs)}
      for n, p in letters.items()
      if lora_config and n in lora_config.targets
    }
    if adapters:
      lora[part] = adapters
  return {'params': params, 'lora': lora}


def masked(
  trees: Any,
  masks: Mapping[str, Array],
  axes: Any,
  config: ModelConfig,
  shape: LayerShape,
) -> dict[str, Any]:
  """A block's variables where groups are masked; one layer.

  A norm over all heads takes its mean over those that are alive, so that it is
  what it is once the others are cut. A layer that is masked as a whole adds
  nothing (models/block.py).

  Args:
    trees: {'params', 'lora'}.
    masks: {group: array}.
    axes: `block_axes`.
    config: the model's numbers.
    shape: the layer's sizes.
  """
  variables = {
    name: apply_masks(tree, masks, axes[name]) for name, tree in trees.items()
  }
  alive = {}
  if masks and config.qk_norm == 'heads':
    sizes = config.sizes(shape)
    heads = {
      name: {'heads': Axes.of(letters.removesuffix('H'))}
      for name, letters in config.qk_norms.items()
    }
    ones = jax.tree.map(lambda x: jnp.ones([sizes[a] for a in x]), heads)
    alive['self_attn'] = apply_masks(ones, masks, heads)
  if LAYERS in masks:
    alive[LAYERS] = masks[LAYERS]
  return variables | ({ALIVE: alive} if alive else {})


def logical_axes(
  config: ModelConfig, lora_config: LoraConfig | None = None
) -> dict[str, Any]:
  """The axis names of every tensor: {'params': Axes, 'lora': Axes}.

  The trees have the structure of the arrays', with an `Axes` for each.
  """
  block = jax.tree.map(
    lambda axes: Axes(('layers', *axes)),
    block_axes(config, lora_config),
  )
  stacks = range(len(config.stacks))
  params = {
    'embed_tokens': {'weight': Axes.of('VD')},
    'norm': {'weight': Axes.of('D')},
    'stacks': tuple(block['params'] for _ in stacks),
  }
  if not config.tie_embeddings:
    params['lm_head'] = {'weight': Axes.of('VD')}
  return {'params': params, 'lora': tuple(block['lora'] for _ in stacks)}


def param_shapes(config: ModelConfig, dtype: Any) -> Any:
  """A `jax.ShapeDtypeStruct` for every tensor of `params`.

  Args:
    config: the sizes.
    dtype: of what is not quantised.
  """
  axes = logical_axes(config.dequantized)['params']

  def shapes(tree, sizes):
    return jax.tree.map(
      lambda axes: jax.ShapeDtypeStruct([sizes[a] for a in axes], dtype), tree
    )

  stacks = tuple(
    shapes(tree, {**config.sizes(stack.shape), 'layers': stack.size})
    for tree, stack in zip(axes.pop('stacks'), config.stacks, strict=True)
  )
  dense = {**shapes(axes, config.sizes(config.layers[0])), 'stacks': stacks}
  return jax.eval_shape(functools.partial(_as_stored, config=config), dense)


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def init_params(key: Array, config: ModelConfig, dtype: Any) -> Any:
  """Random weights: normal with deviation 0.02, biases zero, norms neutral."""
  embed, head, blocks = jax.random.split(key, 3)
  shape = (config.vocab_size, config.embed_dim)
  params = {
    'embed_tokens': {'weight': 0.02 * jax.random.normal(embed, shape)},
    'norm': rms_norm(config).init(key, jnp.zeros(config.embed_dim))['params'],
    'stacks': _init_stacks(blocks, config, None, 'params'),
  }
  if not config.tie_embeddings:
    params['lm_head'] = {'weight': 0.02 * jax.random.normal(head, shape)}
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  return _as_stored(params, config)


def _as_stored(params: Any, config: ModelConfig) -> Any:
  """Dense weights, quantised where the config says so."""
  return quantized_like(params, logical_axes(config)['params'])


@functools.partial(jax.jit, static_argnames=('config', 'lora_config'))
def init_lora(key: Array, config: ModelConfig, lora_config: LoraConfig) -> Any:
  """Fresh adapters: A Kaiming-uniform, B zero, in float32.

  Linen's init makes the base's weights as well; they are unused here, so the
  compiler drops them and the base is never materialised.
  """
  return _init_stacks(key, config, lora_config, 'lora')


def _init_stacks(key, config, lora_config, collection) -> tuple[Any, ...]:
  keys = jax.random.split(key, len(config.layers))
  x = jnp.zeros((1, config.embed_dim))
  rotation = rope_rotation(config, jnp.zeros(1))
  rotation = rotation.of(0 if config.rope_of_layer else None)
  stacks = []
  for stack in config.stacks:
    block = Block(config, stack.shape, lora_config)

    def init(key, block=block):
      rngs = {'params': key, 'lora': key}
      return block.init(rngs, x, rotation)[collection]

    stacks.append(jax.vmap(init)(keys[stack.start : stack.start + stack.size]))
  return tuple(stacks)
