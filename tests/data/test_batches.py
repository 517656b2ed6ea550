"""Windows to batches, and to devices: which windows, in which order."""

import threading

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from lorapr_jax.data.batches import batches
from lorapr_jax.data.packing import Packed
from lorapr_jax.errors import UserError
from lorapr_jax.runtime.sharding import make_mesh
from lorapr_jax.training.batches import device_batches


def windows_of(count, seq_len=3):
  """Windows that tell which they are."""
  return np.arange(count * seq_len, dtype=np.int32).reshape(count, seq_len)


def make_batches(count, **options):
  defaults = dict(batch_size=4, micro_batch_size=2, seed=0, shuffle=True)
  parts = [Packed(1.0, {'tokens': windows_of(count)})]
  return batches(parts, **{**defaults, **options})


def order(batch_at, steps):
  """The numbers of the windows of the first batches, in order."""
  tokens = np.concatenate(
    [batch_at(t)['tokens'].reshape(-1, 3) for t in range(steps)]
  )
  np.testing.assert_array_equal(tokens, windows_of(100)[tokens[:, 0] // 3])
  return (tokens[:, 0] // 3).tolist()


def test_a_batch_is_a_function_of_the_seed_and_the_step():
  forwards, again = make_batches(10), make_batches(10)
  for t in (7, 0, 31, 7):
    np.testing.assert_array_equal(forwards(t)['tokens'], again(t)['tokens'])
  assert order(forwards, 5) != order(make_batches(10, seed=1), 5)


@pytest.mark.parametrize('count', [8, 10])
def test_each_epoch_is_a_permutation_of_its_own(count):
  seen = order(make_batches(count), 2 * count)
  epochs = [tuple(seen[i : i + count]) for i in range(0, len(seen), count)]
  assert len(epochs) == 8
  assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
  assert len(set(epochs)) == len(epochs)


def test_without_shuffling_windows_come_in_order():
  seen = order(make_batches(6, shuffle=False), 4)
  assert seen == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_micro_batches_split_the_batch_in_order():
  batch = make_batches(6, shuffle=False)(0)
  assert batch['tokens'].tolist() == [
    [[0, 1, 2], [3, 4, 5]],
    [[6, 7, 8], [9, 10, 11]],
  ]
  assert batch['weights'].shape == (2, 2, 3)
  assert np.all(batch['weights'] == 1)
  whole = make_batches(6, micro_batch_size=4)(0)['tokens']
  single = make_batches(6, micro_batch_size=1)(0)['tokens']
  assert whole.shape == (1, 4, 3) and single.shape == (4, 1, 3)
  np.testing.assert_array_equal(whole.reshape(4, 3), single.reshape(4, 3))


def test_less_than_one_batch_is_refused():
  with pytest.raises(UserError, match='3 windows of 3 tokens: fewer than one'):
    make_batches(3)
  assert len(order(make_batches(4), 1)) == 4


def test_the_rows_of_each_process_make_up_the_batch():
  batch_at = make_batches(10, batch_size=8, micro_batch_size=4)
  for t in (0, 5):
    whole = batch_at(t)
    halves = [batch_at(t, rows) for rows in (slice(0, 2), slice(2, 4))]
    for name, array in whole.items():
      assert array.shape == (2, 4, 3)
      np.testing.assert_array_equal(
        np.concatenate([half[name] for half in halves], axis=1), array
      )


def mixture(shares, counts, **options):
  """Parts whose windows are 0, 1, ... and 1000, 1001, ..."""
  parts = [
    Packed(share, {'tokens': np.tile(np.arange(n)[:, None], 3) + 1000 * i})
    for i, (share, n) in enumerate(zip(shares, counts, strict=True))
  ]
  defaults = dict(batch_size=10, micro_batch_size=5, seed=0, shuffle=True)
  return batches(parts, **{**defaults, **options})


def test_a_mixture_draws_windows_by_the_weights():
  batch_at = mixture((0.7, 0.3), (12, 400))
  seen = np.concatenate(
    [batch_at(t)['tokens'][..., 0].ravel() for t in range(40)]
  )
  first, second = seen[seen < 1000], seen[seen >= 1000]
  assert abs(len(first) - 280) <= 2
  # Each is shuffled and begins again by itself, whatever the other does.
  for i in range(0, 276, 12):
    assert sorted(first[i : i + 12]) == list(range(12))
  assert len(set(second)) == len(second)
  assert list(first[:12]) != sorted(first[:12])
  again = mixture((0.7, 0.3), (12, 400))
  np.testing.assert_array_equal(again(31)['tokens'], batch_at(31)['tokens'])


def test_a_mixture_has_weights_and_segments_where_a_part_has_none():
  plain = {'tokens': np.zeros((4, 3), np.int32)}
  learnt = {
    'tokens': np.ones((4, 3), np.int32),
    'weights': np.tile(np.array([0, 0, 1], np.uint8), (4, 1)),
  }
  options = dict(batch_size=8, micro_batch_size=8, seed=0, shuffle=True)
  batch = batches([Packed(0.5, plain), Packed(0.5, learnt)], **options)(3)
  assert batch.keys() == {'tokens', 'weights', 'sources'}
  tokens, weights = batch['tokens'][0], batch['weights'][0]
  assert weights.dtype == np.float32
  assert np.all(weights[tokens[:, 0] == 0] == 1)
  assert weights[tokens[:, 0] == 1].tolist() == [[0, 0, 1]] * 4
  for windows in (plain, learnt):
    windows['segments'] = np.full((4, 3), 1 + windows['tokens'][0, 0])
  batch = batches([Packed(0.5, plain), Packed(0.5, learnt)], **options)(3)
  np.testing.assert_array_equal(batch['segments'], 1 + batch['tokens'])
  np.testing.assert_array_equal(batch['sources'], batch['tokens'])


def placed(batch_at, steps, devices=4):
  mesh = make_mesh({'data': devices, 'fsdp': 8 // devices, 'tensor': 1})
  place = NamedSharding(mesh, P(None, 'data', None))
  return device_batches(batch_at, place, 4, steps), place


@pytest.mark.mesh
def test_device_batches_are_those_of_the_steps_from_a_resumed_one():
  batch_at = make_batches(10, batch_size=8, micro_batch_size=4)
  stream, place = placed(batch_at, range(3, 9))
  with stream as ahead:
    got = list(ahead)
  assert len(got) == 6
  for t, batch in enumerate(got, start=3):
    for name, array in batch_at(t).items():
      assert isinstance(batch[name], jax.Array)
      assert batch[name].sharding.is_equivalent_to(place, 3)
      np.testing.assert_array_equal(batch[name], array)


@pytest.mark.mesh
def test_a_bad_batch_is_raised_in_the_loop_and_no_thread_is_left():
  batch_at = make_batches(10, batch_size=8, micro_batch_size=4)

  def breaks(t, rows):
    if t == 2:
      raise OSError('the disk is gone')
    return batch_at(t, rows)

  before = threading.active_count()
  seen = []
  stream, _ = placed(breaks, range(100))
  with pytest.raises(OSError, match='the disk is gone'), stream as ahead:
    for batch in ahead:
      seen.append(batch)
  assert len(seen) == 2
  assert threading.active_count() == before


@pytest.mark.mesh
def test_a_loop_that_is_left_early_leaves_no_thread():
  batch_at = make_batches(10, batch_size=8, micro_batch_size=4)
  asked = []

  def counted(t, rows):
    asked.append(t)
    return batch_at(t, rows)

  before = threading.active_count()
  stream, _ = placed(counted, range(1000))
  with pytest.raises(KeyboardInterrupt), stream as ahead:
    next(ahead)
    raise KeyboardInterrupt
  assert threading.active_count() == before
  # Made ahead, but boundedly.
  assert asked == [0, 1, 2]
