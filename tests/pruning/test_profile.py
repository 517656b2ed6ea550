"""Profiles over depth: the same total, as near as whole counts come."""

import itertools

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.models.config import LayerShape, LlamaConfig
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.profile import parse_profile, runs, spread
from lorapr_jax.pruning.targets import Targets, plan_pruning

CONFIG = LlamaConfig(
  vocab_size=64,
  embed_dim=32,
  head_dim=4,
  layers=(LayerShape(9, 4, 1536),) * 30,
)


def of(text, **targets):
  return plan_pruning(CONFIG, Targets(layer_profile=text, **targets))


def test_runs_differ_by_one_layer_at_most():
  for layers, parts in itertools.product(range(1, 81), range(1, 33)):
    if parts > layers:
      with pytest.raises(UserError, match=f'{parts} shares for the {layers}'):
        runs(layers, (1.0,) * parts)
      continue
    lengths = runs(layers, (1.0,) * parts)
    assert len(lengths) == parts and sum(lengths) == layers
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize('layers', [2, 7, 26, 78])
@pytest.mark.parametrize(
  'profile', [(1,), (1, 3), (3, 2, 1), (0, 1, 1.5), (0.2, 1, 0.7, 1.4, 1.1)]
)
@pytest.mark.parametrize('size, multiple', [(9, 1), (64, 8), (1536, 1)])
def test_the_total_is_exact_and_shares_are_followed(
  layers, profile, size, multiple
):
  counts = list(range(multiple, size + 1, multiple))
  for kept in counts[len(counts) // 2 :: -(-len(counts) // 12)]:
    if len(profile) > layers:
      continue
    found = spread(counts, kept, layers, profile)
    lengths = runs(layers, profile)
    weighted = sum(n * w for n, w in zip(lengths, profile, strict=True))
    ideals = [
      size - (size - kept) * layers * w / weighted
      for n, w in zip(lengths, profile, strict=True)
      for _ in range(n)
    ]
    if min(ideals) < multiple:
      assert found is None
      continue
    assert sum(found) == layers * kept and set(found) <= set(counts)
    apart = max(abs(a - b) for a, b in zip(found, ideals, strict=True))
    assert apart <= multiple * (1 + max(lengths))


def test_no_other_counts_with_that_total_are_nearer():
  counts, profile = list(range(1, 8)), (0.5, 1.0, 1.3)
  lengths = runs(8, profile)
  for kept in range(4, 8):
    found = spread(counts, kept, 8, profile)
    weighted = sum(n * w for n, w in zip(lengths, profile, strict=True))
    ideals = [7 - (7 - kept) * 8 * w / weighted for w in profile]

    def distance(of_runs, ideals=ideals):
      return sum(
        n * (c - ideal) ** 2
        for n, c, ideal in zip(lengths, of_runs, ideals, strict=True)
      )

    least = min(
      distance(c)
      for c in itertools.product(counts, repeat=3)
      if sum(n * x for n, x in zip(lengths, c, strict=True)) == 8 * kept
    )
    ends = [sum(lengths[: i + 1]) - 1 for i in range(3)]
    assert distance([found[i] for i in ends]) == pytest.approx(least)


def test_a_size_that_is_no_multiple_is_made_up_for():
  # Of 5 in multiples of 2 a layer keeps 2, 4 or 5.
  assert spread([2, 4, 5], 4, 6, (0, 2)) == (4,) * 6
  assert spread([3, 6, 9, 10], 6, 6, (1, 3)) == (9,) * 3 + (3,) * 3


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
  # A stack for each run, one before and one after.
  assert len(steep.pruned_config.stacks) == 6
  assert of('2,2,2').keep == flat.keep


def test_a_profile_goes_with_every_unit_kind_and_multiple():
  params = of('0.5,1.5', target=0.4, unit='params')
  assert params.sparsity(params.keep)['params'] == pytest.approx(0.4, abs=1e-3)
  rounded = of(
    '0.5,1.5', heads='queries', channels_multiple_of=64, tensor_parallel=3
  )
  assert set(rounded.keep[QUERIES]) == {4, 3, 1}
  assert all(n % 192 == 0 for n in rounded.keep[CHANNELS])
  assert sum(rounded.keep[CHANNELS]) == sum(
    of('1', channels_multiple_of=192).keep[CHANNELS]
  )


def test_counts_on_the_way_follow_the_profile():
  plan = of('0.5,1,1.5')
  for percent in range(101):
    counts = plan.keep_at(percent / 100)[CHANNELS]
    prunable = [counts[i] for i in plan.prunable_layers]
    assert prunable == sorted(prunable, reverse=True)
  assert plan.keep_at(1.0) == plan.keep


@pytest.mark.parametrize('text', ['', 'a', '1,', '-1,2', '0,0', 'inf', 'nan'])
def test_what_is_no_profile_is_refused(text):
  with pytest.raises(UserError, match='shares of what is removed'):
    parse_profile(text)


def test_what_a_layer_cannot_lose_is_refused():
  with pytest.raises(UserError, match='of 9, 5 go on average and at least 1'):
    of('0,2', heads_target=0.6)
