"""benchmark: times of a prompt and of what follows, of folders in turns."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from lorapr_jax.cli.main import main
from lorapr_jax.eval.benchmark import compare
from lorapr_jax.eval.generation import Sampling, make_advance, stream_tokens
from lorapr_jax.hf.write import export_model
from lorapr_jax.models import cached
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.trees import init_params

FULL = ModelConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=8,
  layers=(LayerShape(4, 2, 48),) * 2,
  max_positions=64,
)
HALF = dataclasses.replace(FULL, layers=(LayerShape(2, 2, 24),) * 2)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp('models')
  for name, config in (('full', FULL), ('half', HALF)):
    params = init_params(jax.random.key(0), config, jnp.float32)
    export_model(root / name, params, config)
  return root


def benchmark(folders, capsys, *arguments):
  command = ['benchmark', '--model', str(folders / 'half'), *arguments]
  status = main(command)
  out, err = capsys.readouterr()
  return status, out, err


SHORT = ('--prompt_tokens', '16', '--new_tokens', '4', '--repeats', '2')


def test_both_folders_are_timed_at_every_batch_size(folders, capsys):
  against = ('--against', str(folders / 'full'), '--batch_sizes', '1,3')
  status, out, err = benchmark(folders, capsys, *SHORT, *against, '--json')
  assert status == 0, err
  report = json.loads(out)
  assert report['model']['params'] == HALF.num_parameters
  assert report['against']['weights_bytes'] == 4 * FULL.num_parameters
  # Keys and values of two layers: of 2 and of 4 heads of 8 numbers.
  assert report['model']['kv_cache_bytes_per_token'] == 2 * 2 * 2 * 8 * 4
  assert report['against']['kv_cache_bytes_per_token'] == 2 * 2 * 4 * 8 * 4
  rows = [(row['batch_size'], row['phase']) for row in report['results']]
  assert rows == [(b, p) for b in (1, 3) for p in ('prefill', 'decode')]
  for row in report['results']:
    assert row['speedup'] > 0 and row['flops_ratio'] > 1
    tokens = row['batch_size'] * (16 if row['phase'] == 'prefill' else 1)
    for name in ('model', 'against'):
      speed = tokens / row[name]['seconds']
      assert row[name]['tokens_per_second'] == pytest.approx(speed)


def test_one_folder_has_nothing_to_be_faster_than(folders, capsys):
  status, out, err = benchmark(folders, capsys, *SHORT, '--batch_sizes', '2')
  assert status == 0, err
  assert 'prefill' in out and 'decode' in out and 'faster' not in out
  assert f'{HALF.num_parameters:,} parameters' in out


def test_the_speed_up_is_that_of_turns_not_of_medians():
  # The machine was three times as slow in the last turn, for both.
  times = {
    'model': {'prefill': [1.0, 1.0, 3.0], 'decode': [0.1, 0.1, 0.3]},
    'against': {'prefill': [2.0, 4.0, 6.0], 'decode': [0.2, 0.2, 0.6]},
  }
  flops = {'model': 10.0, 'against': 25.0}
  row = compare(times, 'prefill', 32, flops)
  assert row == {
    'model': {'seconds': 1.0, 'tokens_per_second': 32.0},
    'against': {'seconds': 4.0, 'tokens_per_second': 8.0},
    'speedup': 2.0,
    'flops_ratio': 2.5,
  }
  assert compare(times, 'decode', 2, flops)['speedup'] == pytest.approx(2.0)


def test_a_batch_is_continued_row_by_row(random_params):
  params = random_params(FULL)
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  prompt = jax.random.randint(jax.random.key(1), (2, 9), 0, 96)
  cache = cached.empty_cache(FULL, 2, 14, jnp.float32, place)
  advance = functools.partial(
    make_advance(FULL, jnp.dtype('float32'), place),
    params,
    key=jax.random.key(0),
    temperature=0.0,
    top_p=1.0,
  )
  cache, tokens = advance(cache, prompt, 0, 9)
  drawn = [tokens]
  for position in range(9, 14):
    cache, tokens = advance(cache, tokens, position, 1)
    drawn.append(tokens)
  for row, ids in zip(jnp.concatenate(drawn, axis=1), prompt, strict=True):
    sampling = Sampling(max_new_tokens=6)
    stream = stream_tokens(params, FULL, ids, sampling, dtype=jnp.float32)
    assert list(stream) == row.tolist()


@pytest.mark.parametrize(
  'arguments, message',
  [
    (('--batch_sizes', '1,many'), "--batch_sizes is '1,many'"),
    (('--batch_sizes', '0'), 'batch_sizes is 0: it must be at least 1'),
    (('--new_tokens', '1'), 'new_tokens is 1: it must be at least 2'),
    (('--repeats', '0'), 'repeats is 0: it must be at least 1'),
    (('--prompt_tokens', '60'), 'are 92 tokens, more than the 64 positions'),
    ((*SHORT, '--against', 'not-there'), 'not-there'),
  ],
)
def test_mistakes_are_one_line(folders, capsys, arguments, message):
  status, out, err = benchmark(folders, capsys, *arguments)
  assert status == 1 and out == ''
  assert message in err and err.count('\n') == 1
