"""prune.speedup: the largest size that is so many times as fast, measured.

Speed is that of the command `benchmark`: a model with random weights of each
size takes turns with the dense one, on one device.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError, first_line
from lorapr_jax.eval.benchmark import (
  NEW_TOKENS,
  PROMPT_TOKENS,
  REPEATS,
  speedup,
)
from lorapr_jax.eval.latency import paired_generation
from lorapr_jax.eval.remembered import remembered
from lorapr_jax.hf.load import load_or_draw
from lorapr_jax.models.compute import Compute, resolve_dtype
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.trees import param_shapes
from lorapr_jax.pruning.fit import nothing_smaller
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.sizes import plan_sizes
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.processor import describe
from lorapr_jax.runtime.terminal import say

# Part of the key. Raise it when a change of code changes what is measured.
_FORMAT = 1
# Sizes to choose from, but of whole layers alone, of which there are so many:
# six of them are measured at most.
_SIZES = 32
# Sequences at a time.
_BATCH = 1


def plan_targets(
  config: ModelConfig,
  targets: Targets,
  devices: Sequence[jax.Device] = (),
  measured: Mapping[str, Sequence[int]] | None = None,
) -> PruningPlan:
  """The plan of any targets; what a speed-up comes to is measured.

  All processes of a run get the same plan: the first one measures.

  Args:
    config: the sizes before pruning.
    targets: what was asked for.
    devices: of the run; empty: the default ones.
    measured: what was kept by a plan that was measured before, for a run that
      goes on; None: it is measured, or read from the cache.

  Raises:
    UserError: if it is beyond what can be pruned, or cannot be measured.
  """
  if targets.speedup is None:
    return plan_pruning(config, targets)
  alone = targets.groups == (LAYERS,)
  number = len(config.layers) if alone else _SIZES
  plans = plan_sizes(config, targets, number)
  if not plans:
    raise nothing_smaller(f'prune.speedup={targets.speedup}')
  if measured is not None:
    before = {group: tuple(kept) for group, kept in measured.items()}
    for plan in plans:
      if plan.keep == before:
        return plan
    raise UserError(
      'the counts that were measured when this run began are none of those '
      f'that prune.speedup={targets.speedup} chooses from now: go on with the '
      'mesh.tensor of then, or choose another --workdir'
    )
  phase, device = targets.speedup_of, _to_time(devices or jax.devices())

  def measure(smaller: ModelConfig) -> float:
    return measured_speedup(config, smaller, phase, device)

  return plans[
    processes.from_first(lambda: _search(plans, measure, describe(device)))
  ]


def _to_time(devices: Sequence[jax.Device]) -> jax.Device:
  """The first of the devices that is here; if none is, the first."""
  here = jax.local_devices()
  return next((x for x in devices if x in here), devices[0])


def _search(
  plans: Sequence[PruningPlan],
  measure: Callable[[ModelConfig], float],
  device: str,
) -> int:
  """The first plan, of ever smaller sizes, that is fast enough, by bisection.

  Raises:
    UserError: if the last one is not.
  """
  targets, dense = plans[0].targets, plans[0].config.num_parameters
  phase, found = targets.speedup_of, {}

  def is_enough(i: int) -> bool:
    smaller = plans[i].pruned_config
    found[i] = measure(smaller)
    say(
      f'{smaller.num_parameters:,} of {dense:,} parameters: {found[i]:.2f} '
      'times as fast',
      error=True,
    )
    return found[i] >= targets.speedup

  say(
    f'prune.speedup: {phase} is timed on {device}, as benchmark does it',
    error=True,
  )
  last = len(plans) - 1
  if not is_enough(last):
    most = math.floor(found[last] * 100) / 100
    raise UserError(
      f'prune.speedup={targets.speedup} of {phase} is beyond what can be '
      f'pruned; the most that was measured on {device} is {most:.2f}, of the '
      'smallest size (at least one of each group is kept, embeddings and '
      'protected layers stay)'
    )
  return bisect.bisect_left(range(last), True, key=is_enough)


def measured_speedup(
  dense: ModelConfig, smaller: ModelConfig, phase: str, device: jax.Device
) -> float:
  """How many times as fast the smaller model is, from the cache if it is there.

  Args:
    dense: the sizes that it is compared with.
    smaller: its own.
    phase: decode or prefill.
    device: what they are timed on.

  Raises:
    UserError: if the device is not here, or has no room for both.
  """
  new = NEW_TOKENS if phase == 'decode' else 1
  new = min(new, dense.longest // 2)
  how = {
    'batch_size': _BATCH,
    'prompt_tokens': min(PROMPT_TOKENS, dense.longest - new),
    'new_tokens': new,
    'repeats': REPEATS,
  }
  dtype = resolve_dtype('dtype', 'auto', device.platform)
  models = {'model': smaller, 'against': dense}
  # All that the figure depends on.
  parts = {
    'format': _FORMAT,
    'device': (device.platform, describe(device)),
    'jax': jax.__version__,
    'models': {name: repr(config) for name, config in models.items()},
    'dtype': dtype.name,
    'phase': phase,
    **how,
  }

  def measure() -> dict[str, Any]:
    times = _times(models, device, dtype, how)
    return {'speedup': speedup(times, phase)}

  return remembered('speedup', parts, measure)['speedup']


def _times(
  models: Mapping[str, ModelConfig],
  device: jax.Device,
  dtype: Any,
  how: Mapping[str, int],
) -> dict[str, dict[str, list[float]]]:
  """`paired_generation` of models with random weights."""
  if device not in jax.local_devices():
    raise UserError(
      f'prune.speedup: there is no {describe(device)} here to be timed, and '
      'the cache has no figures of one: use prune.target or prune.fit'
    )
  place, drawn = SingleDeviceSharding(device), {}
  try:
    for name, config in models.items():
      places = jax.tree.map(lambda _: place, param_shapes(config, dtype))
      params = load_or_draw(None, config, places, dtype, seed=0)
      drawn[name] = params, Compute(config, dtype=dtype)
    return paired_generation(drawn, **how)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f'prune.speedup: {describe(device)} cannot time a model of '
      f'{models["against"].num_parameters:,} parameters beside a smaller one '
      f'({first_line(error)}): use prune.target or prune.fit'
    ) from None
