"""Generates text token by token, with a cache of keys and values.

One function reads some tokens, writes their keys and values into the cache, and
draws the token that follows. It reads the prompt in chunks that are padded to a
power of two, and then each later token by itself. The cache's length is a power
of two as well, so the function is compiled only a few times.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Sharding
import numpy as np

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError, check_least, short
from lorapr_jax.models import cached, decoder
from lorapr_jax.models.compute import compiler_options
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.runtime import sharding
from lorapr_jax.runtime.files import read_json
from lorapr_jax.runtime.paths import path_of

# The sizes of a chunk of the prompt are powers of two between these.
_SMALLEST, _LARGEST = 16, 512
# A tokenizer decodes bytes to this if they are no character, or a part of one.
_HALF = '\ufffd'


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    max_new_tokens: the most tokens to draw.
    temperature: T in softmax(logits / T); at 0 the likeliest token is taken.
    top_p: tokens are drawn from the likeliest ones that together reach this
      probability (nucleus sampling, arXiv 1904.09751); 1: from all tokens.
    seed: the same seed draws the same tokens.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    check_least(max_new_tokens=(self.max_new_tokens, 1))
    if not 0.0 <= self.temperature < math.inf:
      raise UserError(
        f'temperature is {self.temperature}: it must be 0 or positive'
      )
    if not 0.0 < self.top_p <= 1.0:
      raise UserError(f'top_p is {self.top_p}: it must be in (0, 1]')
    if not 0 <= self.seed < 2**32:
      raise UserError(f'seed is {self.seed}: it must be in [0, 2^32)')


def encode_prompt(
  tokenizer: Tokenizer,
  config: ModelConfig,
  messages: Sequence[dict[str, str]],
  *,
  raw: bool = False,
) -> np.ndarray:
  """The ids of a conversation to be answered, or of a text to be continued.

  Each message is {'role', 'content'}, and the last one is the user's. With
  `raw`, or without a chat template, it is the beginning of a text.

  Raises:
    UserError: for a prompt that the model cannot continue.
  """
  if tokenizer.has_chat_template and not raw:
    ids = tokenizer.encode_chat(messages)
  else:
    ids = tokenizer.encode(messages[-1]['content'])
  check_prompt(ids, config)
  return ids


def stop_ids(folder: str | Path) -> frozenset[int]:
  """The ids that end a text, from generation_config.json or config.json."""
  for name in ('generation_config.json', 'config.json'):
    path = path_of(folder) / name
    eos = read_json(path).get('eos_token_id') if path.exists() else None
    if eos is None:
      continue
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int for i in ids):
      raise UserError(
        f'{path}: eos_token_id is {short(json.dumps(eos))}, not the id of a '
        'token or a list of them'
      )
    return frozenset(ids)
  return frozenset()


def check_prompt(prompt_ids: Sequence[int], config: ModelConfig) -> None:
  """Raises a UserError for a prompt that the model cannot continue."""
  if not len(prompt_ids):
    raise UserError('the prompt is empty')
  if len(prompt_ids) >= config.longest:
    raise UserError(
      f'the prompt has {len(prompt_ids)} tokens, which leaves no room in the '
      f"model's {config.longest} positions (max_position_embeddings)"
    )
  if max(prompt_ids) >= config.vocab_size:
    raise UserError(
      f'the prompt has the id {max(prompt_ids)}, but the model has a '
      f'vocabulary of {config.vocab_size}: the tokenizer is not of this model'
    )


def stream_text(
  params: Any,
  config: ModelConfig,
  tokenizer: Tokenizer,
  prompt_ids: Sequence[int],
  sampling: Sampling,
  *,
  dtype: Any,
) -> Iterator[str]:
  """Yields the text that follows a prompt, piece by piece.

  The tokenizer's folder says which ids end it. The rest is as of
  `stream_tokens`.
  """
  tokens = stream_tokens(
    params,
    config,
    prompt_ids,
    sampling,
    stop=stop_ids(tokenizer.folder),
    dtype=dtype,
  )
  return detokenize(tokenizer, prompt_ids, tokens)


def detokenize(
  tokenizer: Tokenizer, prompt_ids: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
  """Yields the text of tokens that follow a prompt, in whole characters.

  The text of a token can depend on the token before it (a space in front). So
  each token is decoded together with the tokens that were shown last.
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
  config: ModelConfig,
  prompt_ids: Sequence[int],
  sampling: Sampling,
  *,
  stop: Collection[int] = (),
  dtype: Any,
) -> Iterator[int]:
  """Yields the ids that follow a prompt, one by one.

  The text ends at an id of `stop`, which is not part of it, or when all of the
  model's positions are used. Sharded weights are used on their devices.

  Raises:
    UserError: at once, if the prompt is empty or too long.
  """
  check_prompt(prompt_ids, config)
  ids = np.asarray(prompt_ids, np.int32)
  return _stream(params, config, ids, sampling, stop, jnp.dtype(dtype))


