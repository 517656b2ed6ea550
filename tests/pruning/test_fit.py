"""prune.fit: what is counted, against arrays; what is chosen, against all."""

import dataclasses
from fractions import Fraction
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest

from lorapr_jax.axes import LAYERS, LORA_TARGETS
from lorapr_jax.errors import UserError
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.models import cached
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.trees import param_shapes
from lorapr_jax.pruning.fit import Room
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.sizes import plan_sizes
from lorapr_jax.pruning.targets import Targets
from tests.kinds import KINDS


def nbytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- What is counted.


@pytest.mark.parametrize('kind', KINDS)
def test_a_family_takes_what_its_arrays_take(kind):
  config = config_from_hf(KINDS[kind].keys)
  quantized = dataclasses.replace(config, quantized=LORA_TARGETS)
  for dtype, stored, number in (
    ('float32', config, jnp.float32),
    ('bfloat16', config, jnp.bfloat16),
    ('int8', quantized, jnp.bfloat16),
  ):
    room = Room('1GB', context=11, batch=3, dtype=dtype)
    found = room.footprint(config)
    assert found.weights_bytes == nbytes(param_shapes(stored, number)), dtype
    kept = 0
    for i, window in enumerate(config.layer_windows):
      layer = dataclasses.replace(config, layers=config.layers[i : i + 1])
      tokens = 11 if window is None else min(window, 11)
      kept += nbytes(cached.empty_cache(layer, 3, tokens, number))
    assert found.kv_cache_bytes == kept, dtype
    assert found.total == found.weights_bytes + kept


def test_kinds_with_windows_are_among_them():
  windows = {
    window
    for kind in KINDS.values()
    for window in config_from_hf(kind.keys).layer_windows
  }
  assert {None, 8} <= windows


def test_without_a_context_the_cache_has_all_positions():
  config = model(1, 2, 1, 8)
  all_of_them = Room('1GB', context=64).footprint(config)
  assert Room('1GB').footprint(config) == all_of_them
  assert all_of_them.kv_cache_bytes == 64 * 2 * 2 * 4 * 2
  assert str(all_of_them) == (
    '1.90 kB of weights and 2.05 kB of KV cache, in bfloat16, for a text of 64 '
    'tokens'
  )


# --- What is chosen.


def model(layers, kv_heads, queries, mlp, windows=()):
  return ModelConfig(
    vocab_size=20,
    embed_dim=12,
    head_dim=4,
    layers=(LayerShape(kv_heads, queries, mlp),) * layers,
    windows=windows,
    tie_embeddings=True,
    max_positions=64,
  )


def taken(config, keep, context, batch, gone=()):
  """Bytes in bfloat16 without the layers that are gone, by hand."""
  D, H = config.embed_dim, config.head_dim
  weights, cache = config.vocab_size * D + D, 0
  for i, shape in enumerate(config.layers):
    if i in gone:
      continue
    K, G, F = shape.num_kv_heads, shape.queries_per_kv, shape.mlp_dim
    K = keep.get(KV_HEADS, {}).get(i, K)
    G = keep.get(QUERIES, {}).get(i, G)
    F = keep.get(CHANNELS, {}).get(i, F)
    weights += 2 * D * K * G * H + 2 * D * K * H + 3 * D * F + 2 * D
    window = config.layer_windows[i]
    tokens = context if window is None else min(window, context)
    cache += 2 * K * H * tokens
  return 2 * (weights + batch * cache)


def counts(size, multiple):
  return [*range(multiple, size, multiple), size]


def nearest(size, step, kept):
  """The multiple of the step nearest to a number; the size, above the last."""
  multiple = math.floor(kept / step + Fraction(1, 2)) * step
  return min(max(multiple, step), size)


