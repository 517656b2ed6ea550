"""Perplexities of base models, measured once for each model and text."""

from collections.abc import Callable
import contextlib
import dataclasses
import hashlib
import json

import jax
import numpy as np

from lorapr_jax.eval.perplexity import Perplexity
from lorapr_jax.hf.shards import content_hash
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.files import cache_dir, read_json, write_json
from lorapr_jax.settings.run import RunSettings

# Part of the key. Raise it when a change of code changes what is measured.
_FORMAT = 2


def remembered_perplexity(
  settings: RunSettings,
  windows: np.ndarray | None,
  measure: Callable[[], Perplexity | None],
) -> Perplexity | None:
  """The perplexity of a run's base, from the cache or measured.

  Random weights are always measured.

  Args:
    settings: of the run.
    windows: (W, T) ids, or None.
    measure: measures the base on these windows.
  """
  # Many processes must all measure or all not, and their caches may differ.
  alone = processes.count() == 1
  if settings.model_path is None or windows is None or not alone:
    return measure()
  # All that the figure depends on.
  parts = {
    'format': _FORMAT,
    'model': content_hash(settings.model_path),
    'windows': hashlib.sha256(np.ascontiguousarray(windows)).hexdigest(),
    'shape': windows.shape,
    'dtypes': (settings.base_dtype.name, settings.compute.dtype.name),
    'quantized': settings.compute.config.quantized,
    'attention': settings.compute.attention,
    'jax': (jax.__version__, jax.default_backend()),
  }
  key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
  path = cache_dir() / 'perplexity' / f'{key}.json'
  if path.exists():
    return Perplexity(**read_json(path) | {'data': settings.data.eval})
  result = measure()
  # The cache may be full, or another run may write the same: go on without it.
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(result))
  return result
