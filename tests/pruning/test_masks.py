"""Masks: exact counts, never grown again, along the right axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.axes import Axes, apply_masks
from lorapr_jax.pruning.masks import alive_counts, initial_masks, select_masks

QUERIES = 'kv_heads,queries_per_kv'


def select(importance, mask, keep, group='mlp'):
  chosen = select_masks(
    {group: jnp.asarray(importance, jnp.float32)},
    {group: jnp.asarray(mask, jnp.float32)},
    {group: jnp.asarray(keep)},
  )
  return np.asarray(chosen[group])


def test_the_least_important_go_and_each_layer_has_its_own_count():
  importance = [[3, 1, 2, 5], [4, 6, 8, 7], [9, 9, 9, 9]]
  assert select(importance, np.ones((3, 4)), [2, 1, 4]).tolist() == [
    [1, 0, 0, 1],
    [0, 0, 1, 0],
    [1, 1, 1, 1],
  ]


def test_a_tie_keeps_the_lower_index():
  importance = [[1, 2, 1, 1], [0, 0, 0, 0]]
  assert select(importance, np.ones((2, 4)), [3, 2]).tolist() == [
    [1, 1, 1, 0],
    [1, 1, 0, 0],
  ]


def test_what_is_masked_stays_masked_whatever_its_importance():
  assert select([[9, 1, 9, 2]], [[0, 1, 0, 1]], [1]).tolist() == [[0, 0, 0, 1]]
  # Nothing more to remove: nothing changes, not even among equals.
  for keep in (2, 3, 4):
    found = select([[0, 0, 0, 0]], [[0, 1, 0, 1]], [keep])
    assert found.tolist() == [[0, 1, 0, 1]]


def test_query_heads_are_ranked_under_their_own_kv_head():
  # Every query head of the first KV head beats all of the second.
  importance = [[[7, 9, 8], [1, 2, 3]], [[1, 3, 2], [6, 5, 4]]]
  ones = np.ones((2, 2, 3))
  assert select(importance, ones, [1, 2], QUERIES).tolist() == [
    [[0, 1, 0], [0, 0, 1]],
    [[0, 1, 1], [1, 1, 0]],
  ]


@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('shape', [(3, 7), (2, 3, 4)])
def test_counts_are_exact_and_masks_only_shrink(shape, seed):
  rng = np.random.default_rng(seed)
  group = 'mlp' if len(shape) == 2 else QUERIES
  mask = np.ones(shape)
  keep = np.full(shape[0], shape[-1])
  for _ in range(4):
    # Few values, so that there are many ties.
    importance = rng.integers(0, 4, shape)
    keep = np.array([rng.integers(1, k + 1) for k in keep])
    new = select(importance, mask, keep, group)
    assert set(np.unique(new)) <= {0, 1}
    assert np.all(new <= mask)
    for index in np.ndindex(shape[:-1]):
      alive = np.flatnonzero(mask[index])
      best = sorted(alive, key=lambda u: (-importance[index][u], u))
      expected = sorted(best[: keep[index[0]]])
      assert np.flatnonzero(new[index]).tolist() == expected
    mask = new


def test_selection_does_not_depend_on_being_jitted():
  rng = np.random.default_rng(0)
  importance = {'mlp': rng.integers(0, 3, (2, 9)).astype(np.float32)}
  masks, keep = {'mlp': jnp.ones((2, 9))}, {'mlp': jnp.asarray([4, 7])}
  np.testing.assert_array_equal(
    select_masks(importance, masks, keep)['mlp'],
    jax.jit(select_masks)(importance, masks, keep)['mlp'],
  )


TREE = {
  'q_proj': jnp.asarray([[[[1.0], [2.0]], [[3.0], [4.0]]]]),
  'k_proj': jnp.asarray([[[5.0], [6.0]]]),
  'o_proj': jnp.asarray([[[[1.0, 10.0]], [[2.0, 20.0]]]] * 2),
  'up_proj': jnp.asarray([[1.0, 2.0, 3.0]]),
  'down_proj': jnp.asarray([[1.0], [2.0], [3.0]]),
  'norm': jnp.asarray([7.0]),
  'a': jnp.asarray([[8.0, 9.0]]),
  'b': jnp.asarray([[1.0, 2.0, 3.0]] * 2),
}
AXES = {
  'q_proj': Axes.of('DKGH'),
  'k_proj': Axes.of('DKH'),
  'o_proj': Axes.of('KGHD'),
  'up_proj': Axes.of('DF'),
  'down_proj': Axes.of('FD'),
  'norm': Axes.of('D'),
  'a': Axes.of('Dr'),
  'b': Axes.of('rF'),
}


@pytest.mark.parametrize(
  'masks, changed',
  [
    (
      {'kv_heads': [0, 1]},
      {
        'q_proj': [[[[0], [0]], [[3], [4]]]],
        'k_proj': [[[0], [6]]],
        'o_proj': [[[[0, 0]], [[0, 0]]], [[[1, 10]], [[2, 20]]]],
      },
    ),
    (
      {QUERIES: [[1, 0], [0, 1]]},
      {
        'q_proj': [[[[1], [0]], [[0], [4]]]],
        'o_proj': [[[[1, 10]], [[0, 0]]], [[[0, 0]], [[2, 20]]]],
      },
    ),
    (
      {'mlp': [1, 0, 1]},
      {
        'up_proj': [[1, 0, 3]],
        'down_proj': [[1], [0], [3]],
        'b': [[1, 0, 3]] * 2,
      },
    ),
    (
      {'kv_heads': [1, 1], 'mlp': [0, 0, 1]},
      {
        'up_proj': [[0, 0, 3]],
        'down_proj': [[0], [0], [3]],
        'b': [[0, 0, 3]] * 2,
      },
    ),
    ({}, {}),
  ],
)
def test_masks_zero_what_carries_the_groups_axes_and_nothing_else(
  masks, changed
):
  masks = {group: jnp.asarray(mask, float) for group, mask in masks.items()}
  found = apply_masks(TREE, masks, AXES)
  for name, x in TREE.items():
    expected = changed.get(name, x.tolist())
    assert np.asarray(found[name]).tolist() == expected, name


def test_masks_keep_the_dtype():
  tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TREE)
  masked = apply_masks(tree, {'mlp': jnp.ones(3)}, AXES)
  assert {x.dtype for x in jax.tree.leaves(masked)} == {jnp.dtype('bfloat16')}


def test_at_first_everything_is_alive():
  sizes = {'kv_heads': 2, 'queries_per_kv': 3, 'mlp': 5}
  wide = {**sizes, 'mlp': 6}
  masks = initial_masks((QUERIES, 'mlp'), ((1, sizes), (4, wide)))
  assert [{g: m.shape for g, m in stack.items()} for stack in masks] == [
    {QUERIES: (1, 2, 3), 'mlp': (1, 5)},
    {QUERIES: (4, 2, 3), 'mlp': (4, 6)},
  ]
  assert all(np.all(m == 1) for m in jax.tree.leaves(masks))


def test_alive_counts_go_over_the_layers_of_all_stacks():
  masks = (
    {QUERIES: jnp.ones((1, 2, 3)), 'mlp': jnp.asarray([[1.0, 0, 1, 1]])},
    {
      QUERIES: jnp.asarray([[[1.0, 0, 1], [0, 1, 1]], [[1, 0, 0], [0, 0, 1]]]),
      'mlp': jnp.asarray([[1.0, 1, 0, 0], [0, 0, 0, 1]]),
    },
  )
  assert alive_counts(masks) == {QUERIES: (3, 2, 1), 'mlp': (3, 2, 1)}
