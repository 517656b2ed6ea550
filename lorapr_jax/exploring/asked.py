"""What is explored: ways, sizes, and what each leaves. No weights are read."""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from ml_collections import config_dict

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError, choose
from lorapr_jax.eval.benchmark import NEW_TOKENS, PROMPT_TOKENS
from lorapr_jax.exploring.ways import (
  WAYS,
  Dense,
  Settings,
  Size,
  Sizes,
  asked_as,
  split_amount,
  split_sizes,
)
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.fit import check_amount
from lorapr_jax.pruning.groups import group_size, with_kept
from lorapr_jax.pruning.importance import OBS
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.profile import parse_profile
from lorapr_jax.settings.model import INT8, ModelSettings
from lorapr_jax.settings.run import RunSettings
from lorapr_jax.settings.sections import read_section

# What is measured of the dense model: itself, and what a user may do instead.
DENSE, QUANTIZED = 'dense', {'int8': jnp.int8, 'int4': jnp.int4}
# Each size is chosen and repaired at once, and nothing is trained.
_SETTINGS = {
  'prune': {
    'criterion': OBS,
    'order': 'none',
    'compensate': 'ridge',
    'shrink': 'end',
    'unit': 'params',
    'target': 0.0,
    'heads_target': None,
    'channels_target': None,
    'layers_target': 0.0,
    'fit': '',
    'speedup': None,
    'rung_steps': '',
  },
  'export': {'ladder': ''},
  'train': {'distill': 0.0},
  'recover': {'steps': 0, 'data': ''},
}


@dataclasses.dataclass(frozen=True)
class Asked:
  """What is explored, all of it checked.

  Attributes:
    config: the run's settings, whatever the size.
    settings: what follows from them, at one of the sizes: one that repairs, if
      any does.
    plans: what each size leaves, by way and from the largest down.
    asks: the `prune.*` settings of each size.
    left_out: the names of sizes that one way has and another has not; of what
      is to fit or to be so fast with the reason.
    context: tokens of the KV cache that is shown.
    latency: whether the sizes are timed.
  """

  config: dict[str, Any]
  settings: RunSettings
  plans: dict[Size, PruningPlan]
  asks: dict[Size, Settings]
  left_out: tuple[str, ...]
  context: int
  latency: bool

  @property
  def dense(self) -> ModelConfig:
    """The sizes of the model before pruning."""
    return self.settings.compute.config

  @property
  def sizes(self) -> tuple[Size, ...]:
    """All that is measured, in order."""
    return (Size(DENSE), *map(Size, QUANTIZED), *self.plans)

  @property
  def dtype(self) -> Any:
    """Of exported weights."""
    name = self.settings.export.dtype
    return self.settings.base_dtype if name == 'auto' else jnp.dtype(name)

  @property
  def batches(self) -> range:
    """Of `text`: those that are measured and repaired on."""
    return range(self.settings.pruning.pass_batches)

  @property
  def text(self) -> str:
    """The mixture of these batches."""
    return self.settings.pruning.data or self.settings.data.train

  @property
  def tokens(self) -> int:
    """Of these batches."""
    train = self.settings.train
    return len(self.batches) * train.batch_size * train.seq_len

  @property
  def groups(self) -> tuple[str, ...]:
    """Those that are pruned at any size.

    The arrays of all sizes are alike, so that what runs is compiled once.
    """
    found = (
      group for plan in self.plans.values() for group in plan.targets.groups
    )
    return tuple(dict.fromkeys(found))

  def counts(self, size: Size) -> dict[str, tuple[int, ...]]:
    """How many of each of the groups a size keeps, by layer."""
    keep = self.plans[size].keep
    return {
      group: keep.get(group)
      or tuple(group_size(self.dense, s, group) for s in self.dense.layers)
      for group in self.groups
    }

  def left(self, size: Size, gone: Sequence[int]) -> ModelConfig:
    """The sizes of what is left of a size, whose layers that go are known."""
    if size not in self.plans:
      return self.dense
    keep = self.plans[size].keep
    if LAYERS in keep:
      layers = range(len(self.dense.layers))
      keep = {**keep, LAYERS: tuple(int(i not in gone) for i in layers)}
    return with_kept(self.dense, keep)


