"""Reads what a finished run left in its workdir, without the model."""

import json
import math
from pathlib import Path
import re
import shlex
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError, first_line, short
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.report.pruning_file import SPARSITY, read_pruning, shape_of
from lorapr_jax.runtime.files import LARGE, read_bytes, read_json
from lorapr_jax.runtime.forms import (
  COUNT,
  INDEX,
  MEASURED,
  NUMBER,
  POSITIVE,
  SHARE,
  TEXT,
  Each,
  Leaf,
  Maybe,
  check_form,
)
from lorapr_jax.runtime.paths import is_folder, path_of
from lorapr_jax.runtime.workdir import METRICS_FILE, RUN_FILE, SUMMARY_FILE
from lorapr_jax.settings.files import read_run_json

IMPORTANCE_FILE = 'importance.safetensors'
PRUNING_FILE = 'export/pruning.json'


def _is_command(value: Any) -> bool:
  try:
    return isinstance(value, str) and bool(shlex.split(value))
  except ValueError:  # A quote that is not closed.
    return False


_COMMAND = Leaf('a command line', _is_command)
_ABOVE_0 = Leaf('a number above 0', lambda x: MEASURED.holds(x) and not x <= 0)
_PAIR = {'dense': POSITIVE, 'pruned': POSITIVE}
# A perplexity, and what it was measured on.
PERPLEXITY = {
  'value': _ABOVE_0,
  'data': TEXT,
  'seq_len': COUNT,
  'windows': COUNT,
}
_EXPORT = {
  'path': TEXT,
  'dtype': TEXT,
  'layout': Maybe(TEXT),
  'max_logit_difference': NUMBER,
}
# Of one group in all layers.
_MOST_MEMBERS = 2**28
# What is read of a summary.json, of a run.json's config and of a line of
# metrics.jsonl.
_RUNG = {
  'share': SHARE,
  'steps': COUNT,
  'params_pruned': COUNT,
  'bytes': _PAIR,
  'kv_cache_bytes_per_token': _PAIR,
  'perplexity': {'pruned?': PERPLEXITY},
  'generations': [{'prompt': TEXT, 'pruned': TEXT}],
  'exports': {'hf': _EXPORT},
}
_SUMMARY = {
  'model': TEXT,
  'base': {'name': TEXT, 'sha256': Maybe(TEXT)},
  'params_dense': COUNT,
  'params_pruned': COUNT,
  'bytes': _PAIR,
  'flops_per_token': {**_PAIR, 'seq_len': COUNT},
  'kv_cache_bytes_per_token': _PAIR,
  'sparsity': SPARSITY,
  'perplexity': Each(PERPLEXITY),
  'latency': {**_PAIR, 'batch_size': COUNT, 'seq_len': COUNT},
  'generations': [{'prompt': TEXT, 'dense': TEXT, 'pruned': TEXT}],
  'seconds': Each(NUMBER),
  'tokens_per_second': NUMBER,
  'peak_memory_bytes': INDEX,
  'warnings': [TEXT],
  'exports': {'hf?': _EXPORT, 'gguf?': _EXPORT, 'peft?': _EXPORT},
  'versions': Each(TEXT),
  'command': _COMMAND,
  'repair?': {},
  'rungs?': [_RUNG],
}
_STEPS = {
  'train': {'steps': INDEX},
  'prune': {'order': TEXT, 'calibration_steps': INDEX},
  'recover': {'steps': INDEX},
}
_RECORD = {
  'step': INDEX,
  'loss': MEASURED,
  'heads_sparsity': SHARE,
  'channels_sparsity': SHARE,
  'layers_sparsity?': SHARE,
  'params_kept': SHARE,
  'perplexity?': _ABOVE_0,
}


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
    config=read_run_json(workdir / RUN_FILE)['config'],
    summary=summary,
    metrics=read_lines(workdir / METRICS_FILE, _RECORD),
    kept=_read_kept(workdir / PRUNING_FILE),
    scores=_read_scores(workdir / IMPORTANCE_FILE),
  )


