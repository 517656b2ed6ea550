"""Figures that are measured once, and then read from the cache."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import hashlib
import json
import logging
from typing import Any

import jax
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.eval.perplexity import HeldOut, Perplexity
from lorapr_jax.models.compute import Compute
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.files import cache_dir, read_sealed, write_sealed

# Part of the key. Raise it when a change of code changes what is measured.
_FORMAT = 3

_log = logging.getLogger(__name__)


def remembered(
  what: str, parts: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
  """What `measure` gives, from the cache if it was measured before.

  Args:
    what: the figure's name, and its folder's in the cache.
    parts: all that the figure depends on, as JSON can hold it.
    measure: gives it, as JSON can hold it.
  """
  key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
  path = cache_dir() / what / f'{key}.json'
  if path.exists():
    try:
      return read_sealed(path)
    except UserError as error:
      _log.warning('%s: the %s is measured again', error, what)
  result = measure()
  # The cache may be full, or another run may write the same: go on without it.
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, result)
  return result


def remembered_perplexity(
  held_out: HeldOut, sha256: str | None, params: Any, compute: Compute
) -> Perplexity:
  """The perplexity of a base, from the cache if it was measured before.

  `sha256` is of the base (`hf.files.content_hash`); None for random weights,
  which are measured anew.
  """
  # Many processes must all measure or all not, and their caches may differ.
  if sha256 is None or processes.count() > 1:
    return held_out.perplexity(params, compute)
  windows = np.ascontiguousarray(held_out.windows)
  # All that the figure depends on.
  parts = {
    'format': _FORMAT,
    'model': sha256,
    'windows': hashlib.sha256(windows).hexdigest(),
    'shape': windows.shape,
    'dtypes': (params['norm']['weight'].dtype.name, compute.dtype.name),
    'quantized': compute.config.quantized,
    'attention': compute.attention,
    'jax': (jax.__version__, jax.default_backend()),
  }
  found = remembered(
    'perplexity',
    parts,
    lambda: dataclasses.asdict(held_out.perplexity(params, compute)),
  )
  return Perplexity(**found | {'data': held_out.data})