MODELS = {
  'mha': model(3, 6, 1, 16),
  'gqa': model(3, 4, 3, 24),
  'coarse': model(3, 4, 6, 5),
  'windows': model(3, 4, 2, 16, windows=(6, None, 6)),
}


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('heads', ['kv_groups', 'queries', 'none'])
@pytest.mark.parametrize(
  'context, batch, multiple, tensor, layers',
  [
    (2, 1, 1, 1, 0.0),
    (60, 1, 1, 1, 0.0),
    (60, 9, 1, 1, 0.0),
    (30, 1, 3, 2, 0.0),
    (60, 9, 1, 1, 0.5),
    (30, 1, 3, 2, 0.5),
  ],
)
def test_the_largest_that_fits_among_all_counts(
  name, heads, context, batch, multiple, tensor, layers
):
  config = MODELS[name]
  [shape] = set(config.layers)
  groups = {
    'kv_groups': (KV_HEADS, shape.num_kv_heads, tensor),
    'queries': (QUERIES, shape.queries_per_kv, 1),
    'none': (KV_HEADS, shape.num_kv_heads, shape.num_kv_heads),
  }
  group, size, step = groups[heads]
  channel_step = math.lcm(multiple, tensor)
  channels = counts(shape.mlp_dim, channel_step)

  def bytes_of(h, c):
    # Layer 2, the last, is protected. Which other one goes, nobody knows.
    keep = {group: dict.fromkeys((0, 1), h), CHANNELS: dict.fromkeys((0, 1), c)}
    choices = [(0,), (1,)] if layers else [()]
    return max(taken(config, keep, context, batch, gone) for gone in choices)

  every = {(h, c): bytes_of(h, c) for h in counts(size, step) for c in channels}
  dense, least = every[size, shape.mlp_dim], min(every.values())
  whole = Room('1B', context, batch).footprint(config).total
  assert (whole == dense) == (not layers)
  gone = dense - bytes_of(0 if heads != 'none' else size, 0)
  for most in range(least, whole, max(1, (whole - least) // 40)):
    plan = plan_pruning(
      config,
      Targets(
        fit=f'{most}B',
        fit_context=context,
        fit_batch=batch,
        heads=heads,
        channels_multiple_of=multiple,
        tensor_parallel=tensor,
        layers_target=layers,
      ),
    )
    assert len(plan.going) == (layers > 0)
    h, c = (
      plan.keep.get(g, (n,))[0]
      for g, n in ((group, size), (CHANNELS, shape.mlp_dim))
    )
    assert plan.keep.get(CHANNELS, (shape.mlp_dim,) * 3)[2] == shape.mlp_dim
    found = plan.targets.room.footprint(plan.pruned_config)
    assert found.total == every[h, c] <= most
    # Heads go as far as all groups, pruned alike, would have to.
    left = 1 - Fraction(dense - most, gone)
    if Fraction(step, size) < Fraction(channel_step, shape.mlp_dim):
      alike = nearest(shape.mlp_dim, channel_step, shape.mlp_dim * left)
      row = {(n, alike) for n in counts(size, step)}
    else:
      alike = nearest(size, step, size * left)
      row = {(alike, n) for n in channels}
    fitting = [every[pair] for pair in row if every[pair] <= most]
    if not fitting or max(fitting) == max(every[pair] for pair in row):
      fitting = [taken for taken in every.values() if taken <= most]
    else:
      assert (h, c) in row
    assert every[h, c] == max(fitting)


@pytest.mark.parametrize('profile', ['1', '3,1', '1,2', '1,1.2,0.8'])
def test_a_profile_fits_too(profile):
  # Heads in the layer without a window cache ten times as much.
  config = model(8, 6, 2, 24, windows=(None, 6, 6, 6, 6, 6, 6, None))
  dense = Room('1B').footprint(config).total
  planned = 0
  for most in range(dense // 2, dense, dense // 40):
    targets = Targets(fit=f'{most}B', layer_profile=profile, protect='none')
    try:
      plan = plan_pruning(config, targets)
    except UserError as error:
      assert 'than it can lose' in str(error)
      continue
    planned += 1
    keep = {g: dict(enumerate(kept)) for g, kept in plan.keep.items()}
    assert taken(config, keep, 64, 1) <= most
  assert planned > 5


def test_heads_alone_and_channels_alone():
  config = MODELS['gqa']
  dense = Room('1B').footprint(config).total
  one = Targets(fit=f'{dense - 1}B', channels=False)
  assert plan_pruning(config, one).keep == {KV_HEADS: (3, 3, 4)}
  one = Targets(fit=f'{dense - 1}B', heads='none')
  assert plan_pruning(config, one).keep == {CHANNELS: (23, 23, 24)}


def test_nothing_is_asked_of_shares():
  plan = plan_pruning(MODELS['gqa'], Targets(fit='14KB'))
  assert plan.targets_by_kind() == dict.fromkeys(
    ('heads', 'channels', 'params')
  )


def test_where_layers_alone_are_enough_the_width_stays():
  config = MODELS['gqa']
  dense = Room('1B').footprint(config).total
  one = Targets(fit=f'{dense - 1}B', layers_target=0.5)
  plan = plan_pruning(config, one)
  assert plan.keep == {LAYERS: (1, 0, 1)}
  assert plan.targets_by_kind() == {
    **dict.fromkeys(('heads', 'channels', 'params')),
    'layers': 0.5,
  }


ALONE = {'heads': 'none', 'channels': False}


@pytest.mark.parametrize('protect', ['reference', 'none'])
@pytest.mark.parametrize('windows', [(), (None, 6, None, 6, 6)])
def test_the_fewest_layers_go_with_which_it_fits(windows, protect):
  config = model(5, 4, 2, 24, windows=windows)
  room, free = Room('1B', 48), range(4 if protect == 'reference' else 5)
  dense, plans = room.footprint(config).total, {}
  for most in range(dense // 5, dense, dense // 50):
    amount = {'fit': f'{most}B', 'fit_context': 48, 'protect': protect}
    try:
      plan = plan_pruning(config, Targets(**amount, **ALONE))
    except UserError as error:
      assert 'beyond what can be pruned' in str(error)
      continue
    plans[most] = plan
    assert plan.keep.keys() == {LAYERS}
    # Which go is not known before the run: whichever do, it fits.
    left = {
      gone: max(
        room.footprint(
          config.of_layers([i for i in range(5) if i not in x])
        ).total
        for x in itertools.combinations(free, gone)
      )
      for gone in range(1, len(free))
    }
    assert len(plan.going) == min(gone for gone in left if left[gone] <= most)
  assert len({len(plan.going) for plan in plans.values()}) > 2


# --- What cannot be.


def named(error):
  [text] = re.findall(r'the nearest that works is (\S+MB) ', str(error.value))
  return text


@pytest.mark.parametrize(
  'options, reason',
  [({'fit': '10KB'}, 'beyond what'), ({'fit': '400B'}, 'embeddings alone')],
)
def test_what_cannot_fit_names_what_can(options, reason):
  config = model(3, 40, 2, 400)
  with pytest.raises(UserError, match=reason) as error:
    plan_pruning(config, Targets(**options))
  assert 'prune.fit=' + options['fit'] in str(error.value)
  plan = plan_pruning(config, Targets(fit=named(error)))
  found = plan.targets.room
  assert found.footprint(plan.pruned_config).total <= found.bytes
  assert plan.keep[KV_HEADS] == (1, 1, 40)


def test_what_fits_as_it_is_is_not_pruned():
  config = MODELS['gqa']
  dense = Room('1B').footprint(config).total
  with pytest.raises(UserError, match='the model fits as it is'):
    plan_pruning(config, Targets(fit=f'{dense}B'))


def test_multiples_that_leave_no_smaller_size_are_named():
  targets = Targets(fit='1KB', heads='none', channels_multiple_of=24)
  with pytest.raises(UserError, match='fit=1KB: no smaller size is left by'):
    plan_pruning(MODELS['gqa'], targets)


@pytest.mark.parametrize(
  'options, message',
  [
    ({'fit': '8 GX'}, "prune.fit is '8 GX': a number and one of"),
    ({'fit': '8GB', 'target': 0.5}, 'prune.target and prune.fit are set'),
    ({'fit': '8GB', 'speedup': 2.0}, 'prune.fit and prune.speedup are set'),
    ({'target': 0.0, 'speedup': 2.0}, 'prune.target and prune.speedup are set'),
    ({'fit': '8GB', 'heads_target': 0.5}, 'prune.heads_target and prune.fit'),
    ({'speedup': 1.0}, 'prune.speedup is 1.0: it must be above 1'),
    (
      {'fit': '8GB', 'layers_target': 0.5, 'heads': 'none', 'channels': False},
      'prune.fit and prune.speedup find how many: leave one out',
    ),
    ({'speedup': math.inf}, 'prune.speedup is inf'),
    ({'speedup': math.nan}, 'prune.speedup is nan'),
    ({'speedup_of': 'both'}, "prune.speedup_of is 'both'.*decode, prefill"),
    ({'fit': '8GB', 'fit_dtype': 'int4'}, "prune.fit_dtype is 'int4'.*int8"),
    ({'fit': '8GB', 'fit_batch': 0}, 'prune.fit_batch is 0'),
    ({'fit': '8GB', 'fit_context': -1}, 'prune.fit_context is -1'),
  ],
)
def test_impossible_amounts_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    Targets(**options)


def test_more_context_than_positions_is_refused():
  targets = Targets(fit='14KB', fit_context=65)
  with pytest.raises(UserError, match='but the model has 64 positions'):
    plan_pruning(MODELS['gqa'], targets)


def test_a_speed_up_is_not_planned_without_measuring():
  with pytest.raises(ValueError, match='measured'):
    plan_pruning(MODELS['gqa'], Targets(speedup=1.5))


# --- The sizes between.


@pytest.mark.parametrize('heads', ['kv_groups', 'queries', 'none'])
def test_sizes_are_those_of_shares_of_the_parameters(heads):
  config = model(3, 6, 3, 48)
  dense, number = config.num_parameters, 8
  plans = plan_sizes(config, Targets(speedup=1.5, heads=heads), number)
  sizes = [plan.pruned_config.num_parameters for plan in plans]
  assert len(plans) == number and sizes == sorted(set(sizes), reverse=True)
  assert plans[-1].keep[CHANNELS] == (1, 1, 48)
  step = (dense - sizes[-1]) / number
  channel = 2 * 3 * config.embed_dim
  for i, size in enumerate(sizes, 1):
    assert 0 <= dense - i * step - size + 1 <= channel + 1
  # A share of the parameters gives the same counts, where it is reached.
  for plan, size in zip(plans[:-1], sizes, strict=False):
    share = Targets(target=1 - size / dense, unit='params', heads=heads)
    assert plan_pruning(config, share).keep == plan.keep


@pytest.mark.parametrize('heads', ['kv_groups', 'none'])
def test_sizes_where_layers_go_begin_with_the_model_without_them(heads):
  config, asked = model(5, 6, 3, 48), {'layers_target': 0.5, 'heads': heads}
  plans = plan_sizes(config, Targets(speedup=1.5, **asked), 8)
  sizes = [plan.pruned_config.num_parameters for plan in plans]
  assert len(plans) == 8 and sizes == sorted(set(sizes), reverse=True)
  assert plans[0].keep == {LAYERS: (1, 1, 0, 0, 1)}
  assert plans[-1].keep[CHANNELS] == (1, 1, 1, 1, 48)
  for plan, size in zip(plans[1:-1], sizes[1:], strict=False):
    share = 1 - size / config.num_parameters
    share = Targets(target=share, unit='params', **asked)
    assert plan_pruning(config, share).keep == plan.keep


def test_sizes_of_layers_alone_are_those_of_each_number_of_layers():
  plans = plan_sizes(model(5, 6, 3, 48), Targets(speedup=1.5, **ALONE), 32)
  assert [len(plan.going) for plan in plans] == [1, 2, 3]
  assert all(plan.keep.keys() == {LAYERS} for plan in plans)


def test_a_profile_leaves_out_the_sizes_that_it_cannot_have():
  config = model(4, 6, 3, 48)
  targets = Targets(speedup=1.5, layer_profile='0,1', protect='none')
  plans = plan_sizes(config, targets, 8)
  assert 1 < len(plans) < 8
  assert all(plan.keep[CHANNELS][0] == 48 for plan in plans)


def test_where_nothing_smaller_is_left_there_are_no_sizes():
  targets = Targets(speedup=1.5, heads='none', channels_multiple_of=24)
  assert plan_sizes(MODELS['gqa'], targets, 8) == []


def test_the_few_sizes_of_a_small_model_are_there_once():
  config = model(2, 1, 1, 3)
  plans = plan_sizes(config, Targets(speedup=1.5), 32)
  assert [plan.keep for plan in plans] == [
    {CHANNELS: (2, 3)},
    {CHANNELS: (1, 3)},
  ]


def test_every_pair_of_amounts_is_refused():
  amounts = {'target': 0.5, 'fit': '8GB', 'speedup': 1.5}
  for pair in itertools.combinations(amounts, 2):
    with pytest.raises(UserError, match='said by one of'):
      Targets(**{key: amounts[key] for key in pair})
