"""Makes batches of windows: batch t depends on the seed and t alone."""

from collections.abc import Callable, Sequence
import itertools

import grain
import numpy as np

from lorapr_jax.data.packing import Packed
from lorapr_jax.errors import UserError


def batches(
  parts: Sequence[Packed],
  *,
  batch_size: int,
  micro_batch_size: int,
  seed: int,
  shuffle: bool,
) -> Callable[..., dict[str, np.ndarray]]:
  """Makes the function (t, rows) -> batch t, or some rows of its micro-batches.

  A batch is {'tokens', 'weights'}, 'segments' where documents share a window,
  and 'sources', the part of each token, where there are several. Each is
  (M, B, T): M micro-batches of B windows of T tokens. A batch
  depends on the seed and t alone. So a resumed run goes on with the data that
  it would have seen, and each of many processes can read only its own rows.
  Each part of a mixture gets a new order in every epoch. `batch_size` is M B,
  and `micro_batch_size` B.

  Raises:
    UserError: if there is less than one batch.
  """
  sizes = [len(part.windows['tokens']) for part in parts]
  seq_len = parts[0].windows['tokens'].shape[1]
  if sum(sizes) < batch_size:
    raise UserError(
      f'the training data has {sum(sizes)} windows of {seq_len} tokens: fewer '
      f'than one batch of {batch_size}'
    )
  # Windows are numbered through all parts. grain only orders the numbers: to
  # handle the windows themselves it would take too long.
  starts = np.cumsum([0, *sizes])
  weights = [part.weight for part in parts]
  order = _order(starts.tolist(), weights, seed if shuffle else None)
  order = order.batch(batch_size)

  def batch(t: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    numbers = order[t].reshape(-1, micro_batch_size)[:, rows]
    shape = (*numbers.shape, seq_len)
    result = {
      'tokens': np.empty(shape, np.int32),
      'weights': np.ones(shape, np.float32),
    }
    if 'segments' in parts[0].windows:
      result['segments'] = np.empty(shape, np.int32)
    part_of = np.searchsorted(starts, numbers, side='right') - 1
    if len(parts) > 1:
      result['sources'] = np.empty(shape, np.int32)
      result['sources'][...] = part_of[..., None]
    for i, part in enumerate(parts):
      here = part_of == i
      for name, array in part.windows.items():
        result[name][here] = array[numbers[here] - starts[i]]
    return result

  return batch


def _order(
  starts: Sequence[int], weights: Sequence[float], seed: int | None
) -> grain.MapDataset:
  """The numbers of the windows in the order in which they are drawn.

  `starts` has the first of each part, and the end of the last. Without a seed
  they are not shuffled.
  """
  orders = []
  for i, (start, end) in enumerate(itertools.pairwise(starts)):
    order = grain.MapDataset.range(start, end)
    if seed is not None:
      order = order.seed((seed + i) % 2**32).shuffle()
    orders.append(order.repeat())
  if len(orders) == 1:
    return orders[0]
  return grain.MapDataset.mix(orders, weights)
