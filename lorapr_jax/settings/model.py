"""What a run prunes: its model, adapters and plan.

A checkpoint's shapes follow from these, so that an export of a run needs no
other section of its config.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lorapr_jax.axes import LAYERS, LORA_TARGETS
from lorapr_jax.errors import MeshError, UserError, choose
from lorapr_jax.eval.speedup import plan_targets
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.layout import heads_must_divide
from lorapr_jax.hf.load import load_config
from lorapr_jax.models.compute import DTYPES, resolve_dtype
from lorapr_jax.models.config import LoraConfig, ModelConfig
from lorapr_jax.models.decoder import REMAT_POLICIES
from lorapr_jax.models.kernels import ATTENTION
from lorapr_jax.models.lora import INPUTS, terms_of
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.compensation import NONE, REPAIRED, RIDGE
from lorapr_jax.pruning.groups import couplings, kind
from lorapr_jax.pruning.importance import OBS, SUM, Criterion
from lorapr_jax.pruning.ladder import plan_ladder
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.schedule import AtOnce, PruneSchedule, Schedule
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.runtime.paths import path_of
from lorapr_jax.runtime.sharding import divisors
from lorapr_jax.settings.sections import ExportSettings, read_section

ORDERS = ('joint', 'prune_then_tune', 'none')
INT8 = 'int8'


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  """The `model.*` keys."""

  path: str = ''
  sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  base_dtype: str = 'auto'
  compute_dtype: str = 'auto'
  matmul_dtype: str = 'auto'
  attention: str = 'auto'
  remat: str = 'blocks'
  scan_layers: bool = True

  def __post_init__(self):
    choose('model.base_dtype', self.base_dtype, (*DTYPES, INT8))
    choose('model.matmul_dtype', self.matmul_dtype, DTYPES)
    choose('model.attention', self.attention, ATTENTION)
    choose('model.remat', self.remat, REMAT_POLICIES)
    if bool(self.path) == bool(self.sizes):
      raise UserError(
        'model.path is a Hugging Face folder, or empty with model.sizes for '
        'random weights: set one of them'
      )

  @property
  def folder(self) -> Path | None:
    """Of the base; None for random weights."""
    return path_of(self.path) if self.path else None

  def read_sizes(self) -> ModelConfig:
    """From the folder's config.json, or from `sizes`.

    Raises:
      UserError: naming the key that is not supported.
    """
    if self.path:
      return load_config(self.path)
    try:
      return config_from_hf(dict(self.sizes))
    except UserError as error:
      reason = str(error).removeprefix('config.json: ')
      raise UserError(f'model.sizes: {reason}') from None


@dataclasses.dataclass(frozen=True)
class LoraSettings:
  """The `lora.*` keys."""

  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.05
  targets: str = 'all'

  @property
  def config(self) -> LoraConfig:
    """The adapters that the model gets."""
    names = (name.strip() for name in self.targets.split(','))
    return LoraConfig(
      rank=self.rank,
      alpha=self.alpha,
      dropout=self.dropout,
      targets=LORA_TARGETS
      if self.targets == 'all'
      else tuple(filter(None, names)),
    )


@dataclasses.dataclass(frozen=True)
class PruneSettings:
  """The `prune.*` keys."""

  criterion: str = OBS
  order: str = 'prune_then_tune'
  calibration_steps: int = 10
  rung_steps: str = ''
  target: float | None = Targets.target
  heads_target: float | None = Targets.heads_target
  channels_target: float | None = Targets.channels_target
  layers_target: float = Targets.layers_target
  layers_criterion: str = Criterion.layers
  unit: str = Targets.unit
  fit: str = Targets.fit
  fit_context: int = Targets.fit_context
  fit_batch: int = Targets.fit_batch
  fit_dtype: str = Targets.fit_dtype
  speedup: float | None = Targets.speedup
  speedup_of: str = Targets.speedup_of
  heads: str = Targets.heads
  channels: bool = Targets.channels
  every: int = 10
  warmup: float = 0.1
  cooldown: float = 0.1
  compensate: str = RIDGE
  compensate_batches: int = 0
  compensate_data: str = ''
  shrink: str = 'end'
  protect: str = Targets.protect
  layer_profile: str = Targets.layer_profile
  heads_multiple_of: int = Targets.heads_multiple_of
  channels_multiple_of: int = Targets.channels_multiple_of
  score: str = Criterion.score
  norm: bool = Criterion.norm
  lora_gradient: str = Criterion.lora_gradient
  decay: float = Criterion.decay

  def __post_init__(self):
    choose('prune.order', self.order, ORDERS)
    choose(
      'prune.compensate',
      self.compensate,
      (RIDGE, NONE),
      removed={'bias': 'prune.compensate=ridge'},
    )
    if self.compensate_batches < 0:
      raise UserError(
        f'prune.compensate_batches is {self.compensate_batches}: 0, or a '
        'number of batches'
      )
    if self.calibration_steps < 1:
      raise UserError(
        f'prune.calibration_steps is {self.calibration_steps}: it must be '
        'positive'
      )

  def targets(self, tensor_parallel: int, heads_divide: int = 0) -> Targets:
    """How much is pruned; the arguments are as of `Targets`."""
    names = {field.name for field in dataclasses.fields(Targets)}
    asked = {name: x for name, x in vars(self).items() if name in names}
    return Targets(
      tensor_parallel=tensor_parallel, heads_divide=heads_divide, **asked
    )

  def ranking(self) -> Criterion:
    """How groups are ranked."""
    return Criterion(
      name=self.criterion,
      score=self.score,
      lora_gradient=self.lora_gradient,
      norm=self.norm,
      decay=self.decay,
      layers=self.layers_criterion,
    )

  @property
  def repairs(self) -> bool:
    """Whether what survives is repaired."""
    return self.compensate == RIDGE

  def schedule(self, steps: int) -> Schedule:
    """When groups are masked, in a run of so many steps with LoRA."""
    if self.order == 'joint':
      return PruneSchedule(steps, self.every, self.warmup, self.cooldown)
    steps = self.calibration_steps
    return AtOnce(steps, (steps - 1,))


class PlannedModel(NamedTuple):
  """The model of a run, and what will be left of it.

  Attributes:
    settings: the config's section model.
    prune: the config's section prune.
    config: the sizes of the base, which say what is quantised.
    lora: the adapters'.
    plan: what will be left; None if nothing is pruned.
    base_dtype: of the weights that are not quantised.
    ladder: what is left at each share of export.ladder.
  """

  settings: ModelSettings
  prune: PruneSettings
  config: ModelConfig
  lora: LoraConfig
  plan: PruningPlan | None
  base_dtype: Any
  ladder: tuple[PruningPlan, ...] = ()


def plan_model(
  config: Mapping[str, Any],
  tensor_parallel: int,
  devices: Sequence[jax.Device] = (),
  keep: Mapping[str, Sequence[int]] | None = None,
  measured: Mapping[str, Sequence[int]] | None = None,
) -> PlannedModel:
  """The model of a config; no weights are read.

  Args:
    config: its sections model, lora, prune and export are read.
    tensor_parallel: the size of the mesh axis that splits heads.
    devices: of the run; empty: the default ones.
    keep: that of a run's plan, without its ladder; None: it is planned.
    measured: as of `plan_targets`.

  Raises:
    UserError: naming the key whose value is impossible.
  """
  settings = read_section(ModelSettings, config['model'])
  lora = read_section(LoraSettings, config['lora']).config
  prune = read_section(PruneSettings, config['prune'])
  sizes = settings.read_sizes()
  for shape in sizes.layers:
    if shape.num_kv_heads % tensor_parallel:
      raise MeshError(
        f'mesh.tensor={tensor_parallel} does not divide the '
        f'{shape.num_kv_heads} KV heads of the model: '
        f'{divisors(shape.num_kv_heads, tensor_parallel)} would do'
      )
  export = read_section(ExportSettings, config['export'])
  uniform = export.layout == 'uniform' and heads_must_divide(sizes)
  targets = prune.targets(tensor_parallel, sizes.embed_dim * uniform)
  if keep is None:
    plan = plan_targets(sizes, targets, devices, measured)
    _check_plan(plan, prune, lora)
  else:
    counts = {group: tuple(n) for group, n in keep.items()}
    plan = PruningPlan(sizes, targets, counts)
  ladder = plan_ladder(plan, export.shares if keep is None else ())
  if not plan.keep:
    plan = None
  dtype, quantized = settings.base_dtype, ()
  if dtype == INT8:
    # A repair would be rounded to int8 each time.
    repairs = prune.repairs and plan and plan.within_layers
    kept = REPAIRED.values() if repairs else ()
    dtype = 'auto'
    quantized = tuple(name for name in LORA_TARGETS if name not in kept)
  return PlannedModel(
    settings,
    prune,
    dataclasses.replace(sizes, quantized=quantized),
    lora,
    plan,
    resolve_dtype(
      'model.base_dtype', dtype, devices[0].platform if devices else None
    ),
    ladder,
  )


def _check_plan(
  plan: PruningPlan, prune: PruneSettings, lora: LoraConfig
) -> None:
  """Refuses what could not be pruned, or not be ranked."""
  if not plan.keep and prune.order == 'none':
    raise UserError(
      'prune.target is 0: by prune.order=none nothing would be pruned and '
      'nothing trained; with another order LoRA is trained alone'
    )
  if prune.criterion != 'lora':
    return
  adapters = block_axes(plan.config, lora)['lora']
  for group in plan.keep:
    if group == LAYERS and prune.layers_criterion != SUM:
      continue
    paths = [path.split('.') for path, _ in couplings(adapters, group)]
    targets = f'lora.targets {",".join(lora.targets)}'
    if not paths:
      raise UserError(
        f'{targets} has no projection of the {kind(group)}: '
        'prune.criterion=lora cannot rank them'
      )
    terms = {terms_of(prune.lora_gradient, *path[:2]) for path in paths}
    if prune.order != 'joint' and terms == {INPUTS}:
      raise UserError(
        f'{targets} has of the {kind(group)} what reads them alone, which '
        'prune.lora_gradient=own cannot score while B is zero, as it stays '
        f'under prune.order={prune.order}: use prune.lora_gradient=full'
      )
