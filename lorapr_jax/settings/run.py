"""A ConfigDict (configs/default.py) split into frozen dataclasses, checked.

Nothing here reads weights or text: a mistake stops a run before any work.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.data.packing import PACKINGS
from lorapr_jax.data.sources import parse_mixture, parse_spec
from lorapr_jax.data.templates import Template
from lorapr_jax.errors import (
  MeshError,
  UserError,
  choose,
)
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.layout import resolve_layout, resolve_model_type
from lorapr_jax.hf.load import load_config
from lorapr_jax.models.compute import (
  DTYPES,
  Compute,
  resolve_dtype,
)
from lorapr_jax.models.config import LlamaConfig, LoraConfig
from lorapr_jax.models.kernels import check_attention
from lorapr_jax.models.lora import INPUTS, terms_of
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.compensation import (
  NONE,
  REPAIRED,
  RIDGE,
  Compensation,
)
from lorapr_jax.pruning.groups import couplings, kind
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.pruning.milestones import Milestones, parse_shrink
from lorapr_jax.pruning.schedule import PruneSchedule
from lorapr_jax.pruning.targets import PruningPlan, Targets, plan_pruning
from lorapr_jax.runtime.paths import path_of
from lorapr_jax.runtime.sharding import divisors, make_mesh, mesh_sizes
from lorapr_jax.settings.devices import (
  resolve_compiler_options,
  resolve_loss_chunk,
  resolve_matmul_dtype,
  resolve_remat,
)
from lorapr_jax.settings.sections import (
  DataSettings,
  ExportSettings,
  LogSettings,
  RecoverSettings,
  ReportSettings,
  TrainSettings,
)

ORDERS = ('joint', 'prune_then_tune', 'none')
INT8 = 'int8'


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """All that a run depends on.

  Attributes:
    model_path: the base's folder, or None for random weights.
    base_dtype: of the frozen weights that are not quantised.
    compute: what the compiled functions are specialised to: the base in memory.
    order: one of ORDERS.
    plan: what will be left, of the base as it is; None if nothing is pruned.
    schedule: of joint pruning.
    calibration_steps: of the other orders.
    cuts: the steps before which masked groups are cut out on the way.
    compensation: of every pruning step; None for none.
    mesh: sizes of data, fsdp, sequence, tensor.
    devices: that the mesh is made of, all of one kind.
  """

  model_path: Path | None
  base_dtype: Any
  compute: Compute
  data: DataSettings
  train: TrainSettings
  recover: RecoverSettings
  order: str
  plan: PruningPlan | None
  schedule: PruneSchedule
  calibration_steps: int
  cuts: tuple[int, ...]
  compensation: Compensation | None
  criterion: Criterion
  mesh: dict[str, int]
  devices: tuple[jax.Device, ...]
  export: ExportSettings
  log: LogSettings
  report: ReportSettings

  @property
  def device_mesh(self) -> Mesh:
    """The mesh of the devices."""
    return make_mesh(self.mesh, self.devices)

  @property
  def dense(self) -> LlamaConfig:
    """The sizes of the base as it is."""
    return self.compute.config.dequantized


def _quantized(
  base_dtype: str, compensation: Compensation | None
) -> tuple[str, ...]:
  """The projections of the base that are held in int8.

  Those that compensation repairs are not: a repair would be rounded to int8
  each time.
  """
  choose('model.base_dtype', base_dtype, (*DTYPES, INT8))
  if base_dtype != INT8:
    return ()
  if compensation:
    return tuple(x for x in LORA_TARGETS if x not in REPAIRED.values())
  return LORA_TARGETS


def split_config(
  config: config_dict.ConfigDict, devices: Sequence[jax.Device] | None = None
) -> RunSettings:
  """Splits and checks a config.

  Args:
    config: see configs/default.py.
    devices: that the run is for; None: all of this machine or pod.

  Raises:
    UserError: naming the key whose value is impossible.
  """
  model, prune = config.model, config.prune
  devices = tuple(devices or jax.devices())
  platform = devices[0].platform
  mesh = mesh_sizes(**config.mesh, devices=len(devices))
  sizes, lora, plan = split_model(config, mesh['tensor'])
  train = TrainSettings(**config.train)
  recover = RecoverSettings(**config.recover)
  data = _data_settings(config.data, train, recover)
  dtype = resolve_dtype('model.compute_dtype', model.compute_dtype, platform)
  for key, length in (
    ('train.seq_len', train.seq_len),
    ('data.eval_seq_len', data.eval_seq_len),
  ):
    if length > sizes.max_positions:
      raise UserError(
        f'{key} is {length}, but the model has {sizes.max_positions} '
        'positions (max_position_embeddings)'
      )
    if key == 'train.seq_len' or data.eval:
      if length % mesh['sequence']:
        both = math.gcd(length, len(devices))
        raise MeshError(
          f'mesh.sequence={mesh["sequence"]} does not divide the {length} '
          f'tokens of {key}: {divisors(both, both)} would do'
        )
      check_attention(
        model.attention,
        key,
        length,
        sizes.head_dim,
        dtype,
        devices[0],
        mesh['sequence'],
      )
  if train.distill:
    _check_teacher(train, prune.order, sizes.vocab_size)
  criterion = Criterion(
    name=prune.criterion,
    score=prune.score,
    lora_gradient=prune.lora_gradient,
    norm=prune.norm,
    decay=prune.decay,
  )
  if sizes.quantized and criterion.needs == 'base_grads':
    raise UserError(
      f'prune.criterion={criterion.name} needs gradients of the base, which '
      'model.base_dtype=int8 has none of: use prune.criterion=lora'
    )
  export = _export_settings(config, sizes, plan)
  compute = Compute(
    config=sizes,
    lora=lora,
    dtype=dtype,
    matmul_dtype=resolve_matmul_dtype(model.matmul_dtype, dtype, platform),
    attention=model.attention,
    remat=resolve_remat(model.remat, platform),
    scan_layers=model.scan_layers,
    loss_chunk=resolve_loss_chunk(train, mesh, platform),
    clip_norm=train.clip_norm,
    distill=train.distill,
    compiler_options=resolve_compiler_options(train.compiler_options, devices),
  )
  schedule = PruneSchedule(
    train.steps, prune.every, prune.warmup, prune.cooldown
  )
  return RunSettings(
    model_path=path_of(model.path) if model.path else None,
    base_dtype=resolve_dtype(
      'model.base_dtype',
      'auto' if model.base_dtype == INT8 else model.base_dtype,
      platform,
    ),
    compute=compute,
    data=data,
    train=train,
    recover=recover,
    order=prune.order,
    plan=plan,
    schedule=schedule,
    calibration_steps=_calibration_steps(prune, train),
    cuts=_cuts(prune, plan, schedule, train.seq_len),
    compensation=resolve_compensation(prune, plan),
    criterion=criterion,
    mesh=mesh,
    devices=devices,
    export=export,
    log=LogSettings(**config.log),
    report=ReportSettings(**config.report),
  )


def split_model(
  config: config_dict.ConfigDict,
  tensor_parallel: int,
  keep: Mapping[str, Sequence[int]] | None = None,
) -> tuple[LlamaConfig, LoraConfig, PruningPlan | None]:
  """The sizes, the adapters and the plan: what a checkpoint's shapes follow.

  The sizes are the base's in memory: they say what is quantised, and those of
  the plan do not.

  Args:
    config: its sections model, lora and prune are read.
    tensor_parallel: the size of the mesh axis that splits heads.
    keep: that of a run's plan; None: it is planned.
  """
  sizes = _model_sizes(config.model)
  for shape in sizes.layers:
    if shape.num_kv_heads % tensor_parallel:
      raise MeshError(
        f'mesh.tensor={tensor_parallel} does not divide the '
        f'{shape.num_kv_heads} KV heads of the model: '
        f'{divisors(shape.num_kv_heads, tensor_parallel)} would do'
      )
  lora = LoraConfig(
    rank=config.lora.rank,
    alpha=config.lora.alpha,
    dropout=config.lora.dropout,
    targets=_lora_targets(config.lora.targets),
  )
  if keep is None:
    plan = _plan(sizes, config.prune, tensor_parallel, lora)
  else:
    counts = {group: tuple(n) for group, n in keep.items()}
    targets = _targets(config.prune, tensor_parallel)
    plan = PruningPlan(sizes, targets, counts) if counts else None
  compensation = resolve_compensation(config.prune, plan)
  quantized = _quantized(config.model.base_dtype, compensation)
  return dataclasses.replace(sizes, quantized=quantized), lora, plan


def _export_settings(
  config: config_dict.ConfigDict, sizes: LlamaConfig, plan: PruningPlan | None
) -> ExportSettings:
  export = ExportSettings(**config.export)
  final = sizes
  if plan and export.layout != 'padded':
    final = plan.pruned_config
  resolve_layout(final, export.layout)
  resolve_model_type(final, export.layout, export.model_type)
  return export


def _model_sizes(model: config_dict.ConfigDict) -> LlamaConfig:
  if bool(model.path) == bool(model.sizes):
    raise UserError(
      'model.path is a Hugging Face folder, or empty with model.sizes for '
      'random weights: set one of them'
    )
  if model.path:
    return load_config(model.path)
  try:
    return config_from_hf(model.sizes.to_dict())
  except UserError as error:
    reason = str(error).removeprefix('config.json: ')
    raise UserError(f'model.sizes: {reason}') from None


def _data_settings(
  data: config_dict.ConfigDict, train: TrainSettings, recover: RecoverSettings
) -> DataSettings:
  if data.eval:
    parse_spec(data.eval)
  if not data.train:
    raise UserError('data.train is empty: give a data spec such as file:PATH')
  specs = [spec for spec in (data.train, recover.data) if spec]
  parts = [part for spec in specs for part in parse_mixture(spec)]
  choose('data.packing', data.packing, PACKINGS)
  if data.max_tokens and data.max_tokens < train.seq_len:
    raise UserError(
      f'data.max_tokens is {data.max_tokens}: 0 for all, or at least the '
      f'{train.seq_len} of train.seq_len'
    )
  template = Template(data.template, data.response, data.loss)
  if data.template and not any(template.applies_to(p.spec) for p in parts):
    raise UserError(
      'data.template has no records to fill in: '
      f'{" and ".join(specs)} is plain text (text files, the demo, and specs '
      'that name their column are)'
    )
  if data.eval_every < 0 or (data.eval_every and not data.eval):
    raise UserError(
      f'data.eval_every is {data.eval_every}: 0, or a number of steps, with '
      'data.eval'
    )
  if min(data.eval_seq_len, data.eval_windows) < 0 or data.eval_seq_len == 1:
    raise UserError(
      f'data.eval_seq_len {data.eval_seq_len} and data.eval_windows '
      f'{data.eval_windows}: 0, or a length above 1 and a number of windows'
    )
  return DataSettings(
    train=data.train,
    shuffle=data.shuffle,
    packing=data.packing,
    max_tokens=data.max_tokens,
    template=template,
    eval=data.eval,
    eval_seq_len=data.eval_seq_len or train.seq_len,
    eval_windows=data.eval_windows,
    eval_every=data.eval_every,
  )


def _calibration_steps(
  prune: config_dict.ConfigDict, train: TrainSettings
) -> int:
  steps = prune.calibration_steps
  if steps < 1:
    raise UserError(f'prune.calibration_steps is {steps}: it must be positive')
  if prune.order == 'prune_then_tune' and steps >= train.steps:
    raise UserError(
      f'prune.calibration_steps {steps} leaves none of train.steps '
      f'{train.steps} to tune: lower it, or use prune.order=none'
    )
  return steps


def _cuts(
  prune: config_dict.ConfigDict,
  plan: PruningPlan | None,
  schedule: PruneSchedule,
  seq_len: int,
) -> tuple[int, ...]:
  shrink = parse_shrink(prune.shrink)
  if plan is None or prune.order != 'joint':
    reason = 'there is no ramp: use prune.shrink=end, or prune.order=joint'
  elif prune.criterion == 'random':
    reason = 'scores are drawn for the sizes at the start: use prune.shrink=end'
  else:
    return Milestones(plan, schedule).cuts(shrink, seq_len)
  if isinstance(shrink, tuple):
    raise UserError(f'prune.shrink is {prune.shrink!r}, but {reason}')
  return ()


def resolve_compensation(
  prune: config_dict.ConfigDict, plan: PruningPlan | None
) -> Compensation | None:
  """How what is masked is made up for; None where nothing is.

  Args:
    prune: the config's section.
    plan: what will be left.
  """
  if 'compensate' not in prune:  # The run is older than the key.
    return None
  choose(
    'prune.compensate',
    prune.compensate,
    (RIDGE, NONE),
    removed={'bias': 'prune.compensate=ridge'},
  )
  compensation = Compensation(
    prune.compensate_damping, prune.compensate_batches
  )
  return compensation if plan and prune.compensate != NONE else None


def _check_teacher(train: TrainSettings, order: str, vocab_size: int) -> None:
  """Refuses distillation that would teach nothing."""
  if train.distill_top_k >= vocab_size:
    raise UserError(
      f'train.distill_top_k is {train.distill_top_k}, and the model has '
      f'{vocab_size} tokens: choose fewer, such as 64'
    )
  if train.distill == 1 and order != 'joint':
    raise UserError(
      f'train.distill=1 with prune.order={order}: while importance is '
      'measured the model is its own teacher, and gradients are zero: use a '
      'smaller share'
    )


def _lora_targets(names: str) -> tuple[str, ...]:
  if names == 'all':
    return LORA_TARGETS
  return tuple(name.strip() for name in names.split(',') if name.strip())


def _targets(prune: config_dict.ConfigDict, tensor_parallel: int) -> Targets:
  names = {field.name for field in dataclasses.fields(Targets)}
  # A run that is older than a key has none of it.
  asked = {name: prune[name] for name in names & set(prune)}
  return Targets(tensor_parallel=tensor_parallel, **asked)


def _plan(
  sizes: LlamaConfig,
  prune: config_dict.ConfigDict,
  tensor_parallel: int,
  lora: LoraConfig,
) -> PruningPlan | None:
  choose('prune.order', prune.order, ORDERS)
  plan = plan_pruning(sizes, _targets(prune, tensor_parallel))
  if not plan.keep:
    if prune.order != 'joint':
      raise UserError(
        f'prune.target is 0: nothing would be pruned by '
        f'prune.order={prune.order}; LoRA alone is trained by '
        'prune.order=joint'
      )
    return None
  if prune.criterion == 'lora':
    adapters = block_axes(sizes, lora)['lora']
    for group in plan.keep:
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
  return plan
