"""A run's checkpoint, or a folder, written in any layout and format."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.exporting import routes
from lorapr_jax.exporting.finish import merge, pruned_model
from lorapr_jax.hf.config import config_to_hf, layers_from_hf
from lorapr_jax.hf.load import (
  check_tensors,
  load_config,
  load_or_draw,
  load_params,
  weight_places,
)
from lorapr_jax.hf.shards import Shards
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.shrink import Kept, shrunk_config
from lorapr_jax.runtime.files import read_json
from lorapr_jax.runtime.paths import is_folder, path_of
from lorapr_jax.runtime.workdir import (
  RUN_FILE,
)
from lorapr_jax.settings.phases import CHECKPOINTS, CHECKPOINTS_AFTER_CUT
from lorapr_jax.settings.run import (
  resolve_compensation,
  split_model,
)
from lorapr_jax.training.base import (
  cut_params,
  kept_of,
)
from lorapr_jax.training.checkpoint import (
  read_state,
  saved_steps,
)
from lorapr_jax.training.cut import (
  cut_adapters,
  cut_stacks,
  widened,
)
from lorapr_jax.training.repair import repaired_of, repaired_part, with_repaired
from lorapr_jax.training.state import (
  TrainState,
)


def export(
  source: Path, route: routes.Route, base: Path | None = None
) -> dict[str, Any]:
  """Writes `source` as `route` says, and compares what was written with it.

  Args:
    source: a run's workdir, finished or not: its last checkpoint is cut as its
      masks stand, and merged. Or a Hugging Face folder, such as an export.
      Nothing in it changes.
    route: where to and how.
    base: of a workdir whose base has moved: where it is now.

  Returns:
    As `routes.write`, and {'parameters'} of the pruned model.

  Raises:
    UserError: for what cannot be exported so, before any weights are read.
  """
  route.check_path()
  if (source / RUN_FILE).exists():
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
  written = routes.write(route, model, weights)
  return {**written, 'parameters': model.config.num_parameters}


def _of_run(
  workdir: Path, route: routes.Route, base: Path | None
) -> tuple[routes.Model, routes.Weights]:
  run = _read(workdir / RUN_FILE, ('config', 'resolved'))
  config = config_dict.ConfigDict(run['config'])
  config.model.path = _base_path(workdir, config.model.path, base)
  # Of another mesh, other counts might have been the nearest.
  keep = run['resolved']['keep']
  sizes, lora_config, plan = split_model(config, tensor_parallel=1, keep=keep)
  if config_to_hf(sizes) != run['resolved']['model']:
    raise UserError(
      f'{config.model.path} is not the base of {workdir}: its config.json has '
      'other sizes'
    )
  dtype = jnp.dtype(run['resolved']['base_dtype'])
  state = TrainState(**read_state(workdir, CHECKPOINTS))
  kept = kept_of(widened(state, sizes)['masks'])
  path = path_of(config.model.path) if config.model.path else None
  if path:
    check_tensors(Shards(path), plan.config if plan else sizes.dequantized)
  model = pruned_model(
    path,
    sizes,
    kept,
    dtype=dtype.name,
    plan=plan,
    settings=run['config']['prune'],
  )
  _check_same_base(workdir, model)
  route.check(model)
  places = weight_places(sizes, dtype)
  params = load_or_draw(path, sizes, places, dtype, config.train.seed)
  params = cut_params(params, kept, sizes, delete=True)
  # Some of it may have been cut on the way.
  size = shrunk_config(sizes, kept_of(state.whole['masks']))
  left = kept_of(state.masks)
  if state.repaired:
    leaf = resolve_compensation(config.prune, plan).leaf
    axes = block_axes(size)['params']
    axes = repaired_part(axes, leaf)
    repaired = cut_stacks(state.repaired, axes, left, size)
    places = jax.tree.map(lambda x: x.sharding, repaired_of(params, leaf))
    params = with_repaired(params, jax.device_put(repaired, places))
  for folder in reversed(CHECKPOINTS_AFTER_CUT):
    if saved_steps(workdir / folder):
      lora = read_state(workdir, folder)['lora']
      break
  else:
    lora = cut_adapters(state.lora, left, size, lora_config)
  weights = merge(params, lora, lora_config, unmerged=route.kind == 'peft')
  return model, weights


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
  value = read_json(path)
  missing = [key for key in keys if key not in value]
  if missing:
    raise UserError(f'{path} is none of ours: it has no {", ".join(missing)}')
  return value


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


def _check_same_base(workdir: Path, model: routes.Model) -> None:
  """A finished run's export says which weights it started from."""
  path = workdir / 'export' / 'pruning.json'
  if path.exists():
    sha256 = _read(path, ('base',))['base']['sha256']
    if sha256 != model.pruning['base']['sha256']:
      raise UserError(
        f'{model.base} is not the base of {workdir}: its weights are others '
        f'than {path} says'
      )


def export_params(
  params: Any, folder: Path, dtype: str, route: routes.Route
) -> dict[str, Any]:
  """As `export` of a folder, with weights that are in memory already.

  Args:
    params: the weights; their sizes are those of the folder.
    folder: where all but the weights is read.
    dtype: of the weights, by name.
    route: where to and how.
  """
  model = dataclasses.replace(_model_of(folder, route), dtype=dtype)
  route.check(model)
  written = routes.write(route, model, routes.Weights(params))
  return {**written, 'parameters': model.config.num_parameters}


def _of_folder(
  folder: Path, route: routes.Route
) -> tuple[routes.Model, routes.Weights]:
  model = _model_of(folder, route)
  route.check(model)
  config, dtype = model.config, jnp.dtype(model.dtype)
  params = load_params(folder, config, weight_places(config, dtype), dtype)
  return model, routes.Weights(params)


def _model_of(folder: Path, route: routes.Route) -> routes.Model:
  if route.kind == 'peft':
    raise UserError(
      f"{folder}: LoRA is merged into a folder's weights; an adapter is "
      "exported from the run's workdir"
    )
  config, shards = load_config(folder), Shards(folder)
  check_tensors(shards, config)
  name, before, kept, pruning = folder.resolve().name, None, None, None
  if (folder / 'pruning.json').exists():
    pruning = _read(folder / 'pruning.json', ('base', 'sparsity', 'kept'))
    before, kept = _cut_of(folder / 'pruning.json', pruning, config)
    name = pruning['base']['name']
  return routes.Model(
    name=name,
    config=config,
    dtype=shards.dtype.name,
    base=folder,
    before=before,
    kept=kept,
    pruning=pruning,
  )


def _cut_of(
  path: Path, pruning: dict[str, Any], config: LlamaConfig
) -> tuple[LlamaConfig | None, Kept | None]:
  """The sizes before the cut and what it left, as pruning.json says it."""
  sizes = pruning['base'].get('config')
  if sizes is None:  # Written before the sizes were.
    return None, None
  layers = layers_from_hf(sizes)
  before = dataclasses.replace(config, layers=layers)
  kept = tuple(
    {group: np.asarray(indices) for group, indices in layer.items()}
    for layer in pruning['kept']
  )
  # An export that is padded has the sizes before the cut.
  if config not in (before, shrunk_config(before, kept)):
    raise UserError(
      f'{path} is of another model: it says that other sizes were left than '
      'config.json has'
    )
  return before, kept
