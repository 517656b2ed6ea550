"""The ways to a size: by width, by depth, or by both.

A size is a share of the parameters, or what prune.fit or prune.speedup say.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
from fractions import Fraction
import itertools
import math
from typing import Any, NamedTuple

from ml_collections import config_dict

from lorapr_jax.errors import TargetError, UserError
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.groups import protected_layers
from lorapr_jax.settings.run import RunSettings, split_config

# The `prune.*` settings of a way.
Settings = Mapping[str, Any]
# By which nothing goes within layers.
_DEPTH: Settings = {'heads': 'none', 'channels': False}


class Dense(NamedTuple):
  """A model before pruning, whose layers are equal.

  Attributes:
    parameters: all of them.
    layer: those of a layer.
    layers: how many layers are not protected.
  """

  parameters: int
  layer: int
  layers: int

  @classmethod
  def of(cls, config: ModelConfig, protect: str) -> 'Dense':
    """That of these sizes; `protect` is prune.protect."""
    count = len(config.layers)
    return cls(
      config.num_parameters,
      config.layer_parameters(config.layers[0]),
      count - len(protected_layers(count, protect)),
    )

  def removed(self, share: float) -> Fraction:
    """The layers that what goes would fill, where this share stays."""
    # A Fraction of the decimal that was written.
    return (1 - Fraction(repr(share))) * self.parameters / self.layer

  def layers_target(self, gone: int) -> float:
    """`prune.layers_target` by which so many go."""
    return round(gone / self.layers, 6)

  def share(self, gone: int) -> float:
    """The share of the parameters that so many layers have."""
    return gone * self.layer / self.parameters


def width(_: Dense, share: float) -> Settings:
  """Heads and channels go, as under unit=params."""
  return {'unit': 'params', 'target': round(1 - share, 9)}


def depth(dense: Dense, share: float) -> Settings:
  """Whole layers go: the fewest with which no more than the share stays.

  Raises:
    TargetError: if none would be left of those that are not protected.
  """
  gone, most = math.ceil(dense.removed(share)), dense.layers - 1
  if gone > most:
    nearest = math.floor(dense.share(max(0, most)) * 1e6) / 1e6
    raise TargetError(f'{gone} of {dense.layers} layers would go', nearest)
  layers = dense.layers_target(gone)
  return {'unit': 'groups', 'target': 0.0, **_DEPTH, 'layers_target': layers}


def both(dense: Dense, share: float) -> Settings:
  """Layers go for half of the parameters; heads and channels for the rest.

  It is the number of layers that comes nearest to half, and at least one.

  Raises:
    TargetError: if that one has more than all that goes, or none can go.
  """
  removed = dense.removed(share)
  if dense.layers < 2:
    raise TargetError('no layer can go', 0.0)
  if removed < 1:
    nearest = math.ceil(dense.share(1) * 1e6) / 1e6
    raise TargetError('a layer has more parameters than go', nearest)
  half = math.floor(removed / 2 + Fraction(1, 2))
  gone = max(1, min(half, dense.layers - 1))
  return {**width(dense, share), 'layers_target': dense.layers_target(gone)}


# By name; each gives settings, of the dense model and of the share that stays.
WAYS: Mapping[str, Callable[[Dense, float], Settings]] = {
  'width': width,
  'depth': depth,
  'both': both,
}


def layers_of_both(dense: Dense, by_width: Callable[[], float]) -> Settings:
  """The layers of `both` where width alone would leave a share."""
  return {'layers_target': both(dense, by_width())['layers_target']}


# By name; what each takes beside prune.fit or prune.speedup, of the dense model
# and of the share that width alone would leave.
BESIDE: Mapping[str, Callable[[Dense, Callable[[], float]], Settings]] = {
  'width': lambda *_: {},
  'depth': lambda *_: _DEPTH,
  'both': layers_of_both,
}


class Size(NamedTuple):
  """One model that is measured.

  Attributes:
    way: of WAYS, or another form of the dense model, such as int8.
    share: of the dense model's parameters.
    asked: what it was to come to, if that was no share, such as fit=8GB.
  """

  way: str
  share: float = 1.0
  asked: str = ''

  @property
  def name(self) -> str:
    """As people see it: width 0.7, depth fit=8GB, or int8."""
    if self.way not in WAYS:
      return self.way
    return f'{self.way} {self.asked or format(self.share, "g")}'


class Planned(NamedTuple):
  """A run to a size.

  Attributes:
    asks: the `prune.*` settings by which it comes to it.
    settings: all of them.
  """

  asks: Settings
  settings: RunSettings


Sizes = dict[Size, Planned]


def split_sizes(
  config: config_dict.ConfigDict,
  dense: Dense,
  ways: Sequence[str],
  shares: Sequence[float],
) -> Sizes:
  """The settings of a run to each size, by way and share.

  A size that a way cannot come to is left out.

  Raises:
    UserError: if none can come to a size, or what is common to all is wrong.
  """
  found: Sizes = {}
  for size in itertools.starmap(Size, itertools.product(ways, shares)):
    with contextlib.suppress(TargetError):
      found[size] = _split(config, WAYS[size.way](dense, size.share))
  for share in shares:
    those = [Size(way, share) for way in ways]
    if found.keys().isdisjoint(those):
      near = [_nearest(config, dense, size) for size in those]
      nearest = min(near, key=lambda size: abs(size.share - share))
      raise UserError(
        f'--sizes: {share:g} of the parameters cannot be reached by '
        f'{" or ".join(ways)}; the nearest that can is {nearest.share:g}, by '
        f'{nearest.way}'
      )
  return found


def split_amount(
  config: config_dict.ConfigDict,
  dense: Dense,
  ways: Sequence[str],
  amount: Settings,
) -> tuple[Sizes, dict[str, str]]:
  """The same, of the size that prune.fit or prune.speedup come to.

  Returns:
    It, by each way that comes to it, and why others do not, by name.

  Raises:
    UserError: if no way comes to it.
  """
  found: Sizes = {}
  reasons: dict[str, str] = {}
  asks = {'target': None, **amount}
  nothing_within = config.prune.heads == 'none' and not config.prune.channels

  def share_of(run: Planned) -> float:
    return run.settings.plan.pruned_config.num_parameters / dense.parameters

  for way in ways:
    try:
      own = BESIDE[way](dense, lambda: share_of(_split(config, asks)))
      if nothing_within and own != _DEPTH:
        raise UserError('neither heads nor channels are pruned')
      run = _split(config, {**asks, **own})
      found[Size(way, share_of(run), asked_as(amount))] = run
    except UserError as error:
      reasons[way] = str(error)
  if not found:
    own = (f'by {way}: {reason}' for way, reason in reasons.items())
    alike = len({*reasons.values()}) == 1
    raise UserError(reasons[ways[0]] if alike else '; '.join(own))
  return found, reasons


def asked_as(amount: Settings) -> str:
  """The setting that says what a size is to come to, such as fit=8GB."""
  [(key, value)] = amount.items()
  return f'{key}={value}'


def _split(config: config_dict.ConfigDict, asks: Settings) -> Planned:
  """A run with these settings.

  Raises:
    TargetError: if they are a share of the parameters that no counts come to.
  """
  config = config.copy_and_resolve_references()
  config.prune.update(asks)
  return Planned(asks, split_config(config))


def _nearest(config: config_dict.ConfigDict, dense: Dense, size: Size) -> Size:
  """The size nearest to one that its way cannot come to."""
  # How much of the width can go depends on the layers that go, and these on
  # the size: a few steps lead there.
  for _ in range(20):
    try:
      _split(config, WAYS[size.way](dense, size.share))
      break
    except TargetError as error:
      size = size._replace(share=round(1 - error.nearest, 6))
      if size.share == 1:
        break
  return size
