"""The pass of an event: exact where it can be, alike on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lorapr_jax.axes import LORA_TARGETS, apply_masks, group_axes
from lorapr_jax.models import decoder
from lorapr_jax.models.block import Block
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import (
  NORMS,
  LayerShape,
  LoraConfig,
  ModelConfig,
)
from lorapr_jax.models.kinds import kinds
from lorapr_jax.models.layers import INPUTS
from lorapr_jax.models.quantization import (
  dequantized,
  is_quantized,
  quantized_like,
)
from lorapr_jax.models.rope import Rope
from lorapr_jax.models.rotation import rope_rotation
from lorapr_jax.models.trees import (
  block_axes,
  init_lora,
  init_params,
  logical_axes,
  param_shapes,
)
from lorapr_jax.pruning import compensation, surgeon
from lorapr_jax.pruning.compensation import (
  REPAIRED,
  repaired_of,
  with_repaired,
  without_repaired,
)
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.pruning.masks import initial_masks
from lorapr_jax.runtime import sharding
from lorapr_jax.training.base import Places
from lorapr_jax.training.event import make_prune_layers, repair_of
from tests.families.cover import few

LORA_CRITERION = Criterion('lora')
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0)
CONFIG = ModelConfig(
  vocab_size=48,
  embed_dim=16,
  head_dim=4,
  layers=(LayerShape(4, 2, 24),) * 2,
)
BIASED = CONFIG.with_biases(LORA_TARGETS)
# What LLaMA has not. Only the second layer has a window; it does not turn.
OTHER = dataclasses.replace(
  CONFIG,
  norms=NORMS,
  norm_offset=True,
  qk_norm='head',
  activation='gelu_tanh',
  embed_scale=4.0,
  residual_scale=0.6,
  attention_scale=0.3,
  attention_cap=2.0,
  windows=(None, 5),
  ropes=(Rope(), None),
  rope_of_layer=(0, 1),
)
# Of a base without biases and of one that has its own.
BASES = pytest.mark.parametrize(
  'config', [CONFIG, BIASED, OTHER], ids=['plain', 'biases', 'other']
)
# A member of each group, and its double.
DOUBLES = {CHANNELS: (3, 9), KV_HEADS: (0, 2), QUERIES: (1, 0)}


def doubled(tree, axes, group):
  """Of what makes a member, its double is given the same."""

  def double(x, names):
    if not set(group_axes(group)) <= set(names) or names[-1] == 'embed':
      return x  # Not of the group, or what reads it: o_proj and down_proj.
    kept, gone = DOUBLES[group]
    axis = 1 + names.index(group_axes(group)[-1])
    index = [slice(None)] * x.ndim
    source = list(index)
    index[axis], source[axis] = gone, kept
    x = x.copy()
    x[tuple(index)] = x[tuple(source)]
    return x

  return jax.tree.map(double, tree, axes)


@functools.partial(jax.jit, static_argnames='config')
def drawn(config):
  params = init_params(jax.random.key(0), config, jnp.float32)
  lora = init_lora(jax.random.key(1), CONFIG, LORA)
  lora = jax.tree.map(
    lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), lora
  )

  def draw(path, x):
    if path[-1].key == 'bias':
      key = jax.random.key(x.size + len(path[-2].key))
      return jax.random.normal(key, x.shape)
    if 'norm' in path[-2].key and config.norm_offset:
      return 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    return 10 * x if x.ndim > 2 else x

  return jax.tree_util.tree_map_with_path(draw, params), lora


def random_model(config=CONFIG):
  """Weights and adapters, which a test may change."""
  return jax.tree.map(np.array, drawn(config))


def model_with_doubles(group):
  params, lora = random_model()
  axes = block_axes(CONFIG, LORA)
  # A of what reads a member has its axes too, with the rank behind.
  readers = {'self_attn': 'o_proj', 'mlp': 'down_proj'}
  new = {
    part: {
      name: adapter
      if readers[part] == name
      else doubled(adapter, axes['lora'][part][name], group)
      for name, adapter in adapters.items()
    }
    for part, adapters in lora[0].items()
  }
  stacks = (doubled(params['stacks'][0], axes['params'], group),)
  return {**params, 'stacks': stacks}, (new,)


def masks_of(group):
  (before,) = initial_masks((group,), ((2, CONFIG.sizes(CONFIG.layers[0])),))
  mask = np.ones(before[group].shape, np.float32)
  mask[..., DOUBLES[group][1]] = 0
  return (jax.device_get(before),), ({group: mask},)


def batches(count, *, packed=False, B=8):
  generator = np.random.default_rng(0)
  found = []
  for _ in range(count):
    batch = {
      'tokens': generator.integers(0, 48, (2, B, 12), np.int32),
      'weights': np.ones((2, B, 12), np.float32),
    }
    if packed:
      batch['segments'] = np.zeros((2, B, 12), np.int32) + np.repeat(
        (1, 2, 0), (5, 5, 2)
      )
    found.append(batch)
  return tuple(found)


def packed_and_alone():
  """A batch whose rows hold two documents, and one with a row for each."""
  (packed,) = batches(1, packed=True)
  alone = {
    name: np.concatenate([x[..., :5], x[..., 5:10]], axis=1)
    for name, x in packed.items()
    if name != 'segments'
  }
  return packed, alone


def places_of(config, mesh):
  """Of what is on every device, and of each tensor of the base."""
  shapes = param_shapes(config, jnp.float32)
  if mesh is None:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return place, jax.tree.map(lambda x: place, shapes)
  axes = logical_axes(config)['params']
  return NamedSharding(mesh, P()), sharding.shardings(mesh, axes, shapes)


@functools.cache
def event_of(config, adapters, criterion, damping, mesh, texts):
  state, base = places_of(config, mesh)
  places = Places(base, None, state)
  compute = Compute(config, adapters)
  return make_prune_layers(compute, criterion, True, places, texts)


def event(
  params,
  lora,
  before,
  importance,
  keep,
  tokens,
  *,
  config=CONFIG,
  adapters=LORA,
  criterion=LORA_CRITERION,
  damping=1e-6,
  mesh=None,
  texts=1,
):
  """The base and what else the event changes."""
  state, base = places_of(config, mesh)
  # A copy, which the event may take.
  params = jax.device_put(jax.tree.map(np.array, params), base)
  lora, before, importance, keep = jax.device_put(
    (lora, before, jax.tree.map(np.array, importance), keep), state
  )
  if mesh is not None:
    rows = sharding.sharding(mesh, ('accumulation', 'batch', 'length'))
    tokens = jax.device_put(tokens, rows)
  prune_layers = event_of(config, adapters, criterion, damping, mesh, texts)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compensation, 'DAMPINGS', (damping,))
    patch.setattr(surgeon, 'DAMPING', damping)
    pruned = prune_layers(
      *(repaired_of(params), without_repaired(params), lora),
      *(before, importance, keep, tokens),
    )
  return with_repaired(params, pruned.repaired), pruned


def compensate(
  params,
  lora,
  before,
  after,
  tokens,
  **options,
):
  """The base and how many repairs failed, where `after` is what is chosen."""
  keep = jax.tree.map(lambda x: x.sum(axis=-1).astype(np.int32), after)
  keep = jax.tree.map(lambda x: x.reshape(len(x), -1)[:, 0], keep)
  params, pruned = event(params, lora, before, after, keep, tokens, **options)
  jax.tree.map(np.testing.assert_array_equal, pruned.masks, after)
  return params, repair_of(pruned.errors, jnp.int32(0))['unrepaired']


# That no batch has.
UNSEEN = np.random.default_rng(2).integers(0, 48, (3, 10))


@jax.jit
def logits_of(params, lora, masks):
  hidden = decoder.hidden_states(
    params, UNSEEN, CONFIG, lora=lora, lora_config=LORA, masks=masks
  )
  return decoder.logits(params, hidden, CONFIG)


def logits(*trees):
  return np.asarray(logits_of(*trees))


@pytest.mark.parametrize('group', DOUBLES)
def test_a_member_that_has_a_double_goes_without_a_trace(group):
  params, lora = model_with_doubles(group)
  before, after = masks_of(group)
  repaired, failed = compensate(params, lora, before, after, batches(2))
  assert int(failed) == 0
  expected = logits(params, lora, before)
  unrepaired = np.abs(logits(params, lora, after) - expected).max()
  difference = np.abs(logits(repaired, lora, after) - expected).max()
  assert unrepaired > 0.02
  assert difference < 2e-3 * unrepaired


@pytest.mark.parametrize(
  'mesh', [None, pytest.param((2, 2, 1, 2), marks=pytest.mark.mesh)]
)
def test_errors_are_told_apart_by_text(mesh):
  params, lora = random_model()
  before, after = masks_of(CHANNELS)
  keep = ({CHANNELS: np.array([23, 23], np.int32)},)
  run = functools.partial(event, params, lora, before, after, keep)
  # The last micro-batch is kept out: it is of two texts, and of the third is
  # none of it.
  tokens = batches(1)
  sources = np.zeros_like(tokens[0]['tokens'])
  sources[0], sources[1, 4:] = 2, 1
  together = run(tokens)[1].errors
  if mesh:
    mesh = sharding.make_mesh(sharding.mesh_sizes(*mesh))
  _, apart = run(({**tokens[0], 'sources': sources},), texts=3, mesh=mesh)
  np.testing.assert_allclose(apart.errors.sum(-1), together[..., 0], rtol=1e-4)
  assert np.all(apart.errors[..., :2] > 0)
  assert np.all(apart.errors[..., 2] == 0)
  left = repair_of(apart.errors, jnp.int32(0))['error_left']
  shares = apart.errors[:, 1] / apart.errors[:, 0]
  np.testing.assert_allclose(left, shares.mean(axis=0), rtol=1e-5)
  assert np.all(left[:2] < 1) and np.isnan(left[2])


@BASES
def test_what_is_not_repaired_stays_and_what_nothing_leaves_too(config):
  params, lora = random_model(config)
  before, after = masks_of(CHANNELS)
  # Nothing goes from the second layer.
  after[0][CHANNELS][1] = 1.0
  repaired, _ = compensate(
    params, lora, before, after, batches(1), config=config, damping=0.1
  )
  repaired = jax.device_get(repaired)
  for path, old in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    new = dict(jax.tree_util.tree_leaves_with_path(repaired))[path]
    if 'down_proj.weight' in name:
      assert np.abs(new[0] - old[0]).max() > 0
      new, old = new[1], old[1]
    np.testing.assert_array_equal(new, old, err_msg=name)


@pytest.mark.parametrize('qk_norm', [None, 'heads'])
def test_the_next_layer_sees_what_the_masks_leave(qk_norm):
  """As it does where the layer before it was masked already."""
  config = dataclasses.replace(OTHER, norms=CONFIG.norms, qk_norm=qk_norm)
  params, lora = random_model(config)
  before, after = masks_of(KV_HEADS)
  run = functools.partial(compensate, config=config, damping=0.1)
  once, _ = run(params, lora, before, after, batches(1))
  before = jax.tree.map(np.array, before)
  before[0][KV_HEADS][0] = after[0][KV_HEADS][0]
  first, second = (
    x['stacks'][0]['self_attn']['o_proj'] for x in (once, params)
  )
  second['weight'][0] = first['weight'][0]
  again, _ = run(params, lora, before, after, batches(1))
  found = again['stacks'][0]['self_attn']['o_proj']['weight']
  assert np.abs(found[1] - second['weight'][1]).max() > 0.01
  np.testing.assert_allclose(found, first['weight'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('config', 'targets'),
  few((CONFIG, BIASED, OTHER), (LORA.targets, ('q_proj', 'up_proj'))),
)
def test_a_layer_is_repaired_behind_those_before_it_that_were(config, targets):
  """Layer 1's down_proj against NumPy, on what repaired layer 0 hands on."""
  adapters = dataclasses.replace(LORA, targets=targets)
  params, lora = random_model(config)
  lora = tuple(
    {
      part: {name: x for name, x in tree.items() if name in targets}
      for part, tree in stack.items()
    }
    for stack in lora
  )
  before, after = masks_of(CHANNELS)
  gone = np.asarray(jax.random.bernoulli(jax.random.key(5), 0.4, (2, 24)))
  after = ({CHANNELS: np.where(gone, np.float32(0), np.float32(1))},)
  tokens, damping = batches(2), 0.1
  repaired, _ = compensate(
    params,
    lora,
    before,
    after,
    tokens,
    config=config,
    adapters=adapters,
    damping=damping,
  )

  block = Block(config, config.layers[0], adapters)
  axes = block_axes(config, adapters)

  @functools.partial(jax.jit, static_argnums=(1, 4))
  def run(x, layer, params, masks, parts=('self_attn', 'mlp')):
    trees = {'params': params['stacks'][0], 'lora': lora[0]}
    trees = jax.tree.map(lambda x: x[layer], trees)
    masks = {CHANNELS: masks[0][CHANNELS][layer]}
    variables = {n: apply_masks(t, masks, axes[n]) for n, t in trees.items()}
    rotation = rope_rotation(config, jnp.arange(12.0))
    kind = jax.tree.map(lambda x: x[layer], kinds(config, config.stacks[0], 12))
    turn = rotation.of(kind.rope)
    return block.apply(variables, x, turn, parts, kind.window, mutable=[INPUTS])

  rows = np.concatenate([batch['tokens'] for batch in tokens]).reshape(-1)
  table = params['embed_tokens']['weight']
  x = decoder.embedded(table, rows, config, jnp.float32)
  x, _ = run(x, 0, repaired, after)
  stream, _ = run(x, 1, params, before, ('self_attn',))
  _, seen = run(x, 1, params, before)
  inputs = np.asarray(seen[INPUTS]['mlp']['down_proj']['inputs'], np.float64)

  old, new = (
    jax.tree.map(
      lambda x: np.asarray(x[1], np.float64),
      tree['stacks'][0]['mlp']['down_proj'],
    )
    for tree in (params, repaired)
  )
  whole = old['weight']
  if 'down_proj' in targets:
    adapter = jax.tree.map(lambda x: np.asarray(x[1]), lora[0]['mlp'])
    adapter = adapter['down_proj']
    whole = whole + LORA.scale * adapter['a'] @ adapter['b']
  gone = gone[1]
  old, new = old['weight'], new['weight']
  # Each token counts as large as the residual stream that it is added to, and
  # the last of the four micro-batches is kept out.
  # A norm behind the projection divides a token's error too.
  behind = (stream, inputs @ whole) if config is OTHER else (stream,)
  for x in behind:
    x = np.asarray(x, np.float64)
    inputs = inputs / np.sqrt((x**2).mean(axis=-1, keepdims=True))
  inputs = inputs[: len(inputs) * 3 // 4]
  there, lost = inputs[:, ~gone], inputs[:, gone] @ whole[gone]
  gram = there.T @ there
  ridge = damping * np.diag(gram).mean() * np.eye(len(gram))
  expected = np.linalg.solve(gram + ridge, there.T @ lost)
  np.testing.assert_allclose(
    (new - old)[~gone], expected, atol=1e-3 * np.abs(expected).max()
  )
  np.testing.assert_array_equal(new[gone], old[gone])


@pytest.mark.parametrize('group', DOUBLES)
def test_documents_that_share_a_row_are_as_if_alone(group):
  # With biases there, padding is not zero.
  params, lora = random_model(BIASED)
  before, after = masks_of(group)
  packed, alone = packed_and_alone()
  found = [
    repaired_of(
      compensate(
        params,
        lora,
        before,
        after,
        (batch,),
        config=BIASED,
        damping=0.1,
      )[0]
    )
    for batch in (packed, alone)
  ]
  for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('group', DOUBLES)
def test_what_masked_groups_hold_is_of_no_account(group):
  params, lora = model_with_doubles(group)
  _, after = masks_of(group)
  gone = DOUBLES[group][1]
  again = after[0][group].copy()
  again[..., (gone + 1) % again.shape[-1]] = 0
  again = ({group: again},)
  axes = block_axes(CONFIG, LORA)['params']

  def disturb(x, names):
    if not set(group_axes(group)) <= set(names):
      return x
    mask = after[0][group]
    sizes = dict(zip(('layers', *group_axes(group)), mask.shape, strict=True))
    mask = mask.reshape([sizes.get(n, 1) for n in ('layers', *names)])
    return x + 7.0 * (1 - mask)

  stacks = (jax.tree.map(disturb, params['stacks'][0], axes),)
  noise = {**params, 'stacks': stacks}
  found = [
    compensate(p, lora, after, again, batches(2), damping=0.1)[0]
    for p in (params, noise)
  ]
  ours, theirs = (logits(p, lora, again) for p in found)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.mesh
@pytest.mark.parametrize(
  'group, config, sizes',
  [
    (CHANNELS, CONFIG, (1, 2, 2, 2)),
    (CHANNELS, BIASED, (8, 1, 1)),
    (KV_HEADS, CONFIG, (1, 2, 4)),
    (QUERIES, CONFIG, (2, 2, 2)),
    (KV_HEADS, BIASED, (1, 2, 2, 2)),
  ],
)
def test_eight_devices_repair_as_one_does(group, config, sizes):
  params, lora = random_model(config)
  before, after = masks_of(group)
  mesh = sharding.make_mesh(sharding.mesh_sizes(*sizes))
  tokens = batches(2, packed=mesh.shape['sequence'] > 1)
  (one, _), (eight, _) = (
    compensate(
      params, lora, before, after, tokens, config=config, damping=0.1, mesh=m
    )
    for m in (None, mesh)
  )
  found = (repaired_of(params) for params in (eight, one))
  for ours, theirs in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_int8_base_is_repaired_as_what_it_stands_for():
  int8 = tuple(name for name in LORA_TARGETS if name not in REPAIRED.values())
  config = dataclasses.replace(BIASED, quantized=int8)
  params, lora = random_model(BIASED)
  before, after = masks_of(KV_HEADS)
  base = quantized_like(params, logical_axes(config)['params'])
  tokens = batches(2)
  (found, failed), (expected, _) = (
    compensate(x, lora, before, after, tokens, config=c, damping=0.1)
    for c, x in ((config, base), (BIASED, dequantized(base, jnp.float32)))
  )
  assert int(failed) == 0
  ours, theirs, first = (
    jax.tree.leaves(repaired_of(x)) for x in (found, expected, params)
  )
  assert max(np.abs(x - y).max() for x, y in zip(ours, first, strict=True)) > 0
  for x, y in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  up = found['stacks'][0]['mlp']['up_proj']['weight']
  assert is_quantized(up)


@BASES
def test_a_repair_that_is_not_finite_is_left_out_and_counted(config):
  params, lora = random_model(config)
  before, after = masks_of(CHANNELS)
  down = params['stacks'][0]['mlp']['down_proj']['weight']
  down[0, DOUBLES[CHANNELS][1], 0] = np.inf
  repaired, failed = compensate(
    params, lora, before, after, batches(1), config=config
  )
  assert int(failed) >= 1
  new, old = (x['stacks'][0]['mlp']['down_proj'] for x in (repaired, params))
  for name, leaf in old.items():
    np.testing.assert_array_equal(np.asarray(new[name])[0], leaf[0])


def inputs_of(part, params, lora, masks, batch):
  """What the last projection of a part of the first layer reads, in NumPy."""
  axes = block_axes(CONFIG, LORA)
  trees = jax.tree.map(
    lambda x: x[0], {'params': params['stacks'][0], 'lora': lora[0]}
  )
  masks = {group: mask[0] for group, mask in masks[0].items()}
  variables = {n: apply_masks(t, masks, axes[n]) for n, t in trees.items()}
  tokens = batch['tokens'].reshape(-1)
  x = params['embed_tokens']['weight'][tokens]
  block = Block(CONFIG, CONFIG.layers[0], LORA)
  rotation = rope_rotation(CONFIG, jnp.arange(float(batch['tokens'].shape[-1])))
  parts = ('self_attn',) if part == 'self_attn' else ('self_attn', 'mlp')
  _, seen = block.apply(variables, x, rotation, parts=parts, mutable=[INPUTS])
  found = {n: y['inputs'] for n, y in seen[INPUTS][part].items()}
  return jax.tree.map(lambda y: np.asarray(y, np.float64), found)


def counts_below(masks, gone):
  """How many stay, where so many more go from each layer."""
  return jax.tree.map(
    lambda x: (x.sum(axis=-1) - gone).reshape(len(x), -1)[:, 0].astype(int),
    masks,
  )


@pytest.mark.parametrize('group', DOUBLES)
def test_the_scores_of_fluctuation_are_flaps(group):
  """Variance over tokens times the squared norm of the row, in NumPy."""
  params, lora = random_model()
  before, _ = masks_of(group)
  (batch,) = batches(1)
  zeros = jax.tree.map(np.zeros_like, before)
  _, pruned = event(
    *(params, lora, before, zeros, counts_below(before, 1), (batch,)),
    criterion=Criterion('fluctuation', norm=False),
  )
  part, name = next(
    (part, name)
    for part, name in REPAIRED.items()
    if (part == 'mlp') == (group == CHANNELS)
  )
  inputs = inputs_of(part, params, lora, before, batch)[name]
  weight = params['stacks'][0][part][name]['weight'][0]
  adapter = jax.tree.map(lambda x: x[0], lora[0][part][name])
  weight = weight.reshape(-1, 16) + LORA.scale * (
    adapter['a'].reshape(-1, LORA.rank) @ adapter['b']
  )
  rows = inputs.reshape(-1, len(weight)).var(axis=0)
  rows = rows * (weight.astype(np.float64) ** 2).sum(axis=1)
  shape = before[0][group].shape[1:]
  expected = rows.reshape(np.prod(shape), -1).sum(axis=1).reshape(shape)
  found = np.asarray(pruned.importance[0][group])[0]
  np.testing.assert_allclose(found, expected, rtol=1e-3)
  kept = np.asarray(pruned.masks[0][group])[0]
  lowest = expected == expected.min(axis=-1, keepdims=True)
  np.testing.assert_array_equal(kept, ~lowest)


@pytest.mark.parametrize(
  ('name', 'group'), few(['activation', 'fluctuation', 'obs'], DOUBLES)
)
def test_documents_that_share_a_row_are_measured_as_if_alone(name, group):
  params, lora = random_model(BIASED)
  before, _ = masks_of(group)
  packed, alone = packed_and_alone()
  zeros = jax.tree.map(np.zeros_like, before)
  (_, ours), (_, theirs) = (
    event(
      *(params, lora, before, zeros, counts_below(before, 1), (batch,)),
      config=BIASED,
      criterion=Criterion(name),
      damping=0.1,
    )
    for batch in (packed, alone)
  )
  for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('group', DOUBLES)
def test_of_a_member_and_its_double_only_one_goes(group):
  """By loss: the first costs nothing, and then the other costs all."""
  params, lora = model_with_doubles(group)
  before, _ = masks_of(group)
  zeros = jax.tree.map(np.zeros_like, before)
  _, pruned = event(
    *(params, lora, before, zeros, counts_below(before, 1), batches(2)),
    criterion=Criterion('obs'),
  )
  mask = np.asarray(pruned.masks[0][group])
  kept, gone = DOUBLES[group]
  if group == QUERIES:  # One of two stays under every KV head.
    assert np.all(mask.sum(axis=-1) == 1)
  else:
    assert np.all(mask[:, [kept, gone]].sum(axis=1) == 1)


@pytest.mark.mesh
@pytest.mark.parametrize('name', ['activation', 'fluctuation', 'obs'])
def test_eight_devices_choose_as_one_does(name):
  params, lora = random_model()
  before, _ = masks_of(KV_HEADS)
  before[0][CHANNELS] = masks_of(CHANNELS)[0][0][CHANNELS]
  zeros = jax.tree.map(np.zeros_like, before)
  keep = counts_below(before, 1)
  (_, one), (_, eight) = (
    event(
      *(params, lora, before, zeros, keep, batches(2)),
      criterion=Criterion(name),
      damping=0.1,
      mesh=mesh,
    )
    for mesh in (None, sharding.make_mesh(sharding.mesh_sizes(2, 2, 2)))
  )
  jax.tree.map(np.testing.assert_array_equal, one.masks, eight.masks)
  for x, y in zip(
    *map(jax.tree.leaves, (one.importance, eight.importance)), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)
