"""The plan of a run: how many of each group every layer keeps."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import math

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.counts import Choice
from lorapr_jax.pruning.groups import (
  group_size,
  kind,
  protected_layers,
  with_kept,
)
from lorapr_jax.pruning.masks import without_layers
from lorapr_jax.pruning.profile import spread
from lorapr_jax.pruning.targets import Targets, multiple_of


@dataclasses.dataclass(frozen=True)
class PruningPlan:
  """What will be left: counts by group and layer.

  Attributes:
    config: the model before pruning.
    targets: what was asked for.
    keep: {group: the number kept in each layer}. For query heads it counts
      those under one KV head. Groups that lose nothing are absent. A layer of
      which 0 of `layers` is kept goes as a whole: how many these are is known,
      but which is not before the run, and all of `prunable_layers` are alike.
      So they stand for those that will go, and in this order.
    share: of the parameters, of a rung on the way to the targets; None: it is
      the plan of the targets.
  """

  config: ModelConfig
  targets: Targets
  keep: dict[str, tuple[int, ...]]
  share: float | None = None

  @property
  def pruned_config(self) -> ModelConfig:
    """The sizes at the end."""
    return with_kept(self.config, self.keep)

  @property
  def within_layers(self) -> bool:
    """Whether groups within layers go, not whole layers alone."""
    return bool(without_layers(self.keep))

  @property
  def multiples(self) -> dict[str, int]:
    """What the counts of each group divide by."""
    return {g: multiple_of(self.config, self.targets, g) for g in self.keep}

  @property
  def prunable_layers(self) -> list[int]:
    """The layers that are not protected."""
    layers = range(len(self.config.layers))
    protected = protected_layers(len(layers), self.targets.protect)
    return [i for i in layers if i not in protected]

  @property
  def kept_by_depth(self) -> dict[str, list[tuple[int, int]]]:
    """(count, layers that keep it) in order, of the layers not protected.

    Of the groups within layers, in those that stay.
    """
    found, gone = {}, self.going
    layers = [i for i in self.prunable_layers if i not in gone]
    for group, kept in without_layers(self.keep).items():
      counts = itertools.groupby(kept[i] for i in layers)
      found[group] = [(count, len(list(run))) for count, run in counts]
    return found

  def sizes(self, group: str) -> list[int]:
    """The count of a group in each layer before pruning."""
    return [group_size(self.config, s, group) for s in self.config.layers]

  def alike(self, kept: Mapping[str, int]) -> ModelConfig:
    """The sizes where each layer that is not protected keeps so many.

    Of a plan in which nothing goes within layers.
    """
    layers = frozenset(self.prunable_layers)
    keep = {
      group: self.staying(count)
      if group == LAYERS
      else tuple(
        count if i in layers else size
        for i, size in enumerate(self.sizes(group))
      )
      for group, count in kept.items()
    }
    return with_kept(self.config, {**self.keep, **keep})

  def staying(self, count: int) -> tuple[int, ...]:
    """By layer, 1 if it stays where so many of those not protected do.

    Those with the shortest windows go first: whichever go in the run, what is
    left caches no more.
    """
    windows, layers = self.config.layer_windows, self.prunable_layers
    order = sorted(reversed(layers), key=lambda i: windows[i] or math.inf)
    gone = order[: len(layers) - count]
    return tuple(int(i not in gone) for i in range(len(windows)))

  def by_layer(self, choice: Choice, kept: int) -> tuple[int, ...] | None:
    """What each layer keeps, where `kept` is the mean of those not protected.

    None where the profile takes more of a layer than it can lose.
    """
    if choice.group == LAYERS:
      return self.staying(kept)
    layers = self.prunable_layers
    counts = spread(choice.counts, kept, len(layers), self.targets.profile)
    if counts is None:
      return None
    of_layer = dict(zip(layers, counts, strict=True))
    return tuple(
      of_layer.get(i, choice.size) for i in range(len(self.config.layers))
    )

  def keeping(
    self, choices: Sequence[Choice], kept: Mapping[str, int]
  ) -> 'PruningPlan':
    """The plan by which so many of each group stay in a layer, on average.

    Raises:
      UserError: if the profile takes more of a layer than it can lose.
    """
    keep = dict(self.keep)
    for choice in choices:
      count = kept[choice.group]
      if count == choice.size:
        continue
      counts = self.by_layer(choice, count)
      if counts is None:
        raise UserError(
          f'prune.layer_profile={self.targets.layer_profile} takes more of the '
          f'{kind(choice.group)} of a layer than it can lose: of '
          f'{choice.size}, {choice.size - count} go on average and at least '
          f'{choice.fewest} stay; choose shares that differ less, or prune less'
        )
      keep[choice.group] = counts
    return dataclasses.replace(self, keep=keep)

  def keep_at(self, progress: float) -> dict[str, tuple[int, ...]]:
    """Counts when a share `progress` of the ramp is done; exact at 1.

    The k-th group of n goes at k / (n + 1/2): rounded down, as the reference
    does, from the largest target that ends in n. Half of 9 heads ends in 4,
    and the k-th goes where 9 s(t) reaches k.
    """

    def removed(most: int) -> int:
      return min(most, math.floor(progress * (most + 0.5)))

    keep = {
      group: tuple(
        size - removed(size - k)
        for size, k in zip(self.sizes(group), kept, strict=True)
      )
      for group, kept in self.keep.items()
    }
    if LAYERS in keep:
      gone = self.going[: removed(len(self.going))]
      layers = range(len(self.config.layers))
      keep[LAYERS] = tuple(int(i not in gone) for i in layers)
    return keep

  @property
  def going(self) -> list[int]:
    """The layers that stand for those that go, in their order."""
    return [i for i, kept in enumerate(self.keep.get(LAYERS, ())) if not kept]

  def layers_in(self, count: int) -> list[int]:
    """The layers that stand for those of arrays with so many."""
    layers = range(len(self.config.layers))
    gone = self.going[: len(layers) - count]
    return [i for i in layers if i not in gone]

  def protected_in(self, count: int) -> list[bool]:
    """Of arrays with so many layers, which ones are protected."""
    prunable = set(self.prunable_layers)
    return [i not in prunable for i in self.layers_in(count)]

  def counts_in(
    self, keep: Mapping[str, tuple[int, ...]], count: int
  ) -> dict[str, tuple[int, ...]]:
    """Of counts by layer, those of arrays with so many layers."""
    layers = self.layers_in(count)
    return {group: tuple(n[i] for i in layers) for group, n in keep.items()}

  def sparsity(self, keep: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """The share of groups of each kind, and of all parameters, that is gone.

    Groups are those of the layers that are not protected, whether or not they
    have lost any; heads and channels are those of the layers that are left. A
    kind that is not pruned has lost 0; `layers` are there if they are pruned.

    Args:
      keep: counts by layer of the model, or of those that are in the arrays.
    """
    result = {'heads': 0.0, 'channels': 0.0}
    keep = self._of_all(keep)
    stay = keep.get(LAYERS, (1,) * len(self.config.layers))
    for group, kept in keep.items():
      sizes, layers = self.sizes(group), self.prunable_layers
      if group != LAYERS:
        layers = [i for i in layers if stay[i]]
      total, left = (sum(x[i] for i in layers) for x in (sizes, kept))
      result[kind(group)] = 1 - left / total
    parameters = with_kept(self.config, keep).num_parameters
    result['params'] = 1 - parameters / self.config.num_parameters
    return result

  def _of_all(
    self, keep: Mapping[str, tuple[int, ...]]
  ) -> dict[str, tuple[int, ...]]:
    """Counts by layer of the model: nothing of those that are in no array."""
    there = self.layers_in(len(next(iter(keep.values()), self.config.layers)))
    places = {i: place for place, i in enumerate(there)}
    layers = range(len(self.config.layers))
    return {
      group: tuple(n[places[i]] if i in places else 0 for i in layers)
      for group, n in keep.items()
    }

  def targets_by_kind(self) -> dict[str, float | None]:
    """What was asked for, in the units of `sparsity`; None if not asked."""
    if self.share is not None:
      asked = {
        'heads': None,
        'channels': None,
        'params': round(1 - self.share, 9),
      }
      return asked | {kind(g): None for g in self.keep if g == LAYERS}
    layers = self.targets.layers_target or None
    own = {LAYERS: layers} if LAYERS in self.targets.groups else {}
    if self.targets.by_size or self.targets.unit == 'params':
      share = None if self.targets.by_size else self.targets.share
      return {'heads': None, 'channels': None, 'params': share} | own
    asked = {kind(g): self.targets.of(g) for g in self.targets.groups}
    return {'heads': 0.0, 'channels': 0.0, 'params': None} | asked
