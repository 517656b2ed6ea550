"""Runs beside each other, and whether their perplexities compare."""

from collections.abc import Sequence
import json
from typing import Any

from lorapr_jax.report.run import Run

# What two perplexities must share, with what it is called.
_MEASURED_ON = {
  'data': 'data',
  'split': 'split',
  'seq_len': 'tokens a window',
  'windows': 'windows',
}


def entries(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """One entry for each run: what the table of `report` shows."""
  names = [run.workdir.resolve().name for run in runs]
  return [
    {
      # Two folders of one name are told apart by their paths.
      'name': name if names.count(name) == 1 else str(run.workdir),
      'workdir': str(run.workdir),
      'model': run.summary['model'],
      'base': run.base,
      'params_dense': run.summary['params_dense'],
      'params_pruned': run.summary['params_pruned'],
      'params_kept': run.summary['params_pruned'] / run.summary['params_dense'],
      'heads_removed': run.summary['sparsity']['heads']['achieved'],
      'channels_removed': run.summary['sparsity']['channels']['achieved'],
      'perplexity': run.summary.get('perplexity') or None,
      'latency': run.summary.get('latency'),
      'seconds': sum(run.summary['seconds'].values()),
    }
    for name, run in zip(names, runs, strict=True)
  ]


def warnings(compared: Sequence[dict[str, Any]]) -> list[str]:
  """Why perplexities of these entries do not compare; none if they do."""
  found = [
    f'{entry["name"]} has no perplexity'
    for entry in compared
    if not entry['perplexity']
  ]
  measured = [entry for entry in compared if entry['perplexity']]
  values = {
    what: [entry['perplexity']['pruned'].get(key) for entry in measured]
    for key, what in _MEASURED_ON.items()
  }
  # Folders may be copies of each other: the hash tells; random weights have
  # none.
  values['base'] = [
    entry['base'].get('sha256') or entry['model'] for entry in measured
  ]
  for what, of_each in values.items():
    if len({json.dumps(value) for value in of_each}) > 1:
      listed = ', '.join(
        f'{entry["name"]}: {str(value)[:60]}'
        for entry, value in zip(measured, of_each, strict=True)
      )
      found.append(f'perplexities do not compare, {what} differs: {listed}')
  return found
