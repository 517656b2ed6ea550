"""The kernel's sums, interpreted, are those of the element scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.trees import (
  block_axes,
  init_lora,
  logical_axes,
  param_shapes,
)
from lorapr_jax.pruning import block_sums as kernel
from lorapr_jax.pruning.importance import (
  Criterion,
  Options,
  Signals,
  element_scores,
)
from lorapr_jax.runtime import sharding

pytestmark = pytest.mark.skipif(
  not kernel.has_triton(), reason='this JAX has no Pallas for Triton'
)

LORA = LoraConfig(
  rank=3, alpha=4.0, dropout=0.0, targets=('q_proj', 'o_proj', 'up_proj')
)


def _config(embed_dim, head_dim, shape):
  return ModelConfig(
    vocab_size=8, embed_dim=embed_dim, head_dim=head_dim, layers=(shape,) * 2
  )


# Those of every size.
AXES = block_axes(_config(16, 4, LayerShape(1, 1, 8)), LORA)


def _random(shapes, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes
  )


def _trees(config, dtype):
  lora = jax.eval_shape(
    lambda key: init_lora(key, config, LORA), jax.random.key(0)
  )
  params = param_shapes(config, jnp.dtype(dtype))
  (stack,), (adapters,), (grads,) = (
    params['stacks'],
    *(_random(lora, seed) for seed in (1, 2)),
  )
  return _random(stack, 0), adapters, grads


def _sums(trees, criterion, **options):
  return kernel.block_sums(
    Signals(*trees, layer=0),
    Options(criterion, LORA.scale),
    AXES,
    interpret=True,
    **options,
  )


def _over_embed(part, name):
  return AXES['params'][part][name]['weight'].index('embed') + 1


def _assert_sums(sums, trees, criterion):
  params, lora, grads = trees
  scores = jax.vmap(
    lambda *trees: element_scores(
      Signals(*trees, layer=0), Options(criterion, LORA.scale)
    )
  )(params, lora, grads)
  assert jax.tree.structure(sums) == jax.tree.structure(scores)
  for part, projections in sums.items():
    for name, leaf in projections.items():
      axis, got = _over_embed(part, name), leaf['weight']
      want = scores[part][name]['weight']
      np.testing.assert_allclose(
        got.sum(axis), want.sum(axis), rtol=2e-5, atol=1e-6
      )


# Less than a tile, and more than one but no whole number of them.
@pytest.mark.parametrize(
  'config',
  [
    _config(6, 4, LayerShape(3, 1, 5)),
    _config(70, 30, LayerShape(1, 3, 133)),
  ],
  ids=['small', 'tiles'],
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
  'criterion',
  [
    Criterion('lora'),
    Criterion('lora', lora_gradient='full'),
    Criterion('lora', score='square', lora_gradient='full'),
  ],
  ids=['own', 'full', 'full_square'],
)
def test_the_sums_are_those_of_the_scores(config, dtype, criterion):
  trees = _trees(config, dtype)
  _assert_sums(_sums(trees, criterion), trees, criterion)


@pytest.mark.mesh
@pytest.mark.parametrize('sizes', [(1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_a_mesh_has_the_same_sums(sizes):
  config = _config(144, 4, LayerShape(8, 2, 72))
  trees = _trees(config, 'float32')
  mesh = sharding.make_mesh(
    dict(zip(('data', 'fsdp', 'tensor'), sizes, strict=True))
  )
  places = sharding.shardings(
    mesh, logical_axes(config)['params'], param_shapes(config, jnp.float32)
  )
  params = jax.device_put(trees[0], places['stacks'][0])
  run = jax.jit(lambda *trees: _sums(trees, Criterion('lora'), mesh=mesh))
  sums = run(params, *trees[1:])
  _assert_sums(sums, trees, Criterion('lora'))
  # Every device sums what it has: no weights travel.
  text = run.lower(params, *trees[1:]).compile().as_text()
  for collective in ('all-gather', 'all-to-all', 'permute', 'all-reduce'):
    assert collective not in text
