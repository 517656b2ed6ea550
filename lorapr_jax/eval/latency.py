"""Measures how long forward passes and generation take, of several models."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from lorapr_jax.models import cached, decoder
from lorapr_jax.models.compute import Compute, compiler_options
from lorapr_jax.runtime import sharding


@functools.cache
def _prefill(settings: Compute) -> Callable[..., Any]:
  def last_logits(params, tokens):
    hidden = decoder.hidden_states(
      params, tokens, settings.config, dtype=settings.dtype
    )
    return decoder.logits(params, hidden[:, -1])

  return jax.jit(last_logits, compiler_options=compiler_options())


def paired_latency(
  models: dict[str, tuple[Any, Compute]],
  *,
  batch_size: int = 1,
  seq_len: int = 128,
  repeats: int = 7,
) -> dict[str, float]:
  """Median seconds of a prefill: a forward pass and the last token's logits.

  The models take turns, so that other work on the machine slows all of them.

  Args:
    models: {name: (params, settings)}.
    batch_size: the number of sequences.
    seq_len: the tokens of a sequence.
    repeats: the number of timed turns, after one turn that compiles.
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


@dataclasses.dataclass(frozen=True)
class GenerationTimes:
  """The seconds that generation took in each turn.

  Attributes:
    prefill: from the prompt to the first new token.
    decode: for each later token, of all sequences together.
  """

  prefill: tuple[float, ...]
  decode: tuple[float, ...]


def paired_generation(
  models: Mapping[str, tuple[Any, Compute]],
  *,
  batch_size: int,
  prompt_tokens: int,
  new_tokens: int,
  repeats: int,
) -> dict[str, GenerationTimes]:
  """Times how models read a prompt and continue it, with a KV cache.

  The models take turns, so that other work on the machine slows all of them:
  compare the times of the same turn. Always the likeliest token is taken. Only
  the last token is waited for.

  Args:
    models: {name: (params, settings)}.
    batch_size: the number of sequences.
    prompt_tokens: the tokens of each prompt.
    new_tokens: the tokens that follow, at least 2; the prefill gives the first.
    repeats: the number of timed turns, after one turn that compiles.
  """
  vocab = min(s.config.vocab_size for _, s in models.values())
  shape = (batch_size, prompt_tokens)
  prompt = jax.random.randint(jax.random.key(0), shape, 0, vocab)
  turns: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
  for _ in range(repeats + 1):
    for name, (params, settings) in models.items():
      place = sharding.beside(params, ())
      length = prompt_tokens + new_tokens - 1
      cache = cached.empty_cache(
        settings.config, batch_size, length, settings.dtype, place
      )
      tokens = jax.block_until_ready(jax.device_put(prompt, place))
      jax.block_until_ready(cache)
      advance = _make_advance(settings, place)
      start = time.perf_counter()
      cache, tokens = advance(params, cache, tokens, 0)
      jax.block_until_ready(tokens)
      first = time.perf_counter()
      for position in range(prompt_tokens, length):
        cache, tokens = advance(params, cache, tokens, position)
      jax.block_until_ready(tokens)
      decode = (time.perf_counter() - first) / (new_tokens - 1)
      turns[name].append((first - start, decode))
  return {
    name: GenerationTimes(*zip(*times[1:], strict=True))
    for name, times in turns.items()
  }


@functools.cache
def _make_advance(
  settings: Compute, place: Sharding
) -> Callable[..., tuple[cached.Cache, jax.Array]]:
  """The function of one step, compiled for each length of tokens and cache.

  (params, cache, tokens (B, T), start) -> (cache, the next ids (B, 1)). The old
  cache is donated.
  """

  def advance(params, cache, tokens, start):
    hidden, cache = cached.hidden_states(
      params, tokens, cache, start, settings.config, dtype=settings.dtype
    )
    logits = decoder.logits(params, hidden[:, -1:])
    return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

  return jax.jit(
    advance,
    donate_argnums=1,
    out_shardings=place,
    compiler_options=compiler_options(),
  )
