"""Every order and criterion on configs/tiny.py, phase after phase."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorapr_jax.axes import PROJECTIONS
from lorapr_jax.cli.main import main
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.load import load_config
from lorapr_jax.hf.write import export_model
from lorapr_jax.models.config import LayerShape
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS
from tests.kinds import KINDS
from tests.runs import assert_same_run, metrics, train

# So that less is traced and compiled.
LESS = '--config.lora.targets=q_proj,gate_proj', '--config.data.eval='
FULL, SMALL = LayerShape(4, 2, 128), LayerShape(2, 2, 64)
# Each with what it leaves of the four layers.
WAYS = {
  'prune.target=0': (FULL,) * 4,
  'prune.heads=queries prune.protect=none prune.criterion=gradient': (
    *[LayerShape(4, 1, 64)] * 4,
  ),
  'prune.layer_profile=0.5,1.5 prune.protect=none prune.order=prune_then_tune '
  'prune.criterion=obs train.distill=1 prune.compensate_data=synthetic:7': (
    *[LayerShape(3, 2, 96)] * 2,
    *[LayerShape(1, 2, 32)] * 2,
  ),
  # Four shapes, and one of them of a layer that is protected.
  'prune.layer_profile=0.5,1,1.5 prune.order=prune_then_tune '
  'prune.criterion=obs train.distill=1 prune.compensate_data=synthetic:7': (
    *(LayerShape(3, 2, 96), SMALL, LayerShape(1, 2, 32), FULL),
  ),
}


*_FEW_SHAPES, _MANY_SHAPES = WAYS


@pytest.mark.parametrize(
  'way', [*_FEW_SHAPES, pytest.param(_MANY_SHAPES, marks=pytest.mark.slow)]
)
def test_other_ways_to_prune_run_to_the_end(way, tmp_path):
  workdir = tmp_path / 'run'
  settings = ['--config.train.steps=12', '--config.prune.every=3', *LESS]
  said = train(workdir, [*settings, *(f'--config.{x}' for x in way.split())])
  costs = 'keeps gradients of the base' in said
  assert costs == way.endswith('=gradient')
  # Steps that only measure have no teacher: of its own it would be 0.
  assert metrics(workdir)[0]['loss'] > 1
  report = json.loads((workdir / 'summary.json').read_text())
  for text, left in report['repair'].get('error_left', {}).items():
    own = 'compensate_data=' in way
    assert text == ('synthetic:7' if own else 'synthetic:0?windows=512')
    assert 0 < left < 1
  assert load_config(workdir / 'export').layers == WAYS[way]


# tests/families has biases in shorter runs.
@pytest.mark.slow
@pytest.mark.parametrize(
  'parts, settings',
  [
    (('self_attn', 'mlp'), ('prune.shrink=0.5',)),
    (
      ('mlp',),
      ('prune.heads=none', 'model.base_dtype=int8', 'prune.compensate=none'),
    ),
  ],
)
def test_a_bases_own_biases_are_cut_and_exported(
  tmp_path, capsys, random_params, add_tokenizer, parts, settings
):
  keys = {'attention_bias': 'self_attn' in parts, 'vocab_size': 300}
  dense = config_from_hf(KINDS['biases'].keys | keys)
  base, workdir = tmp_path / 'base', tmp_path / 'run'
  export_model(base, random_params(dense), dense)
  add_tokenizer(base)
  text = tmp_path / 'text.txt'
  text.write_text('the quick brown fox jumps over the lazy dog ' * 300)
  arguments = [
    *('--config=configs/default.py', f'--config.model.path={base}'),
    *(f'--workdir={workdir}', f'--config.data.train=file:{text}'),
    *('--config.train.steps=6', '--config.train.batch_size=8'),
    *('--config.train.micro_batch_size=8', '--config.train.seq_len=32'),
    *('--config.prune.criterion=lora', '--config.prune.order=joint'),
    *('--config.prune.every=2', '--config.prune.protect=none', *LESS),
    *('--config.export.format=hf,gguf,peft', '--config.report.prompts=()'),
    *(f'--config.{setting}' for setting in settings),
  ]
  assert main(['train', *arguments]) == 0, capsys.readouterr().err
  config = load_config(workdir / 'export')
  biased = (name for part in parts for name in PROJECTIONS[part])
  assert config.biases == tuple(biased) and config.layers != dense.layers
  stored, whole = (
    load_file(folder / 'model.safetensors')
    for folder in (workdir / 'export', base)
  )
  kept = json.loads((workdir / 'export' / 'pruning.json').read_text())['kept']
  for i, groups in enumerate(kept):
    for group, part, names in (
      (KV_HEADS, 'self_attn', ('q_proj', 'k_proj', 'v_proj')),
      (CHANNELS, 'mlp', ('gate_proj', 'up_proj')),
    ):
      for name in names if part in parts else ():
        path = f'model.layers.{i}.{part}.{name}.bias'
        bias = whole.pop(path).reshape(dense.sizes(dense.layers[i])[group], -1)
        found = stored[path].reshape(-1, bias.shape[1])
        np.testing.assert_array_equal(found, bias[groups[group]], path)
  # What is left are those of o_proj and down_proj.
  for name in (name for name in whole if name.endswith('.bias')):
    np.testing.assert_array_equal(stored[name], whole[name], name)
  report = json.loads((workdir / 'summary.json').read_text())
  assert report['params_dense'] == dense.num_parameters
  assert report['params_pruned'] == sum(x.size for x in stored.values())
  share = 1 - report['params_pruned'] / report['params_dense']
  assert report['sparsity']['params']['achieved'] == pytest.approx(share)
  again = ['export', str(workdir), str(tmp_path / 'again')]
  assert main(again) == 0, capsys.readouterr().err
  found = load_file(tmp_path / 'again' / 'model.safetensors')
  assert found.keys() == stored.keys()
  for name, x in stored.items():
    np.testing.assert_allclose(found[name], x, atol=1e-6, err_msg=name)


def losses_of(workdir, *settings):
  arguments = [
    *('--config.train.steps=8', '--config.prune.every=3'),
    *('--config.train.log_every=1', '--config.lora.dropout=0.0', *LESS),
    *(f'--config.{setting}' for setting in settings),
  ]
  train(workdir, arguments)
  return np.array([record['loss'] for record in metrics(workdir)])


def test_a_model_that_does_not_change_is_its_own_teacher(tmp_path):
  same = ('prune.target=0', 'train.learning_rate=1e-12')
  plain = losses_of(tmp_path / 'plain', *same)
  assert len(set(plain)) == 8
  taught = losses_of(tmp_path / 'taught', *same, 'train.distill=0.25')
  np.testing.assert_allclose(taught, 0.75 * plain, atol=1e-5)


def test_the_teacher_is_the_dense_model_however_the_base_changes(tmp_path):
  flags = ('train.distill=1', 'train.distill_top_k=32', 'recover.steps=3')
  changes = ('prune.compensate=ridge', 'prune.shrink=0.3')
  found = losses_of(tmp_path / 'run', *flags, *changes)
  assert abs(found[0]) < 1e-5
  assert len(found) == 11 and np.all(found[-4:] > 1e-4)
  report = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert report['seconds'].keys() >= {'teacher', 'prune', 'recover'}


PHASES = [
  *('--config.train.steps=9', '--config.train.log_every=1'),
  '--config.train.checkpoint_every=2',
  *('--config.prune.order=prune_then_tune', '--config.recover.steps=4'),
  *('--config.prune.calibration_steps=3', '--config.recover.data=synthetic:9'),
  *('--config.prune.compensate=ridge', LESS[0]),
  *('--config.train.distill=0.5', '--config.train.distill_top_k=16'),
  *('--config.export.format=hf,peft', '--config.recover.learning_rate=0.003'),
]


@pytest.fixture(scope='module')
def phased(tmp_path_factory):
  """A run that calibrates, tunes and recovers."""
  workdir = tmp_path_factory.mktemp('phases') / 'run'
  train(workdir, PHASES)
  return workdir


def test_pruned_at_once_then_tuned_then_recovered(phased):
  records = metrics(phased)
  assert [record['step'] for record in records] == list(range(13))
  assert [record['tokens'] for record in records[-2:]] == [6144, 6656]
  channels = [record['channels_sparsity'] for record in records]
  assert channels == [0.0, 0.0] + [0.5] * 11
  rates = [record['lr'] for record in records]
  assert rates[:3] == [0.0] * 3
  assert rates[3] == pytest.approx(1e-2) and rates[9] == pytest.approx(3e-3)
  # Calibration changes nothing, and tuning helps.
  summary = json.loads((phased / 'summary.json').read_text())
  values = {k: v['value'] for k, v in summary['perplexity'].items()}
  assert list(values) == ['dense', 'cut', 'pruned']
  assert values['pruned'] < values['cut']
  assert summary['seconds'].keys() >= {'calibrate', 'tune', 'recover'}
  for folder in (phased / 'export', phased / 'export-peft' / 'base'):
    assert load_config(folder).layers[0] == SMALL


@pytest.mark.parametrize(
  'phase, last', [('checkpoints-tune', 5), ('checkpoints-recover', 3)]
)
def test_a_run_cut_short_in_any_phase_goes_on_bit_for_bit(
  phased, tmp_path, capsys, phase, last
):
  workdir = tmp_path / 'run'
  shutil.copytree(phased, workdir)
  # As a kill would have left it after this phase's step `last`.
  if phase == 'checkpoints-tune':
    shutil.rmtree(workdir / 'checkpoints-recover')
  for step in (workdir / phase).iterdir():
    if int(step.name) > last:
      shutil.rmtree(step)
  (workdir / 'summary.json').unlink()
  err = train(workdir, PHASES)
  done = {'checkpoints-tune': 3, 'checkpoints-recover': 9}[phase] + last
  assert f'resuming at step {done} of 13' in err
  assert_same_run(workdir, phased, 'checkpoints-recover', 4)
  # The cut arrays are those that were exported, and export finds them again.
  again = ['export', str(workdir), str(tmp_path / 'again'), '--format', 'hf']
  assert main(again) == 0, capsys.readouterr().err
  name = 'model.safetensors'
  exported = (phased / 'export' / name).read_bytes()
  for folder in (workdir / 'export', tmp_path / 'again'):
    assert (folder / name).read_bytes() == exported
