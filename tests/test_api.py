"""import lorapr_jax as lp: what a notebook does, on tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest

import lorapr_jax as lp
from lorapr_jax.cli.main import main
from lorapr_jax.config_files import read_config

MESH = {'data': -1, 'fsdp': 1}  # The tests simulate eight devices.
SHORT = {'steps': 12, 'log_every': 4}
HELD_OUT = 'synthetic:1?windows=32'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('api') / 'run'
  return lp.prune('tiny', workdir, train=SHORT, prune={'every': 3}, mesh=MESH)


def test_prune_takes_a_shipped_config_and_changes(run):
  assert run.summary == json.loads((run.workdir / 'summary.json').read_text())
  settings = json.loads((run.workdir / 'run.json').read_text())['config']
  assert settings['train']['steps'] == 12
  assert settings['train']['seq_len'] == 32  # Of tiny.py.
  assert run.summary['sparsity']['channels']['achieved'] == 0.5
  assert run.export == run.workdir / 'export'


def test_load_and_evaluate_what_was_exported(run):
  model = lp.load(run.export)
  assert model.config.num_parameters == run.summary['params_pruned']
  assert model.dtype == np.float32
  assert 'params' not in repr(model)
  expected = run.summary['perplexity']['pruned']['value']
  result = lp.evaluate(model, HELD_OUT, 32)
  assert result.perplexity == pytest.approx(expected, rel=1e-5)
  assert (result.windows, result.seq_len) == (32, 32)
  from_folder = lp.evaluate(run.export, HELD_OUT, 32, max_windows=8)
  assert from_folder.windows == 8
  first = lp.evaluate(model, HELD_OUT, 32, max_windows=8, batch_size=3)
  assert from_folder.perplexity == pytest.approx(first.perplexity, rel=1e-5)


def test_dtypes(run):
  model = lp.load(str(run.export), dtype='bfloat16')
  assert model.params['embed_tokens']['weight'].dtype == model.dtype
  assert model.dtype.name == 'bfloat16'


def test_the_command_and_the_function_agree(run, capsys):
  argv = ['evaluate', '--model', str(run.export), '--data', HELD_OUT]
  assert main([*argv, '--seq_len', '16', '--json']) == 0
  printed = json.loads(capsys.readouterr().out)
  result = lp.evaluate(run.export, HELD_OUT, 16)
  assert printed['perplexity'] == result.perplexity


@pytest.mark.parametrize(
  'config, sections, message',
  [
    ('tinny', {}, "no config 'tinny': .* default, smollm2_135m, tiny"),
    ('configs/none.py', {}, 'default, smollm2_135m, tiny'),
    ('elsewhere/tiny.py', {}, "no config 'elsewhere/tiny.py'"),
    ('tiny', {'purne': {}}, 'config.purne; did you mean config.prune'),
    ('tiny', {'prune': {'tarot': 1}}, 'did you mean config.prune.target'),
    ('tiny', {'prune': {'target': 'half'}}, '^config.prune.target: '),
    ('tiny', {'prune': 0.3}, 'config.prune is 0.3: give a dict'),
    ('tiny', {'train': {'steps': 0}}, 'train.steps is 0'),
    ('tiny', {'model': {'path': Path('nowhere')}}, 'set one of them'),
    (
      'tiny',
      {'model': {'path': Path('nowhere'), 'sizes': {}}},
      'nowhere is not a folder',
    ),
  ],
)
def test_mistakes_in_a_run(tmp_path, config, sections, message):
  with pytest.raises(lp.UserError, match=message):
    lp.prune(config, tmp_path / 'run', **sections)
  assert not (tmp_path / 'run').exists()


def test_a_config_is_not_changed(tmp_path):
  config = read_config('tiny')
  with pytest.raises(lp.UserError, match='train.steps is 0'):
    lp.prune(config, tmp_path / 'run', train={'steps': 0})
  assert config == read_config('tiny')


def test_mistakes_in_an_evaluation(run):
  for arguments, message in (
    ((HELD_OUT, 1), 'seq_len is 1: it must be at least 2'),
    ((HELD_OUT, 999), 'seq_len is 999, but the model has 128 positions'),
    (('wikitext2', 32), "'wikitext2' is not known"),
    ((f'file:{__file__}', 32), 'files of .py'),
  ):
    with pytest.raises(lp.UserError, match=message):
      lp.evaluate(run.export, *arguments)
  with pytest.raises(lp.UserError, match='nowhere is not a folder'):
    lp.load('nowhere')


def test_names():
  assert set(lp.__all__) <= set(dir(lp))
  for name in lp.__all__:
    assert getattr(lp, name).__doc__
  with pytest.raises(AttributeError, match="no attribute 'tarot'"):
    lp.tarot  # noqa: B018
