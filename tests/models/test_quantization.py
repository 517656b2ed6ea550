"""An int8 base: its values, and that all of the package reads it alike."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.exporting.model import merge
from lorapr_jax.hf.load import load_or_draw, load_params, weight_places
from lorapr_jax.models import cached, decoder
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.lora import merge_adapters
from lorapr_jax.models.quantization import (
  BLOCK,
  dequantized,
  is_quantized,
  quantized,
  quantized_like,
)
from lorapr_jax.models.trees import logical_axes, param_shapes
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.pruning.masks import initial_masks
from lorapr_jax.pruning.shrink import shrunk_config
from lorapr_jax.runtime import sharding
from lorapr_jax.runtime.sharding import make_mesh, mesh_sizes
from lorapr_jax.training import steps
from lorapr_jax.training.base import cut_params

CONFIG = ModelConfig(
  vocab_size=48,
  embed_dim=16,
  head_dim=4,
  layers=(LayerShape(2, 3, 24),) * 2 + (LayerShape(2, 3, 16),),
)
INT8 = dataclasses.replace(CONFIG, quantized=LORA_TARGETS)
LORA = LoraConfig(
  rank=2, alpha=4.0, dropout=0.0, targets=('q_proj', 'o_proj', 'up_proj')
)
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 7))
# What each layer keeps.
KEPT = tuple(
  {
    'kv_heads': np.array([i % 2]),
    'mlp': np.sort(np.random.default_rng(i).permutation(16)[:9]),
  }
  for i in range(3)
)


@pytest.fixture
def params(random_params):
  """Random weights, quantised."""
  like = logical_axes(INT8)['params']
  return quantized_like(random_params(CONFIG), like)


def _assert_close(ours, theirs, **tolerance):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **tolerance), ours, theirs
  )


@pytest.mark.parametrize('layers', [(), (2,)])
def test_each_output_has_the_scale_of_its_largest_input(layers):
  # Two inputs (K and H), two outputs.
  weight = np.zeros((*layers, 2, 1, 1, 2), np.float32)
  weight[..., 0, 0, 0, :] = [1.0, -254.9]
  weight[..., 1, 0, 0, :] = [0.25, 99.0]
  found = quantized(jnp.asarray(weight), 'o_proj')
  values, scales = found.qvalue, found.scale
  assert values.dtype == jnp.int8 and scales.dtype == jnp.float32
  assert scales.shape == (*layers, 1, 1, 1, 2)
  expected = np.broadcast_to([1 / 127.5, 254.9 / 127.5], scales.shape)
  np.testing.assert_allclose(scales, expected, rtol=1e-6)
  # 0.25 is 31.9 of 127.5, and 99 of 254.9 is 49.5.
  np.testing.assert_array_equal(
    np.asarray(values).reshape(-1, 2, 2)[-1], [[127, -128], [32, 50]]
  )
  dense = dequantized({'x': found, 'y': weight}, jnp.bfloat16)
  assert dense['x'].dtype == jnp.bfloat16 and dense['y'] is weight
  np.testing.assert_allclose(
    np.float32(dense['x']), weight, atol=1.0 + 0.01, rtol=0.01
  )


@pytest.mark.parametrize('name', ['o_proj', 'up_proj'])
def test_in_int4_a_block_of_neighbours_has_a_scale(name):
  # Two layers of K 2, G 1, H 64, D 3; or of D 64, F 3.
  shape = {'o_proj': (2, 2, 1, 64, 3), 'up_proj': (2, 64, 3)}[name]
  weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  found = quantized(jnp.asarray(weight), name, jnp.int4)
  assert found.qvalue.dtype == jnp.int4 and found.scale.dtype == jnp.bfloat16
  blocks = np.abs(weight).reshape(*shape[:-2], 2, BLOCK, 3)
  expected = blocks.max(axis=-2) / 7.5
  np.testing.assert_allclose(np.float32(found.scale), expected, rtol=2**-8)
  dense = dequantized(found, jnp.float32)
  # Half a step; a whole one at 7.5, which becomes 7, and what is rounded.
  step = expected[..., None, :]
  error = np.abs(dense - weight).reshape(blocks.shape)
  assert (error < np.where(blocks > 7 * step, 0.55, 0.5) * step * 1.03).all()


@pytest.mark.parametrize('names', [LORA_TARGETS, ('q_proj', 'down_proj')])
def test_axes_and_shapes_are_those_of_the_arrays(names, params):
  config = dataclasses.replace(CONFIG, quantized=names)
  trees = (
    logical_axes(config)['params'],
    param_shapes(config, jnp.float32),
  )
  axes, shapes = ({jax.tree_util.keystr(k): x for k, x in
                   jax.tree_util.tree_leaves_with_path(tree)}
                  for tree in trees)  # fmt: skip
  assert axes.keys() == shapes.keys()
  assert sum('.scale' in key for key in axes) == len(CONFIG.stacks) * len(names)
  assert all(len(axes[key]) == len(shapes[key].shape) for key in axes)
  if names == LORA_TARGETS:
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
      lambda x: (tuple(x.shape), x.dtype), trees[1]
    )


@pytest.mark.mesh
def test_scales_lie_with_their_values():
  mesh = make_mesh(mesh_sizes(2, 2, 2))
  places = sharding.shardings(
    mesh,
    logical_axes(INT8)['params'],
    param_shapes(INT8, jnp.float32),
  )
  mlp = places['stacks'][0]['mlp']
  assert mlp['up_proj']['weight'].qvalue.spec == P(
    None, ('fsdp', 'sequence'), 'tensor'
  )
  assert mlp['up_proj']['weight'].scale.spec == P(None, None, 'tensor')
  assert mlp['down_proj']['weight'].scale.spec == P(
    None, None, ('fsdp', 'sequence')
  )


def test_every_forward_pass_is_that_of_the_weights_dequantised(
  params, random_lora
):
  lora = random_lora(CONFIG, LORA)
  dense = dequantized(params, jnp.float32)

  def outputs(params, config):
    cache = cached.empty_cache(config, 2, 7, jnp.float32)
    return (
      decoder.hidden_states(
        params, TOKENS, config, lora=lora, lora_config=LORA
      ),
      cached.hidden_states(params, TOKENS, cache, 0, config)[0],
      merge_adapters(params, lora, LORA.scale),
    )

  _assert_close(outputs(params, INT8), outputs(dense, CONFIG), atol=1e-5)


def test_what_is_merged_or_dequantised_is_dense_in_the_norms_dtype(
  params, random_lora
):
  half = jax.tree.map(
    lambda x: x if is_quantized(x) else x.astype(jnp.bfloat16),
    params,
    is_leaf=is_quantized,
  )
  lora = random_lora(CONFIG, LORA)
  merged = merge_adapters(half, lora, LORA.scale)
  shapes = param_shapes(CONFIG, jnp.bfloat16)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(
    lambda x: (tuple(x.shape), x.dtype), shapes
  )
  exact = merge_adapters(dequantized(params, jnp.float32), lora, LORA.scale)
  # Rounded once.
  _assert_close(
    jax.tree.map(np.float32, merged['stacks']),
    jax.tree.map(lambda x: np.float32(x.astype(jnp.bfloat16)), exact['stacks']),
    rtol=1e-2,
    atol=1e-6,
  )


def test_base_and_adapters_apart_come_to_what_is_merged(params, random_lora):
  half = jax.tree.map(
    lambda x: x if is_quantized(x) else x.astype(jnp.bfloat16),
    params,
    is_leaf=is_quantized,
  )
  lora = random_lora(CONFIG, LORA)
  weights = merge(half, lora, LORA, unmerged=True)
  again = merge_adapters(weights.base, lora, LORA.scale)
  jax.tree.map(np.testing.assert_array_equal, again, weights.merged)


def test_the_cut_takes_values_and_scales(params):
  cut = cut_params(params, KEPT, INT8)
  small = shrunk_config(INT8, KEPT)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), cut) == jax.tree.map(
    lambda x: (tuple(x.shape), x.dtype),
    param_shapes(small, jnp.float32),
  )
  dense = dequantized(params, jnp.float32)
  _assert_close(
    dequantized(cut, jnp.float32), cut_params(dense, KEPT, CONFIG), rtol=1e-6
  )


@pytest.mark.mesh
@pytest.mark.parametrize('sizes', [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_a_folder_is_quantised_as_it_is_read_on_any_mesh(sizes, save_hf, load):
  folder = save_hf('gqa')
  config, dense = load(folder)
  devices = np.prod(sizes)
  mesh = make_mesh(
    dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True)),
    jax.devices()[:devices],
  )
  int8 = dataclasses.replace(config, quantized=LORA_TARGETS)
  places = weight_places(int8, jnp.float32, mesh)
  # Quantised from what the file has, whatever the dtype of the rest.
  got = load_params(folder, int8, places, jnp.dtype('bfloat16'))
  assert jax.tree.map(lambda x: x.sharding, got) == places
  compiled = jax.jit(quantized, static_argnums=1)
  for part, projections in dense['stacks'][0].items():
    for name, leaf in projections.items():
      if name == 'weight':
        continue
      # Compiled as well: the largest weight is half way between two values.
      want = compiled(leaf['weight'], name)
      found = got['stacks'][0][part][name]['weight']
      np.testing.assert_array_equal(found.qvalue, want.qvalue)
      np.testing.assert_array_equal(found.scale, want.scale)
  np.testing.assert_array_equal(
    got['embed_tokens']['weight'],
    dense['embed_tokens']['weight'].astype(jnp.bfloat16),
  )


@pytest.mark.mesh
def test_random_weights_are_quantised_too():
  mesh = make_mesh(mesh_sizes(2, 2, 2))

  def base(config):
    places = weight_places(config, jnp.float32, mesh)
    return load_or_draw(None, config, places, jnp.float32, 3), places

  (dense, _), (small, places) = base(CONFIG), base(INT8)
  assert jax.tree.map(lambda x: x.sharding, small) == places
  down = dense['stacks'][1]['mlp']['down_proj']['weight']
  found = small['stacks'][1]['mlp']['down_proj']['weight']
  half_a_step = np.asarray(found.scale) * 0.501
  dense = np.asarray(dequantized({'x': found}, jnp.float32)['x'])
  assert np.all(np.abs(dense - down) <= half_a_step)
  assert np.abs(dense - down).max() > 0


def test_step_and_importance_are_those_of_the_weights_dequantised(
  params, random_lora
):
  settings = Compute(CONFIG, LORA, loss_chunk=20)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  lora = random_lora(CONFIG, LORA)
  axes = tuple((s.size, CONFIG.sizes(s.shape)) for s in CONFIG.stacks)
  masks = initial_masks(('kv_heads', 'mlp'), axes)
  batch = {
    'tokens': jnp.asarray(TOKENS)[None],
    'weights': jnp.ones((1, *TOKENS.shape)),
  }

  def results(params, config):
    own = dataclasses.replace(settings, config=config)
    metrics, grads, more = steps.make_lora_gradients(own, place)(
      params, lora, masks, batch, jax.random.key(0)
    )
    update = steps.make_update_importance(own, Criterion('lora'), place)
    zeros = jax.tree.map(jnp.zeros_like, masks)
    norm = metrics['grad_norm']
    importance, ok = update(zeros, params, lora, grads, more, masks, norm)
    assert ok
    return metrics, grads, importance

  dense = dequantized(params, jnp.float32)
  _assert_close(
    results(params, INT8), results(dense, CONFIG), rtol=1e-4, atol=1e-6
  )
