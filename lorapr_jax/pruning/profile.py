"""Layer profiles (non-uniform sparsity): what each layer loses, over depth."""

from collections.abc import Sequence
from fractions import Fraction

from lorapr_jax.errors import UserError, short
from lorapr_jax.pruning.counts import nearest

Profile = tuple[Fraction, ...]


def parse_profile(text: str) -> Profile:
  """`prune.layer_profile`: relative shares, from the first layers to the last.

  Raises:
    UserError: if they are no such numbers.
  """
  try:
    shares = tuple(Fraction(share) for share in text.split(','))
  except (ValueError, ZeroDivisionError):
    shares = ()
  if not sum(shares) or min(shares) < 0:
    raise UserError(
      f'prune.layer_profile is {short(repr(text))}: shares of what is removed, '
      'from the first layers to the last, none below 0, such as 0.5,1,1.5'
    )
  return shares


def block_lengths(num_layers: int, parts: int) -> list[int]:
  """How many layers are in each block: they differ by one at most."""
  ends = [num_layers * i // parts for i in range(parts + 1)]
  return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def spread(
  counts: Sequence[int], kept: int, num_layers: int, profile: Profile
) -> tuple[int, ...] | None:
  """What each layer keeps, where all together keep what `kept` each would.

  A layer of share w_i is to lose (size - kept) w_i / mean(w). Each block takes
  the nearest count. What the total is off by then is made up for by blocks
  whose rounding it was, the worst first: their layers take the count on the
  other side. One block at most is so divided; every layer is less than one
  count from its share; a larger share never keeps more.

  Args:
    counts: that a layer may keep, ascending; the last is its size. The total is
      exact if it is a multiple of the step between them.
    kept: by every layer, were they to lose alike.
    num_layers: of those that are pruned.
    profile: the shares, each of a block of layers.

  Returns:
    The counts by layer; None where a layer would lose more than it can.
  """
  lengths = block_lengths(num_layers, len(profile))
  size = counts[-1]
  weight = sum(n * w for n, w in zip(lengths, profile, strict=True))
  ideals = [size - (size - kept) * num_layers * w / weight for w in profile]
  if min(ideals) < counts[0]:
    return None
  taken = [nearest(counts, ideal) for ideal in ideals]
  layers = [[counts[i]] * n for i, n in zip(taken, lengths, strict=True)]
  excess = sum(map(sum, layers)) - num_layers * kept
  sign = 1 if excess > 0 else -1
  rounding = [
    sign * (counts[i] - ideal) for i, ideal in zip(taken, ideals, strict=True)
  ]
  for block in sorted(range(len(profile)), key=lambda b: -rounding[b]):
    if rounding[block] <= 0:
      break
    other = counts[taken[block] - sign]
    step = abs(other - counts[taken[block]])
    moved = min(lengths[block], round(abs(excess) / step))
    layers[block][:moved] = [other] * moved
    excess -= sign * moved * step
  rising = profile[0] <= profile[-1]
  return tuple(n for block in layers for n in sorted(block, reverse=rising))