def ask(
  config: config_dict.ConfigDict,
  ways: Sequence[str],
  shares: Sequence[float],
  *,
  tokens: int | None = None,
  context: int | None = None,
  latency: bool = False,
) -> Asked:
  """Checks what is to be explored.

  Args:
    config: as of a run. Its own order does not count, nor does a target. What
      prune.fit or prune.speedup come to is one more size.
    ways: of WAYS.
    shares: of the parameters that stay.
    tokens: to measure and repair on, rounded down to micro-batches; None: those
      of the config's calibration.
    context: tokens of the KV cache; None: 4,096, or all positions.
    latency: whether the sizes are timed.

  Raises:
    UserError: naming the flag or key whose value is impossible.
  """
  amount = _amount(config.prune)
  _check_sizes(ways, shares, amount)
  _check_config(config, ways)
  config = config.copy_and_resolve_references()
  for section, keys in _SETTINGS.items():
    for key, value in keys.items():
      config[section][key] = value
  if tokens is not None:
    _set_tokens(config, tokens)
  ways = [way for way in WAYS if way in ways]
  found, left_out = _split(config, ways, shares, amount)
  runs = [run.settings for run in found.values()]
  settings = max(runs, key=lambda x: x.plan.within_layers)
  longest = settings.compute.config.longest
  context = min(4096, longest) if context is None else context
  if not 1 <= context <= longest:
    raise UserError(
      f'--context is {context}: from 1 to the {longest} positions of the model '
      '(max_position_embeddings)'
    )
  if latency:
    _check_timing(settings, longest)
  order = sorted(found, key=lambda size: (ways.index(size.way), -size.share))
  return Asked(
    config.to_dict(),
    settings,
    {size: found[size].settings.plan for size in order},
    {size: found[size].asks for size in order},
    left_out,
    context,
    latency,
  )


def _amount(prune: config_dict.ConfigDict) -> Settings:
  """prune.fit or prune.speedup, where one is set.

  Raises:
    UserError: if both are.
  """
  check_amount({}, prune.fit, prune.speedup)
  keys = ('fit', 'speedup')
  return {key: prune[key] for key in keys if prune[key] not in ('', None)}


def _check_sizes(
  ways: Sequence[str], shares: Sequence[float], amount: Settings
) -> None:
  for way in ways:
    choose('--ways', way, WAYS)
  if not (shares or amount) or not all(0 < share < 1 for share in shares):
    raise UserError(
      f'--sizes is {",".join(map(str, shares))}: shares of the parameters that '
      'stay, each between 0 and 1, such as 0.9,0.7'
    )


def _split(
  config: config_dict.ConfigDict,
  ways: Sequence[str],
  shares: Sequence[float],
  amount: Settings,
) -> tuple[Sizes, tuple[str, ...]]:
  """The runs to all sizes, and which sizes are left out."""
  model = read_section(ModelSettings, config.model).read_sizes()
  dense = Dense.of(model, config.prune.protect)
  found = split_sizes(config, dense, ways, shares)
  sizes = itertools.starmap(Size, itertools.product(ways, shares))
  left_out = [size.name for size in sizes if size not in found]
  if amount:
    more, reasons = split_amount(config, dense, ways, amount)
    found |= more
    for way, reason in reasons.items():
      name = Size(way, asked=asked_as(amount)).name
      left_out.append(f'{name} ({reason})')
  return found, tuple(left_out)


def _check_config(config: config_dict.ConfigDict, ways: Sequence[str]) -> None:
  if not config.data.eval:
    raise UserError(
      'data.eval is empty: give --eval, the text that sizes are measured on'
    )
  if config.model.base_dtype == INT8:
    raise UserError(
      'model.base_dtype is int8: the dense model is measured in int8 beside '
      'the sizes, which are of the model as it is: use model.base_dtype=auto'
    )
  profile = config.prune.layer_profile
  if len({*parse_profile(profile)}) > 1 and {*ways} != {'width'}:
    raise UserError(
      f'prune.layer_profile is {profile}, which is of widths, and where layers '
      'go as a whole it is not known which stay: give --ways=width, or leave '
      'the profile out'
    )


def _set_tokens(config: config_dict.ConfigDict, tokens: int) -> None:
  """Makes each batch one micro-batch, and takes as many as the tokens fill."""
  train, prune = config.train, config.prune
  each = train.micro_batch_size * train.seq_len
  # One micro-batch is kept out of what a repair is fitted to.
  if tokens < 2 * each:
    raise UserError(
      f'--tokens is {tokens}: at least {2 * each}, two micro-batches of '
      f'{train.micro_batch_size} x {train.seq_len} (train.micro_batch_size, '
      'train.seq_len)'
    )
  train.batch_size = train.micro_batch_size
  prune.calibration_steps = prune.compensate_batches = tokens // each


def _check_timing(settings: RunSettings, longest: int) -> None:
  if len(settings.devices) > 1:
    raise UserError(
      f'--latency times one device, and there are {len(settings.devices)}: '
      'leave --latency out, or let JAX see one of them alone'
    )
  if longest < PROMPT_TOKENS + NEW_TOKENS:
    raise UserError(
      f'--latency times {PROMPT_TOKENS} tokens and {NEW_TOKENS} that follow, '
      f'more than the {longest} positions of the model '
      '(max_position_embeddings): leave it out'
    )
