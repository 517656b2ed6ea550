"""Targets to counts: the rule of docs/method.md over a grid, and real models.

The rule is written here a second time, with fractions.
"""

from fractions import Fraction
import itertools
import math
import re

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.groups import (
  CHANNELS,
  KV_HEADS,
  QUERIES,
  couplings,
  group_size,
  protected_layers,
)
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.targets import Targets


def model(layers, kv_heads, queries, mlp, vocab=50, embed=24, head=4, tie=True):
  return ModelConfig(
    vocab_size=vocab,
    embed_dim=embed,
    head_dim=head,
    layers=(LayerShape(kv_heads, queries, mlp),) * layers,
    tie_embeddings=tie,
  )


LAYERS = 20  # of which 0, 1 and 19 are protected
MODELS = {
  'mha': model(LAYERS, 12, 1, 50),
  'gqa': model(LAYERS, 4, 6, 96),
}
LLAMA_7B = model(32, 32, 1, 11008, 32000, 4096, 128, tie=False)
SMOLLM2 = model(30, 3, 3, 1536, 49152, 576, 64)
SMOLLM2_MHA = model(30, 9, 1, 1536, 49152, 576, 64)
TARGETS = ('0.03', '0.2', '0.25', '0.3333', '0.35', '0.4445', '0.5', '0.75')
TARGETS += ('0.9', '0.999')


def parameters(config, kept):
  """The parameters of a model with `kept` = (K, G, F) for each layer."""
  D, H = config.embed_dim, config.head_dim
  total = config.vocab_size * D * (1 if config.tie_embeddings else 2) + D
  for K, G, F in kept:
    q_and_o, k_and_v, mlp = 2 * D * K * G * H, 2 * D * K * H, 3 * D * F
    total += q_and_o + k_and_v + mlp + 2 * D
  return total


def sizes_of(config):
  return [(s.num_kv_heads, s.queries_per_kv, s.mlp_dim) for s in config.layers]


def effective_multiple(config, group, multiple, tensor):
  """The step in which a count may go, for the lcm of multiple and mesh."""
  if group != QUERIES:
    return math.lcm(multiple, tensor)
  # Query heads a layer: those under a KV head times the KV heads.
  kv_heads = config.layers[0].num_kv_heads
  return next(g for g in itertools.count(1) if kv_heads * g % multiple == 0)


def rule(size, multiple, target):
  """How many are kept of `size`; `size` where that rounds to nothing pruned."""
  exact = size * (1 - Fraction(target))
  nearest = math.floor(exact / multiple + Fraction(1, 2)) * multiple
  return min(max(nearest, multiple), size)


def named_target(message):
  [target] = re.findall(r'nearest that works is ([0-9.]+)', message)
  return float(target)


GROUP_KINDS = [
  ('kv_groups', False),
  ('queries', False),
  ('none', True),
  ('kv_groups', True),
  ('queries', True),
]


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('protect', ['reference', 'none'])
@pytest.mark.parametrize('heads, channels', GROUP_KINDS)
def test_counts_follow_the_rule_over_the_grid(name, protect, heads, channels):
  config = MODELS[name]
  planned = 0
  for target, of_heads, of_channels, tensor in itertools.product(
    TARGETS, (1, 2, 3, 8), (1, 7, 16), (1, 2)
  ):
    targets = Targets(
      target=float(target),
      heads=heads,
      channels=channels,
      protect=protect,
      heads_multiple_of=of_heads,
      channels_multiple_of=of_channels,
      tensor_parallel=tensor,
    )
    expected = {}
    for group in targets.groups:
      size = group_size(config, config.layers[0], group)
      own = of_channels if group == CHANNELS else of_heads
      multiple = effective_multiple(config, group, own, tensor)
      expected[group] = rule(size, multiple, target), size, multiple
    if any(kept == size for kept, size, _ in expected.values()):
      with pytest.raises(UserError, match='rounds to nothing|cannot be pruned'):
        plan_pruning(config, targets)
      continue
    planned += 1
    plan = plan_pruning(config, targets)
    assert plan.keep.keys() == expected.keys()
    protected = {0, 1, LAYERS - 1} if protect == 'reference' else set()
    for group, (kept, size, multiple) in expected.items():
      assert 1 <= kept < size and kept % multiple == 0
      assert plan.keep[group] == tuple(
        size if i in protected else kept for i in range(LAYERS)
      ), targets
  # An MHA model has one query head under each KV head: none can go.
  assert bool(planned) == ((name, heads) != ('mha', 'queries'))


