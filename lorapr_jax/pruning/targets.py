"""What to prune and how much, and the counts that a group may then have."""

import dataclasses
import math

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError, choose
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.counts import Choice
from lorapr_jax.pruning.fit import Room, check_amount
from lorapr_jax.pruning.groups import (
  CHANNELS,
  CHOICES,
  HEAD_GROUPS,
  KV_HEADS,
  QUERIES,
  group_size,
  kind,
)
from lorapr_jax.pruning.profile import Profile, parse_profile


@dataclasses.dataclass(frozen=True)
class Targets:
  """What to prune and how much: the `prune.*` keys of configs/default.py.

  How much goes is said by one of `target`, `fit` and `speedup`; where none is
  set, by a target of 0.5.

  `tensor_parallel` is the size of the mesh axis that splits KV heads and
  channels: what is kept must still divide by it. `heads_divide` is what the
  query heads that are kept must divide, for a format of export; 0: nothing.
  """

  target: float | None = None
  heads_target: float | None = None
  channels_target: float | None = None
  layers_target: float = 0.0
  unit: str = 'groups'
  fit: str = ''
  fit_context: int = Room.context
  fit_batch: int = Room.batch
  fit_dtype: str = Room.dtype
  speedup: float | None = None
  speedup_of: str = 'decode'
  heads: str = 'kv_groups'
  channels: bool = True
  protect: str = 'reference'
  layer_profile: str = '1'
  heads_multiple_of: int = 1
  channels_multiple_of: int = 1
  tensor_parallel: int = 1
  heads_divide: int = 0

  def __post_init__(self):
    for key, choices in CHOICES.items():
      choose(f'prune.{key}', getattr(self, key), choices)
    keys = ('target', 'heads_target', 'channels_target')
    shares = {f'prune.{key}': getattr(self, key) for key in keys}
    layers = {'prune.layers_target': self.layers_target}
    for key, value in (shares | layers).items():
      if value is not None and not 0.0 <= value < 1.0:
        raise UserError(f'{key} is {value}: it must be in [0, 1)')
    check_amount(shares, self.fit, self.speedup)
    if self.fit:
      self.room  # noqa: B018  It checks its keys.
    for key in ('heads_multiple_of', 'channels_multiple_of'):
      if getattr(self, key) < 1:
        raise UserError(
          f'prune.{key} is {getattr(self, key)}: it must be at least 1'
        )
    parse_profile(self.layer_profile)
    if not self.groups:
      raise UserError(
        'prune.heads is none and prune.channels is false: there is nothing '
        'to prune; for tuning alone use prune.target=0'
      )
    if LAYERS in self.groups:
      self._check_layers()
    own = {self.heads_target, self.channels_target}
    if self.unit == 'params' and own != {None}:
      raise UserError(
        'prune.unit=params takes prune.target alone: leave out '
        'prune.heads_target and prune.channels_target'
      )

  def _check_layers(self) -> None:
    alone = self.groups == (LAYERS,)
    if alone and self.by_size and self.layers_target:
      raise UserError(
        'prune.layers_target says how many layers go, and without heads and '
        'channels prune.fit and prune.speedup find how many: leave one out'
      )
    if len({*self.profile}) > 1:
      raise UserError(
        f'prune.layer_profile={self.layer_profile} does not go with whole '
        'layers, of which it is not known which stay: leave the profile out'
      )
    if alone and self.unit == 'params' and not self.by_size:
      raise UserError(
        'prune.unit=params takes from heads or channels what '
        'prune.layers_target leaves of prune.target, and neither is pruned: '
        'use prune.unit=groups'
      )

  @property
  def by_size(self) -> bool:
    """Whether a size of the whole model is asked for, not shares of groups."""
    return bool(self.fit) or self.speedup is not None

  @property
  def room(self) -> Room:
    """What the model has to fit in, where `fit` is set."""
    return Room(self.fit, self.fit_context, self.fit_batch, self.fit_dtype)

  @property
  def share(self) -> float:
    """`target`, or what it is where nothing says how much."""
    return 0.5 if self.target is None else self.target

  def of(self, group: str) -> float:
    """The share of this group's members to remove, under unit=groups."""
    own = getattr(self, f'{kind(group)}_target')
    return self.share if own is None else own

  @property
  def profile(self) -> Profile:
    """Relative shares of what is removed, by depth."""
    return parse_profile(self.layer_profile)

  @property
  def groups(self) -> tuple[str, ...]:
    """The groups that are to be pruned.

    Where a size is asked for, and nothing is to go within layers, layers go.
    """
    heads = HEAD_GROUPS[self.heads]
    alone = self.by_size and not (heads or self.channels)
    layers = self.layers_target or alone
    pruned = {LAYERS: layers, heads: heads, CHANNELS: self.channels}
    return tuple(group for group, is_pruned in pruned.items() if is_pruned)


def multiple_of(config: ModelConfig, targets: Targets, group: str) -> int:
  """What the count of a group that stays must divide by."""
  if group == LAYERS:
    return 1
  if group == CHANNELS:
    return math.lcm(targets.channels_multiple_of, targets.tensor_parallel)
  if group == KV_HEADS:
    return math.lcm(targets.heads_multiple_of, targets.tensor_parallel)
  # The query heads of a layer are the KV heads times what each of them keeps;
  # the mesh splits KV heads, which stay.
  kv_heads = config.layers[0].num_kv_heads
  return targets.heads_multiple_of // math.gcd(
    targets.heads_multiple_of, kv_heads
  )


def choice_of(config: ModelConfig, targets: Targets, group: str) -> Choice:
  """The counts of a group, and what they follow from."""
  shape = config.layers[0]
  key = f'{kind(group)}_multiple_of'
  asked = {f'prune.{key}': getattr(targets, key)}
  instead = ''
  if group == QUERIES:
    instead = 'prune.heads=kv_groups' if shape.num_kv_heads > 1 else ''
  else:
    asked['mesh.tensor'] = targets.tensor_parallel
    if group == KV_HEADS and shape.queries_per_kv > 1:
      instead = 'prune.heads=queries'
  multiple = multiple_of(config, targets, group)
  size, allowed, because = group_size(config, shape, group), None, []
  if multiple > 1:
    because = [f'{name}={value}' for name, value in asked.items() if value > 1]
  if targets.heads_divide and group != CHANNELS:
    each = shape.num_heads // size
    whole = targets.heads_divide
    allowed = frozenset(n for n in range(1, size) if whole % (n * each) == 0)
    because.append(f'export.layout=uniform, whose heads divide {whole}')
  return Choice(
    group,
    size,
    multiple,
    because=' and '.join(because),
    instead=instead,
    allowed=allowed,
  )
