"""Measures perplexity as the papers do (docs/method.md, evaluation)."""

from collections.abc import Callable
import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
import numpy as np

from lorapr_jax.models.compute import Compute, compiler_options, token_losses
from lorapr_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """A perplexity, and what it was measured on.

  Attributes:
    perplexity: exp(nll); infinite where no float holds it, from 709.8 nats on.
    nll: the mean negative log-likelihood of a predicted token, in nats.
    tokens: the number of predicted tokens: seq_len - 1 for each window.
    windows: the number of windows.
    seq_len: tokens in a window. Perplexities at different lengths do not
      compare.
    data: the spec of the text.
    tokens_per_second: the speed over all batches but the first, which includes
      compiling; over the first if it is the only one.
  """

  perplexity: float
  nll: float
  tokens: int
  windows: int
  seq_len: int
  data: str
  tokens_per_second: float


def _exp(nll: float) -> float:
  try:
    return math.exp(nll)
  except OverflowError:
    return math.inf


@functools.cache
def make_window_losses(
  settings: Compute, place: Sharding
) -> Callable[..., Any]:
  """The compiled function (params, tokens, weights, lora, masks) -> losses.

  It gives the sum of the losses of each window, (B,).
  """

  def losses(params, tokens, weights, lora, masks):
    each = token_losses(
      params,
      tokens,
      weights,
      settings,
      mesh=sharding.mesh_of(place),
      lora=lora,
      masks=masks,
      skips=True,
    )
    return jnp.sum(each, axis=1)

  return jax.jit(
    losses, out_shardings=place, compiler_options=compiler_options(place)
  )


def batch_rows(params: Any, most: int, count: int) -> int:
  """The number of windows in a batch: `most`, or all `count` if that is less.

  It is raised so that every device gets equally many. `params` may be shapes
  with shardings.
  """
  parts = sharding.batch_parts(params)
  return -(-min(most, count) // parts) * parts


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """Text that models are measured on.

  Attributes:
    windows: (W, T) ids.
    data: the spec of the text.
    batch_size: windows at a time; raised so that devices get equally many.
  """

  windows: np.ndarray
  data: str
  batch_size: int

  def perplexity(
    self, params: Any, compute: Compute, *, lora: Any = None, masks: Any = None
  ) -> Perplexity:
    """exp of the mean NLL of the T - 1 predictions of each window.

    Each window is scored by itself. The last batch is filled up with windows
    that do not count, so that all batches have one shape and are compiled once.
    On a mesh, its axes data and fsdp share each batch.
    """
    count, seq_len = self.windows.shape
    batch_size = batch_rows(params, self.batch_size, count)
    place = sharding.beside(params, ('batch', 'length'))
    score = make_window_losses(compute, sharding.beside(params, ()))
    results, starts = [], []
    for start in range(0, count, batch_size):
      tokens = np.array(self.windows[start : start + batch_size])
      missing = batch_size - len(tokens)
      tokens = np.pad(tokens, ((0, missing), (0, 0)))
      weights = np.ones(tokens.shape, np.float32)
      starts.append(time.perf_counter())
      losses = score(
        params, *jax.device_put((tokens, weights), place), lora, masks
      )
      results.append(np.asarray(losses)[: batch_size - missing])
    end = time.perf_counter()
    timed, begin = count * seq_len, starts[0]
    if len(starts) > 1:
      timed, begin = (count - batch_size) * seq_len, starts[1]
    nll = float(np.concatenate(results).sum(dtype=np.float64))
    tokens = count * (seq_len - 1)
    return Perplexity(
      perplexity=_exp(nll / tokens),
      nll=nll / tokens,
      tokens=tokens,
      windows=count,
      seq_len=seq_len,
      data=self.data,
      tokens_per_second=timed / (end - begin),
    )