@pytest.mark.parametrize('name', MODELS)
def test_multiples_hold_for_the_heads_of_a_whole_layer(name):
  config = MODELS[name]
  for kind, multiple, tensor in itertools.product(
    ('kv_groups', 'queries'), (1, 2, 3, 4, 8), (1, 2)
  ):
    targets = Targets(
      heads=kind,
      target=0.5,
      heads_multiple_of=multiple,
      channels_multiple_of=multiple,
      tensor_parallel=tensor,
      protect='none',
    )
    try:
      shape = plan_pruning(config, targets).pruned_config.layers[0]
    except UserError:
      continue
    heads = shape.num_kv_heads if kind == 'kv_groups' else shape.num_heads
    assert heads % multiple == 0 and shape.mlp_dim % multiple == 0
    assert shape.num_kv_heads % tensor == 0 and shape.mlp_dim % tensor == 0


@pytest.mark.parametrize('heads', ['kv_groups', 'queries'])
def test_counts_on_the_way_fall_and_end_exactly(heads):
  targets = Targets(target=0.5, heads=heads, channels_target=0.9)
  plan = plan_pruning(MODELS['gqa'], targets)
  before = plan.keep_at(0.0)
  full = MODELS['gqa'].layers[0]
  for group, counts in before.items():
    assert set(counts) == {group_size(MODELS['gqa'], full, group)}
  for percent in range(101):
    counts = plan.keep_at(percent / 100)
    for group, kept in counts.items():
      assert all(k <= b for k, b in zip(kept, before[group], strict=True))
      assert min(kept) >= 1
    before = counts
  assert before == plan.keep
  # The k-th of n goes at k / (n + 1/2).
  [size, kept] = plan.keep[CHANNELS][0], plan.keep[CHANNELS][5]
  for k in range(1, size - kept + 1):
    due = k / (size - kept + 0.5)
    assert plan.keep_at(due - 1e-6)[CHANNELS][5] == size - k + 1
    assert plan.keep_at(due + 1e-6)[CHANNELS][5] == size - k


def test_half_of_nine_heads_go_where_the_ramp_reaches_each():
  plan = plan_pruning(SMOLLM2_MHA, Targets(target=0.5, channels=False))
  for percent in range(101):
    gone = 9 - plan.keep_at(percent / 100)[KV_HEADS][5]
    # Nine heads times the sparsity that is due, rounded down.
    assert gone == 9 * percent // 200
  assert plan.keep_at(0.5)[KV_HEADS][:4] == (9, 9, 9, 7)


def test_heads_and_channels_have_their_own_targets():
  targets = Targets(target=0.9, heads_target=0.25, channels_target=0.75)
  plan = plan_pruning(MODELS['mha'], targets)
  assert (plan.keep[KV_HEADS][5], plan.keep[CHANNELS][5]) == (9, 13)
  alone = Targets(target=0.5, heads_target=0.0)
  assert plan_pruning(MODELS['mha'], alone).keep.keys() == {CHANNELS}
  assert plan_pruning(MODELS['mha'], Targets(target=0.0)).keep == {}


@pytest.mark.parametrize(
  'size, multiple, target',
  [
    (size, multiple, target)
    for size, multiple, target in itertools.product(
      (2, 3, 9, 100, 1536, 11008, 28672), (1, 2, 64), (0.00001, 0.04)
    )
    if rule(size, multiple, str(target)) == size
  ],
)
def test_a_refusal_names_a_target_that_works(size, multiple, target):
  config = model(4, 2, 1, size)
  options = dict(heads='none', channels_multiple_of=multiple)
  with pytest.raises(UserError) as error:
    plan_pruning(config, Targets(channels_target=target, **options))
  if size <= multiple:
    assert 'cannot be pruned' in str(error.value)
    return
  nearest = named_target(str(error.value))
  plan = plan_pruning(config, Targets(channels_target=nearest, **options))
  assert plan.keep[CHANNELS][0] == (size - 1) // multiple * multiple


def test_a_refusal_names_the_heads():
  with pytest.raises(UserError, match='prune.heads_target=0.04 of 4'):
    plan_pruning(MODELS['gqa'], Targets(target=0.04))
  plan = plan_pruning(MODELS['gqa'], Targets(target=0.04, heads_target=0.25))
  assert plan.keep[KV_HEADS][5] == 3


