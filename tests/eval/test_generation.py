"""Greedy text is transformers'; draws, stops, pieces of text, compilations."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError
from lorapr_jax.eval import generation
from lorapr_jax.eval.generation import (
  Sampling,
  detokenize,
  nucleus,
  stream_tokens,
)
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.trees import logical_axes
from lorapr_jax.runtime import sharding
from lorapr_jax.runtime.files import cache_dir

CONFIG = ModelConfig(
  vocab_size=300,
  embed_dim=32,
  head_dim=8,
  layers=(LayerShape(2, 2, 48), LayerShape(2, 1, 40)),
  max_positions=128,
)
EIGHT = Sampling(8)


def _prompt(length, vocab=96):
  return np.random.default_rng(length).integers(0, vocab, length)


def _tokens(params, config, prompt, sampling=EIGHT, **kwargs):
  kwargs = {'dtype': 'float32', **kwargs}
  return list(stream_tokens(params, config, prompt, sampling, **kwargs))


def _transformers(folder, prompts, new_tokens):
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=True
  )
  texts = []
  for prompt in prompts:
    ids = torch.tensor(np.asarray(prompt, np.int64)[None])
    out = model.generate(ids, do_sample=False, max_new_tokens=new_tokens)
    texts.append(out[0, len(prompt) :].tolist())
  return texts


@pytest.mark.parametrize('kind', ['gqa', 'mistral'])
def test_greedy_is_transformers(kind, save_hf, load):
  # Prompts and texts for one size of the cache: each size is compiled.
  prompts = [_prompt(length) for length in (5, 12, 16)]
  config, params = load(save_hf(kind))
  got = [_tokens(params, config, p, Sampling(12)) for p in prompts]
  assert got == _transformers(save_hf(kind), prompts, 12)
  assert len({tuple(text) for text in got}) > 1


def test_a_long_prompt_may_come_in_chunks(save_hf, load, monkeypatch):
  config, params = load(save_hf('gqa'))
  [want] = _transformers(save_hf('gqa'), [_prompt(55)], 8)
  assert _tokens(params, config, _prompt(55)) == want
  monkeypatch.setattr(generation, '_LARGEST', 16)
  assert _tokens(params, config, _prompt(55)) == want


def test_a_bf16_computation_draws_a_token_too(random_params):
  params = random_params(CONFIG, 'bfloat16')
  [got] = _tokens(params, CONFIG, _prompt(5), Sampling(1), dtype=jnp.bfloat16)
  assert 0 <= got < 300


def test_the_text_ends_before_a_stop_id(random_params):
  params = random_params(CONFIG)
  whole = _tokens(params, CONFIG, _prompt(5))
  stop = whole[3]
  assert (
    _tokens(params, CONFIG, _prompt(5), stop={stop, 299})
    == (whole[: whole.index(stop)])
  )


def test_the_text_ends_with_the_positions(random_params):
  params = random_params(CONFIG)
  assert len(_tokens(params, CONFIG, _prompt(124), Sampling(100))) == 4
  assert len(_tokens(params, CONFIG, _prompt(127), Sampling(100))) == 1


@pytest.mark.parametrize(
  ('prompt', 'message'),
  [
    ([], 'the prompt is empty'),
    ([1] * 128, 'the prompt has 128 tokens, .* 128 positions'),
    ([1, 300], 'the id 300, .* vocabulary of 300'),
  ],
)
def test_impossible_prompts_are_refused_at_once(prompt, message):
  with pytest.raises(UserError, match=message):
    stream_tokens({}, CONFIG, prompt, Sampling(), dtype='float32')


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    *[('max_new_tokens', n) for n in (0, -1)],
    *[('temperature', t) for t in (-0.1, float('inf'), float('nan'))],
    *[('top_p', p) for p in (0.0, 1.1, float('nan'))],
    *[('seed', s) for s in (-1, 2**32)],
  ],
)
def test_impossible_sampling_is_refused(name, value):
  with pytest.raises(UserError, match=f'{name} is {value}: it must be'):
    Sampling(**{name: value})


# The nucleus of some probabilities: which tokens are kept.
@pytest.mark.parametrize(
  ('top_p', 'kept'),
  [
    (0.01, [0, 0, 1, 0, 0]),
    (0.45, [0, 0, 1, 0, 0]),
    (0.55, [1, 0, 1, 0, 0]),
    (0.74, [1, 0, 1, 0, 0]),
    (0.76, [1, 0, 1, 0, 1]),
    (0.89, [1, 1, 1, 0, 1]),
    (0.99, [1, 1, 1, 1, 1]),
  ],
)
def test_top_p_keeps_exactly_the_nucleus(top_p, kept):
  logits = jnp.log(jnp.array([0.25, 0.1, 0.5, 0.03, 0.12]))
  got = nucleus(logits, top_p)
  np.testing.assert_array_equal(
    got, jnp.where(jnp.array(kept), logits, -np.inf)
  )


def test_tokens_as_likely_as_the_last_of_the_nucleus_stay():
  logits = jnp.log(jnp.array([0.25, 0.25, 0.4, 0.1]))
  assert jnp.isfinite(nucleus(logits, 0.5)).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
  ('temperature', 'top_p', 'expected'),
  [
    (0.0, 1.0, [0, 0, 1, 0]),
    (1e-30, 1.0, [0, 0, 1, 0]),
    (1.0, 1.0, [0.2, 0.1, 0.4, 0.3]),
    (0.5, 1.0, [4 / 30, 1 / 30, 16 / 30, 9 / 30]),
    (1.0, 0.6, [0, 0, 4 / 7, 3 / 7]),
    # The temperature comes first: 16/30 + 9/30 reach 0.8.
    (0.5, 0.8, [0, 0, 16 / 25, 9 / 25]),
  ],
)
def test_draws_have_the_distribution(temperature, top_p, expected):
  logits = jnp.log(jnp.array([0.2, 0.1, 0.4, 0.3])) + 50.0
  draw = jax.vmap(
    lambda key: generation.sample(logits, key, temperature, top_p)
  )
  tokens = jax.jit(draw)(jax.random.split(jax.random.key(0), 20_000))
  shares = np.bincount(tokens, minlength=4) / 20_000
  # Four standard deviations, and none at all for what must not be drawn.
  spread = np.sqrt(np.array(expected) * (1 - np.array(expected)) / 20_000)
  assert (abs(shares - expected) <= 4 * spread + 1e-9).all()


def test_a_seed_draws_the_same_tokens_again(random_params):
  params = random_params(CONFIG)
  sampling = Sampling(12, temperature=2.0, top_p=0.95, seed=3)
  first = _tokens(params, CONFIG, _prompt(5), sampling)
  assert _tokens(params, CONFIG, _prompt(5), sampling) == first
  other = dataclasses.replace(sampling, seed=4)
  assert _tokens(params, CONFIG, _prompt(5), other) != first
  # Each position draws anew.
  assert len(set(first)) > 3


def test_a_handful_of_compilations(random_params):
  # Of this test alone: compiled functions are kept by config.
  config = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1])
  params = random_params(config)
  place = params['norm']['weight'].sharding
  for length in (1, 5, 12, 13, 16, 17, 23, 28):
    for temperature in (0.0, 0.7):
      sampling = Sampling(4, temperature, 0.9, seed=length)
      assert len(_tokens(params, config, _prompt(length), sampling)) == 4
  step = generation.make_advance(config, jnp.dtype('float32'), place)
  # One token, or a prompt of up to 16, into a cache of 16; and one token, or
  # a prompt of up to 16 or 32, into a cache of 32.
  assert step._cache_size() == 2 + 3


@pytest.mark.mesh
def test_sharded_weights_are_used_where_they_lie(random_params):
  params = random_params(CONFIG)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  places = sharding.shardings(mesh, logical_axes(CONFIG)['params'], params)
  sharded = jax.device_put(params, places)
  for length in (5, 7):
    assert _tokens(sharded, CONFIG, _prompt(length)) == (
      _tokens(params, CONFIG, _prompt(length))
    )
  place = sharding.beside(sharded, ())
  step = generation.make_advance(CONFIG, jnp.dtype('float32'), place)
  assert step._cache_size() == 2


def test_stop_ids(tmp_path):
  def write(name, **keys):
    (tmp_path / name).write_text(json.dumps(keys))

  assert generation.stop_ids(tmp_path) == set()
  write('config.json', eos_token_id=2)
  assert generation.stop_ids(tmp_path) == {2}
  write('generation_config.json', bos_token_id=1)
  assert generation.stop_ids(tmp_path) == {2}
  write('generation_config.json', eos_token_id=[3, 0])
  assert generation.stop_ids(tmp_path) == {0, 3}


@pytest.fixture
def byte_level(tmp_path, add_tokenizer):
  return Tokenizer(add_tokenizer(tmp_path))


@pytest.fixture
def byte_fallback(tmp_path):
  """A tokenizer as LLaMA 2's: words with their space, bytes for the rest."""
  words = [
    '<unk>',
    *(f'<0x{i:02X}>' for i in range(256)),
    *('▁the', '▁fox', 's'),
  ]
  tokenizer = tokenizers.Tokenizer(
    models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True)
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(
    '{"tokenizer_class": "PreTrainedTokenizerFast"}'
  )
  return Tokenizer(tmp_path)


