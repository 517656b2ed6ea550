"""The weights that are read are those that transformers reads."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import torch
import transformers

from lorapr_jax.errors import UserError
from lorapr_jax.hf.shards import Shards

WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
NORM = 'model.norm.weight'


@pytest.fixture
def folder(save_hf, tmp_path):
  """One file with the weights, which a test may change."""
  return shutil.copytree(save_hf('gqa'), tmp_path / 'model')


def save(folder, norm, name=WHOLE, only=None):
  """Puts the same weights into another file, but for this number in a norm."""
  file = folder / name
  file.parent.mkdir(exist_ok=True)
  tensors = load_file(folder / WHOLE)
  tensors[NORM] = np.full_like(tensors[NORM], norm)
  if only is not None:
    tensors = {t: x for t, x in tensors.items() if (t == NORM) == only}
  save_file(tensors, file, metadata={'format': 'pt'})


def write_index(folder, weight_map):
  text = json.dumps({'metadata': {}, 'weight_map': weight_map})
  (folder / INDEX).write_text(text)


def save_shards(folder, norm, below=''):
  """Two shards and their index."""
  save(folder, norm, f'{below}a.safetensors', only=True)
  save(folder, norm, f'{below}b.safetensors', only=False)
  write_index(
    folder,
    {
      name: f'{below}a.safetensors' if name == NORM else f'{below}b.safetensors'
      for name in load_file(folder / WHOLE)
    },
  )


def _stale_index(folder):
  save_shards(folder, 7)


def _stale_index_without_shards(folder):
  save_shards(folder, 7)
  for name in 'ab':
    (folder / f'{name}.safetensors').unlink()


def _damaged_index(folder):
  (folder / INDEX).write_text('{')


def _foreign_files(folder):
  save(folder, 7, 'adapter_model.safetensors')
  save(folder, 7, 'model-00001-of-00002.safetensors')
  save(folder, 7, 'consolidated.safetensors')


def _foreign_files_beside_shards(folder):
  _foreign_files(folder)
  save_shards(folder, 5)
  (folder / WHOLE).unlink()


def _shards_below(folder):
  save_shards(folder, 5, 'below/')
  (folder / WHOLE).unlink()


def _dangling_file(folder):
  save_shards(folder, 5)
  (folder / WHOLE).unlink()
  (folder / WHOLE).symlink_to('nowhere')


def _linked_as_the_hub_does(folder):
  (folder / WHOLE).rename(folder.parent / 'blob')
  (folder / WHOLE).symlink_to('../blob')


@pytest.mark.parametrize(
  'change',
  [
    _stale_index,
    _stale_index_without_shards,
    _damaged_index,
    _foreign_files,
    _foreign_files_beside_shards,
    _shards_below,
    _dangling_file,
    _linked_as_the_hub_does,
  ],
)
def test_the_weights_are_those_that_transformers_reads(change, folder):
  save(folder, 3)
  change(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  expected, shards = model.state_dict(), Shards(folder)
  assert expected[NORM][0] in (3, 5)
  assert shards.names == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(shards.slice_of(name)[:], x.numpy())


def _only(name):
  return lambda folder: (folder / WHOLE).rename(folder / name)


@pytest.mark.parametrize(
  'change',
  [
    _only('pytorch_model.safetensors'),
    _only('adapter_model.safetensors'),
    _only('model-00001-of-00001.safetensors'),
  ],
)
def test_no_other_name_is_read_as_in_transformers(change, folder):
  change(folder)
  with pytest.raises(OSError, match='no file named .*model.safetensors'):
    transformers.AutoModelForCausalLM.from_pretrained(folder)
  with pytest.raises(UserError, match=f'holds no {WHOLE} and no {INDEX}'):
    Shards(folder)


@pytest.mark.parametrize(
  'name',
  [
    '../other/model.safetensors',
    'below/../../other/model.safetensors',
    '..\\other\\model.safetensors',
    '/dev/zero',
    'C:\\model.safetensors',
    'memory://other/model.safetensors',
    '..',
    '',
    7,
    None,
    ['a.safetensors'],
  ],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(name, folder):
  shutil.copytree(folder, folder.parent / 'other')
  (folder / WHOLE).unlink()
  write_index(folder, {NORM: name})
  with pytest.raises(UserError, match=f'{NORM} is in .*, which is no name'):
    Shards(folder)


@pytest.mark.parametrize(
  'name', ['pipe', 'below', '.', 'gone', 'link', 'nul\0']
)
def test_an_index_that_names_no_file_is_refused(name, folder):
  (folder / WHOLE).unlink()
  os.mkfifo(folder / 'pipe')
  (folder / 'below').mkdir()
  (folder / 'link').symlink_to('nowhere')
  write_index(folder, {NORM: name})
  with pytest.raises(UserError, match='is not a file|not exist|cannot be read'):
    Shards(folder)


def test_a_link_that_leads_nowhere_is_named(folder):
  (folder / WHOLE).rename(folder / 'blob')
  (folder / WHOLE).symlink_to('../../blobs/0af3')
  with pytest.raises(UserError, match=f'{WHOLE} is a link to ../../blobs/0af3'):
    Shards(folder)


def test_a_tensor_in_two_files_is_refused(folder):
  save_shards(folder, 5)
  save(folder, 7, 'b.safetensors')
  (folder / WHOLE).unlink()
  with pytest.raises(UserError, match=f'b.safetensors holds .* {NORM}, as'):
    Shards(folder)
