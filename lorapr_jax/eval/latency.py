"""The time of a forward pass, of two models side by side."""

from collections.abc import Callable
import functools
import statistics
import time
from typing import Any

import jax

from lorapr_jax.models import llama
from lorapr_jax.steps import StepSettings, compiler_options


@functools.cache
def _prefill(settings: StepSettings) -> Callable[..., Any]:
  def last_logits(params, tokens):
    hidden = llama.hidden_states(
      params, tokens, settings.config, dtype=settings.dtype
    )
    return llama.logits(params, hidden[:, -1])

  return jax.jit(last_logits, compiler_options=compiler_options())


def paired_latency(
  models: dict[str, tuple[Any, StepSettings]],
  *,
  batch_size: int = 1,
  seq_len: int = 128,
  repeats: int = 7,
) -> dict[str, float]:
  """Median seconds of a prefill: a forward pass and the last token's logits.

  The models take turns, so that what else the machine does hits both.

  Args:
    models: name -> (params, settings).
    batch_size: sequences.
    seq_len: tokens a sequence.
    repeats: timed turns, after one that compiles.
  """
  vocab = min(s.config.vocab_size for _, s in models.values())
  tokens = jax.random.randint(
    jax.random.key(0), (batch_size, seq_len), 0, vocab
  )
  seconds: dict[str, list[float]] = {name: [] for name in models}
  for _ in range(repeats + 1):
    for name, (params, settings) in models.items():
      start = time.perf_counter()
      jax.block_until_ready(_prefill(settings)(params, tokens))
      seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(times[1:]) for name, times in seconds.items()}
