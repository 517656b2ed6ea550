"""Compares runs, and says whether their perplexities may be compared."""

from collections.abc import Sequence
from typing import Any

from lorapr_jax.report.run import Run


def entries(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """One entry for each run, with what the command `report` shows in a table."""
  names = [run.workdir.resolve().name for run in runs]
  return [
    {
      # Two folders with the same name are shown by their paths.
      'name': name if names.count(name) == 1 else str(run.workdir),
      'workdir': str(run.workdir),
      'model': run.summary['model'],
      'base': run.summary['base'],
      'params_dense': run.summary['params_dense'],
      'params_pruned': run.summary['params_pruned'],
      'params_kept': run.summary['params_pruned'] / run.summary['params_dense'],
      'heads_removed': run.summary['sparsity']['heads']['achieved'],
      'channels_removed': run.summary['sparsity']['channels']['achieved'],
      'layers_removed': _layers_removed(run),
      'perplexity': run.summary['perplexity'] or None,
      'latency': run.summary['latency'],
      'seconds': sum(run.summary['seconds'].values()),
    }
    for name, run in zip(names, runs, strict=True)
  ]


def _layers_removed(run: Run) -> float:
  return run.summary['sparsity'].get('layers', {'achieved': 0.0})['achieved']


def warnings(compared: Sequence[dict[str, Any]]) -> list[str]:
  """Why the perplexities of these entries do not compare; [] if they do."""
  found = [
    f'{entry["name"]} has no perplexity'
    for entry in compared
    if not entry['perplexity']
  ]
  measured = [entry for entry in compared if entry['perplexity']]
  for what, of in _MEASURED_ON.items():
    named: dict[str, list[str]] = {}
    for entry in measured:
      named.setdefault(str(of(entry)), []).append(entry['name'])
    if len(named) > 1:
      listed = '; '.join(f'{v} ({", ".join(n)})' for v, n in named.items())
      found.append(f'perplexities do not compare, {what}: {listed}')
  return found


def _base(entry: dict[str, Any]) -> str:
  # Copies of a folder are the same base: they have the same hash. Random
  # weights have none.
  sha256 = entry['base']['sha256']
  return f'SHA-256 {sha256[:12]}...' if sha256 else entry['model']


# Perplexities compare if all of these are the same.
_MEASURED_ON = {
  'other data': lambda entry: entry['perplexity']['pruned']['data'],
  'another length': lambda entry: entry['perplexity']['pruned']['seq_len'],
  'other windows': lambda entry: entry['perplexity']['pruned']['windows'],
  'another base': _base,
}