@pytest.mark.parametrize(
  'kv_heads, queries, options, message',
  [
    (
      *(1, 8, {}),
      'prune.heads_target: 1 (in multiples of 1) cannot be pruned; use '
      'prune.heads=queries or prune.heads_target=0',
    ),
    (
      *(1, 1, {}),
      'prune.heads_target: 1 (in multiples of 1) cannot be pruned; use '
      'prune.heads_target=0',
    ),
    (
      *(4, 2, {'tensor_parallel': 4}),
      'prune.heads_target: 4 (in multiples of 4, for mesh.tensor=4) cannot be '
      'pruned; use prune.heads=queries or another multiple or '
      'prune.heads_target=0',
    ),
    (
      *(4, 1, {'tensor_parallel': 2, 'heads_multiple_of': 4}),
      'prune.heads_target: 4 (in multiples of 4, for prune.heads_multiple_of=4 '
      'and mesh.tensor=2) cannot be pruned; use another multiple or '
      'prune.heads_target=0',
    ),
    (
      *(8, 1, {'tensor_parallel': 4, 'target': 0.1}),
      'prune.heads_target=0.1 of 8 (in multiples of 4, for mesh.tensor=4) '
      'rounds to nothing pruned; the nearest that works is 0.5',
    ),
    (
      *(4, 1, {'heads': 'queries', 'heads_multiple_of': 4}),
      'prune.heads_target: 1 (in multiples of 1) cannot be pruned; use '
      'prune.heads=kv_groups or prune.heads_target=0',
    ),
    (
      *(4, 1, {'heads': 'none', 'channels_multiple_of': 64}),
      'prune.channels_target: 64 (in multiples of 64, for '
      'prune.channels_multiple_of=64) cannot be pruned; use another multiple '
      'or prune.channels_target=0',
    ),
  ],
)
def test_a_refusal_says_where_a_multiple_comes_from_and_what_to_use(
  kv_heads, queries, options, message
):
  config = model(4, kv_heads, queries, 64)
  with pytest.raises(UserError, match=re.escape(message)):
    plan_pruning(config, Targets(**options))


def closest(config, choices, prunable, target):
  """The parameters of the best of all choices [(K, G, F)], by brute force.

  A tie prunes fewer.
  """
  dense = parameters(config, sizes_of(config))
  goal = dense * (1 - Fraction(str(target)))
  rest = sizes_of(config)[: len(config.layers) - prunable]
  counts = [parameters(config, rest + [c] * prunable) for c in choices]
  return min(counts, key=lambda n: (abs(n - goal), -n))


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('protect, prunable', [('reference', 17), ('none', 20)])
@pytest.mark.parametrize('multiple', [1, 2])
@pytest.mark.parametrize('pruned', ['channels', 'kv_groups', 'queries'])
def test_one_kind_comes_as_near_to_the_parameters_as_it_can(
  name, protect, prunable, multiple, pruned
):
  config = MODELS[name]
  [(K, G, F)] = set(sizes_of(config))
  if pruned == 'channels':
    steps = {*range(multiple, F + 1, multiple), F}
    choices = [(K, G, f) for f in steps]
  elif pruned == 'kv_groups':
    steps = {*range(multiple, K + 1, multiple), K}
    choices = [(k, G, F) for k in steps]
  else:
    steps = [g for g in range(1, G + 1) if K * g % multiple == 0]
    choices = [(K, g, F) for g in steps]
  planned = 0
  for target in (0.005, 0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5):
    targets = Targets(
      target=target,
      unit='params',
      heads='none' if pruned == 'channels' else pruned,
      channels=pruned == 'channels',
      protect=protect,
      heads_multiple_of=multiple,
      channels_multiple_of=multiple,
    )
    try:
      plan = plan_pruning(config, targets)
    except UserError as error:
      nearest = named_target(str(error)) if len(choices) > 1 else None
    else:
      planned += 1
      expected = closest(config, choices, prunable, target)
      assert plan.pruned_config.num_parameters == expected, target
      continue
    if nearest is not None:
      again = Targets(**{**vars(targets), 'target': nearest})
      assert plan_pruning(config, again).keep
  assert bool(planned) == (len(choices) > 1)


