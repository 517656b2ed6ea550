"""Layer profiles: how what is removed of a group is shared out over depth."""

from collections.abc import Sequence
import math

from lorapr_jax.errors import UserError

Profile = tuple[float, ...]


def parse_profile(text: str) -> Profile:
  """`prune.layer_profile`: relative shares, from the first layers to the last.

  Raises:
    UserError: if they are no such numbers.
  """
  try:
    shares = tuple(float(share) for share in text.split(','))
  except ValueError:
    shares = ()
  if not shares or not all(0 <= share < math.inf for share in shares):
    shares = ()
  if not sum(shares):
    raise UserError(
      f'prune.layer_profile is {text!r}: shares of what is removed, from the '
      'first layers to the last, none below 0, such as 0.5,1,1.5'
    )
  return shares


def runs(num_layers: int, profile: Profile) -> list[int]:
  """The layers of each share: runs that differ by one layer at most.

  Raises:
    UserError: if there are more shares than layers.
  """
  parts = len(profile)
  if parts > num_layers:
    raise UserError(
      f'prune.layer_profile has {parts} shares for the {num_layers} layers '
      'that are pruned: give at most one for each'
    )
  ends = [num_layers * i // parts for i in range(parts + 1)]
  return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def spread(
  counts: Sequence[int], kept: int, num_layers: int, profile: Profile
) -> tuple[int, ...] | None:
  """What each layer keeps, where all together keep what `kept` each would.

  Layer i of share w_i loses as near to (size - kept) w_i / mean(w) as leaves
  the total alone: the sum of squared differences is the least that whole counts
  can have. Where no counts have that total, those with the nearest.

  Args:
    counts: that a layer may keep, ascending; the last is its size.
    kept: by every layer, were they to lose alike.
    num_layers: of those that are pruned.
    profile: the shares, each of a run of layers.

  Returns:
    The counts by layer; None where a layer would lose more than it can.
  """
  lengths = runs(num_layers, profile)
  size, total = counts[-1], num_layers * kept
  mean = math.fsum(n * share for n, share in zip(lengths, profile, strict=True))
  ideals = [
    size - (size - kept) * num_layers * share / mean for share in profile
  ]
  if min(ideals) < counts[0]:
    return None
  # What is kept by the runs so far -> the best way to it. Rounding is made up
  # for within a run's length of the nearest counts.
  best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
  for n, ideal in zip(lengths, ideals, strict=True):
    near = sorted(counts, key=lambda c: abs(c - ideal))[: 2 * max(lengths) + 2]
    found: dict[int, tuple[float, tuple[int, ...]]] = {}
    for so_far, (cost, before) in best.items():
      for count in near:
        way = (cost + n * (count - ideal) ** 2, (*before, count))
        key = so_far + n * count
        found[key] = min(way, found.get(key, way))
    best = found
  reached = min(best, key=lambda n: (abs(n - total), best[n]))
  return tuple(
    count
    for n, count in zip(lengths, best[reached][1], strict=True)
    for _ in range(n)
  )
