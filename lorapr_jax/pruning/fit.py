"""The largest model that fits: prune.fit, of weights and KV cache in bytes."""

import bisect
from collections.abc import Callable, Mapping, Sequence
import dataclasses
from fractions import Fraction
import itertools
import math
from typing import NamedTuple

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.errors import UserError, choose
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.cost import kv_cache_bytes, weight_bytes
from lorapr_jax.pruning.counts import Choice, finest_of
from lorapr_jax.runtime.sizes import parse_size, size

# What a number takes, by prune.fit_dtype. With int8 it is one of those that
# stay as they are: embeddings, norms, biases and the KV cache.
_BYTES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 2}


def check_amount(
  shares: Mapping[str, float | None], fit: str, speedup: float | None
) -> None:
  """Refuses what says twice how much is pruned.

  Args:
    shares: the settings that are shares of groups, by name; None: not set.
    fit: prune.fit; empty: not set.
    speedup: prune.speedup; None: not set.

  Raises:
    UserError: naming the settings.
  """
  sizes = {'prune.fit': fit or None, 'prune.speedup': speedup}
  found = [key for key, x in {**shares, **sizes}.items() if x is not None]
  if len(found) > 1 and not sizes.keys().isdisjoint(found):
    raise UserError(
      f'{" and ".join(found)} are set: how much is pruned is said by one of '
      'prune.target, prune.fit and prune.speedup (KEY=None unsets one)'
    )
  if speedup is not None and not 1 < speedup < math.inf:
    raise UserError(
      f'prune.speedup is {speedup}: it must be above 1, such as 1.5'
    )


class Footprint(NamedTuple):
  """The bytes that a model takes where it is served, and what was counted.

  Attributes:
    weights_bytes: all of them.
    kv_cache_bytes: of all texts.
    dtype: of both.
    batch: texts in the cache.
    context: tokens of each.
  """

  weights_bytes: int
  kv_cache_bytes: int
  dtype: str
  batch: int
  context: int

  @property
  def total(self) -> int:
    """Bytes of both."""
    return self.weights_bytes + self.kv_cache_bytes

  def __str__(self) -> str:
    texts = 'a text' if self.batch == 1 else f'{self.batch} texts'
    weights, cache = size(self.weights_bytes), size(self.kv_cache_bytes)
    return (
      f'{weights} of weights and {cache} of KV cache, in {self.dtype}, for '
      f'{texts} of {self.context:,} tokens'
    )


@dataclasses.dataclass(frozen=True)
class Room:
  """What a model has to fit in: the `prune.fit*` keys.

  Attributes:
    fit: bytes as text, of weights and KV cache together.
    context: the tokens of each text in the cache; 0: the model's positions.
    batch: how many texts.
    dtype: of weights and cache.
  """

  fit: str
  context: int = 0
  batch: int = 1
  dtype: str = 'bfloat16'

  def __post_init__(self):
    choose('prune.fit_dtype', self.dtype, tuple(_BYTES))
    for key, least in (('context', 0), ('batch', 1)):
      if getattr(self, key) < least:
        raise UserError(
          f'prune.fit_{key} is {getattr(self, key)}: it must be at least '
          f'{least}'
        )
    self.bytes  # noqa: B018  It checks the text.

  @property
  def bytes(self) -> int:
    """How many there are."""
    return parse_size('prune.fit', self.fit)

  def footprint(self, config: ModelConfig) -> Footprint:
    """What a model of these sizes takes. With int8 each projection is int8.

    Raises:
      UserError: if the model has no room for so many tokens.
    """
    if self.context > config.longest:
      raise UserError(
        f'prune.fit_context is {self.context}, but the model has '
        f'{config.longest} positions (max_position_embeddings)'
      )
    quantized = LORA_TARGETS if self.dtype == 'int8' else ()
    served = dataclasses.replace(config, quantized=quantized)
    each, context = _BYTES[self.dtype], self.context or config.longest
    return Footprint(
      weight_bytes(served, each),
      kv_cache_bytes(served, self.batch, context, each),
      self.dtype,
      self.batch,
      context,
    )


