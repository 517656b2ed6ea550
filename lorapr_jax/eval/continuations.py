"""Scores how likely continuations of contexts are; each context runs once.

Continuations of the same context share a row (models/branches.py). A
continuation of one token takes no room in it. Rows are padded to one of a few
lengths, and the model is compiled once for each length.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Sharding
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.models import branches, decoder
from lorapr_jax.models.compute import compiler_options
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.runtime import sharding

_SHORTEST = 16
# A row that would become longer than this takes no further continuation.
_FULL = 2048
# Logits exist for this many tokens of a row at a time; it divides every length.
_CHUNK = 8

_log = logging.getLogger(__name__)


class Score(NamedTuple):
  """How likely a continuation is.

  Attributes:
    log_likelihood: the sum over its tokens, in nats.
    is_greedy: whether each of its tokens is the likeliest one.
  """

  log_likelihood: float
  is_greedy: bool


@dataclasses.dataclass
class _Row:
  """A context and some of its continuations.

  Attributes:
    tokens: the ids that the model reads.
    positions: the position of each token.
    branches: the branch of each token; see models/branches.py.
    targets: the ids of the continuations, one behind the other.
    after: for each target, the index of the token that it follows.
    pairs: for each continuation, the index of its pair and its length.
  """

  tokens: list[int]
  positions: list[int]
  branches: list[int]
  after: list[int] = dataclasses.field(default_factory=list)
  targets: list[int] = dataclasses.field(default_factory=list)
  pairs: list[tuple[int, int]] = dataclasses.field(default_factory=list)

  @classmethod
  def of(cls, context: Sequence[int]) -> '_Row':
    T = len(context)
    return cls(list(context), list(range(T)), [branches.TRUNK] * T)

  @property
  def length(self) -> int:
    return max(len(self.tokens), len(self.targets))

  def add(self, pair: int, context_length: int, continuation: Sequence[int]):
    # The model does not read the last token: nothing follows it.
    start, count = len(self.tokens), len(continuation) - 1
    self.tokens += continuation[:-1]
    self.positions += range(context_length, context_length + count)
    self.branches += [len(self.pairs) + 1] * count
    self.after += [context_length - 1, *range(start, start + count)]
    self.targets += continuation
    self.pairs.append((pair, count + 1))


def score_continuations(
  params: Any,
  config: ModelConfig,
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  dtype: Any,
  batch_size: int,
) -> Iterator[dict[int, Score]]:
  """Scores the pairs, a batch at a time, the longest ones first.

  A pair is (ids of a context, ids that follow), neither empty. A context that
  is too long loses its beginning; a warning says how many do. The mesh axes
  data and fsdp share a batch: `batch_size` is raised to a multiple of them.

  Yields:
    {index of a pair: its score}, for each batch.

  Raises:
    UserError: for a pair with nothing in it, with ids that the model does not
      have, or whose continuation alone is too long for the model.
  """
  parts = sharding.batch_parts(params)
  batch_size = -(-batch_size // parts) * parts
  place = sharding.beside(params, ('batch',))
  score = _make_score(config, jnp.dtype(dtype), sharding.beside(params, ()))
  rows = sorted(_rows(pairs, config), key=lambda row: -row.length)
  for start in range(0, len(rows), batch_size):
    batch = rows[start : start + batch_size]
    shape = batch_size, bucket(batch[0].length)
    arrays = [
      _padded([getattr(row, name) for row in batch], shape)
      for name in ('tokens', 'positions', 'branches', 'after', 'targets')
    ]
    most = max(len(row.targets) for row in batch)
    scores = score(params, most, *jax.device_put(arrays, place))
    found: dict[int, Score] = {}
    for row, *values in zip(batch, *map(np.asarray, scores), strict=False):
      found.update(_split(row, *values))
    yield found


def _rows(pairs, config) -> list[_Row]:
  groups: dict[tuple[int, ...], list[int]] = {}
  limit, shortened = config.longest, 0
  for i, (context, continuation) in enumerate(pairs):
    if not len(context) or not len(continuation):
      raise UserError('a continuation, or what it continues, has no tokens')
    if len(continuation) > limit:
      raise UserError(
        f'a continuation has {len(continuation)} tokens, but the model has '
        f'{limit} positions (max_position_embeddings)'
      )
    if max(*context, *continuation) >= config.vocab_size:
      raise UserError(
        f'a text has the id {max(*context, *continuation)}, but the model has '
        f'a vocabulary of {config.vocab_size}: the tokenizer is not of this '
        'model'
      )
    # The last token of the continuation takes no position.
    room = limit + 1 - len(continuation)
    shortened += len(context) > room
    context = tuple(context[-room:])
    groups.setdefault(context, []).append(i)
  if shortened:
    _log.warning(
      '%d of %d texts are longer than the %d positions of the model and lost '
      'their beginning',
      *(shortened, len(pairs), limit),
    )
  rows = []
  for context, members in groups.items():
    row = _Row.of(context)
    for i in members:
      continuation = list(pairs[i][1])
      if row.pairs and row.length + len(continuation) > _FULL:
        rows.append(row)
        row = _Row.of(context)
      row.add(i, len(context), continuation)
    rows.append(row)
  return rows


def bucket(length: int) -> int:
  """The least of 16, 24, 32, 48, 64, 96, ... that is at least `length`."""
  power = max(_SHORTEST, 1 << (length - 1).bit_length())
  between = power * 3 // 4
  return between if between > _SHORTEST and length <= between else power


def _padded(values: list[list[int]], shape: tuple[int, int]) -> np.ndarray:
  out = np.zeros(shape, np.int32)
  for row, value in zip(out, values, strict=False):
    row[: len(value)] = value
  return out


def _split(row: _Row, log_p: np.ndarray, hits: np.ndarray):
  start = 0
  for pair, count in row.pairs:
    end = start + count
    total = float(log_p[start:end].sum(dtype=np.float64))
    yield pair, Score(total, bool(hits[start:end].all()))
    start = end


@functools.cache
def _make_score(
  config: ModelConfig, dtype: Any, place: Sharding
) -> Callable[..., tuple[Array, Array]]:
  """The function that scores a batch of rows, compiled for each (B, T).

  (params, count, tokens, positions, branches, after, targets) -> (log-
  likelihood of each target after token number `after`, whether the target is
  the likeliest). All but the first two arguments, and both results, are (B, T);
  the results are only computed for the first `count` targets of each row.
  """

  def score(params, count, tokens, positions, numbers, after, targets):
    hidden = branches.hidden_states(
      params, tokens, positions, numbers, config, dtype=dtype
    )

    def chunk(i, out):
      def columns(x):
        return jax.lax.dynamic_slice_in_dim(x, i * _CHUNK, _CHUNK, axis=1)

      x = jnp.take_along_axis(hidden, columns(after)[..., None], axis=1)
      logits = decoder.logits(params, x, config)
      target = columns(targets)[..., None]
      log_p = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
      found = (
        log_p - jax.nn.logsumexp(logits, axis=-1),
        jnp.argmax(logits, axis=-1) == target[..., 0],
      )
      return tuple(
        jax.lax.dynamic_update_slice_in_dim(old, new, i * _CHUNK, axis=1)
        for old, new in zip(out, found, strict=True)
      )

    zeros = jnp.zeros(tokens.shape)
    # Only as many as needed: a row has few targets beside its context.
    chunks = (count + _CHUNK - 1) // _CHUNK
    return jax.lax.fori_loop(0, chunks, chunk, (zeros, zeros > 0))

  return jax.jit(
    score, out_shardings=place, compiler_options=compiler_options()
  )
