"""export: from a run, finished or not, and from an export."""

import json
from pathlib import Path
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from configs import tiny
from lorapr_jax import train
from lorapr_jax.cli.main import main
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.load import load_config
from lorapr_jax.hf.write import export_model
from lorapr_jax.models.config import LayerShape
from lorapr_jax.models.trees import init_params
from lorapr_jax.training.checkpoint import read_state
from tests.xla_flags import environment

ROOT = Path(__file__).parents[2]


def write_base(folder, seed=0, **sizes):
  """The random model of configs/tiny.py, and a tokenizer of bytes."""
  sizes = tiny.get_config().model.sizes.to_dict() | sizes
  config = config_from_hf(sizes)
  export_model(
    folder,
    init_params(jax.random.key(seed), config, np.dtype('float32')),
    config,
  )
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {character: i for i, character in enumerate(alphabet)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps(
      {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': alphabet[0]}
    )
  )
  return folder


def make_run(folder, sizes=None, **settings):
  """A finished run with these settings, by their dotted names."""
  config = tiny.get_config()
  with config.unlocked():
    config.model.sizes = {}
  config.model.path = str(write_base(folder / 'base', **sizes or {}))
  (folder / 'corpus.txt').write_text('The mill wheel turned. ' * 50)
  config.data.train = f'file:{folder}/corpus.txt'
  config.data.eval = ''
  config.train.update(
    steps=6, batch_size=8, seq_len=16, checkpoint_every=2, checkpoints_kept=3
  )
  config.prune.every = 2
  config.report.max_new_tokens = 4
  config.update_from_flattened_dict(settings)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('LORAPR_CACHE', str(folder / 'cache'))
    return folder / 'workdir', train.run(config, folder / 'workdir')


@pytest.fixture(scope='session')
def run(tmp_path_factory):
  """A finished run with every format: (workdir, its summary)."""
  every = {'export.format': 'hf,gguf,peft'}
  return make_run(tmp_path_factory.mktemp('run'), **every)


@pytest.fixture
def unfinished(run, tmp_path):
  """What a run leaves that was stopped after four of its six steps."""
  workdir = tmp_path / 'unfinished'
  shutil.copytree(run[0] / 'checkpoints', workdir / 'checkpoints')
  shutil.copy(run[0] / 'run.json', workdir)
  shutil.rmtree(workdir / 'checkpoints' / '6')
  return workdir


def export(capsys, *args):
  """What the command prints with --json, parsed."""
  status = main(['export', *map(str, args), '--json'])
  out, err = capsys.readouterr()
  assert status == 0, err
  return json.loads(out)


def tensors(folder):
  found = {}
  for path in folder.glob('*.safetensors'):
    found |= load_file(path)
  return found


def assert_same(folder, other, atol=0.0):
  """The same files, and the same weights: bit by bit unless `atol` is given."""
  names = {path.name for path in folder.iterdir()}
  assert names == {path.name for path in other.iterdir()}
  for name in names:
    if not name.endswith('.safetensors'):
      assert (folder / name).read_bytes() == (other / name).read_bytes(), name
  found, expected = tensors(folder), tensors(other)
  assert found.keys() == expected.keys()
  for name, x in found.items():
    np.testing.assert_allclose(
      x, expected[name], rtol=0, atol=atol, err_msg=name
    )


def listing(folder):
  """Every file with when it was changed."""
  return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_a_run_writes_every_format_that_was_asked(run):
  workdir, summary = run
  paths = {
    'hf': workdir / 'export',
    'gguf': workdir / 'export-gguf' / 'base-f32.gguf',
    'peft': workdir / 'export-peft',
  }
  assert summary['exports'] == {
    kind: {
      'path': str(path),
      'layout': None if kind == 'gguf' else 'two_shape',
      'dtype': 'f32' if kind == 'gguf' else 'float32',
      'max_logit_difference': 0.0,
    }
    for kind, path in paths.items()
  }
  assert all(path.exists() for path in paths.values())
  merged, base = (
    load_file(f / 'model.safetensors')
    for f in (paths['hf'], paths['peft'] / 'base')
  )
  name = 'model.layers.0.mlp.up_proj.weight'
  assert merged[name].shape == base[name].shape
  assert np.abs(merged[name] - base[name]).max() > 1e-4
  assert (paths['peft'] / 'base' / 'tokenizer.json').exists()


def test_later_is_as_at_the_end_of_the_run(run, tmp_path):
  """On one device, though the run had eight; nothing else is printed.

  A product may be summed in another order there, and weights differ in their
  last bits.
  """
  workdir, summary = run
  before = listing(workdir)
  process = subprocess.run(
    [
      *(sys.executable, '-m', 'lorapr_jax', 'export'),
      *(str(workdir), str(tmp_path / 'out'), '--json'),
    ],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  assert process.stderr == ''
  assert json.loads(process.stdout) == {
    'path': str(tmp_path / 'out'),
    'layout': 'two_shape',
    'dtype': 'float32',
    'max_logit_difference': 0.0,
    'parameters': summary['params_pruned'],
  }
  assert_same(tmp_path / 'out', workdir / 'export', atol=1e-7)
  assert listing(workdir) == before


def test_a_run_on_an_int8_base_is_exported_again_as_it_was(capsys, tmp_path):
  settings = {
    'report.prompts': (),
    'model.base_dtype': 'int8',
    # Ranked at once by what is read of the base and its inputs.
    'prune.criterion': 'activation',
    'prune.order': 'prune_then_tune',
    'prune.calibration_steps': 2,
    'export.format': 'hf,peft',
  }
  workdir, _ = make_run(tmp_path / 'run', **settings)
  hf, peft = tmp_path / 'hf', tmp_path / 'peft'
  export(capsys, workdir, hf)
  assert_same(hf, workdir / 'export')
  export(capsys, workdir, peft, '--format=peft')
  assert_same(peft / 'base', workdir / 'export-peft' / 'base')
  adapter = 'adapter_model.safetensors'
  ours, theirs = (
    load_file(x / adapter) for x in (peft, workdir / 'export-peft')
  )
  assert ours.keys() == theirs.keys()
  for name, x in ours.items():
    np.testing.assert_array_equal(x, theirs[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.mesh
def test_a_profile_is_exported_as_it_was_planned(capsys, tmp_path):
  settings = {
    **{'mesh.data': -1, 'mesh.fsdp': 1, 'mesh.tensor': 2},
    **{'prune.target': 0.6, 'prune.protect': 'none'},
    'prune.layer_profile': '0.5,1.5',
    **{'report.prompts': (), 'lora.targets': 'q_proj,gate_proj'},
    'export.format': 'hf,gguf,peft',
  }
  workdir, summary = make_run(
    tmp_path / 'run', {'num_key_value_heads': 8}, **settings
  )
  shapes = load_config(workdir / 'export').layers
  assert [shape.num_kv_heads for shape in shapes] == [6, 6, 2, 2]
  assert [shape.mlp_dim for shape in shapes] == [90, 90, 14, 14]
  # On one device three heads each would be nearer, of which the last layers
  # cannot lose that much.
  found = export(capsys, workdir, tmp_path / 'again')
  assert found['parameters'] == summary['params_pruned']
  assert_same(tmp_path / 'again', workdir / 'export', atol=1e-6)


def test_an_unfinished_run_is_cut_as_its_masks_stand(
  unfinished, capsys, tmp_path
):
  before = listing(unfinished)
  out = tmp_path / 'out'
  result = export(capsys, unfinished, out)
  masks = read_state(unfinished, 'checkpoints')['masks'][0]
  pruning = json.loads((out / 'pruning.json').read_text())
  for group in ('kv_heads', 'mlp'):
    for layer, kept in enumerate(pruning['kept']):
      assert kept[group] == np.flatnonzero(masks[group][layer]).tolist()
  channels = pruning['sparsity']['channels']
  assert channels['target'] == 0.5 and 0 < channels['achieved'] < 0.5
  config = load_config(out)
  alive = masks['mlp'].sum(axis=-1).astype(int).tolist()
  assert [layer.mlp_dim for layer in config.layers] == alive
  assert config.num_parameters == result['parameters']
  assert listing(unfinished) == before


def test_from_an_export_come_the_other_formats(run, capsys, tmp_path):
  workdir, _ = run
  source = workdir / 'export'
  gguf = tmp_path / 'new' / 'a.gguf'
  assert export(capsys, source, gguf, '--format=gguf')['dtype'] == 'f32'
  written = workdir / 'export-gguf' / 'base-f32.gguf'
  assert gguf.read_bytes() == written.read_bytes()

  half = ('--dtype=float16', '--max_shard_size=50KB')
  result = export(capsys, source, tmp_path / 'half', *half)
  assert result['dtype'] == 'float16'
  assert (tmp_path / 'half' / 'model.safetensors.index.json').exists()
  expected = tensors(source)
  for name, x in tensors(tmp_path / 'half').items():
    np.testing.assert_array_equal(x, expected[name].astype(np.float16))

  for folder in (workdir, source):
    out = tmp_path / f'{folder.name}-padded'
    assert export(capsys, folder, out, '--layout=padded')['layout'] == 'padded'
    assert load_config(out).layers == (LayerShape(4, 2, 128),) * 4
  assert_same(tmp_path / 'workdir-padded', tmp_path / 'export-padded')


def test_people_see_what_was_written(run, capsys, tmp_path):
  workdir, summary = run
  out = tmp_path / 'a.gguf'
  argv = ['export', workdir, out, '--format=gguf', '--dtype=q8_0']
  assert main(list(map(str, argv))) == 0
  text = capsys.readouterr().out
  parameters = f'{summary["params_pruned"]:,} parameters'
  assert text.startswith(f'{out}: {parameters}, q8_0, read back, logits differ')


# --- A base that has moved.


@pytest.fixture
def moved(run, tmp_path):
  """A workdir whose base is not where it was; (workdir, base)."""
  workdir = shutil.copytree(
    run[0], tmp_path / 'moved', ignore=shutil.ignore_patterns('export-*')
  )
  record = json.loads((workdir / 'run.json').read_text())
  base, record['config']['model']['path'] = (
    Path(record['config']['model']['path']),
    str(tmp_path / 'gone'),
  )
  (workdir / 'run.json').write_text(json.dumps(record))
  return workdir, base


def refusal(capsys, tmp_path, *args):
  """The one line that the command prints; nothing is written."""
  before = sorted(tmp_path.rglob('*'))
  assert main(['export', *map(str, args)]) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert err.startswith('error: ') and err.count('\n') == 1, err
  assert sorted(tmp_path.rglob('*')) == before
  return err


def test_a_base_that_has_moved_is_asked_for(moved, run, capsys, tmp_path):
  workdir, base = moved
  out = tmp_path / 'out'
  message = refusal(capsys, tmp_path, workdir, out)
  assert f'{tmp_path / "gone"}, the base of {workdir}, is not a' in message
  assert '--base FOLDER' in message

  other = write_base(tmp_path / 'other', seed=1)
  message = refusal(capsys, tmp_path, workdir, out, '--base', other)
  assert f'{other} is not the base of {workdir}: its weights' in message
  wide = write_base(tmp_path / 'wide', intermediate_size=192)
  message = refusal(capsys, tmp_path, workdir, out, '--base', wide)
  assert f'{wide} is not the base of {workdir}: its config.json' in message

  export(capsys, workdir, out, '--base', base)
  assert_same(out, run[0] / 'export')


# --- Mistakes.


@pytest.mark.parametrize(
  'source, args, message',
  [
    ('nowhere', ['out'], "is neither a run's workdir, with run.json, nor a"),
    (
      'workdir',
      ['here'],
      'here exists already, and nothing is written',
    ),
    ('workdir', ['out', '--format=gguf'], 'of a GGUF file ends in .gguf'),
    ('workdir', ['out.gguf'], 'is named like a GGUF file, but format hf'),
    ('workdir', ['out', '--dtype=q8_0'], 'dtype q8_0 is one of format gguf'),
    ('workdir', ['out', '--dtype=int8'], "invalid choice: 'int8'"),
    ('workdir', ['out', '--layout=zip'], "invalid choice: 'zip'"),
    (
      'workdir',
      ['out', '--max_shard_size=5'],
      "--max_shard_size is '5': a num",
    ),
    ('workdir', ['out', '--layout=uniform'], 'needs layers of one size'),
    ('export', ['out', '--layout=uniform'], 'needs layers of one size'),
    ('export', ['out', '--format=peft'], "LoRA is merged into a folder's weig"),
    ('export', ['out', '--base=x'], '--base goes with a workdir'),
    ('base', ['out', '--layout=padded'], 'has no pruning.json that says it'),
  ],
)
def test_a_mistake_is_one_line(source, args, message, run, capsys, tmp_path):
  (tmp_path / 'here').mkdir()
  workdir, _ = run
  places = {'base': workdir.parent / 'base', 'export': workdir / 'export'}
  place = {'workdir': workdir, **places}.get(source, tmp_path / source)
  destination, *flags = args
  found = refusal(capsys, tmp_path, place, tmp_path / destination, *flags)
  assert message in found


def test_a_workdir_without_a_checkpoint_is_refused(
  unfinished, capsys, tmp_path
):
  shutil.rmtree(unfinished / 'checkpoints')
  message = refusal(capsys, tmp_path, unfinished, tmp_path / 'out')
  assert f'{unfinished} holds no checkpoint' in message


def test_a_run_json_of_something_else_is_refused(capsys, tmp_path):
  (tmp_path / 'run.json').write_text('{"config": {}}')
  message = refusal(capsys, tmp_path, tmp_path, tmp_path / 'out')
  assert 'run.json is none of ours: it has no resolved' in message


def test_a_gguf_needs_a_tokenizer(run, capsys, tmp_path):
  source = shutil.copytree(run[0] / 'export', tmp_path / 'source')
  (source / 'tokenizer.json').unlink()
  args = (source, tmp_path / 'a.gguf', '--format=gguf')
  assert 'tokenizer.json is absent' in refusal(capsys, tmp_path, *args)


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda p: p['base'].pop('config'), 'has no pruning.json that says it'),
    (lambda p: p['kept'][0]['mlp'].pop(), 'pruning.json is of another model'),
    (lambda p: p.pop('kept'), 'pruning.json is none of ours: it has no kept'),
  ],
  ids=['without sizes', 'of another model', 'foreign'],
)
def test_padded_needs_what_pruning_json_says(
  change, message, run, capsys, tmp_path
):
  source = shutil.copytree(run[0] / 'export', tmp_path / 'source')
  pruning = json.loads((source / 'pruning.json').read_text())
  change(pruning)
  (source / 'pruning.json').write_text(json.dumps(pruning))
  args = (source, tmp_path / 'out', '--layout=padded')
  assert message in refusal(capsys, tmp_path, *args)
