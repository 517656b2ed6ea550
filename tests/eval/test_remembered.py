"""The perplexity of a base is measured once, and again where it is damaged."""

import json

import numpy as np
import pytest

from lorapr_jax.eval.perplexity import HeldOut, Perplexity
from lorapr_jax.eval.remembered import remembered_perplexity
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig

COMPUTE = Compute(
  ModelConfig(8, 8, 8, (LayerShape(1, 1, 8),)),
  LoraConfig(1, 1.0, 0.0),
  dtype=np.dtype('float32'),
)
PARAMS = {'norm': {'weight': np.ones(8)}}


class Counted(HeldOut):
  """A text whose perplexity is the number of times that it was measured."""

  times = 0

  def perplexity(self, params, compute, **_):
    Counted.times += 1
    return Perplexity(Counted.times, 0.5, 6, 2, 4, self.data, 1.5)


def measure(sha256='a' * 64, data='file:a.txt'):
  text = Counted(np.arange(8).reshape(2, 4), data, 1)
  return remembered_perplexity(text, sha256, PARAMS, COMPUTE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path))
  monkeypatch.setattr(Counted, 'times', 0)
  return tmp_path / 'perplexity'


def test_it_is_measured_once_for_each_base_and_text():
  first = measure()
  assert measure() == first
  assert measure(data='file:b.txt').data == 'file:b.txt'
  assert Counted.times == 1
  assert measure('b' * 64).perplexity == 2
  assert measure(None).perplexity == 3


@pytest.mark.parametrize(
  'change',
  [
    lambda text: text[:20],
    lambda text: '',
    lambda text: '[]',
    lambda text: '{}',
    lambda text: text.replace('"perplexity": 1', '"perplexity": 0.5'),
    lambda text: text.replace('"perplexity": 1', '"perplexity": "1"'),
    lambda text: text.replace('"nll"', '"loss"'),
    lambda text: json.dumps(json.loads(text) | {'windows': None}),
    lambda text: '[' * 10_000,
    lambda text: text.replace('6', '6' * 5000),
  ],
)
def test_what_is_damaged_is_measured_again(cache, caplog, change):
  measure()
  [path] = cache.iterdir()
  path.write_text(change(path.read_text()))
  assert measure().perplexity == 2
  [message] = caplog.messages
  assert message.startswith(str(path))
  assert message.endswith(': the perplexity is measured again')
  assert measure().perplexity == 2
