"""Continuations that share a context score as each would alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.eval import continuations
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.trees import logical_axes
from lorapr_jax.runtime import sharding

# Two stacks, of layers that differ.
CONFIG = ModelConfig(
  vocab_size=61,
  embed_dim=16,
  head_dim=4,
  layers=(LayerShape(2, 2, 24), LayerShape(1, 2, 20)),
  max_positions=64,
)


@pytest.fixture(scope='module')
def params(random_params):
  return random_params(CONFIG)


@pytest.fixture(scope='module')
def pairs():
  """Contexts of many lengths, of which each goes on in several ways."""
  rng = np.random.default_rng(0)

  def draw(size):
    return rng.integers(CONFIG.vocab_size, size=size).tolist()

  made = []
  for length in (1, 7, 16, 40, 90):
    context = draw(length)
    made += [(context, draw(size)) for size in (1, 1, 3, 1, 8)]
  return made + [([5], draw(64)), ([5], draw(1))]


@pytest.fixture(scope='module')
def alone(params, pairs):
  """Each pair by itself, through the plain forward pass."""
  return _alone(params, pairs, CONFIG)


def _alone(params, pairs, config):
  length = 64

  @jax.jit
  def log_p(ids):
    hidden = decoder.hidden_states(params, ids[None], config)
    return jax.nn.log_softmax(decoder.logits(params, hidden[0], config))

  scores = []
  for context, continuation in pairs:
    ids = (context + continuation)[-(length + 1) :]
    inputs = np.zeros(length, np.int32)
    inputs[: len(ids) - 1] = ids[:-1]
    rows = np.asarray(log_p(inputs))[: len(ids) - 1][-len(continuation) :]
    targets = np.array(continuation)
    total = rows[np.arange(len(targets)), targets].sum(dtype=np.float64)
    scores.append((total, bool((rows.argmax(-1) == targets).all())))
  return scores


def score(params, pairs, batch_size, config=CONFIG):
  found = {}
  for batch in continuations.score_continuations(
    params, config, pairs, dtype=jnp.float32, batch_size=batch_size
  ):
    found |= batch
  assert len(found) == len(pairs)
  return [found[i] for i in range(len(pairs))]


def check(found, expected):
  for one, (log_likelihood, is_greedy) in zip(found, expected, strict=True):
    assert one.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
    assert one.is_greedy == is_greedy


def test_each_scores_as_it_would_alone(params, pairs, alone):
  place = sharding.beside(params, ())
  jitted = continuations._make_score(CONFIG, jnp.dtype('float32'), place)
  for _ in range(2):
    check(score(params, pairs, batch_size=2), alone)
    # It is compiled a handful of times: the rows have six lengths.
    lengths = {row.length for row in continuations._rows(pairs, CONFIG)}
    assert len(lengths) == 6 and jitted._cache_size() == 3


def test_a_window_counts_from_where_a_token_stands_in_its_text(params, pairs):
  config = dataclasses.replace(CONFIG, windows=(9, None))
  expected = _alone(params, pairs, config)
  check(score(params, pairs, 2, config), expected)


def test_contexts_that_lose_their_beginning_are_counted(pairs, caplog):
  continuations._rows(pairs, CONFIG)
  assert caplog.messages == [
    '5 of 27 texts are longer than the 64 positions of the model and lost '
    'their beginning'
  ]
  caplog.clear()
  continuations._rows(pairs[:20], CONFIG)
  assert not caplog.messages


def test_what_is_likeliest_is_greedy(params):
  context = [1, 2, 3]
  ways = [(context, [i]) for i in range(CONFIG.vocab_size)]
  each = score(params, ways, batch_size=4)
  likeliest = each.index(max(each))
  assert [i for i, one in enumerate(each) if one.is_greedy] == [likeliest]


@pytest.mark.mesh
def test_a_mesh_scores_as_one_device(params, pairs, alone):
  sizes = sharding.mesh_sizes(data=2, fsdp=4, tensor=1)
  places = sharding.shardings(
    sharding.make_mesh(sizes), logical_axes(CONFIG)['params'], params
  )
  placed = jax.device_put(params, places)
  # One batch of eight: three are raised to that.
  check(score(placed, pairs[:15], batch_size=3), alone[:15])


def test_a_context_is_computed_once():
  context = list(range(30))
  pairs = [(context, [i]) for i in range(4)] + [(context, [7, 8, 9])]
  (row,) = continuations._rows(pairs, CONFIG)
  # Continuations of one token take no room; the last token of any takes none.
  assert row.tokens == [*context, 7, 8]
  assert row.positions == [*range(30), 30, 31]
  assert row.after == [29, 29, 29, 29, 29, 30, 31]
  assert row.targets == [0, 1, 2, 3, 7, 8, 9]


def test_a_row_that_is_full_goes_on_in_another():
  pairs = [([1] * 20, [i % 61] * 12) for i in range(200)]
  rows = continuations._rows(pairs, CONFIG)
  assert [pair for row in rows for pair, _ in row.pairs] == [*range(200)]
  assert len(rows) == 2
  assert max(row.length for row in rows) <= 2048


@pytest.mark.parametrize(
  'lengths, expected',
  [
    ((1, 16), 16),
    ((17, 24), 24),
    ((25, 32), 32),
    ((33, 48), 48),
    ((49, 64), 64),
    ((1537, 2048), 2048),
  ],
)
def test_lengths_are_few(lengths, expected):
  assert {continuations.bucket(n) for n in lengths} == {expected}


@pytest.mark.parametrize(
  'pair, message',
  [
    (([1], []), 'no tokens'),
    (([], [1]), 'no tokens'),
    (([1], [1] * 65), 'has 65 tokens, but the model has 64 positions'),
    (([1, 61], [1]), 'the id 61, but the model has a vocabulary of 61'),
  ],
)
def test_what_cannot_be_scored_is_refused(params, pair, message):
  with pytest.raises(UserError, match=message):
    score(params, [pair], batch_size=1)
