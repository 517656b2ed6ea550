"""Text from a model, token by token, with a cache of keys and values.

One function takes some tokens, fills the cache with their keys and values and
draws the token that follows. The prompt goes through it in chunks, padded to a
power of two; every later token goes through it alone. With the cache's length
a power of two as well, it is compiled a handful of times.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Sharding
import numpy as np

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError
from lorapr_jax.models import cached, decoder
from lorapr_jax.models.compute import (
  compiler_options,
)
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.runtime import sharding
from lorapr_jax.runtime.files import read_json
from lorapr_jax.runtime.paths import path_of

# Tokens of a prompt that go through the model at the same time: powers of two.
_SMALLEST, _LARGEST = 16, 512
# What a tokenizer makes of bytes that are no character, or not yet one.
_HALF = '\ufffd'


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    max_new_tokens: at most so many are.
    temperature: T of softmax(logits / T); at 0 the likeliest token is taken.
    top_p: draws come from the likeliest tokens that together reach this
      probability (nucleus sampling, arXiv 1904.09751); 1 for all tokens.
    seed: the same seed draws the same tokens.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise UserError(
        f'max_new_tokens is {self.max_new_tokens}: it must be at least 1'
      )
    if not 0.0 <= self.temperature < math.inf:
      raise UserError(
        f'temperature is {self.temperature}: it must be 0 or positive'
      )
    if not 0.0 < self.top_p <= 1.0:
      raise UserError(f'top_p is {self.top_p}: it must be in (0, 1]')
    if not 0 <= self.seed < 2**32:
      raise UserError(f'seed is {self.seed}: it must be in [0, 2^32)')


def stop_ids(folder: str | Path) -> frozenset[int]:
  """The ids that end a text: of generation_config.json, else of config.json."""
  for name in ('generation_config.json', 'config.json'):
    path = path_of(folder) / name
    eos = read_json(path).get('eos_token_id') if path.exists() else None
    if eos is not None:
      return frozenset(eos if isinstance(eos, list) else [eos])
  return frozenset()


def check_prompt(prompt_ids: Sequence[int], config: LlamaConfig) -> None:
  """Raises a UserError for a prompt that the model cannot go on from."""
  if not len(prompt_ids):
    raise UserError('the prompt is empty')
  if len(prompt_ids) >= config.max_positions:
    raise UserError(
      f'the prompt has {len(prompt_ids)} tokens, which leaves no room in the '
      f"model's {config.max_positions} positions (max_position_embeddings)"
    )
  if max(prompt_ids) >= config.vocab_size:
    raise UserError(
      f'the prompt has the id {max(prompt_ids)}, but the model has a '
      f'vocabulary of {config.vocab_size}: the tokenizer is not of this model'
    )


def stream_text(
  params: Any,
  config: LlamaConfig,
  tokenizer: Tokenizer,
  prompt: str,
  sampling: Sampling,
  *,
  dtype: Any,
  chat: bool = False,
) -> Iterator[str]:
  """What follows a prompt, in pieces, as they come.

  Args:
    params: the weights.
    config: the sizes.
    tokenizer: of the model; its folder names the ids that end the text.
    prompt: a text.
    sampling: how tokens are drawn.
    dtype: of the computation.
    chat: whether the prompt is a user's message, for the chat template.

  Raises:
    UserError: at once, for a prompt that is empty or too long, or a chat
      template that is not there.
  """
  if chat:
    ids = tokenizer.encode_chat([{'role': 'user', 'content': prompt}])
  else:
    ids = tokenizer.encode(prompt)
  stop = stop_ids(tokenizer.folder)
  tokens = stream_tokens(params, config, ids, sampling, stop=stop, dtype=dtype)
  return detokenize(tokenizer, ids, tokens)


def detokenize(
  tokenizer: Tokenizer, prompt_ids: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
  """The text of tokens that follow a prompt, never half a character.

  A token's text can depend on the token before it (a space in front), so each
  is decoded behind those that were shown last.
  """
  shown, held = list(prompt_ids), []
  before = tokenizer.decode(shown)
  for token in tokens:
    held.append(token)
    text = tokenizer.decode(shown + held)
    if len(text) > len(before) and not text.endswith(_HALF):
      yield text[len(before) :]
      shown, held = held, []
      before = tokenizer.decode(shown)
  rest = tokenizer.decode(shown + held)[len(before) :].rstrip(_HALF)
  if rest:
    yield rest


def stream_tokens(
  params: Any,
  config: LlamaConfig,
  prompt_ids: Sequence[int],
  sampling: Sampling,
  *,
  stop: Collection[int] = (),
  dtype: Any,
) -> Iterator[int]:
  """The ids that follow a prompt, as they come.

  Args:
    params: the weights; sharded weights are used where they lie.
    config: the sizes. All positions taken, the text ends.
    prompt_ids: the prompt's.
    sampling: how tokens are drawn.
    stop: ids that end the text; they are not part of it.
    dtype: of the computation.

  Raises:
    UserError: at once, for a prompt that is empty or too long.
  """
  check_prompt(prompt_ids, config)
  ids = np.asarray(prompt_ids, np.int32)
  return _stream(params, config, ids, sampling, stop, jnp.dtype(dtype))


def _stream(params, config, ids, sampling, stop, dtype) -> Iterator[int]:
  end = min(len(ids) + sampling.max_new_tokens, config.max_positions)
  place = sharding.beside(params, ())
  cache = cached.make_empty_cache(config, 1, _bucket(end), dtype, place)()
  advance = functools.partial(
    _make_advance(config, dtype, place),
    params,
    key=jax.random.key(sampling.seed),
    temperature=sampling.temperature,
    top_p=sampling.top_p,
  )
  for start in range(0, len(ids), _LARGEST):
    chunk = ids[start : start + _LARGEST]
    padded = np.pad(chunk, (0, _bucket(len(chunk)) - len(chunk)))
    cache, token = advance(cache, padded, start, len(chunk))
  for position in range(len(ids), end):
    drawn = token
    # The next one is on its way before this one is waited for.
    if position + 1 < end:
      cache, token = advance(cache, drawn, position, 1)
    if (value := int(drawn[0])) in stop:
      return
    yield value


def _bucket(count: int) -> int:
  """The next power of two."""
  return max(_SMALLEST, 1 << (count - 1).bit_length())


@functools.cache
def _make_advance(
  config: LlamaConfig, dtype: Any, place: Sharding
) -> Callable[..., tuple[cached.Cache, Array]]:
  """The jitted step; it is compiled for every length of tokens and cache.

  (params, cache, tokens (T,), start, count, key, temperature, top_p) ->
  (cache, the token (1,) that follows). The tokens stand at positions from
  `start` on; those after the first `count` are padding, of which the cache is
  cleared by what is written there next. The old cache is donated.
  """

  def advance(params, cache, tokens, start, count, key, temperature, top_p):
    hidden, cache = cached.hidden_states(
      params, tokens[None], cache, start, config, dtype=dtype
    )
    logits = decoder.logits(params, hidden[0, count - 1])
    key = jax.random.fold_in(key, start + count)
    return cache, sample(logits, key, temperature, top_p)[None]

  return jax.jit(
    advance,
    donate_argnums=1,
    out_shardings=place,
    compiler_options=compiler_options(),
  )


def sample(logits: Array, key: Array, temperature: Array, top_p: Array):
  """An id drawn from logits (V,); see `Sampling`."""

  def draw():
    # The largest is 0, so that no temperature makes it infinite.
    scaled = (logits - jnp.max(logits)) / temperature
    # A sort is slow: it is only done where something is cut off.
    kept = jax.lax.cond(
      top_p < 1.0, nucleus, lambda scaled, _: scaled, scaled, top_p
    )
    return jax.random.categorical(key, kept)

  token = jax.lax.cond(temperature > 0.0, draw, lambda: jnp.argmax(logits))
  return token.astype(jnp.int32)


def nucleus(logits: Array, top_p: Array) -> Array:
  """-inf outside the fewest likeliest tokens that reach the probability top_p.

  Tokens as likely as the last of them stay too.

  Args:
    logits: (V,).
    top_p: in (0, 1).
  """
  descending = jnp.sort(logits, descending=True)
  probabilities = jax.nn.softmax(descending)
  likelier = jnp.cumsum(probabilities) - probabilities
  least = jnp.min(jnp.where(likelier < top_p, descending, jnp.inf))
  return jnp.where(logits >= least, logits, -jnp.inf)