def _stream(params, config, ids, sampling, stop, dtype) -> Iterator[int]:
  end = min(len(ids) + sampling.max_new_tokens, config.longest)
  # A text that outgrows what LongRoPE calls short turns anew, from its start.
  turns = {n for n in config.short_texts if len(ids) <= n < end}
  for last in sorted(turns | {end}):
    for value in _extend(params, config, ids, last, sampling, dtype):
      if value in stop:
        return
      ids = np.append(ids, np.int32(value))
      yield value


def _extend(params, config, ids, end, sampling, dtype) -> Iterator[int]:
  """The ids that follow, up to `end` with those before."""
  place = sharding.beside(params, ())
  cache = cached.empty_cache(config, 1, _bucket(end), dtype, place)
  advance = functools.partial(
    make_advance(config, dtype, place),
    params,
    key=jax.random.key(sampling.seed),
    temperature=sampling.temperature,
    top_p=sampling.top_p,
  )
  for start in range(0, len(ids), _LARGEST):
    chunk = ids[start : start + _LARGEST]
    padded = np.pad(chunk, (0, _bucket(len(chunk)) - len(chunk)))
    cache, token = advance(
      cache, padded[None], start, len(chunk), length=len(ids)
    )
  for position in range(len(ids), end):
    drawn = token
    # Start the next token before waiting for this one.
    if position + 1 < end:
      cache, token = advance(cache, drawn, position, 1, length=position + 1)
    yield drawn.item()


def _bucket(count: int) -> int:
  """The least power of two that is at least `count` (and _SMALLEST)."""
  return max(_SMALLEST, 1 << (count - 1).bit_length())


@functools.cache
def make_advance(
  config: ModelConfig, dtype: Any, place: Sharding
) -> Callable[..., tuple[cached.Cache, Array]]:
  """The function of one step, compiled for each length of tokens and cache.

  (params, cache, tokens (B, T), start, count, key, temperature, top_p, length)
  -> (cache, the tokens (B, 1) that follow). The tokens are at positions
  `start`, start + 1, ... All after the first `count` are padding; the next step
  overwrites what they leave in the cache. The text has `length` tokens so far;
  None: start + count. The old cache is donated. All rows draw with the same
  key.
  """

  def advance(
    params, cache, tokens, start, count, key, temperature, top_p, length=None
  ):
    length = start + count if length is None else length
    hidden, cache = cached.hidden_states(
      params, tokens, cache, start, config, length=length, dtype=dtype
    )
    logits = decoder.logits(params, hidden[:, count - 1], config)
    key = jax.random.fold_in(key, start + count)
    draw = jax.vmap(sample, in_axes=(0, None, None, None))
    return cache, draw(logits, key, temperature, top_p)[:, None]

  return jax.jit(
    advance,
    donate_argnums=1,
    out_shardings=place,
    compiler_options=compiler_options(),
  )


def sample(logits: Array, key: Array, temperature: Array, top_p: Array):
  """An id drawn from logits (V,); see `Sampling`."""

  def draw():
    # Subtract the largest logit: then no temperature gives infinity.
    scaled = (logits - jnp.max(logits)) / temperature
    # A sort is slow: do it only if top_p cuts something off.
    kept = jax.lax.cond(
      top_p < 1.0, nucleus, lambda scaled, _: scaled, scaled, top_p
    )
    return jax.random.categorical(key, kept)

  token = jax.lax.cond(temperature > 0.0, draw, lambda: jnp.argmax(logits))
  return token.astype(jnp.int32)


def nucleus(logits: Array, top_p: Array) -> Array:
  """Sets all logits (V,) to -inf but the likeliest, which together reach top_p.

  As few as possible are kept, and all that equal the smallest of these.
  """
  descending = jnp.sort(logits, descending=True)
  probabilities = jax.nn.softmax(descending)
  likelier = jnp.cumsum(probabilities) - probabilities
  least = jnp.min(jnp.where(likelier < top_p, descending, jnp.inf))
  return jnp.where(logits >= least, logits, -jnp.inf)
