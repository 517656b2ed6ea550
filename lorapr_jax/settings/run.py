"""A ConfigDict (configs/default.py) to all that a run depends on, checked.

Nothing here reads weights or text: a mistake stops a run before any work.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from lorapr_jax.data.sources import parse_mixture
from lorapr_jax.errors import UserError
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.models.compute import Compute, resolve_dtype
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.cost import (
  forward_flops_per_token,
  pass_flops_per_token,
)
from lorapr_jax.pruning.importance import OBS
from lorapr_jax.pruning.milestones import parse_shrink
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.runtime.sharding import make_mesh, mesh_sizes
from lorapr_jax.settings.checks import (
  check_export,
  check_lengths,
  check_teacher,
  check_text,
  exported_sizes,
)
from lorapr_jax.settings.devices import (
  resolve_compiler_options,
  resolve_loss_chunk,
  resolve_matmul_dtype,
)
from lorapr_jax.settings.model import (
  ModelSettings,
  PlannedModel,
  PruneSettings,
  plan_model,
)
from lorapr_jax.settings.phases import Phase, Pruning, make_phases
from lorapr_jax.settings.sections import (
  DataSettings,
  ExportSettings,
  LogSettings,
  MeshSettings,
  RecoverSettings,
  ReportSettings,
  TrainSettings,
  read_section,
)

# What the passes of all pruning events may cost, as a share of the steps'
# operations; and the most tokens of one, if two batches are not more.
EVENT_SHARE = 0.25
EVENT_TOKENS = 2**17


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """All that a run depends on: sections of its config, and what follows.

  data.eval_seq_len is filled in.

  Attributes:
    base_dtype: of the frozen weights that are not quantised.
    compute: what the compiled functions are specialised to.
    plan: what will be left; None if nothing is pruned.
    phases: in order. After the first comes the cut.
    mesh_sizes: of the axes data, fsdp, sequence and tensor.
    devices: that the mesh is made of, all of one kind.
  """

  model: ModelSettings
  data: DataSettings
  train: TrainSettings
  export: ExportSettings
  log: LogSettings
  report: ReportSettings
  base_dtype: Any
  compute: Compute
  plan: PruningPlan | None
  phases: tuple[Phase, ...]
  mesh_sizes: dict[str, int]
  devices: tuple[jax.Device, ...]

  @property
  def mesh(self) -> Mesh:
    """Of the devices."""
    return make_mesh(self.mesh_sizes, self.devices)

  @property
  def steps(self) -> int:
    """Of all phases together."""
    return sum(phase.steps for phase in self.phases)

  @property
  def pruning(self) -> Pruning | None:
    """What the first phase masks."""
    return self.phases[0].pruning

  @property
  def exported(self) -> list[ModelConfig]:
    """What may be exported: which layers go is chosen in the run."""
    return exported_sizes(self.export, self.compute.config, self.plan)

  def resolved(self) -> dict[str, Any]:
    """What the config leaves open, and a resumed run must find unchanged."""
    plan, cuts = self.plan, self.pruning.cuts if self.pruning else ()
    return {
      'base_dtype': self.base_dtype.name,
      'compute_dtype': self.compute.dtype.name,
      'matmul_dtype': self.compute.matmul_dtype.name,
      'model': config_to_hf(self.compute.config),
      # With another mesh.tensor other counts may be the nearest.
      'keep': plan.keep if plan else {},
      'cuts': cuts,
      # Sizes on the way follow from them.
      'multiples': plan.multiples if cuts else {},
    }


def split_config(
  config: config_dict.ConfigDict,
  devices: Sequence[jax.Device] | None = None,
  measured: Mapping[str, Sequence[int]] | None = None,
) -> RunSettings:
  """Splits and checks a config.

  Args:
    config: see configs/default.py.
    devices: of the run; None: all.
    measured: as of `plan_targets`.

  Raises:
    UserError: naming the key whose value is impossible.
  """
  devices = tuple(devices or jax.devices())
  axes = dataclasses.asdict(read_section(MeshSettings, config.mesh))
  mesh = mesh_sizes(**axes, devices=len(devices))
  train = read_section(TrainSettings, config.train)
  recover = read_section(RecoverSettings, config.recover)
  data = read_section(DataSettings, config.data)
  check_text(data, train, recover)
  export = read_section(ExportSettings, config.export)
  log = read_section(LogSettings, config.log)
  report = read_section(ReportSettings, config.report)
  # Last of what needs no plan: it may take minutes.
  planned = plan_model(config, mesh['tensor'], devices, measured=measured)
  length = data.eval_seq_len or train.seq_len
  data = dataclasses.replace(data, eval_seq_len=length)
  compute = _compute(planned, train, mesh, devices)
  check_lengths(data, train, compute, mesh, devices)
  check_teacher(train, planned)
  pruning = _pruning(planned, train, data.train)
  check_export(export, planned)
  return RunSettings(
    model=planned.settings,
    data=data,
    train=train,
    export=export,
    log=log,
    report=report,
    base_dtype=planned.base_dtype,
    compute=compute,
    plan=planned.plan,
    phases=make_phases(planned.prune.order, pruning, train, recover, data),
    mesh_sizes=mesh,
    devices=devices,
  )


def _compute(
  planned: PlannedModel,
  train: TrainSettings,
  mesh: dict[str, int],
  devices: tuple[jax.Device, ...],
) -> Compute:
  model, platform = planned.settings, devices[0].platform
  dtype = resolve_dtype('model.compute_dtype', model.compute_dtype, platform)
  return Compute(
    config=planned.config,
    lora=planned.lora,
    dtype=dtype,
    matmul_dtype=resolve_matmul_dtype(model.matmul_dtype, dtype, platform),
    attention=model.attention,
    remat=model.remat,
    scan_layers=model.scan_layers,
    loss_chunk=resolve_loss_chunk(train, mesh, platform),
    clip_norm=train.clip_norm,
    distill=train.distill,
    compiler_options=resolve_compiler_options(train.compiler_options, devices),
  )


def _event_batches(
  pruning: Pruning, prune: PruneSettings, train: TrainSettings
) -> int:
  """The batches that a pruning event reads, where the config leaves it open.

  So many that their passes together take EVENT_SHARE of the operations of the
  steps, which are three forward passes each. With prune.order=none there are no
  such steps, and all that were read before the event are taken. What solving
  costs does not depend on the number, and is left out.
  """
  config, tokens = pruning.plan.config, train.batch_size * train.seq_len
  step = 3 * forward_flops_per_token(config, train.seq_len)
  each = pass_flops_per_token(config, train.seq_len)
  share = EVENT_SHARE * train.steps * step / each
  number = int(share / max(1, len(pruning.passes)))
  if prune.order == 'none':
    number = prune.calibration_steps
  return max(2, min(number, EVENT_TOKENS // tokens))


def _pruning(
  planned: PlannedModel, train: TrainSettings, text: str
) -> Pruning | None:
  """What the first phase masks."""
  prune, plan = planned.prune, planned.plan
  criterion, schedule = prune.ranking(), prune.schedule(train.steps)
  shares = parse_shrink(prune.shrink)
  if planned.config.quantized and criterion.needs_base_grads:
    raise UserError(
      f'prune.criterion={criterion.name} needs gradients of the base, which '
      'model.base_dtype=int8 has none of: use prune.criterion=lora'
    )
  tuned = train.steps - prune.calibration_steps
  if prune.order == 'prune_then_tune' and tuned <= 0:
    raise UserError(
      f'prune.calibration_steps {prune.calibration_steps} leaves none of '
      f'train.steps {train.steps} to tune: lower it, or use prune.order=none'
    )
  reason = None
  if plan is None or prune.order != 'joint':
    reason = 'there is no ramp: use prune.shrink=end, or prune.order=joint'
  elif prune.criterion == 'random':
    reason = 'scores are drawn for the sizes at the start: use prune.shrink=end'
  if reason and isinstance(shares, tuple):
    raise UserError(f'prune.shrink is {prune.shrink!r}, but {reason}')
  if plan is None:
    return None
  own = prune.compensate_data
  texts = tuple(spec.text for _, spec in parse_mixture(own or text))
  # What a layer that goes adds to the stream is in nobody's inputs.
  repairs = prune.repairs and plan.within_layers
  pruning = Pruning(*(plan, schedule, criterion, repairs, 1, texts, own))
  if own and not pruning.passes:
    raise UserError(
      f'prune.compensate_data is {own!r}, but with '
      f'prune.compensate={prune.compensate} and '
      f'prune.criterion={criterion.name} no text is measured or repaired on: '
      'leave it empty'
    )
  batches = prune.compensate_batches or _event_batches(pruning, prune, train)
  pruning = dataclasses.replace(pruning, batches=batches)
  micro_batches = train.batch_size // train.micro_batch_size
  fits = plan.within_layers and (pruning.repairs or criterion.name == OBS)
  if fits and pruning.pass_batches * micro_batches < 2:
    raise UserError(
      'a pruning event keeps one micro-batch out of what it is fitted to, and '
      'the first one has no other: raise prune.compensate_batches, '
      'prune.calibration_steps or prune.warmup, or lower '
      'train.micro_batch_size'
    )
  if reason:
    return pruning
  cuts = pruning.milestones.cuts(shares, train.seq_len)
  return dataclasses.replace(pruning, cuts=cuts)
