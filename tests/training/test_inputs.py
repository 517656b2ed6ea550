"""A run knows what it reads by its content."""

import gzip
import os
import re
import shutil

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.hf.files import content_hash
from lorapr_jax.runtime.workdir import claim_workdir
from lorapr_jax.training.inputs import reading

WEIGHTS = 'model.safetensors'


def change(path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


@pytest.fixture
def base(save_hf, tmp_path):
  return shutil.copytree(save_hf('gqa'), tmp_path / 'base')


def test_a_base_is_what_was_hashed_when_it_is_loaded(base):
  with reading(base, []) as read:
    inputs = read()
  assert inputs.sha256 == content_hash(base)
  inputs.check_base()
  # A copy, and one with the times of another day, is the same base.
  shutil.copy(base / WEIGHTS, base / 'copy')
  os.replace(base / 'copy', base / WEIGHTS)
  os.utime(base / WEIGHTS, (0, 0))
  inputs.check_base()
  change(base / WEIGHTS)
  os.utime(base / WEIGHTS, (0, 0))
  with pytest.raises(UserError, match=f'{base} has changed since the run'):
    inputs.check_base()


def test_random_weights_have_no_hash():
  with reading(None, []) as read:
    inputs = read()
  assert inputs.sha256 is None
  inputs.check_base()


def begin(workdir, base, *specs):
  """What a run does with its inputs before it loads the base."""
  with reading(base, specs) as read:
    inputs = read()
  claim_workdir(workdir, {'config': {}, 'resolved': {}}, inputs.recorded())


def copy_over(path):
  """Another file with the same bytes and another time."""
  shutil.copyfile(path, path.with_name('copy'))
  os.utime(path.with_name('copy'), (0, 0))
  os.replace(path.with_name('copy'), path)


def _text(folder):
  (folder / 'a.txt').write_text('one')
  return 'file:{}/a.txt', folder / 'a.txt'


def _compressed(folder):
  (folder / 'a.jsonl.gz').write_bytes(gzip.compress(b'{"text": "one"}\n'))
  return 'file:{}/a.jsonl.gz', folder / 'a.jsonl.gz'


def _wildcards(folder):
  for name in ('b', 'c'):
    (folder / f'{name}.txt').write_text(name)
  return 'file:{}/*.txt', folder / 'c.txt'


def _saved_rows(folder):
  datasets = pytest.importorskip('datasets')
  datasets.Dataset.from_dict({'text': ['one']}).save_to_disk(folder / 'rows')
  [path] = (folder / 'rows').glob('*.arrow')
  return 'hf:{}/rows', path


SOURCES = [_text, _compressed, _wildcards, _saved_rows]


@pytest.mark.parametrize('make', SOURCES)
def test_a_run_goes_on_with_the_data_that_it_began_with(make, tmp_path):
  spec, path = make(tmp_path)
  spec = spec.format(tmp_path)
  mixture = f'0.5*{spec} + 0.5*{spec}'
  workdir = tmp_path / 'run'
  for _ in range(2):
    begin(workdir, None, mixture)
  copy_over(path)
  begin(workdir, None, mixture)
  if path.suffix == '.arrow':
    path.write_bytes(path.read_bytes().replace(b'one', b'two'))
  else:
    change(path)
  message = re.escape(f'{workdir} was begun with other contents of {spec}: put')
  with pytest.raises(UserError, match=message):
    begin(workdir, None, mixture)


def test_one_more_file_is_another_text(tmp_path):
  spec, _ = _wildcards(tmp_path)
  begin(tmp_path / 'run', None, spec.format(tmp_path))
  (tmp_path / 'd.txt').write_text('d')
  with pytest.raises(UserError, match='was begun with other contents of file:'):
    begin(tmp_path / 'run', None, spec.format(tmp_path))


@pytest.mark.parametrize('name', [WEIGHTS, 'config.json', 'tokenizer.json'])
def test_a_run_goes_on_with_the_base_that_it_began_with(
  name, base, add_tokenizer, tmp_path
):
  add_tokenizer(base)
  workdir = tmp_path / 'run'
  for _ in range(2):
    begin(workdir, base)
    copy_over(base / name)
  (base / 'README.md').write_text('Not part of it.')
  begin(workdir, base)
  change(base / name)
  message = f'{workdir} was begun with other contents of {base / name}: put'
  with pytest.raises(UserError, match=message):
    begin(workdir, base)


def test_data_that_changes_while_it_is_read_is_refused(tmp_path):
  spec, path = _text(tmp_path)
  spec = spec.format(tmp_path)
  with reading(None, [spec]) as read:
    read()
    change(path)
    with pytest.raises(UserError, match=f'{spec} changed while it was read'):
      read()


def test_random_weights_and_what_is_made_need_no_files(tmp_path):
  for _ in range(2):
    begin(tmp_path / 'run', None, 'synthetic:0')
  with pytest.raises(UserError, match='other contents of synthetic:0'):
    begin(tmp_path / 'run', None, 'synthetic:1')
