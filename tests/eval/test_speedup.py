"""prune.speedup: which size is chosen, what is timed, and what is remembered.

Times are made up from sizes: a decoded token takes as long as the model has
parameters, and a prompt takes half a second more for every head.
"""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from lorapr_jax.axes import LAYERS
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.errors import UserError
from lorapr_jax.eval import speedup
from lorapr_jax.eval.speedup import measured_speedup, plan_targets
from lorapr_jax.exploring.asked import ask
from lorapr_jax.exploring.ways import WAYS
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.sizes import plan_sizes
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.runtime.files import write_json
from lorapr_jax.runtime.processor import describe
from lorapr_jax.settings.run import split_config
from lorapr_jax.train import _measured

CONFIG = ModelConfig(
  vocab_size=16,
  embed_dim=8,
  head_dim=4,
  layers=(LayerShape(4, 2, 64),) * 4,
  tie_embeddings=True,
)
SMALLER = plan_pruning(CONFIG, Targets()).pruned_config
# As it is; most tests replace it.
_TIMES = speedup._times
TPU = SimpleNamespace(platform='tpu', device_kind='TPU v9')


def seconds(config, phase):
  if phase == 'decode':
    return config.num_parameters
  return 1 + 0.5 * sum(shape.num_heads for shape in config.layers)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'speedup'


@pytest.fixture
def timed(monkeypatch):
  """What was timed: (parameters, on what, how)."""
  found = []

  def times(models, device, dtype, how):
    found.append((models['model'].num_parameters, describe(device), how))
    return {
      name: {phase: [seconds(x, phase)] for phase in ('decode', 'prefill')}
      for name, x in models.items()
    }

  monkeypatch.setattr(speedup, '_times', times)
  return found


@pytest.fixture
def untimed(monkeypatch):
  """Nothing may be timed."""

  def times(*_):
    raise AssertionError

  monkeypatch.setattr(speedup, '_times', times)


@pytest.mark.parametrize('phase', ['decode', 'prefill'])
@pytest.mark.parametrize('goal', [1.01, 1.2, 1.5, 1.9, 2.1])
def test_the_largest_size_that_is_fast_enough_is_found(timed, phase, goal):
  targets = Targets(speedup=goal, speedup_of=phase)
  plan = plan_targets(CONFIG, targets)
  dense = seconds(CONFIG, phase)
  fast = [
    each
    for each in plan_sizes(CONFIG, targets, 32)
    if dense / seconds(each.pruned_config, phase) >= goal
  ]
  assert plan == fast[0]
  assert len(timed) == len({size for size, *_ in timed}) <= 6


def test_the_fewest_layers_go_with_which_it_is_fast_enough(timed):
  alone = {'heads': 'none', 'channels': False, 'protect': 'none'}
  layer = CONFIG.layer_parameters(CONFIG.layers[0])
  dense = CONFIG.num_parameters
  for gone in (1, 2, 3):
    goal = dense / (dense - gone * layer) - 1e-6
    plan = plan_targets(CONFIG, Targets(speedup=goal, **alone))
    assert plan.keep == {LAYERS: (1,) * (4 - gone) + (0,) * gone}


def test_explore_has_the_size_that_each_way_is_so_fast_by(timed):
  flags = ['--config=tiny', '--workdir=none', '--config.prune.speedup=1.5']
  config, _ = parse_flags(flags)
  asked = ask(config, list(WAYS), [0.8])
  dense = asked.dense.num_parameters
  found = [size for size in asked.plans if size.asked]
  assert [size.name for size in found] == [f'{way} speedup=1.5' for way in WAYS]
  for size in found:
    plan = asked.plans[size]
    assert 1.5 * plan.pruned_config.num_parameters <= dense
    # Which a run comes to by the settings that are given for it.
    config.prune.update(asked.asks[size])
    run = split_config(config, jax.devices()[:1]).plan
    assert run.keep == plan.keep
    config, _ = parse_flags(flags)
  deep = next(size for size in found if size.way == 'depth')
  left = asked.plans[deep].pruned_config.num_parameters
  layer = asked.dense.layer_parameters(asked.dense.layers[0])
  assert 1.5 * (left + layer) > dense


def test_what_is_too_fast_says_what_was_measured(timed, capsys):
  with pytest.raises(UserError, match='is beyond what can be pruned') as error:
    plan_targets(CONFIG, Targets(speedup=40.0))
  smallest = plan_sizes(CONFIG, Targets(speedup=40.0), 32)[-1]
  size = smallest.pruned_config.num_parameters
  most = int(100 * CONFIG.num_parameters / size) / 100
  here = describe(jax.devices()[0])
  assert f'the most that was measured on {here} is {most:.2f}' in str(
    error.value
  )
  assert [x for x, *_ in timed] == [size]
  first, second = capsys.readouterr().err.splitlines()
  assert first == (
    f'prune.speedup: decode is timed on {here}, as benchmark does it'
  )
  dense = CONFIG.num_parameters
  assert second == (
    f'{size:,} of {dense:,} parameters: {dense / size:.2f} times as fast'
  )
  assert plan_targets(CONFIG, Targets(speedup=most)).keep == smallest.keep


