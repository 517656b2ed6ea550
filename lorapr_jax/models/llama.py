"""The LLaMA forward pass over stacks of equal layers. Letters: axes.py.

Trees:
  params  {'embed_tokens', 'norm' and, untied, 'lm_head': {'weight'},
           'stacks': (block, ...)}: frozen
  lora    (block, ...): the adapters, in the same places as `params['stacks']`
  masks   ({group: array}, ...): see pruning/groups.py
A stack's arrays have the axis `layers` in front.
"""

from collections.abc import Callable, Collection
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from lorapr_jax.axes import (
  PROJECTIONS,
  Axes,
  ProjectionLetters,
  apply_masks,
)
from lorapr_jax.models.attention import ACTIVATION, causal_attention
from lorapr_jax.models.config import LayerShape, LlamaConfig, LoraConfig
from lorapr_jax.models.layers import (
  BLOCK,
  DROPOUT,
  PROJECTION,
  STATISTICS,
  LoRAEinsum,
  RMSNorm,
  Rotation,
  apply_rope,
  dropout,
  rope_frequencies,
)
from lorapr_jax.models.quantization import (
  dequantized,
  is_quantized,
  quantized_axes,
  quantized_like,
)

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
  """Grouped-query self-attention over tokens (N, D) of sequences of T.

  Or over (B, T, D), as all of a block.
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
  """down(silu(gate(x)) * up(x)) over tokens (N, D)."""

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
  """One decoder layer over tokens (N, D), whose rotation fixes T."""

  config: LlamaConfig
  shape: LayerShape
  lora: LoraConfig | None = None
  matmul_dtype: Any = None  # Of the products' operands; None: of x.
  attend: Callable[..., Array] = causal_attention  # Or with a cache.
  valid: Array | None = None  # By token, for what is observed; None: all are.

  @nn.compact
  def __call__(
    self,
    x: Array,
    rotation: Rotation,
    parts: tuple[str, ...] = tuple(PROJECTIONS),
  ) -> Array:
    """Both parts, or one alone."""
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


def block_axes(
  lora_config: LoraConfig | None = None,
  quantized: Collection[str] = (),
  biased: Collection[str] = (),
) -> dict[str, Any]:
  """The axis names of one block: {'params': ..., 'lora': ...}.

  Args:
    lora_config: of the adapters; None: there are none.
    quantized: the projections of the base that are (models/quantization.py).
    biased: the parts whose projections have biases; `LlamaConfig.biased`.
  """
  params: dict[str, Any] = {
    'input_layernorm': {'weight': Axes.of('D')},
    'post_attention_layernorm': {'weight': Axes.of('D')},
  }
  lora: dict[str, Any] = {}
  for part, specs in PROJECTIONS.items():
    letters = {n: ProjectionLetters.of(spec) for n, spec in specs.items()}
    params[part] = {
      n: {'weight': quantized_axes(n) if n in quantized else Axes.of(p.weight)}
      for n, p in letters.items()
    }
    if part in biased:
      for n, p in letters.items():
        params[part][n]['bias'] = Axes.of(p.outputs)
    adapters = {
      n: {'a': Axes.of(p.inputs + 'r'), 'b': Axes.of('r' + p.outputs)}
      for n, p in letters.items()
      if lora_config and n in lora_config.targets
    }
    if adapters:
      lora[part] = adapters
  return {'params': params, 'lora': lora}


def logical_axes(
  config: LlamaConfig,
  lora_config: LoraConfig | None = None,
  quantized: Collection[str] = (),
) -> dict[str, Any]:
  """The axis names of every tensor: {'params': Axes, 'lora': Axes}.

  The trees have the structure of the arrays', with an `Axes` for each.
  """
  block = jax.tree.map(
    lambda axes: Axes(('layers', *axes)),
    block_axes(lora_config, quantized, config.biased),
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


def param_shapes(
  config: LlamaConfig, dtype: Any, quantized: Collection[str] = ()
) -> Any:
  """A `jax.ShapeDtypeStruct` for every tensor of `params`.

  Args:
    config: the sizes.
    dtype: of what is not quantised.
    quantized: as of `block_axes`.
  """
  axes = logical_axes(config)['params']

  def shapes(tree, sizes):
    return jax.tree.map(
      lambda axes: jax.ShapeDtypeStruct([sizes[a] for a in axes], dtype), tree
    )

  stacks = tuple(
    shapes(tree, {**config.sizes(stack.shape), 'layers': stack.size})
    for tree, stack in zip(axes.pop('stacks'), config.stacks, strict=True)
  )
  dense = {**shapes(axes, config.sizes(config.layers[0])), 'stacks': stacks}
  like = logical_axes(config, quantized=quantized)['params']
  return jax.eval_shape(functools.partial(quantized_like, like=like), dense)


def output_weight(params: Any) -> Array:
  """The (V, D) matrix that turns hidden states into logits."""
  return params.get('lm_head', params['embed_tokens'])['weight']


def rope_rotation(config: LlamaConfig, positions: Array) -> Rotation:
  """The (..., T, H/2) rotation of positions (..., T), which are float32."""
  frequencies = rope_frequencies(
    config.head_dim, config.rope_theta, config.rope_scaling
  )
  angles = positions[..., None] * frequencies
  return Rotation(jnp.cos(angles), jnp.sin(angles))


def hidden_states(
  params: Any, tokens: Array, config: LlamaConfig, **options: Any
) -> Array:
  """`observed_hidden_states`, of which nothing is observed."""
  return observed_hidden_states(params, tokens, config, **options)[0]


def observed_hidden_states(
  params: Any,
  tokens: Array,
  config: LlamaConfig,
  *,
  positions: Array | None = None,
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
  observe: bool = False,
) -> tuple[Array, Any]:
  """The last layer's normalised output, (B, T, D), computed in `dtype`.

  Args:
    params: the frozen base.
    tokens: (B, T) ids.
    config: the sizes, of which `config.stacks` follows the trees.
    positions: (B, T): where each token stands in its text; None: a row is one
      text.
    attend: as `causal_attention`: which tokens of a row see which.
    lora: adapters, with `lora_config`; None runs the base alone.
    masks: None where nothing is masked.
    valid: (B, T), False where there is padding, which adds nothing to what is
      observed, and without biases is zero in every layer. None: there is none.
    dropout_key: None for no dropout.
    remat: a key of REMAT_POLICIES.
    scan_layers: whether a stack is a loop over its layers; else each layer is
      compiled apart.
    flat: whether the layers see (N, D), not (B, T, D): a mesh that cuts B and
      T can cut no axis of both. XLA's CPU backend is faster with N.
    dtype: of the activations.
    matmul_dtype: of the operands of the projections; None: as `dtype`.
    observe: whether the projections' inputs are observed.

  Returns:
    The output, and by stack what was observed: for each layer and projection
    {'squares': the sum over tokens of its squared input}; else {}.
  """
  B, T = tokens.shape
  if positions is None:
    positions = jnp.arange(T)
  rotation = rope_rotation(config, positions.astype(jnp.float32))
  if lora is None:
    lora_config, lora = None, tuple({} for _ in config.stacks)
  axes = block_axes(lora_config, biased=config.biased)
  if masks is None:
    masks = tuple({} for _ in config.stacks)
  if flat:
    tokens = tokens.reshape(B * T)
  x = params['embed_tokens']['weight'][tokens].astype(dtype)
  if valid is not None:
    x = jnp.where(valid.reshape(*tokens.shape, 1), x, 0)
  observed = []
  for i, stack in enumerate(config.stacks):
    layers = {'params': _squeezed(params['stacks'][i]), 'lora': lora[i]}
    keys = None
    if dropout_key is not None:
      keys = jax.random.split(
        jax.random.fold_in(dropout_key, stack.start), stack.size
      )
    block = Block(
      config,
      stack.shape,
      lora_config,
      matmul_dtype,
      attend,
      valid if observe and config.biased else None,
    )
    layer = _layer(block, axes, rotation, observe)
    # Without a loop around them XLA would find both computations of a block,
    # and keep what they share. The barriers against that cost time, and where
    # all is kept there is nothing to compute twice.
    layer = jax.checkpoint(
      layer,
      policy=REMAT_POLICIES[remat],
      prevent_cse=not scan_layers and remat != 'none',
    )
    x, statistics = jax.lax.scan(
      layer,
      x,
      (layers, masks[i], keys),
      unroll=1 if scan_layers else stack.size,
    )
    observed.append(statistics)
  norm = RMSNorm(config.norm_eps)
  x = norm.apply({'params': params['norm']}, x).reshape(B, T, -1)
  return x, tuple(observed)


def _squeezed(stack: Any) -> Any:
  """The weights without axes of size 1, such as queries_per_kv often is.

  XLA for TPU pads such an axis, and for that copies the stack out of its loop.
  """

  def squeeze(node: Any) -> Any:
    ones = [i for i, size in enumerate(node.shape) if i and size == 1]
    return jax.tree.map(lambda x: jnp.squeeze(x, ones), node)

  return jax.tree.map(squeeze, stack, is_leaf=is_quantized)


def _layer(
  block: Block, axes: Any, rotation: Rotation, observe: bool
) -> Callable[..., Any]:
  sizes = block.config.sizes(block.shape)

  def layer(x, inputs):
    trees, masks, key = inputs
    params = jax.tree.map(
      lambda weight, axes: weight.reshape([sizes[a] for a in axes]),
      dequantized(trees['params'], x.dtype),
      axes['params'],
    )
    trees = {'params': params, 'lora': trees['lora']}
    variables = {
      name: apply_masks(tree, masks, axes[name]) for name, tree in trees.items()
    }
    rngs = None if key is None else {'dropout': key}
    x, observed = block.apply(
      variables,
      x,
      rotation,
      rngs=rngs,
      mutable=[STATISTICS] if observe else [],
    )
    return x, observed.get(STATISTICS, {})

  return layer


def logits(params: Any, hidden: Array) -> Array:
  """(..., D) hidden states to (..., V) logits, in float32."""
  weight = output_weight(params).astype(hidden.dtype)
  return jnp.einsum(
    '...D,VD->...V', hidden, weight, preferred_element_type=jnp.float32
  )


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def init_params(key: Array, config: LlamaConfig, dtype: Any) -> Any:
  """Random weights: normal with deviation 0.02, norms one, biases zero."""
  embed, head, blocks = jax.random.split(key, 3)
  shape = (config.vocab_size, config.embed_dim)
  params = {
    'embed_tokens': {'weight': 0.02 * jax.random.normal(embed, shape)},
    'norm': {'weight': jnp.ones(config.embed_dim)},
    'stacks': _init_stacks(blocks, config, None, 'params'),
  }
  if not config.tie_embeddings:
    params['lm_head'] = {'weight': 0.02 * jax.random.normal(head, shape)}
  return jax.tree.map(lambda x: x.astype(dtype), params)


@functools.partial(jax.jit, static_argnames=('config', 'lora_config'))
def init_lora(key: Array, config: LlamaConfig, lora_config: LoraConfig) -> Any:
  """Fresh adapters: A Kaiming-uniform, B zero, in float32.

  Linen's init makes the base's weights as well; they are unused here, so the
  compiler drops them and the base is never materialised.
  """
  return _init_stacks(key, config, lora_config, 'lora')


def _init_stacks(key, config, lora_config, collection) -> tuple[Any, ...]:
  keys = jax.random.split(key, len(config.layers))
  x = jnp.zeros((1, config.embed_dim))
  rotation = rope_rotation(config, jnp.zeros(1))
  stacks = []
  for stack in config.stacks:
    block = Block(config, stack.shape, lora_config)

    def init(key, block=block):
      rngs = {'params': key, 'lora': key}
      return block.init(rngs, x, rotation)[collection]

    stacks.append(jax.vmap(init)(keys[stack.start : stack.start + stack.size]))
  return tuple(stacks)
