"""Paths that are not of the local disk: memory://, and gs:// of a server."""

import gzip
import json
from pathlib import Path
import socket
import subprocess
import sys
import uuid

from etils import epath
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
import upath

from configs import tiny
import lorapr_jax as lp
from lorapr_jax.cli.main import main
from lorapr_jax.errors import UserError
from lorapr_jax.exporting.convert import convert
from lorapr_jax.hf.files import content_hash
from lorapr_jax.hf.load import load_config, load_params
from lorapr_jax.hf.shards import Shards
from lorapr_jax.models.trees import logical_axes, param_shapes
from lorapr_jax.report.metrics import check_writers
from lorapr_jax.runtime import lock, sharding
from lorapr_jax.runtime.paths import (
  copy_file,
  files_in,
  new_folder,
  path_of,
  version_of,
)
from lorapr_jax.settings.sections import LogSettings
from tests.cli.test_export import write_base
from tests.runs import ROOT, finish, metrics, start, train, without_times


@pytest.fixture
def memory():
  """A folder of memory:// that is new."""
  folder = path_of(f'memory://{uuid.uuid4().hex}')
  yield folder
  if folder.exists():
    folder.fs.rm(folder.path, recursive=True)


def copied(folder, target):
  """The folder's files there."""
  for path in folder.iterdir():
    copy_file(path, target / path.name)
  return target


@pytest.mark.mesh
@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_weights_are_read_from_afar_as_from_the_disk(save_hf, memory, dtype):
  near = save_hf('gqa', dtype, max_shard_size='20KB')
  far = copied(near, memory)
  assert len(list(far.glob('*.safetensors'))) > 2
  config = load_config(far)
  shapes = param_shapes(config, np.dtype(dtype))
  # Rows over two devices, columns over four.
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2})
  axes = logical_axes(config)['params']
  places = sharding.shardings(mesh, axes, shapes)
  of = {
    path: load_params(path, config, places, np.dtype(dtype))
    for path in (near, far)
  }
  jax.tree.map(np.testing.assert_array_equal, of[near], of[far])


@pytest.fixture
def asked(memory, monkeypatch):
  """The bytes of every read from memory:// so far."""
  sizes, read = [], memory.fs.cat_file

  def cat_file(path, start, end):
    sizes.append(end - start)
    return read(path, start=start, end=end)

  monkeypatch.setattr(memory.fs, 'cat_file', cat_file)
  return sizes


def test_only_the_rows_that_are_asked_for_are_read(save_hf, memory, asked):
  near, far = Shards(save_hf('gqa')), Shards(copied(save_hf('gqa'), memory))
  name = 'model.layers.1.mlp.up_proj.weight'
  index = slice(8, 12), slice(16, 32)
  asked.clear()
  found = far.slice_of(name)[index]
  np.testing.assert_array_equal(found, near.slice_of(name)[index])
  assert asked == [4 * 32 * 4]


@pytest.mark.mesh
def test_what_all_devices_need_is_read_once(save_hf, memory, asked):
  far = copied(save_hf('gqa'), memory)
  config = load_config(far)
  shapes = param_shapes(config, np.dtype('float32'))
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  axes = logical_axes(config)['params']
  load_params(far, config, sharding.shardings(mesh, axes, shapes), 'float32')
  # Beside the sizes and types that are asked for first.
  assert sum(asked) <= (far / 'model.safetensors').stat().st_size


@pytest.mark.parametrize(
  'content',
  (
    lambda content: content[:-4],
    lambda content: content[:100],
    lambda content: b'',
    lambda content: b'version https://git-lfs.github.com/spec/v1',
    lambda content: (5).to_bytes(8, 'little') + b'[1,2]',
    lambda content: (7).to_bytes(8, 'little') + b'{"a":1}',
  ),
)
def test_a_file_that_is_not_whole_is_named_at_once(save_hf, memory, content):
  far = copied(save_hf('gqa'), memory)
  path = far / 'model.safetensors'
  path.write_bytes(content(path.read_bytes()))
  with pytest.raises(UserError, match='model.safetensors cannot be read'):
    Shards(far)


def test_all_but_the_workdir_may_lie_elsewhere(
  tmp_path, memory, monkeypatch, add_tokenizer
):
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  near = add_tokenizer(write_base(tmp_path / 'base', vocab_size=300))
  copied(near, memory / 'base')
  for part in (0, 1):
    texts = [f'The mill turned {i}, {part}. ' * 9 for i in range(30)]
    lines = '\n'.join(json.dumps({'text': text}) for text in texts)
    (memory / f'part-{part}.jsonl.gz').write_bytes(
      gzip.compress(lines.encode())
    )
  (memory / 'corpus.txt').write_text('The river ran on. ' * 40)
  config = tiny.get_config()
  with config.unlocked():
    config.model.sizes = {}
  run = lp.prune(
    config,
    tmp_path / 'run',
    model={'path': memory / 'base'},
    data={
      'train': f'file:{memory}/part-*.jsonl.gz',
      'eval': f'file:{memory}/corpus.txt',
    },
    train={'steps': 4, 'batch_size': 8, 'seq_len': 16},
    prune={'every': 2},
    report={'max_new_tokens': 4},
  )
  assert run.summary['base']['sha256'] == content_hash(near)
  exported = lp.export(run, memory / 'hf', max_shard_size='50KB')
  assert len(list(exported.glob('*.safetensors'))) > 2
  lp.export(run, memory / 'peft', format='peft')
  lp.export(str(exported), memory / 'x.gguf', format='gguf')
  convert(str(memory / 'x.gguf'), memory / 'converted')
  expected = load_file(run.export / 'model.safetensors')
  for folder in (exported, memory / 'converted'):
    shards = Shards(folder)
    assert shards.names == expected.keys()
    for name, x in expected.items():
      found = shards.slice_of(name)[:]
      np.testing.assert_allclose(found, x, rtol=0, atol=1e-7, err_msg=name)
  assert lp.generate(exported, 'The', max_new_tokens=4)