def test_a_model_without_smaller_sizes_is_refused(untimed):
  targets = Targets(speedup=2.0, heads='none', channels_multiple_of=64)
  with pytest.raises(UserError, match='no smaller size is left'):
    plan_targets(CONFIG, targets)


def test_other_targets_are_planned_and_not_timed(untimed):
  assert plan_targets(CONFIG, Targets()).pruned_config == SMALLER


# --- What is timed.


def test_it_is_timed_as_the_benchmark_does(timed):
  here = jax.devices()[0]
  short = dataclasses.replace(CONFIG, max_positions=20)
  for config, phase in (
    (CONFIG, 'decode'),
    (CONFIG, 'prefill'),
    (short, 'decode'),
    (short, 'prefill'),
  ):
    measured_speedup(config, SMALLER, phase, here)
  tokens = [(how['prompt_tokens'], how['new_tokens']) for _, _, how in timed]
  assert tokens == [(128, 32), (128, 1), (10, 10), (19, 1)]
  assert {(how['batch_size'], how['repeats']) for *_, how in timed} == {(1, 7)}


def test_random_weights_of_both_sizes_are_timed_in_turns(monkeypatch):
  monkeypatch.setattr(speedup, 'REPEATS', 2)
  dense = dataclasses.replace(CONFIG, layers=(LayerShape(4, 2, 64),))
  small = dataclasses.replace(CONFIG, layers=(LayerShape(2, 2, 8),))
  assert measured_speedup(dense, small, 'prefill', jax.devices()[0]) > 0


def test_a_device_that_is_not_here_cannot_be_timed():
  with pytest.raises(UserError, match='there is no TPU v9 here to be timed'):
    plan_targets(CONFIG, Targets(speedup=1.5), (TPU,))


def test_a_device_without_room_cannot_be_timed(monkeypatch):
  def draw(*_, **__):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 bytes.\nmore')

  monkeypatch.setattr(speedup, 'load_or_draw', draw)
  with pytest.raises(UserError) as error:
    plan_targets(CONFIG, Targets(speedup=1.5))
  message = str(error.value)
  assert (
    'cannot time' in message and '(RESOURCE_EXHAUSTED: 9 bytes.)' in message
  )
  assert '\n' not in message


# --- What is remembered.


def test_nothing_is_timed_twice(timed):
  targets = Targets(speedup=1.5)
  plan = plan_targets(CONFIG, targets)
  timed.clear()
  assert plan_targets(CONFIG, targets) == plan
  assert timed == []
  # Another goal has the smallest size in common with it, at least.
  plan_targets(CONFIG, Targets(speedup=1.9))
  assert 0 < len(timed) <= 5


def test_other_devices_versions_and_phases_are_timed_anew(timed, monkeypatch):
  here = jax.devices()[0]

  def measure(device=here, phase='decode', smaller=SMALLER):
    before = len(timed)
    measured_speedup(CONFIG, smaller, phase, device)
    return len(timed) - before

  assert [measure(), measure()] == [1, 0]
  assert [measure(TPU), measure(TPU), measure()] == [1, 0, 0]
  assert measure(phase='prefill') == 1
  assert measure(smaller=CONFIG) == 1
  monkeypatch.setattr(jax, '__version__', '99.0')
  assert measure() == 1


def test_a_device_that_was_timed_need_not_be_here(timed, monkeypatch):
  plan = plan_targets(CONFIG, Targets(speedup=1.5), (TPU,))
  assert {device for _, device, _ in timed} == {'TPU v9'}
  monkeypatch.setattr(speedup, '_times', _TIMES)
  assert plan_targets(CONFIG, Targets(speedup=1.5), (TPU,)) == plan
  with pytest.raises(UserError, match='there is no TPU v9 here'):
    plan_targets(CONFIG, Targets(speedup=1.9), (TPU,))


def test_a_damaged_figure_is_timed_again(timed, cache, caplog):
  here = jax.devices()[0]
  measured_speedup(CONFIG, SMALLER, 'decode', here)
  [path] = cache.iterdir()
  path.write_text(json.dumps({'speedup': 9.0}))
  assert measured_speedup(CONFIG, SMALLER, 'decode', here) < 9
  [message] = caplog.messages
  assert message.endswith(': the speedup is measured again')


# --- A run that goes on.


def config_of(*overrides):
  flags = ['--config=configs/tiny.py', '--workdir=none', *overrides]
  return parse_flags(flags)[0]


def test_a_run_that_goes_on_keeps_its_counts_and_times_nothing(
  timed, monkeypatch, tmp_path
):
  config = config_of('--config.prune.speedup=1.2')
  assert _measured(config, tmp_path / 'new') is None
  settings = split_config(config)
  identity = {'config': config.to_dict(), 'resolved': settings.resolved()}
  write_json(tmp_path / 'run.json', identity)
  measured = _measured(config, tmp_path)
  assert measured == {g: list(kept) for g, kept in settings.plan.keep.items()}

  timed.clear()
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'lost'))
  assert split_config(config, measured=measured).plan == settings.plan
  assert timed == []

  with pytest.raises(UserError, match='another config.prune.speedup'):
    _measured(config_of('--config.prune.speedup=1.3'), tmp_path)
  with pytest.raises(UserError, match='the counts that were measured when'):
    split_config(config, measured=measured | {'mlp': [1, 2, 3, 4]})
