"""A ConfigDict (configs/default.py) to all that a run depends on, checked.

Nothing here reads weights or text: a mistake stops a run before any work.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import config_dict

from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.models.compute import Compute, resolve_dtype
from lorapr_jax.models.config import ModelConfig
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
  plan_model,
)
from lorapr_jax.settings.phases import Phase, Pruning, make_phases
from lorapr_jax.settings.pruning import plan_prunings
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


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """All that a run depends on: sections of its config, and what follows.

  data.eval_seq_len is filled in.

  Attributes:
    base_dtype: of the frozen weights that are not quantised.
    compute: what the compiled functions are specialised to.
    plan: what will be left; None if nothing is pruned.
    ladder: what is left at each share of export.ladder.
    phases: in order.
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
  ladder: tuple[PruningPlan, ...]
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
  def until_cut(self) -> tuple[Phase, ...]:
    """The phases up to the cut: those that prune, or the first one."""
    pruning = tuple(phase for phase in self.phases if phase.pruning)
    return pruning or self.phases[:1]

  @property
  def after_cut(self) -> tuple[Phase, ...]:
    """The phases of what is left."""
    return self.phases[len(self.until_cut) :]

  @property
  def pruning(self) -> Pruning | None:
    """What the phase masks that ends in the cut."""
    return self.until_cut[-1].pruning

  @property
  def cuts(self) -> list[int]:
    """The steps of the run before which masked groups are cut out."""
    pruning = self.pruning
    return [pruning.first_step + cut for cut in pruning.cuts] if pruning else []

  @property
  def exported(self) -> list[ModelConfig]:
    """What may be exported: which layers go is chosen in the run."""
    return [
      size
      for plan in (*self.ladder, self.plan)
      for size in exported_sizes(self.export, self.compute.config, plan)
    ]

  def resolved(self) -> dict[str, Any]:
    """What the config leaves open, and a resumed run must find unchanged."""
    plan = self.plan
    return {
      'base_dtype': self.base_dtype.name,
      'compute_dtype': self.compute.dtype.name,
      'matmul_dtype': self.compute.matmul_dtype.name,
      'model': config_to_hf(self.compute.config),
      # With another mesh.tensor other counts may be the nearest.
      'keep': plan.keep if plan else {},
      'cuts': self.cuts,
      # Sizes on the way follow from them.
      'multiples': plan.multiples if self.cuts else {},
      'ladder': {str(rung.share): rung.keep for rung in self.ladder},
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
  prunings = plan_prunings(planned, train, data.train)
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
    ladder=planned.ladder,
    phases=make_phases(planned.prune.order, prunings, train, recover, data),
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
