"""Distillation: the dense model's K most probable tokens, remembered.

Repairs and cuts change the base, so that no dense model is left to ask later.
It is asked before the first step. What it predicts for every token of the
steps to come waits in the host's memory: 8 K bytes a token.
"""

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax import Array
import numpy as np

from lorapr_jax.models import decoder
from lorapr_jax.models.compute import compiler_options, run_model
from lorapr_jax.models.head import Head
from lorapr_jax.models.loss import chunked_top_k, in_rows, out_of_rows
from lorapr_jax.runtime.sharding import mesh_of
from lorapr_jax.settings.phases import Phase
from lorapr_jax.training.base import Base
from lorapr_jax.training.batches import Batches
from lorapr_jax.training.checkpoint import saved_steps


def remember_teacher(
  base: Base,
  phases: Sequence[Phase],
  batches: Batches,
  top_k: int,
  workdir: Path,
  show: Callable[[int, int], None],
) -> Callable[[Phase, int], dict[str, Array]]:
  """Asks the dense model about every batch that is still to be learned from.

  Checkpoints in the workdir say which steps are done. After each batch `show`
  is told how many are done, and of how many.

  Returns:
    (phase, step) -> a batch's 'teacher': {'ids', 'log_probs'}, (M, B, T, K).
    Each is given once, and then forgotten.
  """
  top, known = make_top_tokens(base, top_k), {}
  # The newest checkpoint may be damaged, and the one before it is used.
  starts = [
    (phase, min(saved_steps(workdir / phase.checkpoints), default=0))
    for phase in phases
    if phase.learns
  ]
  total = sum(phase.steps - first for phase, first in starts)
  for phase, first in starts:
    with batches.plain(phase, base.places.batch, first) as stream:
      for step, batch in enumerate(stream, first):
        found = top(base.params, batch)
        known[phase.name, step] = jax.tree.map(_Parts.of, found)
        show(len(known), total)
  place = base.places.batch

  def teacher(phase: Phase, step: int) -> dict[str, Array]:
    return jax.tree.map(
      lambda parts: parts.on(place), known.pop((phase.name, step))
    )

  return teacher


def make_top_tokens(
  base: Base, top_k: int
) -> Callable[[Any, Any], dict[str, Array]]:
  """The jitted (params, batch) -> {'ids', 'log_probs'}, (M, B, T, K) each."""
  compute, mesh = base.compute, mesh_of(base.places.state)

  def of_one(params: Any, micro: Any) -> dict[str, Array]:
    hidden = run_model(
      params,
      micro['tokens'],
      compute,
      mesh=mesh,
      segments=micro.get('segments'),
      matmul_dtype=compute.matmul_dtype,
    )
    found = chunked_top_k(
      in_rows(hidden, mesh),
      decoder.output_weight(params),
      top_k,
      compute.loss_chunk,
      dtype=compute.matmul_dtype,
      mesh=mesh,
      head=Head.of(compute.config),
    )
    shape = micro['tokens'].shape
    return jax.tree.map(lambda x: out_of_rows(x, shape, mesh), found)

  return jax.jit(
    lambda params, batch: jax.lax.map(lambda x: of_one(params, x), batch),
    out_shardings=base.places.batch,
    compiler_options=compiler_options(base.places.state),
  )


@dataclasses.dataclass(frozen=True)
class _Parts:
  """An array on the hosts: each process has what its devices had.

  Attributes:
    shape: of the whole.
    parts: by place in it.
  """

  shape: tuple[int, ...]
  parts: dict[Any, np.ndarray]

  @classmethod
  def of(cls, array: Array) -> '_Parts':
    """Waits for the array."""
    shards = array.addressable_shards
    parts = {_key(s.index): np.asarray(s.data) for s in shards}
    return cls(array.shape, parts)

  def on(self, place: jax.sharding.Sharding) -> Array:
    """On the devices again."""
    return jax.make_array_from_callback(
      self.shape, place, lambda index: self.parts[_key(index)]
    )


def _key(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
  """Slices are no keys before Python 3.12."""
  return tuple((part.start, part.stop) for part in index)
