"""Any mesh computes what one device computes; what does not fit is refused.

conftest.py simulates the eight devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.errors import UserError
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.quantization import quantized_like
from lorapr_jax.models.trees import logical_axes, param_shapes
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.pruning.masks import alive_counts, by_stack, select_masks
from lorapr_jax.runtime import sharding
from lorapr_jax.training import steps
from lorapr_jax.training.state import init_state
from lorapr_jax.training.steps import make_optimizer
from tests import devices

pytestmark = pytest.mark.mesh

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0)
MHA = ModelConfig(
  vocab_size=48,
  embed_dim=16,
  head_dim=4,
  layers=(LayerShape(4, 1, 24),) * 2,
)
GQA = ModelConfig(
  vocab_size=48,
  embed_dim=16,
  head_dim=4,
  layers=(LayerShape(2, 3, 24),) * 2,
  tie_embeddings=True,
)
STEPS, LENGTH = 3, 20
WIDTH = ('fsdp', 'sequence')


def _mesh(*sizes):
  return sharding.make_mesh(sharding.mesh_sizes(*sizes))


@pytest.mark.parametrize(
  'asked, sizes',
  [
    ((-1, 1, 1), (8, 1, 1, 1)),
    ((1, -1, 1), (1, 8, 1, 1)),
    ((2, -1, 2), (2, 2, 2, 1)),
    ((1, 4, -1), (1, 4, 2, 1)),
    ((-1, 8, 1), (1, 8, 1, 1)),
    ((2, 2, 2), (2, 2, 2, 1)),
    ((1, -1, 1, 4), (1, 2, 1, 4)),
    ((1, 1, 2, -1), (1, 1, 2, 4)),
  ],
)
def test_the_free_mesh_axis_takes_what_is_left(asked, sizes):
  found = sharding.mesh_sizes(*asked)
  axes = ('data', 'fsdp', 'tensor', 'sequence')
  assert found == dict(zip(axes, sizes, strict=True))
  assert sharding.make_mesh(found).shape == found


@pytest.mark.parametrize(
  'asked',
  [
    (1, 1, 1),
    (2, 2, 4),
    (3, -1, 1),
    (-1, 16, 1),
    (-1, -1, 1),
    (-1, 0, 1),
    (0, 8, 1),
    (-2, -4, 1),
    (-8, 1, 1),
    (1, -1, 1, 3),
    (1, 4, 2, 2),
  ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused(asked):
  with pytest.raises(UserError) as error:
    sharding.mesh_sizes(*asked)
  data, fsdp, tensor, sequence = (*asked, 1)[:4]
  given = f'mesh.data={data}, mesh.fsdp={fsdp}, mesh.sequence={sequence}, '
  given += f'mesh.tensor={tensor} do not multiply'
  assert given in str(error.value)
  assert '8 devices' in str(error.value)


def test_a_tensor_lies_where_the_rules_say():
  mesh = _mesh(2, 2, 2)
  axes = logical_axes(GQA, LORA)
  places = sharding.shardings(
    mesh, axes['params'], param_shapes(GQA, jnp.float32)
  )
  block = places['stacks'][0]
  assert places['embed_tokens']['weight'].spec == P('tensor', WIDTH)
  assert block['self_attn']['q_proj']['weight'].spec == P(
    None, WIDTH, 'tensor', None, None
  )
  assert block['self_attn']['o_proj']['weight'].spec == P(
    None, 'tensor', None, None, WIDTH
  )
  assert block['mlp']['down_proj']['weight'].spec == P(None, 'tensor', WIDTH)
  batch = sharding.sharding(mesh, ('batch', 'length'), (4, 9))
  assert batch.spec == P(('data', 'fsdp'), 'sequence')


@pytest.mark.parametrize(
  'axes, shape, named',
  [
    (('embed', 'kv_heads', 'head_dim'), (16, 3, 5), ('kv_heads', 3, 'tensor')),
    (('layers', 'embed', 'mlp'), (3, 15, 24), ('embed', 15, 'fsdp')),
    (('batch', 'length'), (6, 9), ('batch', 6, 'data*fsdp')),
  ],
)
def test_a_size_that_the_mesh_does_not_divide_is_refused(axes, shape, named):
  fit = {3: '1 or 3', 15: '1, 3 or 5', 6: '1, 2, 3 or 6'}
  mesh = _mesh(2, 2, 2)
  axis, size, mesh_axis = named
  parts = 4 if '*' in mesh_axis else 2
  with pytest.raises(UserError) as error:
    sharding.sharding(mesh, axes, shape)
  assert f'{axis} has size {size}' in str(error.value)
  assert f'mesh.{mesh_axis}={parts}' in str(error.value)
  assert str(error.value).endswith(f'divide: {fit[size]} would do')


def test_a_name_without_a_rule_is_an_error():
  with pytest.raises(KeyError, match='heads'):
    sharding.sharding(_mesh(8, 1, 1), ('embed', 'heads'), (16, 8))


def _one_device():
  devices = np.asarray(jax.devices()[:1]).reshape(1, 1, 1, 1)
  return Mesh(devices, sharding.AXES)


def _smallest_gap(importance, masks, keep):
  """The smallest difference, by share, between the last kept and the next."""
  gaps = []
  trees = zip(*jax.device_get((importance, masks, keep)), strict=True)
  for scores, alive, kept in trees:
    for group in scores:
      rows = zip(scores[group], alive[group], kept[group], strict=True)
      for row, mask, k in rows:
        ranked = np.sort(row[mask > 0])[::-1]
        if k < len(ranked):
          gaps.append((ranked[k - 1] - ranked[k]) / ranked[k - 1])
  return min(gaps, default=1.0)


def _segments(packed):
  """Of (2, 8, LENGTH): two documents and padding, of a length of their own."""
  if not packed:
    return {}
  index, row = np.arange(LENGTH), np.arange(16).reshape(2, 8, 1)
  segments = 1 + (index >= 3 + row % 5).astype(np.int32)
  return {'segments': np.where(index < LENGTH - row % 3, segments, 0)}


def _prune(config, mesh, params, names, packed):
  """Three steps of lorapr_jax/training/loop.py's loop, each of which prunes.

  The projections with these names are quantised. `packed`: documents share
  windows, and there is dropout.
  """
  lora = dataclasses.replace(LORA, dropout=0.1) if packed else LORA
  config = dataclasses.replace(config, quantized=names)
  settings = Compute(config, lora, loss_chunk=20)
  everywhere = NamedSharding(mesh, P())
  optimizer = make_optimizer(optax.constant_schedule(1e-2))
  lora_gradients = steps.make_lora_gradients(settings, everywhere)
  update_importance = steps.make_update_importance(
    settings, Criterion('lora'), everywhere
  )
  apply_update = steps.make_apply_update(optimizer, everywhere)
  select = jax.jit(select_masks, out_shardings=everywhere)
  axes = logical_axes(config)['params']
  params = quantized_like(params, axes)
  params = jax.device_put(params, sharding.shardings(mesh, axes, params))
  groups = ('kv_heads', 'mlp')
  state = jax.device_put(
    init_state(jax.random.key(0), settings, groups, optimizer), everywhere
  )
  heads = config.layers[0].num_kv_heads
  batch_axes = ('accumulation', 'batch', 'length')
  places = sharding.sharding(mesh, batch_axes, (2, 8, LENGTH))
  losses, gaps = [], []
  for step in range(STEPS):
    rng = np.random.default_rng(step)
    batch = {
      'tokens': rng.integers(0, 48, (2, 8, LENGTH), dtype=np.int32),
      'weights': rng.integers(0, 2, (2, 8, LENGTH)).astype(np.float32),
    }
    batch |= _segments(packed)
    batch = jax.device_put(batch, places)
    metrics, grads, more = lora_gradients(
      params, state.lora, state.masks, batch, jax.random.key(step)
    )
    importance, ok = update_importance(
      state.importance,
      params,
      state.lora,
      grads,
      more,
      state.masks,
      metrics['grad_norm'],
    )
    keep = by_stack(
      {
        'kv_heads': (heads if step == 0 else heads // 2,) * 2,
        'mlp': (20 - 4 * step,) * 2,
      },
      config,
    )
    gaps.append(_smallest_gap(importance, state.masks, keep))
    masks = select(importance, state.masks, keep)
    state = state.replace(importance=importance, masks=masks)
    state = apply_update(state, grads, ok)
    losses.append(float(metrics['loss']))
  assert lora_gradients._cache_size() == 1
  assert update_importance._cache_size() == 1
  assert apply_update._cache_size() == 1
  return losses, min(gaps), jax.device_get(state)


# Sizes, what is quantised, and whether documents are packed.
CONFIGS = {
  'mha': (MHA, (), False),
  'gqa': (GQA, (), False),
  'int8': (GQA, LORA_TARGETS, False),
  'packed': (GQA, (), True),
}


@pytest.fixture(scope='module')
def one_device(random_params):
  """Name -> the result on one device."""
  with devices.one_device():
    return {
      name: _prune(config, _one_device(), random_params(config), *rest)
      for name, (config, *rest) in CONFIGS.items()
    }


def _case(name, *sizes, marks=()):
  return pytest.param(name, sizes, id=f'{name}-{sizes}', marks=marks)


@pytest.mark.parametrize(
  'name, sizes',
  [
    _case('gqa', 2, 2, 2),
    _case('gqa', 8, 1, 1, marks=pytest.mark.slow),
    _case('gqa', 1, 8, 1, marks=pytest.mark.slow),
    _case('gqa', 1, 4, 2, marks=pytest.mark.slow),
    _case('int8', 2, 2, 2),
    _case('gqa', 1, 2, 2, 2),
    _case('gqa', 2, 1, 1, 4, marks=pytest.mark.slow),
    _case('int8', 1, 2, 2, 2, marks=pytest.mark.slow),
    _case('packed', 2, 2, 2, marks=pytest.mark.slow),
    _case('packed', 1, 2, 1, 4),
    _case('packed', 2, 1, 2, 2, marks=pytest.mark.slow),
    _case('mha', 2, 2, 2),
    _case('mha', 8, 1, 1, marks=pytest.mark.slow),
    _case('mha', 1, 8, 1, marks=pytest.mark.slow),
    _case('mha', 1, 4, 2, marks=pytest.mark.slow),
    _case('mha', 2, 2, 1, 2, marks=pytest.mark.slow),
  ],
)
def test_a_mesh_computes_what_one_device_computes(
  name, sizes, one_device, random_params
):
  want_losses, gap, want = one_device[name]
  # Else the order of a sum could decide which of two groups is masked.
  assert gap > 1e-3
  config, *rest = CONFIGS[name]
  losses, _, state = _prune(config, _mesh(*sizes), random_params(config), *rest)
  np.testing.assert_allclose(losses, want_losses, rtol=0, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, state.masks, want.masks)
  assert alive_counts(state.masks)['mlp'] == (12, 12)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6),
    state.importance,
    want.importance,
  )
