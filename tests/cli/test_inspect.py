"""inspect: couplings, counts, bytes, and what a target would leave."""

import dataclasses
import json
import re

import pytest

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.cli.main import main
from lorapr_jax.eval import speedup
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.settings.model import PruneSettings

CONFIG = ModelConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=8,
  layers=(LayerShape(num_kv_heads=4, queries_per_kv=2, mlp_dim=48),) * 10,
)
KV_HEADS, QUERIES, CHANNELS = 'kv_heads', 'kv_heads,queries_per_kv', 'mlp'


def write(folder, config, model_type='llama'):
  """A folder that holds sizes and nothing else."""
  folder.mkdir()
  text = json.dumps({'model_type': model_type, **config_to_hf(config)})
  (folder / 'config.json').write_text(text)
  return folder


@pytest.fixture
def folder(tmp_path):
  return write(tmp_path / 'model', CONFIG)


def inspect(capsys, folder, *args):
  """What the command prints with --json, parsed."""
  assert main(['inspect', '--model', str(folder), *args, '--json']) == 0
  return json.loads(capsys.readouterr().out)


def test_json_has_every_coupling_with_counts_and_bytes(capsys, folder):
  report = inspect(capsys, folder, '--dtype', 'float32')
  # Embeddings and output, and by layer q and o, k and v, the MLP, two norms.
  by_layer = 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48 + 2 * 32
  parameters = 2 * 96 * 32 + 10 * by_layer + 32
  assert report['parameters'] == parameters
  assert report['bytes'] == 4 * parameters
  assert report['layers'] == 10
  assert report['protected_layers'] == [0, 9]
  assert 'plan' not in report

  groups = report['groups']
  assert groups.keys() == {KV_HEADS, QUERIES, CHANNELS}
  q = ['embed', 'kv_heads', 'queries_per_kv', 'head_dim']
  o = ['kv_heads', 'queries_per_kv', 'head_dim', 'embed']
  k = v = ['embed', 'kv_heads', 'head_dim']
  assert groups[KV_HEADS]['tensors'] == {
    'self_attn.q_proj.weight': q,
    'self_attn.k_proj.weight': k,
    'self_attn.v_proj.weight': v,
    'self_attn.o_proj.weight': o,
  }
  assert groups[QUERIES]['tensors'] == {
    'self_attn.q_proj.weight': q,
    'self_attn.o_proj.weight': o,
  }
  assert groups[CHANNELS]['tensors'] == {
    'mlp.gate_proj.weight': ['embed', 'mlp'],
    'mlp.up_proj.weight': ['embed', 'mlp'],
    'mlp.down_proj.weight': ['mlp', 'embed'],
  }
  assert groups[KV_HEADS]['per_layer'] == [4] * 10
  assert groups[QUERIES]['per_layer'] == [2] * 10
  assert groups[CHANNELS]['per_layer'] == [48] * 10
  # Two query heads, a key and a value of 32 x 8 each, and o's rows.
  assert groups[KV_HEADS]['bytes_each'] == [4 * 32 * 8 * (2 + 1 + 1 + 2)]
  assert groups[CHANNELS]['bytes_each'] == [4 * 3 * 32]
  assert [groups[g]['kind'] for g in (KV_HEADS, QUERIES, CHANNELS)] == [
    'heads',
    'heads',
    'channels',
  ]


def test_bytes_follow_the_dtype(capsys, folder):
  single = inspect(capsys, folder, '--dtype', 'float32', '--target', '0.5')
  half = inspect(capsys, folder, '--target', '0.5')
  assert single['bytes'] == 2 * half['bytes']
  assert single['plan']['bytes'] == 2 * half['plan']['bytes']


def test_biases_go_with_the_groups_that_they_belong_to(capsys, tmp_path):
  config = CONFIG.with_biases(LORA_TARGETS)
  report = inspect(capsys, write(tmp_path / 'biased', config))
  assert report['parameters'] == config.num_parameters
  tensors = {g: x['tensors'] for g, x in report['groups'].items()}
  assert tensors[KV_HEADS]['self_attn.v_proj.bias'] == ['kv_heads', 'head_dim']
  assert tensors[CHANNELS]['mlp.up_proj.bias'] == ['mlp']
  names = {name for x in tensors.values() for name in x if 'bias' in name}
  # What o and down add to is no group's.
  assert names == {
    *(f'self_attn.{x}_proj.bias' for x in 'qkv'),
    *('mlp.gate_proj.bias', 'mlp.up_proj.bias'),
  }