def test_pieces_are_whole_characters(byte_level):
  text = ' the fox, née 🌊🌊 東京\n\n  end'
  ids = byte_level.encode(text)
  pieces = list(detokenize(byte_level, byte_level.encode('ü the'), ids))
  assert ''.join(pieces) == text
  assert len(pieces) > 10
  assert '\ufffd' not in ''.join(pieces)


def test_a_character_cut_short_is_left_out(byte_level):
  ids = byte_level.encode('dog 🌊')
  for cut in (1, 2, 3):
    assert ''.join(detokenize(byte_level, [5], ids[:-cut])) == 'dog '


def test_special_tokens_are_not_shown(byte_level):
  ids = [0, *byte_level.encode('the'), 0, *byte_level.encode(' dog'), 0]
  assert ''.join(detokenize(byte_level, [0], ids)) == 'the dog'


def test_spaces_in_front_of_words_stay(byte_fallback):
  the, fox, s, wave = 257, 258, 259, [b + 1 for b in '🌊'.encode()]
  assert byte_fallback.decode([the, fox]) == 'the fox'
  tokens = [fox, s, *wave, *wave, the, fox, *wave[:2]]
  pieces = list(detokenize(byte_fallback, [the], tokens))
  assert pieces == [' fox', 's', '🌊', '🌊', ' the', ' fox']


