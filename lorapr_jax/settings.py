"""A ConfigDict (configs/default.py) split into frozen dataclasses, checked.

Nothing here reads weights or text: a mistake stops a run before any work.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from lorapr_jax.data.packing import PACKINGS
from lorapr_jax.data.sources import parse_mixture, parse_spec
from lorapr_jax.data.templates import Template
from lorapr_jax.errors import UserError
from lorapr_jax.hf.export import (
  DTYPES,
  GGUF_DTYPES,
  parse_size,
  resolve_layout,
  resolve_model_type,
)
from lorapr_jax.hf.load import load_config
from lorapr_jax.models.axes import LORA_TARGETS
from lorapr_jax.models.config import LlamaConfig, LoraConfig
from lorapr_jax.models.llama import REMAT_POLICIES, block_axes
from lorapr_jax.optimizer import LR_SCHEDULES
from lorapr_jax.pruning.groups import couplings, kind
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.pruning.schedule import PruneSchedule
from lorapr_jax.pruning.targets import PruningPlan, Targets, plan_pruning
from lorapr_jax.sharding import mesh_sizes
from lorapr_jax.steps import StepSettings

ORDERS = ('joint', 'prune_then_tune', 'none')
ROUTES = ('hf', 'gguf', 'peft')
_DTYPES = ('auto', 'float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """The `data.*` keys, with the defaults that depend on others filled in."""

  train: str
  shuffle: bool
  packing: str
  max_tokens: int
  template: Template
  eval: str
  eval_seq_len: int
  eval_windows: int
  eval_every: int

  def is_evaluation_step(self, step: int) -> bool:
    """Whether the perplexity is measured after this step."""
    return self.eval_every > 0 and (step + 1) % self.eval_every == 0


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """The `train.*` keys; see configs/default.py."""

  steps: int
  batch_size: int
  micro_batch_size: int
  seq_len: int
  learning_rate: float
  lr_schedule: str
  clip_norm: float
  seed: int
  loss_chunk: int
  log_every: int
  checkpoint_every: int
  checkpoints_kept: int

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name not in ('seed', 'lr_schedule') and not value > 0:
        raise UserError(f'train.{field.name} is {value}: it must be positive')
    if not math.isfinite(self.learning_rate):
      raise UserError('train.learning_rate is inf: it must be finite')
    if not 0 <= self.seed < 2**32:
      raise UserError(f'train.seed is {self.seed}: it must be in [0, 2^32)')
    if self.seq_len < 2:
      raise UserError('train.seq_len is 1: there is nothing to predict')
    if self.batch_size % self.micro_batch_size:
      raise UserError(
        f'train.batch_size {self.batch_size} is not a multiple of '
        f'train.micro_batch_size {self.micro_batch_size}'
      )
    _choose('train.lr_schedule', self.lr_schedule, LR_SCHEDULES)


@dataclasses.dataclass(frozen=True)
class RecoverSettings:
  """The `recover.*` keys."""

  steps: int
  data: str
  learning_rate: float

  def __post_init__(self):
    if self.steps < 0:
      raise UserError(f'recover.steps is {self.steps}: 0 or a number of steps')
    if not 0 <= self.learning_rate < math.inf:
      raise UserError(
        f'recover.learning_rate is {self.learning_rate}: 0, for '
        'train.learning_rate, or a positive number'
      )
    if self.data:
      parse_mixture(self.data)
      if not self.steps:
        raise UserError(
          f'recover.data is {self.data!r}, but recover.steps is 0: give a '
          'number of steps, or leave it out'
        )


@dataclasses.dataclass(frozen=True)
class ExportSettings:
  """The `export.*` keys."""

  format: str
  layout: str
  model_type: str
  dtype: str
  gguf_dtype: str
  max_shard_size: str

  def __post_init__(self):
    _choose('export.dtype', self.dtype, ('auto', *DTYPES))
    _choose('export.gguf_dtype', self.gguf_dtype, ('auto', *GGUF_DTYPES))
    parse_size('export.max_shard_size', self.max_shard_size)
    unknown = sorted(set(self.routes) - set(ROUTES))
    if unknown or 'hf' not in self.routes:
      raise UserError(
        f'export.format is {self.format!r}: hf alone, or with gguf or peft '
        'or both after a comma'
      )

  @property
  def routes(self) -> tuple[str, ...]:
    """Those in `format`."""
    return tuple(name.strip() for name in self.format.split(','))


@dataclasses.dataclass(frozen=True)
class ReportSettings:
  """The `report.*` keys."""

  prompts: tuple[str, ...]
  max_new_tokens: int

  def __post_init__(self):
    # A string given for a tuple stays a string.
    if isinstance(self.prompts, str) or not all(
      isinstance(prompt, str) and prompt for prompt in self.prompts
    ):
      raise UserError(
        f'report.prompts is {self.prompts!r}: give a tuple of texts, such as '
        '\'("The weather", "Once upon a time")\', or () for none'
      )
    if self.max_new_tokens < 1:
      raise UserError(
        f'report.max_new_tokens is {self.max_new_tokens}: it must be at least '
        '1; for no samples use report.prompts=()'
      )


@dataclasses.dataclass(frozen=True)
class LogSettings:
  """The `log.*` keys."""

  tensorboard: bool
  wandb: str


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """All that a run depends on.

  Attributes:
    model_path: the base's folder, or None for random weights.
    base_dtype: of the frozen weights.
    step: what the compiled functions are specialised to.
    order: one of ORDERS.
    plan: what will be left; None if nothing is pruned.
    schedule: of joint pruning.
    calibration_steps: of the other orders.
    mesh: sizes of data, fsdp, tensor.
  """

  model_path: Path | None
  base_dtype: Any
  step: StepSettings
  data: DataSettings
  train: TrainSettings
  recover: RecoverSettings
  order: str
  plan: PruningPlan | None
  schedule: PruneSchedule
  calibration_steps: int
  criterion: Criterion
  mesh: dict[str, int]
  export: ExportSettings
  log: LogSettings
  report: ReportSettings


def _choose(key: str, value: Any, choices: Any) -> Any:
  if value not in choices:
    raise UserError(f'{key} is {value!r}: choose from {", ".join(choices)}')
  return value


def resolve_dtype(key: str, name: str) -> Any:
  """A dtype by name; `auto` is float32 on CPU and bfloat16 elsewhere."""
  _choose(key, name, _DTYPES)
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def split_config(config: config_dict.ConfigDict) -> RunSettings:
  """Splits and checks a config.

  Raises:
    UserError: naming the key whose value is impossible.
  """
  model, prune = config.model, config.prune
  mesh = mesh_sizes(**config.mesh)
  sizes, lora, plan = split_model(config, mesh['tensor'])
  train = TrainSettings(**config.train)
  data = _data_settings(config.data, train)
  for key, length in (
    ('train.seq_len', train.seq_len),
    ('data.eval_seq_len', data.eval_seq_len),
  ):
    if length > sizes.max_positions:
      raise UserError(
        f'{key} is {length}, but the model has {sizes.max_positions} '
        'positions (max_position_embeddings)'
      )
  criterion = Criterion(
    name=prune.criterion,
    score=prune.score,
    cross_term=prune.cross_term,
    norm=prune.norm,
    decay=prune.decay,
  )
  export = _export_settings(config, sizes, plan)
  step = StepSettings(
    config=sizes,
    lora=lora,
    dtype=resolve_dtype('model.compute_dtype', model.compute_dtype),
    remat=_choose('model.remat', model.remat, tuple(REMAT_POLICIES)),
    loss_chunk=train.loss_chunk,
    clip_norm=train.clip_norm,
  )
  return RunSettings(
    model_path=Path(model.path) if model.path else None,
    base_dtype=resolve_dtype('model.base_dtype', model.base_dtype),
    step=step,
    data=data,
    train=train,
    recover=RecoverSettings(**config.recover),
    order=prune.order,
    plan=plan,
    schedule=PruneSchedule(
      train.steps, prune.every, prune.warmup, prune.cooldown
    ),
    calibration_steps=_calibration_steps(prune, train),
    criterion=criterion,
    mesh=mesh,
    export=export,
    log=LogSettings(**config.log),
    report=ReportSettings(**config.report),
  )


def split_model(
  config: config_dict.ConfigDict, tensor_parallel: int
) -> tuple[LlamaConfig, LoraConfig, PruningPlan | None]:
  """The sizes, the adapters and the plan: what a checkpoint's shapes follow.

  Args:
    config: its sections model, lora and prune are read.
    tensor_parallel: the size of the mesh axis that splits heads.
  """
  sizes = _model_sizes(config.model)
  for shape in sizes.layers:
    if shape.num_kv_heads % tensor_parallel:
      raise UserError(
        f'mesh.tensor={tensor_parallel} does not divide the '
        f'{shape.num_kv_heads} KV heads of the model: choose a divisor'
      )
  lora = LoraConfig(
    rank=config.lora.rank,
    alpha=config.lora.alpha,
    dropout=config.lora.dropout,
    targets=_lora_targets(config.lora.targets),
  )
  return sizes, lora, _plan(sizes, config.prune, tensor_parallel, lora)


def _export_settings(
  config: config_dict.ConfigDict, sizes: LlamaConfig, plan: PruningPlan | None
) -> ExportSettings:
  export = ExportSettings(**config.export)
  padded = export.layout == 'padded'
  final = plan.pruned_config if plan and not padded else sizes
  resolve_layout(final, export.layout)
  resolve_model_type(final, export.model_type)
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
    return LlamaConfig.from_hf(model.sizes.to_dict())
  except UserError as error:
    reason = str(error).removeprefix('config.json: ')
    raise UserError(f'model.sizes: {reason}') from None


def _data_settings(
  data: config_dict.ConfigDict, train: TrainSettings
) -> DataSettings:
  if data.eval:
    parse_spec(data.eval)
  if not data.train:
    raise UserError('data.train is empty: give a data spec such as file:PATH')
  parts = parse_mixture(data.train)
  _choose('data.packing', data.packing, PACKINGS)
  if data.max_tokens and data.max_tokens < train.seq_len:
    raise UserError(
      f'data.max_tokens is {data.max_tokens}: 0 for all, or at least the '
      f'{train.seq_len} of train.seq_len'
    )
  template = Template(data.template, data.response, data.loss)
  if data.template and not any(template.applies_to(p.spec) for p in parts):
    raise UserError(
      f'data.template has no records to fill in: {data.train} is plain text '
      '(text files, the demo, and specs that name their column are)'
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


def _lora_targets(names: str) -> tuple[str, ...]:
  if names == 'all':
    return LORA_TARGETS
  return tuple(name.strip() for name in names.split(',') if name.strip())


def _plan(
  sizes: LlamaConfig,
  prune: config_dict.ConfigDict,
  tensor_parallel: int,
  lora: LoraConfig,
) -> PruningPlan | None:
  targets = Targets(
    tensor_parallel=tensor_parallel,
    **{
      field.name: prune[field.name]
      for field in dataclasses.fields(Targets)
      if field.name != 'tensor_parallel'
    },
  )
  _choose('prune.order', prune.order, ORDERS)
  plan = plan_pruning(sizes, targets)
  if not plan.keep:
    if prune.order != 'joint':
      raise UserError(
        f'prune.target is 0: nothing would be pruned by '
        f'prune.order={prune.order}; LoRA alone is trained by '
        'prune.order=joint'
      )
    return None
  if prune.criterion == 'lora':
    adapters = block_axes(lora)['lora']
    for group in plan.keep:
      if not any(couplings(adapters, group)):
        raise UserError(
          f'lora.targets {",".join(lora.targets)} has no projection of the '
          f'{kind(group)}: prune.criterion=lora cannot rank them'
        )
  return plan
