"""A run knows what it reads by its content."""

import os
import shutil

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.hf.files import content_hash
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
  with reading(base) as read:
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
  with reading(None) as read:
    inputs = read()
  assert inputs.sha256 is None
  inputs.check_base()
