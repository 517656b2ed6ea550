"""What is exported: a run's checkpoint, a folder, or a model in memory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import config_dict

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError, short
from lorapr_jax.exporting.model import (
  Description,
  Weights,
  describe_run,
  merge,
  model_name,
)
from lorapr_jax.exporting.routes import Route
from lorapr_jax.exporting.write import write
from lorapr_jax.hf.config import config_from_hf, config_to_hf
from lorapr_jax.hf.files import content_hash
from lorapr_jax.hf.load import (
  Model,
  check_tensors,
  load_config,
  load_or_draw,
  load_params,
  mesh_of_all,
  weight_places,
)
from lorapr_jax.hf.shards import Shards
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.shrink import Kept, shrunk_config
from lorapr_jax.report.pruning_file import PruningFile, read_pruning, shape_of
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.paths import is_folder, path_of
from lorapr_jax.runtime.workdir import RUN_FILE
from lorapr_jax.settings.files import read_run_json
from lorapr_jax.settings.model import plan_model
from lorapr_jax.settings.phases import CHECKPOINTS, CHECKPOINTS_AFTER_CUT
from lorapr_jax.training.base import Base, Places, kept_of
from lorapr_jax.training.checkpoint import read_state, saved_steps
from lorapr_jax.training.cut import as_saved, finished, widened
from lorapr_jax.training.state import TrainState


def export(
  source: Model | Path, route: Route, base: Path | None = None
) -> dict[str, Any]:
  """Writes `source` as `route` says, and compares what was written with it.

  Args:
    source: a run's workdir, finished or not: what the masks of its last
      checkpoint remove is cut out, and LoRA is merged. Or a Hugging Face
      folder, such as an export. Or a model in memory: all but its weights comes
      from its folder. Nothing in the source changes.
    route: where the export goes, and in which form.
    base: where the base of a workdir is now, if it has moved.

  Returns:
    As `write`, and {'parameters'} of the pruned model.

  Raises:
    UserError: if the source cannot be exported so; before weights are read.
  """
  route.check_path()
  if isinstance(source, Model):
    model, weights = _of_memory(source, route)
  elif (source / RUN_FILE).exists():
    model, weights = _of_run(source, route, base)
  elif (source / 'config.json').exists():
    if base is not None:
      raise UserError(f'--base goes with a workdir; {source} is a folder')
    model, weights = _of_folder(source, route)
  else:
    raise UserError(
      f"{source} is neither a run's workdir, with {RUN_FILE}, nor a Hugging "
      'Face folder, with config.json'
    )
  written = write(route, model, weights)
  return {**written, 'parameters': model.config.num_parameters}


def _of_run(
  workdir: Path, route: Route, base: Path | None
) -> tuple[Description, Weights]:
  run = read_run_json(workdir / RUN_FILE)
  config = config_dict.ConfigDict(run['config'])
  config.model.path = _base_path(workdir, config.model.path, base)
  # On another mesh, other counts might have been the nearest.
  keep = run['resolved']['keep']
  planned = plan_model(config, tensor_parallel=1, keep=keep)
  sizes, lora_config, plan = planned.config, planned.lora, planned.plan
  _check_keep(keep, sizes, workdir / RUN_FILE)
  if config_to_hf(sizes) != run['resolved']['model']:
    raise UserError(
      f'{config.model.path} is not the base of {workdir}: its config.json has '
      'other sizes'
    )
  state = TrainState(**read_state(workdir, CHECKPOINTS))
  path = planned.settings.folder
  if path:
    check_tensors(Shards(path), sizes.dequantized)
  dtype = jnp.dtype(run['resolved']['base_dtype'])
  model = describe_run(
    path,
    sizes,
    kept_of(widened(state, sizes)['masks']),
    sha256=content_hash(path) if path and processes.is_first() else None,
    dtype=dtype.name,
    plan=plan,
    settings=run['config']['prune'],
  )
  if processes.is_first():
    _check_same_base(workdir, run.get('inputs'), model)
  route.check(model)
  places = Places.of(mesh_of_all(sizes), sizes, dtype)
  params = load_or_draw(path, sizes, places.base, dtype, config.train.seed)
  loaded = Base(params, Compute(sizes, lora_config), places)
  lora, left = finished(state, as_saved(loaded, state))
  for folder in reversed(CHECKPOINTS_AFTER_CUT):
    if saved_steps(workdir / folder):
      lora = read_state(workdir, folder)['lora']
      break
  unmerged = route.kind == 'peft'
  return model, merge(left.params, lora, lora_config, unmerged=unmerged)


def _check_keep(
  keep: dict[str, list[int]], sizes: ModelConfig, path: Path
) -> None:
  for group, counts in keep.items():
    most = [shape_of(group, layer)[-1:] for layer in sizes.layers]
    least = 0 if group == LAYERS else 1
    if len(counts) != len(most) or any(
      count < least or (count,) > size
      for count, size in zip(counts, most, strict=True)
    ):
      raise UserError(
        f'{path}: resolved.keep.{short(group)} is not of the model of this run'
      )


def _base_path(workdir: Path, recorded: str, given: Path | None) -> str:
  if not recorded:
    if given:
      raise UserError(
        f'{workdir} started from random weights: leave out --base'
      )
    return ''
  path = path_of(recorded if given is None else given)
  if not is_folder(path):
    raise UserError(
      f'{path}, the base of {workdir}, is not a folder: say where it is now '
      'with --base FOLDER'
    )
  return str(path)


def _check_same_base(workdir: Path, inputs: Any, model: Description) -> None:
  """Compares the base with the one that run.json has the hash of."""
  found = model.pruning['base']['sha256']
  begun_with = inputs.get('sha256') if isinstance(inputs, dict) else None
  if found and not begun_with:
    raise UserError(
      f'{workdir / RUN_FILE} has no hash of the base of its run, as of an '
      'earlier version: prune again in another workdir'
    )
  if begun_with != found:
    raise UserError(
      f'{model.base} is not the base of {workdir}: its weights are others '
      f'than {RUN_FILE} says'
    )


def _of_memory(source: Model, route: Route) -> tuple[Description, Weights]:
  model = _describe_folder(source.folder, route)
  model = dataclasses.replace(model, dtype=source.dtype.name)
  route.check(model)
  return model, Weights(source.params)


def _of_folder(folder: Path, route: Route) -> tuple[Description, Weights]:
  model = _describe_folder(folder, route)
  route.check(model)
  config, dtype = model.config, jnp.dtype(model.dtype)
  params = load_params(folder, config, weight_places(config, dtype), dtype)
  return model, Weights(params)


def _describe_folder(folder: Path, route: Route) -> Description:
  if route.kind == 'peft':
    raise UserError(
      f"{folder}: LoRA is merged into a folder's weights; an adapter is "
      "exported from the run's workdir"
    )
  config, shards = load_config(folder), Shards(folder)
  check_tensors(shards, config)
  name, before, kept, pruning = model_name(folder), None, None, None
  if (folder / 'pruning.json').exists():
    cut = read_pruning(folder / 'pruning.json')
    pruning, name = cut.contents, cut.contents['base']['name']
    before, kept = _cut_of(folder / 'pruning.json', cut, config)
  return Description(
    name=name,
    config=config,
    dtype=shards.dtype.name,
    base=folder,
    before=before,
    kept=kept,
    pruning=pruning,
  )


def _cut_of(
  path: Path, cut: PruningFile, config: ModelConfig
) -> tuple[ModelConfig | None, Kept | None]:
  """The sizes before the cut and what it kept, from pruning.json."""
  if not cut.layers:
    return None, None
  before = dataclasses.replace(config, layers=cut.layers)
  if len(cut.layers) != len(config.layers):
    before = _with_kinds_of(cut.contents['base']['config'], before, path)
  # A padded export has the sizes before the cut.
  if config not in (before, shrunk_config(before, cut.kept)):
    raise UserError(
      f'{path} is of another model: it says that other sizes were left than '
      'config.json has'
    )
  return before, cut.kept


def _with_kinds_of(
  hf: dict[str, Any], before: ModelConfig, path: Path
) -> ModelConfig:
  """Sizes with the windows and rotations that a config.json has."""
  try:
    whole = config_from_hf(hf)
  except UserError as error:
    raise UserError(f'{path}: base.{error}') from None
  return dataclasses.replace(
    before,
    windows=whole.windows,
    ropes=whole.ropes,
    rope_of_layer=whole.rope_of_layer,
  )
