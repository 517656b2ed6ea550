"""Profiles over depth: the same total, each layer within one of its share."""

import itertools

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.profile import block_lengths, parse_profile, spread
from lorapr_jax.pruning.targets import Targets

CONFIG = ModelConfig(
  vocab_size=64,
  embed_dim=32,
  head_dim=4,
  layers=(LayerShape(9, 4, 1536),) * 30,
)
SMALL = ModelConfig(
  vocab_size=64, embed_dim=32, head_dim=4, layers=(LayerShape(8, 1, 64),) * 4
)


def of(text, **targets):
  return plan_pruning(CONFIG, Targets(layer_profile=text, **targets))


def test_blocks_differ_by_one_layer_at_most():
  for layers, parts in itertools.product(range(1, 81), range(1, 33)):
    if parts > layers:
      continue
    lengths = block_lengths(layers, parts)
    assert len(lengths) == parts and sum(lengths) == layers
    assert max(lengths) - min(lengths) <= 1


TEXTS = ('1', '1,3', '0.1,0.1,0.1', '3,2,1', '0,1,1', '0.2,1,0.7,1.4,1.1')


@pytest.mark.parametrize(
  'layers, text',
  [(2, text) for text in TEXTS[:2]]
  + list(itertools.product((7, 26, 28, 78), TEXTS)),
)
@pytest.mark.parametrize(
  'size, multiple', [(9, 1), (8, 2), (64, 8), (1536, 1), (1536, 7)]
)
def test_shares_are_followed_and_the_total_stays(layers, text, size, multiple):
  profile = parse_profile(text)
  counts = [*range(multiple, size, multiple), size]
  lengths = block_lengths(layers, len(profile))
  shares = [w for n, w in zip(lengths, profile, strict=True) for _ in range(n)]
  for kept in counts[:: -(-len(counts) // 20)]:
    lost = [(size - kept) * layers * w / sum(shares) for w in shares]
    found = spread(counts, kept, layers, profile)
    if max(lost) > size - multiple:
      assert found is None
      continue
    assert set(found) <= set(counts)
    off = abs(sum(found) - layers * kept)
    assert off == 0 if size % multiple == 0 else off < multiple
    for left, ideal, share in zip(found, lost, shares, strict=True):
      assert abs(size - left - ideal) < multiple
      assert share or left == size
    # Who has the larger share never keeps more.
    by_share = sorted(zip(shares, found, strict=True))
    for (low, more), (high, less) in itertools.pairwise(by_share):
      assert low == high or more >= less
    if len(set(shares)) == 1:
      assert set(found) == {kept}
    # One block at most is divided.
    assert len(list(itertools.groupby(found))) <= len(profile) + 1


def test_a_profile_moves_counts_and_leaves_the_size_alone():
  flat, steep = of('1'), of('0.4,0.8,1.2,1.6')
  assert steep.pruned_config.num_parameters == flat.pruned_config.num_parameters
  assert steep.sparsity(steep.keep) == flat.sparsity(flat.keep)
  for group in (KV_HEADS, CHANNELS):
    counts = [steep.keep[group][i] for i in steep.prunable_layers]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    # Protected layers keep all.
    for i in (0, 1, 2, 29):
      assert steep.keep[group][i] == flat.keep[group][i]
  # A stack for each block, one where each group divides a block, and two of
  # protected layers.
  assert len(steep.pruned_config.stacks) <= 4 + 2 + 2
  assert of('2,2,2').keep == flat.keep
  assert steep.kept_by_depth[KV_HEADS] == [
    *((8, 1), (7, 5), (6, 7), (4, 6), (3, 7)),
  ]


def test_a_falling_profile_keeps_ever_more():
  plan = of('1.6,1.2,0.8,0.4')
  for kept in plan.keep.values():
    counts = [kept[i] for i in plan.prunable_layers]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_a_profile_goes_with_every_unit_kind_and_multiple():
  params = of('0.5,1.5', target=0.4, unit='params')
  assert params.sparsity(params.keep)['params'] == pytest.approx(0.4, abs=1e-3)
  options = dict(heads='queries', channels_multiple_of=64, tensor_parallel=3)
  rounded, flat = of('0.5,1.5', **options), of('1', **options)
  assert set(rounded.keep[QUERIES]) == {4, 3, 1}
  assert all(n % 192 == 0 for n in rounded.keep[CHANNELS])
  assert sum(rounded.keep[CHANNELS]) == sum(flat.keep[CHANNELS])


def test_counts_on_the_way_follow_the_profile():
  plan = of('0.5,1,1.5')
  for percent in range(101):
    counts = plan.keep_at(percent / 100)[CHANNELS]
    prunable = [counts[i] for i in plan.prunable_layers]
    assert prunable == sorted(prunable, reverse=True)
  assert plan.keep_at(1.0) == plan.keep


@pytest.mark.parametrize('text', ['', 'a', '1,', '-1,2', '0,0', 'inf', '1/0'])
def test_what_is_no_profile_is_refused(text):
  with pytest.raises(UserError, match='shares of what is removed'):
    parse_profile(text)


def test_what_a_layer_cannot_lose_is_refused():
  with pytest.raises(UserError, match='of 9, 5 go on average and at least 1'):
    of('0,2', heads_target=0.6)
  # Decimals are exact: three times 0.7 is 2.1.
  targets = Targets(
    heads_target=0.75, channels=False, layer_profile='0.1,0.1', protect='none'
  )
  assert plan_pruning(SMALL, targets).keep[KV_HEADS] == (2,) * 4


def test_a_profile_with_more_shares_than_layers_is_refused_where_all_stay():
  with pytest.raises(UserError, match='5 shares for the 4'):
    plan_pruning(
      SMALL, Targets(target=0.0, layer_profile='1,1,1,1,1', protect='none')
    )
