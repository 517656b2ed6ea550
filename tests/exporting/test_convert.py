"""A Hugging Face folder is converted into another; GGUF: tests/gguf/."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorapr_jax.errors import UserError
from lorapr_jax.exporting.convert import convert
from lorapr_jax.hf.load import load_config


def _tensors(folder):
  """Name -> what is stored, from all files of a folder."""
  tensors = {}
  for path in folder.glob('*.safetensors'):
    tensors |= load_file(path)
  assert tensors
  return tensors


def _bits(folder):
  """Name -> dtype, shape and bytes of what is stored."""
  stored = _tensors(folder).items()
  return {name: (x.dtype, x.shape, x.tobytes()) for name, x in stored}


@pytest.mark.parametrize('kind', ['gqa_tied', 'mistral', 'biases'])
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_a_converted_folder_has_the_same_weights(
  kind, dtype, save_hf, load, tmp_path
):
  source = shutil.copytree(
    save_hf(kind, max_shard_size='20KB'), tmp_path / 'source'
  )
  (source / 'tokenizer.json').write_bytes(b'{"a":\r\n 1}')
  out = tmp_path / 'out'
  config = convert(str(source), out, dtype)
  assert config == load_config(out) == load_config(source)
  assert (out / 'tokenizer.json').read_bytes() == b'{"a":\r\n 1}'
  if dtype is None:
    assert _bits(source) == _bits(out)
    return
  given, written = _tensors(source), _tensors(out)
  assert given.keys() == written.keys()
  for name, x in given.items():
    assert written[name].dtype == jnp.bfloat16
    np.testing.assert_array_equal(written[name], x.astype(jnp.bfloat16))
  hf = json.loads((out / 'config.json').read_text())
  assert hf['torch_dtype'] == 'bfloat16'


def test_a_bf16_folder_is_converted_to_bf16(save_hf, tmp_path):
  source = save_hf('gqa', 'bfloat16')
  convert(str(source), tmp_path / 'out')
  assert _bits(source) == _bits(tmp_path / 'out')
  with pytest.raises(UserError, match=f'{tmp_path / "out"} exists already'):
    convert(str(source), tmp_path / 'out')
