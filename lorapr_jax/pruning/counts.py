"""How many of each group a layer keeps, from the share that is to go."""

import bisect
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
import math
from typing import NamedTuple

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import TargetError, UserError
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.groups import kind, member_parameters


class Choice(NamedTuple):
  """The counts that one group may have in a prunable layer.

  Attributes:
    group: the group.
    size: the count before pruning.
    multiple: what every smaller count divides by.
    because: the settings that say so, such as `mesh.tensor=2`; '' for 1.
    instead: a setting under which other heads could go; '' if there is none.
    allowed: those that a smaller count must be of; None: all.
  """

  group: str
  size: int
  multiple: int
  because: str = ''
  instead: str = ''
  allowed: frozenset[int] | None = None

  @property
  def fewest(self) -> int:
    """The least count."""
    return self.counts[0]

  @property
  def counts(self) -> list[int]:
    """All counts, ascending."""
    below = range(self.multiple, self.size, self.multiple)
    allowed = below if self.allowed is None else self.allowed
    return [*(count for count in below if count in allowed), self.size]

  def nearest(self, kept: Fraction) -> int:
    """The count nearest to `kept`, at least one of them; a tie keeps more.

    `size` counts as the multiple that it is or that is next to it: nothing is
    pruned.
    """
    *below, size = self.counts
    counts = [*below, -(-size // self.multiple) * self.multiple]
    return min(size, counts[nearest(counts, kept)])


def nearest(counts: Sequence[int], value: Fraction) -> int:
  """The index of the nearest of ascending counts; of two, the larger one's."""
  above = min(bisect.bisect_left(counts, value), len(counts) - 1)
  below = max(above - 1, 0)
  return below if value - counts[below] < counts[above] - value else above


def round_share(choice: Choice, target: float) -> int:
  """The count that is left where the share `target` goes: unit=groups.

  Raises:
    UserError: if a target that is not zero prunes nothing.
  """
  # A Fraction of the decimal that was written: 0.35 of 10 is 3.5, a tie.
  kept = choice.nearest(choice.size * (1 - Fraction(repr(target))))
  if not target or kept < choice.size:
    return kept
  below = choice.counts[:-1]
  name = f'prune.{kind(choice.group)}_target'
  multiples = f'in multiples of {choice.multiple}'
  if choice.because:
    multiples += f', for {choice.because}'
  if not below:
    another = 'another multiple' if choice.because else ''
    ways = filter(None, [choice.instead, another, f'{name}=0'])
    raise UserError(
      f'{name}: {choice.size} ({multiples}) cannot be pruned; use '
      + ' or '.join(ways)
    )
  share = 1 - below[-1] / choice.size
  raise UserError(
    f'{name}={target} of {choice.size} ({multiples}) rounds to nothing '
    f'pruned; the nearest that works is {share:.6f}, or 0 to leave them alone'
  )


def finest_of(choices: Sequence[Choice]) -> Choice:
  """The group with the finest steps, which makes up what others are off by."""
  return min(choices, key=lambda c: c.multiple / c.size)


def layers_left(layers: int, target: float) -> int:
  """How many of so many layers are left where the share `target` of them goes.

  Raises:
    UserError: if none would be left, or a target that is not zero removes none.
  """
  if layers > 1 and 2 * layers * (1 - Fraction(repr(target))) < 1:
    raise UserError(
      f'prune.layers_target={target} would leave none of the {layers} layers '
      f'that are not protected; the nearest that works is {1 - 1 / layers:.6f}'
    )
  return round_share(Choice(LAYERS, layers, 1), target)


def _nearest_counts(
  choices: Sequence[Choice],
  first: Mapping[str, int],
  distance: Callable[[Mapping[str, int]], float],
  near: float,
) -> dict[str, int]:
  """The counts of least distance: `first`, but for the finest group.

  Where that one cannot come as near as it should, another group's count is
  changed as well.
  """
  finest = finest_of(choices)

  def complete(coarse: Mapping[str, int]) -> dict[str, int]:
    counts = ({**coarse, finest.group: n} for n in reversed(finest.counts))
    return min(counts, key=distance)

  kept = complete(first)
  if distance(kept) <= near:
    return kept
  others = [
    complete({**kept, c.group: count})
    for c in choices
    if c is not finest
    for count in reversed(c.counts)
  ]
  return min([kept, *others], key=distance)


def solve_parameters(
  config: ModelConfig,
  layers: int,
  choices: Sequence[Choice],
  target: float,
  gone: int = 0,
) -> dict[str, int]:
  """The counts with which a share of all parameters goes: unit=params.

  Every group gets the count nearest to the share at which all groups, pruned
  alike, would meet the target. The group with the finest steps then makes up
  the difference. Where it cannot, the counts of another group that come
  nearest are taken. The layers of `config` are equal, `layers` of them are
  pruned, and `gone` others go as a whole. Gives {group: the count in each of
  those that are pruned}.

  Raises:
    TargetError: if the target is beyond what can be pruned, or is not zero and
      prunes nothing.
  """
  dense, shape = config.num_parameters, config.layers[0]
  cost = {c.group: member_parameters(config, shape, c.group) for c in choices}
  whole = gone * config.layer_parameters(shape)
  if whole > target * dense:
    raise UserError(
      f'prune.layers_target alone takes {whole / dense:.4f} of the parameters, '
      f'and prune.target={target} is the share of all that go: lower the one '
      'or raise the other'
    )

  def removed(kept: Mapping[str, float]) -> float:
    # Every projection is linear in each group's count, so that this holds for
    # counts that are not whole too.
    each = sum((c.size - kept[c.group]) * cost[c.group] for c in choices)
    return (layers * each + whole) / dense

  already = Fraction(removed({c.group: c.size for c in choices}))
  most = removed({c.group: c.fewest for c in choices})
  if target > most:
    nearest = math.floor(most * 1e4) / 1e4
    raise TargetError(
      f'prune.target={target} of the parameters is beyond what can be pruned; '
      f'the nearest that works is {nearest:.4f} (at least one of each group is '
      'kept, embeddings and protected layers stay)',
      nearest,
    )
  # `removed` is linear in the share: one division solves it.
  rest = Fraction(removed({c.group: 0 for c in choices})) - already
  share = (Fraction(target) - already) / rest
  finest = finest_of(choices)
  kept = _nearest_counts(
    choices,
    {c.group: c.nearest(c.size * (1 - share)) for c in choices},
    lambda kept: abs(removed(kept) - target),
    layers * finest.multiple * cost[finest.group] / dense / 2,
  )
  if target and not gone and all(kept[c.group] == c.size for c in choices):
    below = finest.counts[-2] if len(finest.counts) > 1 else finest.fewest
    nearest = math.floor(removed(kept | {finest.group: below}) * 1e6) / 1e6
    raise TargetError(
      f'prune.target={target} of the parameters rounds to nothing pruned; the '
      f'nearest that works is {nearest:.6f}, or 0',
      nearest,
    )
  return kept