@pytest.mark.parametrize(
  'args, targets, kept',
  [
    (['--target', '0.5'], Targets(), {KV_HEADS: 2, CHANNELS: 24}),
    (
      ['--target', '0.5', '--protect', 'none'],
      Targets(protect='none'),
      {KV_HEADS: 2, CHANNELS: 24},
    ),
    (
      ['--heads_target', '0.5', '--channels_target', '0.3', '--heads=queries'],
      Targets(heads='queries', heads_target=0.5, channels_target=0.3),
      {QUERIES: 1, CHANNELS: 34},
    ),
    (
      ['--target', '0.3', '--channels_multiple_of', '16', '--heads', 'none'],
      Targets(target=0.3, channels_multiple_of=16, heads='none'),
      {CHANNELS: 32},
    ),
    (
      ['--target', '0.25', '--channels', 'false'],
      Targets(target=0.25, channels=False),
      {KV_HEADS: 3},
    ),
    (
      ['--target', '0.3', '--unit', 'params'],
      Targets(target=0.3, unit='params'),
      None,
    ),
  ],
)
def test_json_has_what_a_target_would_leave(
  capsys, folder, args, targets, kept
):
  found = inspect(capsys, folder, *args)['plan']
  plan = plan_pruning(CONFIG, targets)
  if kept is not None:
    layers = len(plan.prunable_layers)
    alike = {g: [[n, layers]] for g, n in kept.items()}
    assert found['kept_by_depth'] == alike
  per_layer = {g: list(counts) for g, counts in plan.keep.items()}
  assert found['kept_per_layer'] == per_layer
  assert found['parameters'] == plan.pruned_config.num_parameters
  assert found['bytes'] == 2 * found['parameters']
  assert found['achieved'] == plan.sparsity(plan.keep)
  assert found['target'] == plan.targets_by_kind()
  if targets.unit == 'params':
    assert found['achieved']['params'] == pytest.approx(0.3, abs=0.005)


def test_json_and_people_have_what_fits(capsys, folder):
  args = ['--fit', '300KB', '--fit_context', '100', '--fit_batch', '2']
  found = inspect(capsys, folder, *args)['plan']
  targets = Targets(fit='300KB', fit_context=100, fit_batch=2)
  plan = plan_pruning(CONFIG, targets)
  per_layer = {g: list(counts) for g, counts in plan.keep.items()}
  assert found['kept_per_layer'] == per_layer
  heads = sum(shape.num_kv_heads for shape in plan.pruned_config.layers)
  assert found['fit'] == {
    'weights_bytes': found['bytes'],
    'kv_cache_bytes': 2 * 100 * 2 * 2 * heads * 8,
    'dtype': 'bfloat16',
    'batch': 2,
    'context': 100,
  }
  assert sum(found['fit'][f'{x}_bytes'] for x in ('weights', 'kv_cache')) <= 3e5
  assert found['target'] == {'heads': None, 'channels': None, 'params': None}
  assert main(['inspect', '--model', str(folder), *args]) == 0
  out = capsys.readouterr().out
  served = targets.room.footprint(plan.pruned_config)
  assert f'served: {served}' in out


def test_a_speed_up_is_measured_here_too(capsys, folder, monkeypatch, tmp_path):
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))

  def times(models, *_):
    # A token takes as long as the model has parameters.
    return {
      name: {'decode': [config.num_parameters]}
      for name, config in models.items()
    }

  monkeypatch.setattr(speedup, '_times', times)
  assert main(['inspect', '--model', str(folder), '--speedup', '1.5']) == 0
  out, err = capsys.readouterr()
  [left] = re.findall(r'left: ([0-9,]+) parameters', out)
  faster = CONFIG.num_parameters / int(left.replace(',', ''))
  assert 1.5 <= faster < 1.6
  assert f'{left} of {CONFIG.num_parameters:,} parameters: ' in err


