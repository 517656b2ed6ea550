"""Reads what a finished run left in its workdir, without the model."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from lorapr_jax.errors import UserError
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.runtime.files import read_json
from lorapr_jax.runtime.paths import is_folder, path_of
from lorapr_jax.runtime.workdir import METRICS_FILE, RUN_FILE, SUMMARY_FILE

IMPORTANCE_FILE = 'importance.safetensors'
PRUNING_FILE = 'export/pruning.json'
# What every version writes into its summary.
_REQUIRED = ('model', 'params_dense', 'params_pruned', 'sparsity', 'seconds')


class Scores(NamedTuple):
  """The scores of one layer's groups. Each row is ranked by itself.

  Attributes:
    importance: (rows, members); for a group that was cut, its importance when
      it was masked.
    kept: (rows, members), bool.
  """

  importance: np.ndarray
  kept: np.ndarray


class Run(NamedTuple):
  """The content of a workdir's files. That of a missing file is empty.

  Attributes:
    workdir: the folder.
    config: every setting.
    sizes: the base's sizes, by the keys of a config.json.
    summary: summary.json.
    metrics: the lines of metrics.jsonl.
    kept: {group: (layers, members), bool}, of all layers.
    scores: {group: {layer: Scores}}, of the layers that were pruned.
    base: the base's name and sha256.
  """

  workdir: Path
  config: dict[str, Any]
  sizes: dict[str, Any]
  summary: dict[str, Any]
  metrics: list[dict[str, Any]]
  kept: dict[str, np.ndarray]
  scores: dict[str, dict[int, Scores]]
  base: dict[str, Any]


def read_run(workdir: str | Path) -> Run:
  """Reads the workdir of a finished run.

  Raises:
    UserError: if there is no run, if it is not finished, or if a file is
      damaged.
  """
  workdir = path_of(workdir)
  if not is_folder(workdir):
    raise UserError(f'{workdir} does not exist, or is no folder')
  metrics = _read_metrics(workdir / METRICS_FILE)
  summary = _read_summary(workdir, metrics)
  run = _read_if_there(workdir / RUN_FILE)
  pruning = _read_if_there(workdir / PRUNING_FILE)
  base = pruning.get('base', {})
  sizes = base.get('config') or run.get('resolved', {}).get('model', {})
  return Run(
    workdir=workdir,
    config=run.get('config', {}),
    sizes=sizes,
    summary=summary,
    metrics=metrics,
    kept=_kept_by_group(pruning.get('kept', []), sizes),
    scores=_read_scores(workdir / IMPORTANCE_FILE),
    base=summary.get('base') or {k: base.get(k) for k in ('name', 'sha256')},
  )


def _read_if_there(path: Path) -> dict[str, Any]:
  return read_json(path) if path.exists() else {}


def _read_summary(
  workdir: Path, metrics: list[dict[str, Any]]
) -> dict[str, Any]:
  path = workdir / SUMMARY_FILE
  if not path.exists():
    if not (workdir / RUN_FILE).exists():
      raise UserError(f'{workdir} holds no run: it has no {RUN_FILE}')
    steps = _planned_steps(read_json(workdir / RUN_FILE)['config'])
    done = metrics[-1]['step'] + 1 if metrics else 0
    raise UserError(
      f'{workdir} holds a run that is not finished: step {done} of {steps} is '
      'logged; run its command again to go on'
    )
  summary = read_json(path)
  missing = [key for key in _REQUIRED if key not in summary]
  if missing:
    raise UserError(f'{path} is no summary of ours: it has no {missing[0]!r}')
  return summary


def _planned_steps(config: dict[str, Any]) -> int:
  """The steps of all phases; see settings/phases.py."""
  steps = config['train']['steps']
  if config['prune']['order'] == 'none':
    steps = config['prune']['calibration_steps']
  return steps + config['recover']['steps']


def _read_metrics(path: Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  # After the last line end there may be a line that a killed run cut short.
  *lines, _ = path.read_text(encoding='utf-8').split('\n')
  try:
    return [json.loads(line) for line in lines]
  except json.JSONDecodeError as error:
    raise UserError(f'{path} has a line that is not JSON: {error}') from None


def _kept_by_group(
  layers: list[dict[str, Any]], sizes: dict[str, Any]
) -> dict[str, np.ndarray]:
  if not layers or not sizes:
    return {}
  kv_heads = sizes['num_key_value_heads']
  totals = {
    KV_HEADS: (1, kv_heads),
    QUERIES: (kv_heads, sizes['num_attention_heads'] // kv_heads),
    CHANNELS: (1, sizes['intermediate_size']),
  }
  result = {}
  for group in layers[0]:
    kept = np.zeros((len(layers), *totals[group]), bool)
    for mask, layer in zip(kept, layers, strict=True):
      rows = layer[group] if group == QUERIES else [layer[group]]
      for row, indices in zip(mask, rows, strict=True):
        row[indices] = True
    result[group] = kept.reshape(len(layers), -1)
  return result


def _read_scores(path: Path) -> dict[str, dict[int, Scores]]:
  if not path.exists():
    return {}
  try:
    tensors = load(path.read_bytes())
  except SafetensorError as error:
    raise UserError(f'{path} cannot be read: {error}') from None
  scores: dict[str, dict[int, Scores]] = {}
  suffix = '.importance'
  for name in sorted(n for n in tensors if n.endswith(suffix)):
    _, layer, group = name.removesuffix(suffix).split('.')
    values = tensors[name].astype(np.float64)
    mask = tensors[name.removesuffix(suffix) + '.mask'] > 0.5
    rows = (-1, values.shape[-1])
    scores.setdefault(group, {})[int(layer)] = Scores(
      values.reshape(rows), mask.reshape(rows)
    )
  return {group: dict(sorted(by.items())) for group, by in scores.items()}