@pytest.mark.parametrize(
  'name, heads',
  [
    ('mha', 'kv_groups'),
    ('gqa', 'kv_groups'),
    ('gqa', 'queries'),
    ('smollm2', 'kv_groups'),
    ('smollm2', 'queries'),
    ('llama_7b', 'kv_groups'),
  ],
)
@pytest.mark.parametrize('protect', ['reference', 'none'])
def test_both_kinds_come_within_half_a_channel_of_the_parameters(
  name, heads, protect
):
  config = {**MODELS, 'smollm2': SMOLLM2, 'llama_7b': LLAMA_7B}[name]
  dense = config.num_parameters
  pruned_layers = len(config.layers) - len(
    protected_layers(len(config.layers), protect)
  )
  half_channel = pruned_layers * 3 * config.embed_dim / 2
  percents = range(1, 100) if name in MODELS else (1, 20, 35, 50, 99)
  for percent in percents:
    targets = Targets(
      target=percent / 100, unit='params', heads=heads, protect=protect
    )
    try:
      plan = plan_pruning(config, targets)
    except UserError as error:
      refusal = str(error)
      break
    left = parameters(config, sizes_of(plan.pruned_config))
    assert left == plan.pruned_config.num_parameters
    assert abs(left - dense * (1 - percent / 100)) <= half_channel + 1, percent
    assert plan.sparsity(plan.keep)['params'] == pytest.approx(1 - left / dense)
  assert percent > 30
  assert 'beyond what can be pruned' in refusal
  nearest = named_target(refusal)
  plan = plan_pruning(
    config,
    Targets(target=nearest, unit='params', heads=heads, protect=protect),
  )
  assert plan.sparsity(plan.keep)['params'] == pytest.approx(nearest, abs=1e-3)


def test_a_share_of_the_parameters_that_rounds_to_nothing_is_refused():
  targets = Targets(target=1e-6, unit='params')
  with pytest.raises(UserError, match='rounds to nothing pruned') as error:
    plan_pruning(SMOLLM2, targets)
  nearest = named_target(str(error.value))
  plan = plan_pruning(SMOLLM2, Targets(target=nearest, unit='params'))
  assert plan.keep == {CHANNELS: (1536,) * 3 + (1535,) * 26 + (1536,)}


@pytest.mark.parametrize(
  'layers, protected',
  [(1, {0}), (9, {8}), (10, {0, 9}), (30, {0, 1, 2, 29}), (32, {0, 1, 2, 31})],
)
def test_the_first_tenth_and_the_last_layer_are_protected(layers, protected):
  assert protected_layers(layers, 'reference') == protected
  assert protected_layers(layers, 'none') == set()


def test_llama_7b_at_half_of_the_groups():
  assert LLAMA_7B.num_parameters == 6_738_415_616
  plan = plan_pruning(LLAMA_7B, Targets(target=0.5))
  assert plan.keep == {
    KV_HEADS: (32,) * 3 + (16,) * 28 + (32,),
    CHANNELS: (11008,) * 3 + (5504,) * 28 + (11008,),
  }
  achieved = plan.sparsity(plan.keep)
  assert achieved['heads'] == achieved['channels'] == 0.5
  assert achieved['params'] == pytest.approx(0.420, abs=5e-4)


@pytest.mark.parametrize('of_params, of_groups', [(0.5, 0.595), (0.2, 0.238)])
def test_llama_7b_at_a_share_of_the_parameters(of_params, of_groups):
  plan = plan_pruning(LLAMA_7B, Targets(target=of_params, unit='params'))
  achieved = plan.sparsity(plan.keep)
  assert achieved['params'] == pytest.approx(of_params, abs=5e-5)
  # Heads are coarse; channels, the finer kind, are near the common share.
  assert achieved['heads'] == pytest.approx(of_groups, abs=0.5 / 32)
  assert achieved['channels'] == pytest.approx(of_groups, abs=0.01)
  gone = LLAMA_7B.num_parameters - plan.pruned_config.num_parameters
  in_groups = 28 * (32 * 4 * 4096 * 128 + 3 * 4096 * 11008)
  assert gone / in_groups == pytest.approx(of_groups, abs=5e-4)


@pytest.mark.parametrize(
  'target, kept', [(0.4445, 5), (0.5, 5), (0.2, 7), (0.1, 8), (0.05556, 8)]
)
def test_smollm2_with_nine_heads(target, kept):
  plan = plan_pruning(SMOLLM2_MHA, Targets(target=target, channels=False))
  assert plan.keep == {KV_HEADS: (9,) * 3 + (kept,) * 26 + (9,)}


def test_smollm2_as_the_demo_prunes_it():
  assert SMOLLM2.num_parameters == 134_515_008
  targets = Targets(target=0.5, heads_target=1 / 3, heads='queries')
  plan = plan_pruning(SMOLLM2, targets)
  assert plan.keep == {
    QUERIES: (3,) * 3 + (2,) * 26 + (3,),
    CHANNELS: (1536,) * 3 + (768,) * 26 + (1536,),
  }
  gone = 26 * (2 * 576 * 3 * 64 + 3 * 576 * 768)
  assert plan.pruned_config.num_parameters == 134_515_008 - gone
  assert plan.sparsity(plan.keep) == {
    'heads': pytest.approx(1 / 3),
    'channels': 0.5,
    'params': pytest.approx(gone / 134_515_008),
  }
  assert plan.targets_by_kind() == {
    'heads': 1 / 3,
    'channels': 0.5,
    'params': None,
  }


