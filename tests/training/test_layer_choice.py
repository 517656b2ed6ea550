"""Which layers go: the same as a loop over them, and as NumPy, chooses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.axes import LAYERS
from lorapr_jax.models import decoder
from lorapr_jax.models.compute import Compute, run_model, token_losses
from lorapr_jax.models.config import LayerShape
from lorapr_jax.pruning.groups import CHANNELS
from lorapr_jax.pruning.importance import COSINE, LOSS, SUM
from lorapr_jax.pruning.masks import initial_masks, of_layers, with_layers
from lorapr_jax.runtime import sharding
from lorapr_jax.training import layer_choice
from lorapr_jax.training.base import Places
from lorapr_jax.training.layer_choice import make_choose_layers
from tests.training.test_layer_pass import (
  LORA,
  OTHER,
  batches,
  compensate,
  event,
  places_of,
)

# Layers of two sizes and of three kinds.
CONFIG = dataclasses.replace(
  OTHER,
  layers=(LayerShape(4, 2, 24),) * 2
  + (LayerShape(4, 2, 16),) * 3
  + (LayerShape(4, 2, 24),),
  windows=(None, 5) * 3,
  rope_of_layer=(0, 1, 1) * 2,
)
PROTECTED = (False,) * 5 + (True,)


@pytest.fixture
def model(random_params, random_lora):
  """Base, adapters, and masks of a model of which some is masked."""
  stacks = tuple((s.size, CONFIG.sizes(s.shape)) for s in CONFIG.stacks)
  masks = initial_masks((LAYERS, CHANNELS), stacks)
  masks = tuple(m | {CHANNELS: m[CHANNELS].at[:, 3].set(0)} for m in masks)
  masks = with_layers(masks, jnp.array([1.0, 1, 1, 0, 1, 1]))
  return random_params(CONFIG), random_lora(CONFIG, LORA), masks


@functools.cache
def chooser(how, mesh):
  """What chooses, compiled once."""
  state, base = places_of(CONFIG, mesh)
  return make_choose_layers(
    Compute(CONFIG, LORA), how, PROTECTED, Places(base, None, state)
  )


def choose(model, how, keep, tokens, mesh=None, old=0.5):
  params, lora, masks = model
  state, base = places_of(CONFIG, mesh)
  params, (lora, masks) = jax.device_put((params, (lora, masks)), (base, state))
  if mesh is not None:
    rows = sharding.sharding(mesh, ('accumulation', 'batch', 'length'))
    tokens = jax.device_put(tokens, rows)
  importance = jax.tree.map(lambda x: jnp.full(x.shape, old), masks)
  masks, importance = chooser(how, mesh)(
    params, lora, masks, importance, np.int32(keep), tokens
  )
  return np.asarray(of_layers(masks)), np.asarray(of_layers(importance))


@functools.partial(jax.jit, static_argnames='run')
def _of_micro(model, mask, micro, run):
  params, lora, masks = model
  context = {'lora': lora, 'masks': with_layers(masks, mask)}
  context['segments'] = micro.get('segments')
  compute = Compute(CONFIG, LORA)
  if run == 'losses':
    tokens = micro['tokens'], micro['weights']
    return jnp.sum(token_losses(params, *tokens, compute, **context))
  return run_model(
    params, micro['tokens'], compute, run=decoder.through_layers, **context
  )[0]


def micros(tokens):
  for batch in tokens:
    for i in range(len(batch['tokens'])):
      yield {name: x[i] for name, x in batch.items()}


def mean_loss(model, mask, tokens):
  total = sum(
    _of_micro(model, jnp.asarray(mask), x, 'losses') for x in micros(tokens)
  )
  return float(total) / sum(x['weights'][:, 1:].sum() for x in micros(tokens))


@pytest.mark.parametrize('packed', [False, True])
def test_the_layer_goes_without_which_the_loss_is_least(model, packed):
  tokens = batches(2, packed=packed, B=2)
  mask, losses = np.array([1.0, 1, 1, 0, 1, 1]), np.full(6, 0.5)
  order = []
  while mask.sum() > 2:
    for i in np.flatnonzero(mask[:5]):
      without = mask.copy()
      without[i] = 0
      losses[i] = mean_loss(model, without, tokens)
    least = min(np.flatnonzero(mask[:5]), key=lambda i: losses[i])
    mask[least] = 0
    order.append(least)
    found, scores = choose(model, LOSS, mask.sum(), tokens)
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_allclose(scores, losses, rtol=1e-4)
  # The last one is protected, and one had gone.
  assert sorted([*order, *np.flatnonzero(mask), 3]) == [0, 1, 2, 3, 4, 5]
  first = [mean_loss(model, np.arange(6) != i, tokens) for i in range(5)]
  assert len(set(order)) == 3 and np.std(first) > 0.01


def test_losses_are_of_few_tokens(model, monkeypatch):
  tokens = batches(2, B=2)
  # Of four micro-batches of 24 tokens, two.
  few = [{name: x[:1] for name, x in batch.items()} for batch in tokens]
  monkeypatch.setattr(layer_choice, 'LOSS_TOKENS', 50)
  chooser.cache_clear()
  _, scores = choose(model, LOSS, 4, tokens)
  chooser.cache_clear()
  without = [1, 0, 1, 0, 1, 1]
  np.testing.assert_allclose(
    scores[1], mean_loss(model, without, few), rtol=1e-4
  )


def test_a_loss_that_is_no_number_is_the_worst(model):
  params, lora, masks = model
  last = params['stacks'][2]
  broken = last | {'mlp': jax.tree.map(lambda x: x * jnp.nan, last['mlp'])}
  params = params | {'stacks': (*params['stacks'][:2], broken)}
  mask, _ = choose((params, lora, masks), LOSS, 4, batches(1, B=2))
  assert mask.sum() == 4 and mask[5] == 1


@pytest.mark.parametrize('packed', [False, True])
def test_the_layers_go_that_turn_their_input_least(model, packed):
  tokens = batches(2, packed=packed, B=2)
  before = np.array([1.0, 1, 1, 0, 1, 1])
  turned, count = np.zeros(6), 0
  for micro in micros(tokens):
    there = np.asarray(micro.get('segments', micro['weights'])).ravel() > 0
    count += there.sum()
    streams = [
      np.asarray(_of_micro(model, jnp.asarray(before * k), micro, 'stream'))
      for k in np.tri(7, 6, -1)
    ]
    for i, (x, y) in enumerate(zip(streams, streams[1:], strict=False)):
      norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
      turned[i] += (1 - (x * y).sum(-1) / np.where(there, norms, 1))[
        there
      ].sum()
  turned /= count
  found, scores = choose(model, COSINE, 3, tokens)
  open_ = np.flatnonzero(before[:5])
  np.testing.assert_allclose(scores[open_], turned[open_], rtol=1e-3)
  assert scores[3] == scores[5] == 0.5
  gone = sorted(open_, key=lambda i: turned[i])[:2]
  np.testing.assert_array_equal(found, before * ~np.isin(np.arange(6), gone))


def test_sums_need_no_tokens(model):
  params, lora, masks = model
  averages = with_layers(masks, jnp.array([3.0, 1, 2, 0, 4, 0.5]))
  chosen, same = chooser(SUM, None)(
    params, lora, masks, averages, np.int32(3), ()
  )
  np.testing.assert_array_equal(of_layers(chosen), [1, 0, 0, 0, 1, 1])
  jax.tree.map(np.testing.assert_array_equal, same, averages)


# Weights and tokens are split.
@pytest.mark.mesh
@pytest.mark.parametrize(
  ('how', 'sizes'),
  [
    (LOSS, (2, 1, 2, 2)),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (LOSS, (2, 2, 1, 2)),
        (COSINE, (2, 1, 2, 2)),
        (COSINE, (2, 2, 1, 2)),
      )
    ),
  ],
)
def test_eight_devices_choose_as_one_does(model, how, sizes):
  tokens = batches(2, packed=True)
  expected = choose(model, how, 3, tokens)
  mesh = sharding.make_mesh(sharding.mesh_sizes(*sizes))
  found = choose(model, how, 3, tokens, mesh=mesh)
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)


def test_a_repair_sees_the_stream_without_layers_that_are_gone(
  random_params, random_lora
):
  config = dataclasses.replace(
    CONFIG,
    layers=CONFIG.layers[:1] * 3,
    windows=(None, 5, None),
    rope_of_layer=(0, 1, 1),
  )
  params, lora = random_params(config), random_lora(config, LORA)
  small = config.of_layers([0, 2])

  def without(tree):
    return jax.tree.map(lambda x: x[jnp.array([0, 2])], tree)

  cut = params | {'stacks': (without(params['stacks'][0]),)}
  (before,) = initial_masks((CHANNELS,), ((3, config.sizes(config.layers[0])),))
  after = {CHANNELS: before[CHANNELS].at[:, ::4].set(0)}
  tokens = batches(3)
  expected, failed = compensate(
    *(cut, (without(lora[0]),), (without(before),), (without(after),)),
    tokens,
    config=small,
    adapters=LORA,
    damping=0.1,
  )
  assert int(failed) == 0
  layers = jnp.array([1.0, 0, 1])
  repaired, pruned = event(
    params,
    lora,
    (before | {LAYERS: layers},),
    (after | {LAYERS: layers},),
    ({CHANNELS: np.full(3, 18), LAYERS: layers},),
    tokens,
    config=config,
    damping=0.1,
  )
  found = without(repaired['stacks'][0])
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    found,
    expected['stacks'][0],
  )
  # The layer that is gone stays as it is.
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x[1], y[1]),
    repaired['stacks'][0],
    params['stacks'][0],
  )
  masks = pruned.masks[0]
  np.testing.assert_array_equal(masks[LAYERS], layers)
  np.testing.assert_array_equal(masks[CHANNELS].sum(axis=-1), [18, 24, 18])
