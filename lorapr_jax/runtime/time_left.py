"""How long a piece of work that goes on in steps will still take."""

import collections

# Timings that the mean is taken over. A slow step, such as one that masks
# groups, is then one among many: the estimate does not jump with it. Yet it
# follows within as many timings when all steps become faster.
_NEWEST = 20


class TimeLeft:
  """Estimates the seconds that are left from the mean of the newest timings."""

  def __init__(self, total: int):
    """A piece of work of `total` steps."""
    self._total = total
    self._done = 0
    self._timings: collections.deque[tuple[int, float]] = collections.deque(
      maxlen=_NEWEST
    )

  def add(self, done: int, seconds: float, *, compiled: bool) -> None:
    """Takes in the time of the steps since the last call.

    Args:
      done: the steps that are done so far.
      seconds: of a step, the mean over the steps since the last call.
      compiled: whether something was compiled meanwhile. Such a timing says
        nothing about later steps and is left out.
    """
    steps, self._done = done - self._done, done
    if not compiled:
      self._timings.append((steps, steps * seconds))

  def seconds(self) -> float | None:
    """The estimate; None while there is no timing without compiling."""
    if not self._timings:
      return None
    steps, seconds = map(sum, zip(*self._timings, strict=True))
    return seconds / steps * (self._total - self._done)