def test_what_could_not_be_written_leaves_nothing(memory):
  with pytest.raises(ZeroDivisionError), new_folder(memory / 'new') as folder:
    (folder / 'config.json').write_text('{}')
    raise ZeroDivisionError
  assert not (memory / 'new').exists()
  with new_folder(memory / 'new') as folder:
    (folder / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='exists already'), new_folder(folder):
    pass


def test_file_urls_are_of_the_disk(tmp_path):
  path = path_of(f'file://{tmp_path}/a folder')
  assert path == tmp_path / 'a folder' and isinstance(path, Path)
  assert path_of(upath.UPath(f'file://{tmp_path}')) == tmp_path
  assert path_of(epath.Path(tmp_path)) == tmp_path
  assert str(path_of('gcs://bucket/a')) == 'gs://bucket/a'


def test_a_upath_keeps_its_options():
  path = upath.UPath('memory://a', token='mine')
  assert path_of(path) is path and path.storage_options == {'token': 'mine'}


def test_what_others_write_is_seen(memory):
  (memory / 'a.txt').write_text('one')
  version = version_of(memory / 'a.txt')
  (memory / 'a.txt').write_text('more')
  assert version_of(memory / 'a.txt') != version
  assert files_in(memory / 'none', '*') == []


@pytest.mark.parametrize(
  ('workdir', 'message'),
  (
    ('memory://run', 'checkpoints lie on a disk or in gs://'),
    ('nonsense://run', 'nonsense://run: the file system nonsense:// cannot'),
  ),
)
def test_a_workdir_that_cannot_be_is_refused_at_once(capsys, workdir, message):
  assert main(['train', '--config=tiny', f'--workdir={workdir}']) == 1
  assert message in capsys.readouterr().err


def test_tensorboard_writes_to_a_disk(memory):
  log = LogSettings(tensorboard=True, wandb='')
  with pytest.raises(UserError, match='log.tensorboard writes to a disk'):
    check_writers(log, memory)


@pytest.fixture(scope='module')
def store():
  """The environment of processes for which a server is gs://."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  server = subprocess.Popen(
    [sys.executable, 'tests/gcs.py', str(port)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  assert server.stdout.readline() == 'ready\n'
  where = f'http://localhost:{port}'
  yield {'STORAGE_EMULATOR_HOST': where, 'TENSORSTORE_GCS_HTTP_URL': where}
  server.kill()
  server.wait()


def test_a_run_in_gs_that_was_killed_goes_on_as_undisturbed(
  store, tmp_path, monkeypatch
):
  for name, value in store.items():
    monkeypatch.setenv(name, value)
  settings = [
    *('--config.train.steps=24', '--config.prune.every=3'),
    *('--config.train.log_every=1', '--config.train.checkpoint_every=5'),
    *('--config.lora.targets=q_proj,down_proj', '--config.data.eval='),
    *('--config.train.batch_size=8', '--config.train.micro_batch_size=4'),
    '--config.prune.compensate=none',
  ]
  env = store | {'LORAPR_CACHE': str(tmp_path / 'cache')}
  killed = start('gs://bucket/run', settings, **env)
  for line in killed.stderr:
    if line.startswith('step 17 of 24'):
      break
  killed.kill()
  killed.communicate()
  # The store lets one process alone have the lock, and that one is dead.
  far = path_of('gs://bucket/run')
  with pytest.raises(FileExistsError):
    lock._make(far / 'run.lock', b'')
  # The newest checkpoint is damaged as well.
  complete = (far / 'checkpoints').glob('*/commit_success.txt')
  newest = max(int(path.parent.name) for path in complete)
  for path in (far / 'checkpoints' / str(newest)).glob('**/d/*'):
    path.write_bytes(b'')
  _, err = finish(start(far, settings, **env))
  assert f'{newest} cannot be read, because it is damaged: it is now' in err
  assert f'resuming at step {newest - 5} of 24' in err
  train(tmp_path / 'near', settings)

  copy_file(far / 'metrics.jsonl', tmp_path / 'metrics.jsonl')
  assert without_times(metrics(tmp_path)) == (
    without_times(metrics(tmp_path / 'near'))
  )
  expected = load_file(tmp_path / 'near' / 'export' / 'model.safetensors')
  # Of the last checkpoint; merged here, on eight devices.
  exported = lp.export('gs://bucket/run', tmp_path / 'export')
  for folder, atol in ((far / 'export', 0.0), (exported, 1e-7)):
    shards = Shards(folder)
    for name, x in expected.items():
      found = shards.slice_of(name)[:]
      np.testing.assert_allclose(found, x, rtol=0, atol=atol, err_msg=name)
  assert (far / 'report.html').stat().st_size > 10_000
  assert not (far / 'run.lock').exists()
