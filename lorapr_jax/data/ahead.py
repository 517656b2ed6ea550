"""Does work ahead: before its result is asked for, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Any


def in_order(
  pool: Executor,
  function: Callable[[Any], Any],
  items: Iterable[Any],
  ahead: int,
) -> Iterator[Any]:
  """Yields `function(item)` for each item, computed ahead in the pool.

  At most `ahead` results wait to be taken, and no further item is asked for, so
  `items` may be endless. If `function` raises an error, it is raised here when
  its result is due.
  """
  waiting: deque[Any] = deque()
  for item in items:
    waiting.append(pool.submit(function, item))
    if len(waiting) > ahead:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()
