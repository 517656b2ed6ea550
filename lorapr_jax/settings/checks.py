"""What sections of a config ask of each other, checked before any work."""

import math

import jax

from lorapr_jax.axes import LAYERS
from lorapr_jax.data.sources import parse_mixture
from lorapr_jax.errors import MeshError, UserError
from lorapr_jax.hf.layout import (
  check_padded,
  resolve_layout,
  resolve_model_type,
)
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.kernels import unfit
from lorapr_jax.pruning.groups import with_kept
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.runtime.sharding import divisors
from lorapr_jax.settings.model import PlannedModel
from lorapr_jax.settings.sections import (
  DataSettings,
  ExportSettings,
  RecoverSettings,
  TrainSettings,
)


def check_text(
  data: DataSettings, train: TrainSettings, recover: RecoverSettings
) -> None:
  """What the text's keys and those of training ask of each other."""
  if data.max_tokens and data.max_tokens < train.seq_len:
    raise UserError(
      f'data.max_tokens is {data.max_tokens}: 0 for all, or at least the '
      f'{train.seq_len} of train.seq_len'
    )
  specs = [spec for spec in (data.train, recover.data) if spec]
  parts = [part for spec in specs for _, part in parse_mixture(spec)]
  if data.template and not any(map(data.records.applies_to, parts)):
    raise UserError(
      'data.template has no records to fill in: '
      f'{" and ".join(specs)} is plain text (text files, the demo, and specs '
      'that name their column are)'
    )


def check_lengths(
  data: DataSettings,
  train: TrainSettings,
  compute: Compute,
  mesh: dict[str, int],
  devices: tuple[jax.Device, ...],
) -> None:
  """Sequences must fit the model, the mesh and the attention kernel."""
  config, parts = compute.config, mesh['sequence']
  for key, length in (
    ('train.seq_len', train.seq_len),
    ('data.eval_seq_len', data.eval_seq_len),
  ):
    if length > config.longest:
      raise UserError(
        f'{key} is {length}, but the model has {config.longest} '
        'positions (max_position_embeddings)'
      )
    if key == 'data.eval_seq_len' and not data.eval:
      continue
    if length % parts:
      both = math.gcd(length, len(devices))
      raise MeshError(
        f'mesh.sequence={parts} does not divide the {length} '
        f'tokens of {key}: {divisors(both, both)} would do'
      )
    reason = unfit(
      compute.attention,
      length,
      config.head_dim,
      compute.dtype,
      devices[0],
      parts,
      config.attention_cap,
    )
    if reason:
      raise UserError(
        f'model.attention is {compute.attention!r} and {key} is {length}, but '
        f'{reason}: use model.attention=auto'
      )


def check_teacher(train: TrainSettings, planned: PlannedModel) -> None:
  """Refuses distillation that would teach nothing."""
  if not train.distill:
    return
  order, vocab_size = planned.prune.order, planned.config.vocab_size
  if train.distill_top_k >= vocab_size:
    raise UserError(
      f'train.distill_top_k is {train.distill_top_k}, and the model has '
      f'{vocab_size} tokens: choose fewer, such as 64'
    )
  averaged = planned.plan and planned.prune.ranking().averaged
  if train.distill == 1 and order != 'joint' and averaged:
    raise UserError(
      f'train.distill=1 with prune.order={order}: while importance is '
      'measured the model is its own teacher, and gradients are zero: use a '
      'smaller share'
    )


def check_export(export: ExportSettings, planned: PlannedModel) -> None:
  """The layout and type must hold what will be left."""
  if planned.plan and export.layout == 'padded':
    if planned.plan.targets.by_size:
      raise UserError(
        'export.layout=padded stores the sizes before the cut, which '
        'prune.fit and prune.speedup are to make smaller: use '
        'export.layout=auto'
      )
    check_padded(planned.config, planned.plan.pruned_config)
  for plan in (*planned.ladder, planned.plan):
    for size in exported_sizes(export, planned.config, plan):
      resolve_layout(size, export.layout)
      resolve_model_type(size, export.layout, export.model_type)


def exported_sizes(
  export: ExportSettings, config: ModelConfig, plan: PruningPlan | None
) -> list[ModelConfig]:
  """What may be exported of a model of these sizes."""
  return outcomes(plan) if plan and export.layout != 'padded' else [config]


def outcomes(plan: PruningPlan) -> list[ModelConfig]:
  """What may be left: one model, unless layers differ that may go.

  A file can have windows or rotations at fixed places, or ask that some layer
  has one. So these stand for all choices: the first layers go, the last ones,
  and of each kind as many as can.
  """
  config, layers = plan.config, plan.prunable_layers
  kinds = [*zip(config.layer_windows, config.layer_ropes, strict=True)]
  if not plan.going or len({kinds[i] for i in layers}) == 1:
    return [plan.pruned_config]
  orders = [layers, layers[::-1]]
  for kind in dict.fromkeys(kinds):
    orders.append([i for i in layers if kinds[i] == kind])
    orders[-1] += [i for i in layers if kinds[i] != kind]
  found = []
  for order in orders:
    gone = order[: len(plan.going)]
    stay = tuple(int(i not in gone) for i in range(len(kinds)))
    found.append(with_kept(config, {**plan.keep, LAYERS: stay}))
  return list(dict.fromkeys(found))
