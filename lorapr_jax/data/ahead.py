"""Work that is done before its result is asked for, in order."""

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
  """`function(item)` of each item; at most `ahead` wait to be taken.

  An item is asked for no earlier than that, so items may be endless. What
  `function` raises is raised where its result is taken.
  """
  waiting: deque[Any] = deque()
  for item in items:
    waiting.append(pool.submit(function, item))
    if len(waiting) > ahead:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()
