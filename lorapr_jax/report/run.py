"""Reads what a finished run left in its workdir, without the model."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from lorapr_jax.errors import UserError
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.runtime.files import LARGE, read_json
from lorapr_jax.runtime.paths import is_folder, path_of
from lorapr_jax.runtime.workdir import METRICS_FILE, RUN_FILE, SUMMARY_FILE

IMPORTANCE_FILE = 'importance.safetensors'
PRUNING_FILE = 'export/pruning.json'
# What the report reads of a summary.
_REQUIRED = (
  *('model', 'base', 'params_dense', 'params_pruned', 'bytes'),
  *('flops_per_token', 'kv_cache_bytes_per_token', 'sparsity', 'perplexity'),
  *('latency', 'generations', 'seconds', 'tokens_per_second'),
  *('peak_memory_bytes', 'warnings', 'exports', 'versions', 'command'),
)


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
  """The content of a workdir's files.

  Attributes:
    workdir: the folder.
    config: every setting.
    summary: summary.json.
    metrics: the lines of metrics.jsonl.
    kept: {group: (layers, members), bool}, of all layers; {} if nothing was
      pruned, or if the export lies elsewhere.
    scores: {group: {layer: Scores}}, of the layers that were pruned.
  """

  workdir: Path
  config: dict[str, Any]
  summary: dict[str, Any]
  metrics: list[dict[str, Any]]
  kept: dict[str, np.ndarray]
  scores: dict[str, dict[int, Scores]]


def read_run(workdir: str | Path) -> Run:
  """Reads the workdir of a finished run.

  Raises:
    UserError: if there is no run, if it is not finished, or if a file is
      damaged.
  """
  workdir = path_of(workdir)
  if not is_folder(workdir):
    raise UserError(f'{workdir} does not exist, or is no folder')
  summary = _read_summary(workdir)
  return Run(
    workdir=workdir,
    config=read_json(workdir / RUN_FILE)['config'],
    summary=summary,
    metrics=_read_metrics(workdir / METRICS_FILE),
    kept=_read_kept(workdir / PRUNING_FILE),
    scores=_read_scores(workdir / IMPORTANCE_FILE),
  )


def _read_summary(workdir: Path) -> dict[str, Any]:
  path = workdir / SUMMARY_FILE
  if not path.exists():
    if not (workdir / RUN_FILE).exists():
      raise UserError(f'{workdir} holds no run: it has no {RUN_FILE}')
    steps = _planned_steps(read_json(workdir / RUN_FILE)['config'])
    metrics = _read_metrics(workdir / METRICS_FILE)
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


def _read_kept(path: Path) -> dict[str, np.ndarray]:
  pruning = read_json(path, LARGE) if path.exists() else {}
  layers = pruning.get('kept')
  if not layers:
    return {}
  sizes = pruning['base']['config']
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