def test_text_is_streamed_from_a_prompt_or_a_message(
  tmp_path, add_tokenizer, random_params
):
  tokenizer = Tokenizer(add_tokenizer(tmp_path, 'chat_template.jinja'))
  (tmp_path / 'config.json').write_text('{"eos_token_id": 0}')
  params = random_params(CONFIG)
  for chat in (False, True):
    question = [{'role': 'user', 'content': 'the'}]
    ids = generation.encode_prompt(tokenizer, CONFIG, question, raw=not chat)
    prompt = '<|user|>the\n<|assistant|>' if chat else 'the'
    assert ids.tolist() == tokenizer.encode(prompt).tolist()
    want = tokenizer.decode(_tokens(params, CONFIG, ids, Sampling(20)))
    pieces = generation.stream_text(
      params, CONFIG, tokenizer, ids, Sampling(20), dtype='float32'
    )
    assert ''.join(pieces).rstrip('\ufffd') == want.rstrip('\ufffd')
    assert len(want) > 5


@pytest.mark.slow
def test_a_real_model_writes_what_transformers_writes(load):
  folder = cache_dir() / 'smollm2-135m-instruct'
  if not folder.is_dir():
    pytest.skip(f'{folder} is not there: `make demo` makes it')
  config, params = load(folder)
  tokenizer, stop = Tokenizer(folder), generation.stop_ids(folder)
  texts = ('The capital of France is', 'Write a poem about 東京 and the sea.')
  prompts = [tokenizer.encode(text) for text in texts]
  prompts += [
    tokenizer.encode_chat([{'role': 'user', 'content': text}]) for text in texts
  ]
  stream = functools.partial(_tokens, params, config, stop=stop)
  got = [stream(prompt, Sampling(32)) for prompt in prompts]
  want = _transformers(folder, prompts, 32)
  assert got == [[i for i in text if i not in stop] for text in want]