def test_what_a_kind_that_is_not_pruned_has_lost_is_zero():
  plan = plan_pruning(SMOLLM2, Targets(target=0.5, heads='none'))
  assert plan.sparsity(plan.keep)['heads'] == 0.0
  assert plan.targets_by_kind()['heads'] == 0.0
  by_params = Targets(target=0.2, unit='params', heads='none')
  plan = plan_pruning(SMOLLM2, by_params)
  assert plan.targets_by_kind() == {
    'heads': None,
    'channels': None,
    'params': 0.2,
  }


@pytest.mark.parametrize(
  'group, params, lora',
  [
    (
      KV_HEADS,
      {
        'self_attn.k_proj.weight': 'embed kv_heads head_dim',
        'self_attn.o_proj.weight': 'kv_heads queries_per_kv head_dim embed',
        'self_attn.q_proj.weight': 'embed kv_heads queries_per_kv head_dim',
        'self_attn.v_proj.weight': 'embed kv_heads head_dim',
      },
      {
        'self_attn.o_proj.a': 'kv_heads queries_per_kv head_dim rank',
        'self_attn.v_proj.b': 'rank kv_heads head_dim',
      },
    ),
    (
      QUERIES,
      {
        'self_attn.o_proj.weight': 'kv_heads queries_per_kv head_dim embed',
        'self_attn.q_proj.weight': 'embed kv_heads queries_per_kv head_dim',
      },
      {'self_attn.o_proj.a': 'kv_heads queries_per_kv head_dim rank'},
    ),
    (
      CHANNELS,
      {
        'mlp.down_proj.weight': 'mlp embed',
        'mlp.gate_proj.weight': 'embed mlp',
        'mlp.up_proj.weight': 'embed mlp',
      },
      {'mlp.gate_proj.b': 'rank mlp'},
    ),
  ],
)
def test_couplings_are_the_tensors_that_have_all_axes(group, params, lora):
  adapters = LoraConfig(2, 4.0, 0.0, ('v_proj', 'o_proj', 'gate_proj'))
  axes = block_axes(SMOLLM2, adapters)
  for tree, expected in (('params', params), ('lora', lora)):
    found = {
      name: ' '.join(names) for name, names in couplings(axes[tree], group)
    }
    assert found == expected


@pytest.mark.parametrize(
  'options, message',
  [
    ({'target': 1.2}, r'prune.target is 1.2: it must be in \[0, 1\)'),
    ({'target': 1.0}, 'prune.target is 1.0'),
    ({'heads_target': -0.1}, 'prune.heads_target is -0.1'),
    ({'channels_target': float('nan')}, 'prune.channels_target is nan'),
    ({'unit': 'flops'}, "prune.unit is 'flops'.*groups, params"),
    ({'heads': 'all'}, "prune.heads is 'all'.*kv_groups, queries, none"),
    ({'protect': 'last'}, "prune.protect is 'last'.*reference, none"),
    ({'heads_multiple_of': 0}, 'prune.heads_multiple_of is 0'),
    ({'channels_multiple_of': -8}, 'prune.channels_multiple_of is -8'),
    ({'heads': 'none', 'channels': False}, 'nothing to prune'),
    ({'unit': 'params', 'heads_target': 0.5}, 'takes prune.target alone'),
  ],
)
def test_impossible_targets_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    Targets(**options)


def test_a_model_that_cannot_be_pruned_is_refused():
  with pytest.raises(UserError, match='use prune.protect=none'):
    plan_pruning(model(1, 4, 1, 8), Targets())
  pruned = plan_pruning(MODELS['mha'], Targets()).pruned_config
  with pytest.raises(UserError, match='it is pruned already'):
    plan_pruning(pruned, Targets())


def test_heads_move_where_channels_cannot_make_up_the_difference():
  config = model(4, 4, 6, 24)
  plan = plan_pruning(
    config, Targets(target=0.12, unit='params', protect='none')
  )
  reachable = [
    plan.sparsity({KV_HEADS: (h,) * 4, CHANNELS: (c,) * 4})['params']
    for h in range(1, 5)
    for c in range(1, 25)
  ]
  nearest = min(abs(share - 0.12) for share in reachable)
  assert abs(plan.sparsity(plan.keep)['params'] - 0.12) == nearest