def test_people_see_couplings_counts_bytes_and_the_plan(
  capsys, monkeypatch, folder
):
  monkeypatch.setenv('COLUMNS', '100')
  argv = ['inspect', '--model', str(folder), '--target', '0.5']
  assert main(argv) == 0
  out, err = capsys.readouterr()
  assert err == ''
  # Without the tables' frames.
  lines = [re.sub('[ │]+', ' ', line).strip() for line in out.splitlines()]
  plan = plan_pruning(CONFIG, Targets())
  assert f'{CONFIG.num_parameters:,} parameters' in lines[0]
  assert lines[0].endswith('10 layers; protected: 0, 9')
  assert 'kv_heads: 4 a layer, 3,072 bytes for one' in lines
  assert 'mlp: 48 a layer, 192 bytes for one' in lines
  q = 'self_attn.q_proj.weight embed KV_HEADS'
  assert f'{q} queries_per_kv head_dim' in lines
  assert f'{q} QUERIES_PER_KV head_dim' in lines
  assert 'mlp.down_proj.weight MLP embed' in lines
  left = plan.pruned_config.num_parameters
  assert f'left: {left:,} parameters, {2 * left / 1e6:,.1f} MB' in lines
  assert 'kv_heads: 2 kept in each layer not protected' in lines
  assert 'mlp: 24 kept in each layer not protected' in lines
  assert 'heads removed: 50.00% (target 50.00%)' in lines
  share = plan.sparsity(plan.keep)['params']
  assert f'params removed: {share:.2%}' in lines


def test_a_model_that_is_pruned_already_is_shown_layer_by_layer(
  capsys, tmp_path
):
  pruned = plan_pruning(CONFIG, Targets()).pruned_config
  folder = write(tmp_path / 'pruned', pruned, 'pruned_llama')
  report = inspect(capsys, folder)
  assert report['parameters'] == pruned.num_parameters
  groups = report['groups']
  assert groups[KV_HEADS]['per_layer'] == [4, *[2] * 8, 4]
  assert groups[CHANNELS]['per_layer'] == [48, *[24] * 8, 48]
  assert main(['inspect', '--model', str(folder), '--target', '0.5']) == 1
  assert 'it is pruned already' in capsys.readouterr().err


@pytest.mark.parametrize(
  'args, message',
  [
    (['--target', '1.2'], 'prune.target is 1.2: it must be in [0, 1)'),
    (['--fit', '8 GX'], "prune.fit is '8 GX': a number and one of B, KB"),
    (['--fit', '8GB', '--target', '0.5'], 'prune.target and prune.fit are set'),
    (['--fit', '8GB'], 'the model fits as it is'),
    (['--target', 'half'], "--target: invalid float value: 'half'"),
    (['--target', '0.001'], 'the nearest that works is 0.25'),
    (['--heads', 'all'], "prune.heads is 'all'"),
    (['--target', '0.5', '--protect', 'last'], "prune.protect is 'last'"),
    (['--protect', 'last'], 'last'),
    (['--target', '0.5', '--unit', 'flops'], "prune.unit is 'flops'"),
    (['--target', '0.99', '--unit', 'params'], 'beyond what can be pruned'),
    (['--blocks', '3'], 'unrecognized arguments: --blocks 3'),
    (['--model', 'nowhere'], 'nowhere is not a folder'),
  ],
)
def test_a_mistake_is_one_line_and_exit_status_one(
  capsys, folder, args, message
):
  assert main(['inspect', '--model', str(folder), '--json', *args]) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ') and err.count('\n') == 1
  assert message in err


def test_its_flags_are_settings(capsys):
  with pytest.raises(SystemExit):
    main(['inspect', '--help'])
  found = set(re.findall(r'prune\.(\w+)', capsys.readouterr().out))
  settings = {field.name for field in dataclasses.fields(PruneSettings)}
  assert {'target', 'fit', 'layers_target'} <= found <= settings
