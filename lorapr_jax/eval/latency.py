"""Times how models read a prompt and continue it, beside each other."""

from collections.abc import Mapping
import functools
import time
from typing import Any

import jax
import numpy as np

from lorapr_jax.eval.generation import make_advance
from lorapr_jax.models import cached
from lorapr_jax.models.compute import Compute
from lorapr_jax.runtime import sharding


def paired_generation(
  models: Mapping[str, tuple[Any, Compute]],
  *,
  batch_size: int,
  prompt_tokens: int,
  new_tokens: int,
  repeats: int,
) -> dict[str, dict[str, list[float]]]:
  """Times generation by each model, with a KV cache.

  The models take turns, so that other work on the machine slows all of them:
  compare the times of the same turn. One turn compiles; then `repeats` are
  timed. Always the likeliest token is taken. Only the last token is waited for.
  The prefill gives the first of the new tokens.

  Returns:
    {name: {'prefill': seconds of each turn from the prompt to the first new
    token, 'decode': seconds of each later token, of all sequences together}}.
  """
  vocab = min(s.config.vocab_size for _, s in models.values())
  prompt = np.random.default_rng(0).integers(
    vocab, size=(batch_size, prompt_tokens), dtype=np.int32
  )
  found = {name: {'prefill': [], 'decode': []} for name in models}
  for turn in range(repeats + 1):
    for name, (params, settings) in models.items():
      prefill, later = _turn(params, settings, prompt, new_tokens)
      if turn:
        found[name]['prefill'].append(prefill)
        found[name]['decode'].append(later / max(new_tokens - 1, 1))
  return found


def _turn(
  params: Any, settings: Compute, prompt: np.ndarray, new_tokens: int
) -> tuple[float, float]:
  """Seconds of the prefill, and of all tokens after the first."""
  place = sharding.beside(params, ())
  config, (B, T) = settings.config, prompt.shape
  end = T + new_tokens - 1
  advance = functools.partial(
    make_advance(config, settings.dtype, place),
    params,
    key=jax.random.key(0),
    temperature=0.0,
    top_p=1.0,
  )
  cache = cached.empty_cache(config, B, end, settings.dtype, place)
  tokens = jax.device_put(prompt, place)
  jax.block_until_ready((cache, tokens))
  start = time.perf_counter()
  cache, tokens = advance(cache, tokens, 0, T)
  jax.block_until_ready(tokens)
  first = time.perf_counter()
  for position in range(T, end):
    cache, tokens = advance(cache, tokens, position, 1)
  jax.block_until_ready(tokens)
  return first - start, time.perf_counter() - first