def _read_summary(workdir: Path) -> dict[str, Any]:
  path = workdir / SUMMARY_FILE
  if not path.exists():
    if not (workdir / RUN_FILE).exists():
      raise UserError(f'{workdir} holds no run: it has no {RUN_FILE}')
    config = read_run_json(workdir / RUN_FILE)['config']
    check_form(config, _STEPS, workdir / RUN_FILE, 'config')
    steps = _planned_steps(config)
    metrics = read_lines(workdir / METRICS_FILE, _RECORD)
    done = metrics[-1]['step'] + 1 if metrics else 0
    raise UserError(
      f'{workdir} holds a run that is not finished: step {done} of {steps} is '
      'logged; run its command again to go on'
    )
  summary = read_json(path)
  check_form(summary, _SUMMARY, path)
  if measured := summary['perplexity']:
    check_form(measured, {'dense': {}, 'pruned': {}}, path, 'perplexity')
  # A run that is older has no ladder, and does not say how its repairs went.
  for rung in summary.setdefault('rungs', []):
    form = {'pruned': {}} if measured else {}
    check_form(rung['perplexity'], form, path, 'rungs.perplexity')
  if repair := summary.setdefault('repair', {}):
    check_form(repair, {'error_left': Each(Maybe(NUMBER))}, path, 'repair')
  return summary


def _planned_steps(config: dict[str, Any]) -> int:
  """The steps of all phases; see settings/phases.py."""
  steps = config['train']['steps']
  if config['prune']['order'] == 'none':
    steps = config['prune']['calibration_steps']
  return steps + config['recover']['steps']


def read_lines(path: Path, form: Any) -> list[dict[str, Any]]:
  """The lines of a file, each a JSON object of this form; [] without a file.

  Raises:
    UserError: naming the line that is not.
  """
  if not path.exists():
    return []
  # After the last line end there may be a line that a killed run cut short.
  *lines, _ = read_bytes(path, LARGE).split(b'\n')
  try:
    records = [json.loads(line) for line in lines]
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'{path} has a line that is not JSON: {first_line(error)}'
    ) from None
  for number, record in enumerate(records, 1):
    check_form(record, form, path, f'line {number}')
  return records


def _read_kept(path: Path) -> dict[str, np.ndarray]:
  if not path.exists():
    return {}
  _, layers, kept = read_pruning(path)
  result = {}
  for group in kept[0] if kept else ():
    shape = np.max([shape_of(group, layer) for layer in layers], axis=0)
    if len(layers) * math.prod(shape.tolist()) > _MOST_MEMBERS:
      raise UserError(f'{path}: base.config has more of {group} than any model')
    masks = np.zeros((len(layers), *shape), bool)
    for mask, layer in zip(masks, kept, strict=True):
      rows = zip(np.atleast_2d(mask), np.atleast_2d(layer[group]), strict=False)
      for row, indices in rows:
        row[indices] = True
    result[group] = masks.reshape(len(layers), -1)
  return result


def _read_scores(path: Path) -> dict[str, dict[int, Scores]]:
  if not path.exists():
    return {}
  content = read_bytes(path, LARGE)
  try:
    tensors = load(content)
  except SafetensorError as error:
    raise UserError(f'{path} cannot be read: {first_line(error)}') from None
  scores: dict[str, dict[int, Scores]] = {}
  for name in sorted(tensors):
    found = re.fullmatch(
      r'(layers\.([0-9]{1,4})\.(.*))\.(mask|importance)', name
    )
    of = found[1] if found else ''
    values, mask = (tensors.get(f'{of}.{x}') for x in ('importance', 'mask'))
    if not (
      found
      and found[3] in (KV_HEADS, QUERIES, CHANNELS, LAYERS)
      and values is not None
      and mask is not None
      and values.dtype == mask.dtype == np.float32
      and values.shape == mask.shape
      and values.ndim
      and values.size
    ):
      raise UserError(
        f'{path} is none of ours: {short(name)} is not the float32 scores of a '
        'group with a mask of their shape'
      )
    rows = (-1, values.shape[-1])
    scores.setdefault(found[3], {})[int(found[2])] = Scores(
      values.astype(np.float64).reshape(rows), mask.reshape(rows) > 0.5
    )
  return {group: dict(sorted(by.items())) for group, by in scores.items()}
