"""Each model goes to the architecture that computes what it does."""

import dataclasses

import gguf
import numpy as np
import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.gguf import archs
from lorapr_jax.gguf.archs import architecture
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.gguf.write import write_gguf
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.write import hf_tensors
from lorapr_jax.models.config import LayerShape
from lorapr_jax.models.rope import Yarn
from tests.kinds import KINDS

# By kind: the architecture, and that of layers of unequal size; else the
# reason why there is none.
ARCHS = {
  'mha': ('llama', 'deci'),
  'gqa_tied': ('llama', 'deci'),
  'biases': ('llama', 'deci'),
  'llama3': ('llama', 'deci'),
  'mistral': ('llama', 'deci'),
  'llama_linear': ('llama', 'deci'),
  'llama_yarn': ('llama', 'deci'),
  'llama_dynamic': ('no RoPE scaling of this type (dynamic)',) * 2,
  'qwen2': ('llama', 'deci'),
  'qwen3': ('qwen3', 'openelm'),
  'qwen3_yarn': ('qwen3 has no bias of o_proj', 'no layers of unequal size'),
  'granite': ('granite', 'granite has no layers of unequal size'),
  'gemma': ('gemma', 'gemma has no layers of unequal size'),
  'seed_oss': ('llama', 'deci'),
  'hunyuan_v1_dense': ('hunyuan-dense', 'no layers of unequal size'),
  'olmo2': ('no heads that are not as wide',) * 2,
  'ernie4_5': ('llama', 'deci'),
}


def sizes(kind, *, unequal):
  config = config_from_hf(KINDS[kind].keys)
  if unequal:
    first, *others = config.layers
    layers = (LayerShape(1, 1, 30), first, *others[1:])
    config = dataclasses.replace(config, layers=layers)
  return config


@pytest.mark.parametrize('unequal', [False, True], ids=['equal', 'unequal'])
@pytest.mark.parametrize('kind', ARCHS)
def test_a_model_comes_back_bit_by_bit(kind, unequal, random_params, tmp_path):
  config, expected = sizes(kind, unequal=unequal), ARCHS[kind][unequal]
  if ' ' in expected:
    with pytest.raises(UserError, match='Choose format hf') as error:
      architecture(config)
    assert expected in str(error.value)
    return
  assert_comes_back(config, expected, random_params, tmp_path)


def test_olmo2_is_held_where_no_head_was_pruned(random_params, tmp_path):
  config = dataclasses.replace(sizes('olmo2', unequal=False), head_dim=8)
  assert_comes_back(config, 'olmo2', random_params, tmp_path)


def assert_comes_back(config, arch, random_params, tmp_path):
  # float32 holds 1 + weight of a bfloat16.
  params = random_params(config, 'bfloat16')
  path = tmp_path / 'a.gguf'
  write_gguf(path, params, config, base=None, dtype='f32', name='Tiny')
  fields = gguf.GGUFReader(path).fields
  assert fields['general.architecture'].contents() == arch
  model = open_gguf(path)
  assert model.config == config
  found = dict(model.tensors())
  tensors = dict(hf_tensors(params, config, np.float32))
  assert found.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_qwen2_of_another_program_is_read(random_params, tmp_path, monkeypatch):
  """We write it as a llama, whose heads lie otherwise."""
  config = dataclasses.replace(sizes('qwen2', unequal=False), head_dim=8)
  others = {name: x for name, x in archs.ARCHS.items() if name != 'llama'}
  monkeypatch.setattr(archs, 'ARCHS', others)
  assert_comes_back(config, 'qwen2', random_params, tmp_path)


def test_joined_rows_are_those_that_llama_cpp_splits(random_params, tmp_path):
  """OpenELM's queries, keys and values."""
  config = sizes('qwen3', unequal=True)
  params = random_params(config)
  path = tmp_path / 'a.gguf'
  write_gguf(path, params, config, base=None, dtype='f32', name='Tiny')
  (stored,) = (
    np.asarray(x.data)
    for x in gguf.GGUFReader(path).tensors
    if x.name == 'blk.1.attn_qkv.weight'
  )
  ours = dict(hf_tensors(params, config, np.float32))
  names = [f'model.layers.1.self_attn.{x}_proj.weight' for x in 'qkv']
  np.testing.assert_array_equal(
    stored, np.concatenate([ours[n] for n in names])
  )


def test_norms_of_gemma_are_stored_with_their_offset(random_params, tmp_path):
  config = sizes('gemma', unequal=False)
  params = random_params(config)
  path = tmp_path / 'a.gguf'
  write_gguf(path, params, config, base=None, dtype='f32', name='Tiny')
  tensors = {x.name: np.asarray(x.data) for x in gguf.GGUFReader(path).tensors}
  norm = np.asarray(params['norm']['weight'])
  np.testing.assert_array_equal(tensors['output_norm.weight'], norm + 1)


def test_yarn_of_its_usual_numbers_is_said_by_keys(random_params, tmp_path):
  """What llama.cpp makes of them, times what is there, is our magnitude."""
  config = sizes('qwen3', unequal=False)
  rope = dataclasses.replace(config.ropes[0], scaling=Yarn(32, 4.0, 1.3))
  config = dataclasses.replace(config, ropes=(rope,))
  path, params = tmp_path / 'a.gguf', random_params(config)
  write_gguf(path, params, config, base=None, dtype='f32', name='Tiny')
  reader = gguf.GGUFReader(path)
  scaling = {
    key.removeprefix('qwen3.rope.scaling.'): field.contents()
    for key, field in reader.fields.items()
    if key.startswith('qwen3.rope.scaling.')
  }
  factor = scaling.pop('attn_factor')
  np.testing.assert_allclose(factor * (1 + 0.1 * np.log(4.0)), 1.3, rtol=1e-6)
  assert scaling == {
    'type': 'yarn',
    'factor': 4.0,
    'original_context_length': 32,
  }
  assert 'rope_freqs.weight' not in [x.name for x in reader.tensors]
  assert open_gguf(path).config == config


def test_a_key_that_contradicts_another_is_named(random_params, tmp_path):
  config = sizes('llama_linear', unequal=False)
  path = tmp_path / 'a.gguf'
  params = random_params(config)
  write_gguf(path, params, config, base=None, dtype='f32', name='Tiny')
  content = path.read_bytes()
  path.write_bytes(content.replace(b'lorapr_jax.rope_', b'lorapr_jaX.rope_'))
  assert open_gguf(path).config == config
  path.write_bytes(content.replace(b'linear', b'xarLin', 1))
  with pytest.raises(UserError, match='llama.rope.scaling.type is'):
    open_gguf(path)
