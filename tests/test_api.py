"""import lorapr_jax as lp: what a notebook does, on tiny models."""

import dataclasses
import json
from pathlib import Path
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
import tokenizers
from tokenizers import models, pre_tokenizers

import lorapr_jax as lp
from lorapr_jax.cli.main import main
from lorapr_jax.models import decoder
from lorapr_jax.settings.files import read_config

SHORT = {'steps': 12, 'log_every': 4}
HELD_OUT = 'synthetic:1?windows=32'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('api') / 'run'
  return lp.prune('tiny', workdir, train=SHORT, prune={'every': 3})


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


def test_export_of_a_run_a_folder_and_a_model_agree(run, tmp_path):
  model = lp.load(run.export)
  sources = (run, run.workdir, str(run.export), model)
  folders = [
    lp.export(source, tmp_path / str(i), layout='padded')
    for i, source in enumerate(sources)
  ]
  assert folders[0] == tmp_path / '0'
  weights = [load_file(f / 'model.safetensors') for f in folders]
  for one, other in ((0, 1), (2, 3)):
    assert weights[one].keys() == weights[other].keys()
    for name, x in weights[one].items():
      np.testing.assert_array_equal(x, weights[other][name])
  # LoRA is merged anew from the checkpoint, in another order of sums.
  for name, x in weights[0].items():
    np.testing.assert_allclose(x, weights[2][name], rtol=0, atol=1e-7)
  assert lp.load(folders[0]).config.is_uniform and not model.config.is_uniform


def test_a_models_own_weights_are_exported(run, tmp_path):
  model = lp.load(run.export)
  norm = {'weight': 2 * model.params['norm']['weight']}
  params = {**model.params, 'norm': norm}
  changed = dataclasses.replace(model, params=params)
  folder = lp.export(changed, tmp_path / 'half', dtype='bfloat16')
  read = lp.load(folder)
  expected = np.asarray(norm['weight'], ml_dtypes.bfloat16)
  np.testing.assert_array_equal(read.params['norm']['weight'], expected)
  with pytest.raises(lp.UserError, match='half exists already'):
    lp.export(changed, folder)
  with pytest.raises(lp.UserError, match="format is 'zip': choose from hf, gg"):
    lp.export(changed, tmp_path / 'zip', format='zip')
  with pytest.raises(lp.UserError, match="exported from the run's workdir"):
    lp.export(changed, tmp_path / 'peft', format='peft')


@pytest.fixture
def talking(run, tmp_path):
  """The pruned model with a tokenizer of three words."""
  folder = shutil.copytree(run.export, tmp_path / 'talking')
  vocabulary = {'one': 0, 'two': 1, 'three': 2}
  vocabulary |= {f'word{i}': i for i in range(3, 256)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, 'one'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  # Without it, transformers 4 adds the tokens of a LLaMA.
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast'})
  )
  return folder


def test_generate_goes_on_with_the_likeliest_tokens(talking):
  model = lp.load(talking)
  text = lp.generate(model, 'one two three', max_new_tokens=4)
  ids = [0, 1, 2]

  @jax.jit
  def logits(params, tokens):
    hidden = decoder.hidden_states(params, tokens, model.config)
    return decoder.logits(params, hidden, model.config)

  for _ in range(4):
    # A token does not see those after it.
    tokens = np.array([ids + [0] * (7 - len(ids))])
    found = np.asarray(logits(model.params, tokens))
    ids.append(int(np.argmax(found[0, len(ids) - 1])))
  vocabulary = json.loads((talking / 'tokenizer.json').read_text())
  words = {i: word for word, i in vocabulary['model']['vocab'].items()}
  assert text.split() == [words[i] for i in ids[3:]]
  assert lp.generate(talking, 'one two three', max_new_tokens=4) == text
  drawn = {
    lp.generate(model, 'one', max_new_tokens=8, temperature=2.0, seed=seed)
    for seed in range(3)
  }
  assert len(drawn) == 3
  with pytest.raises(lp.UserError, match='the prompt is empty'):
    lp.generate(model, '')
  with pytest.raises(lp.UserError, match='max_new_tokens is 0'):
    lp.generate(model, 'one', max_new_tokens=0)


@pytest.mark.parametrize(
  'config, sections, message',
  [
    (
      'tinny',
      {},
      "no config 'tinny': .* default, models, paper, smollm2_135m, tiny",
    ),
    ('configs/none.py', {}, 'default, models, paper, smollm2_135m, tiny'),
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
