"""What is explored: ways, sizes, and what each leaves. No weights are read."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import config_dict

from lorapr_jax.errors import TargetError, UserError
from lorapr_jax.eval.benchmark import NEW_TOKENS, PROMPT_TOKENS
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.groups import group_size
from lorapr_jax.pruning.importance import OBS
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.settings.model import INT8
from lorapr_jax.settings.run import RunSettings, split_config

# The ways to a size, by name: the `prune.*` settings that each takes.
WAYS: Mapping[str, Mapping[str, Any]] = {'width': {}}
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
  },
  'train': {'distill': 0.0},
  'recover': {'steps': 0, 'data': ''},
}


class Size(NamedTuple):
  """One model that is measured.

  Attributes:
    way: of WAYS, DENSE, or one of QUANTIZED.
    share: of the dense model's parameters.
  """

  way: str
  share: float = 1.0

  @property
  def name(self) -> str:
    """As people see it: width 0.7, or int8."""
    return f'{self.way} {self.share:g}' if self.way in WAYS else self.way

  @property
  def target(self) -> float:
    """`prune.target` under prune.unit=params."""
    return round(1 - self.share, 9)


@dataclasses.dataclass(frozen=True)
class Asked:
  """What is explored, all of it checked.

  Attributes:
    config: the run's settings, whatever the size.
    settings: what follows from them, at the first size.
    plans: what each size leaves, by way and from the largest down.
    context: tokens of the KV cache that is shown.
    latency: whether the sizes are timed.
  """

  config: dict[str, Any]
  settings: RunSettings
  plans: dict[Size, PruningPlan]
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

  def counts(self, size: Size) -> dict[str, tuple[int, ...]]:
    """How many of each kind a size keeps by layer, of all that is pruned.

    It has the groups that lose nothing too, so that sizes differ in counts
    alone.
    """
    plan = self.plans[size]
    return {
      group: plan.keep.get(group)
      or tuple(group_size(self.dense, s, group) for s in self.dense.layers)
      for group in plan.targets.groups
    }


def ask(
  config: config_dict.ConfigDict,
  shares: Sequence[float],
  *,
  tokens: int | None = None,
  context: int | None = None,
  latency: bool = False,
) -> Asked:
  """Checks what is to be explored.

  Args:
    config: as of a run. Its own target and order do not count.
    shares: of the parameters that stay.
    tokens: to measure and repair on, rounded down to micro-batches; None: those
      of the config's calibration.
    context: tokens of the KV cache; None: 4,096, or all positions.
    latency: whether the sizes are timed.

  Raises:
    UserError: naming the flag or key whose value is impossible.
  """
  if not shares or not all(0 < share < 1 for share in shares):
    raise UserError(
      f'--sizes is {",".join(map(str, shares))}: shares of the parameters that '
      'stay, each between 0 and 1, such as 0.9,0.7'
    )
  if not config.data.eval:
    raise UserError(
      'data.eval is empty: give --eval, the text that sizes are measured on'
    )
  if config.model.base_dtype == INT8:
    raise UserError(
      'model.base_dtype is int8: the dense model is measured in int8 beside '
      'the sizes, which are of the model as it is: use model.base_dtype=auto'
    )
  config = config.copy_and_resolve_references()
  for section, keys in _SETTINGS.items():
    for key, value in keys.items():
      config[section][key] = value
  if tokens is not None:
    _set_tokens(config, tokens)
  settings, plans = None, {}
  for way, changes in WAYS.items():
    for share in sorted(set(shares), reverse=True):
      size = Size(way, share)
      found = _split(config, changes, size)
      settings, plans[size] = settings or found, found.plan
  longest = settings.compute.config.longest
  context = min(4096, longest) if context is None else context
  if not 1 <= context <= longest:
    raise UserError(
      f'--context is {context}: from 1 to the {longest} positions of the model '
      '(max_position_embeddings)'
    )
  if latency:
    _check_timing(settings, longest)
  return Asked(config.to_dict(), settings, plans, context, latency)


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


def _split(
  config: config_dict.ConfigDict, way: Mapping[str, Any], size: Size
) -> RunSettings:
  """The settings of a run to a size."""
  config = config.copy_and_resolve_references()
  for key, value in {**way, 'target': size.target}.items():
    config.prune[key] = value
  try:
    return split_config(config)
  except TargetError as error:
    raise UserError(
      f'--sizes: {size.share:g} of the parameters cannot be reached by '
      f'{size.way}; the nearest that can is {1 - error.nearest:g}'
    ) from None


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