def solve_fit(
  config: ModelConfig,
  choices: Sequence[Choice],
  sized: Callable[[Mapping[str, int]], ModelConfig],
  room: Room,
  most: int,
) -> dict[str, int]:
  """The counts of the largest model that takes at most `most` bytes.

  Heads and channels share the cut as under unit=params, by bytes in place of
  parameters; see `largest_within`.

  Args:
    config: the sizes before pruning.
    choices: the counts that each group may have.
    sized: the sizes where the layers that are pruned keep so many of each,
      and those that go as a whole have gone.
    room: what is counted.
    most: `room.bytes`, or less.

  Raises:
    UserError: if the model fits as it is, or cannot be made to fit.
  """
  dense = room.footprint(config)
  if dense.total <= room.bytes:
    raise UserError(
      f'prune.fit={room.fit}: the model fits as it is ({dense}), and nothing '
      'would be pruned; prune.target=0 trains LoRA alone'
    )
  least = room.footprint(sized({c.group: c.fewest for c in choices}))
  if least == dense:
    raise nothing_smaller(f'prune.fit={room.fit}')
  if least.total > most:
    bare = dataclasses.replace(config, layers=(), windows=())
    embeddings = room.footprint(bare).weights_bytes
    alone = embeddings > room.bytes
    reason = (
      f'the embeddings alone take {size(embeddings)}'
      if alone
      else 'that is beyond what can be pruned'
    )
    # Rounded up, so that it works.
    nearest = f'{math.ceil(least.total / 1e4) / 100:.2f}MB'
    raise UserError(
      f'prune.fit={room.fit}: {reason}; the nearest that works is {nearest} '
      f'({least}; at least one of each group is kept, embeddings and '
      'protected layers stay)'
    )
  return largest_within(
    choices, lambda kept: room.footprint(sized(kept)).total, most
  )


def nothing_smaller(asked: str) -> UserError:
  """That what is asked for needs a smaller size, and there is none."""
  return UserError(
    f'{asked}: no smaller size is left by prune.heads_multiple_of, '
    'prune.channels_multiple_of, prune.layer_profile and mesh.tensor'
  )


def largest_within(
  choices: Sequence[Choice],
  size_of: Callable[[Mapping[str, int]], int],
  most: int,
) -> dict[str, int]:
  """The counts of the largest size that is at most `most`.

  Every group gets the count nearest to the share at which all groups, pruned
  alike, would meet it. The group with the finest steps then takes its largest
  count with which the size is within. Where there is none, or all of it stays,
  the counts of the other groups that come nearest are taken.

  Args:
    choices: the counts that each group may have.
    size_of: the size with so many of each group: linear in every count.
    most: at least the size with the fewest of each group.
  """
  finest = finest_of(choices)
  others = [c for c in choices if c is not finest]
  dense = size_of({c.group: c.size for c in choices})
  # The size is linear in the share: one division solves it.
  removable = dense - size_of({c.group: 0 for c in choices})
  share = Fraction(dense - most, removable)

  def filled(coarse: Mapping[str, int]) -> list[dict[str, int]]:
    def size_with(count: int) -> int:
      return size_of({**coarse, finest.group: count})

    counts = finest.counts
    fitting = bisect.bisect_right(counts, most, key=size_with)
    return [{**coarse, finest.group: counts[fitting - 1]}] if fitting else []

  kept = filled({c.group: c.nearest(c.size * (1 - share)) for c in others})
  if not kept or kept[0][finest.group] == finest.size:
    names = [c.group for c in others]
    for counts in itertools.product(*(c.counts for c in others)):
      kept += filled(dict(zip(names, counts, strict=True)))
  return max(kept, key=size_of)
