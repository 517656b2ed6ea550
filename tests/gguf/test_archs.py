"""Each model goes to the architecture that computes what it does."""

import dataclasses

import gguf
import numpy as np
import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.gguf import archs
from lorapr_jax.gguf.archs import architecture
from lorapr_jax.gguf.format import EMPTY
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.gguf.write import write_gguf
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.write import hf_tensors
from lorapr_jax.models.config import NORMS, LayerShape
from lorapr_jax.models.rope import Linear, Rope, Yarn
from tests.kinds import KINDS

# By kind: the architecture, and that of layers of unequal size; else the
# reason why there is none.
ARCHS = {
  'mha': ('llama', 'deci'),
  'gqa_tied': ('llama', 'deci'),
  'biases': ('llama', 'deci'),
  'llama3': ('llama', 'deci'),
  'mistral': ('llama', 'deci'),
  'mistral_window': ('granite_swa', 'deci has no sliding window'),
  'ministral': ('granite_swa', 'deci has no sliding window'),
  'ministral3': ('mistral3', 'no scale of queries by their position'),
  'smollm3': ('granite_swa', 'deci has no layers that turn in such ways'),
  'llama_linear': ('llama', 'deci'),
  'llama_yarn': ('llama', 'deci'),
  'llama_dynamic': ('no RoPE scaling of this type (dynamic)',) * 2,
  'qwen2': ('llama', 'deci'),
  'qwen2_window': ('granite_swa', 'deci has no sliding window'),
  'phi3': ('llama', 'deci'),
  'phi3_longrope': ('RoPE by which a part of each head grows',) * 2,
  'qwen3': ('qwen3', 'openelm'),
  'qwen3_yarn': ('qwen3 has no bias of o_proj', 'no layers of unequal size'),
  'granite': ('granite', 'granite has no layers of unequal size'),
  'glm': ('llama', 'deci'),
  'glm4': ('glm4', 'glm4 has no layers of unequal size'),
  'gemma2': ('gemma2 has no such scale of attention', 'of unequal size'),
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


_LOCAL = (Rope(1e5, Linear(8.0)), Rope(100.0))
_FIVE_OF_SIX = (8,) * 5 + (None, 8)
_CAPS = {'attention_cap': 5.0, 'logit_cap': 3.0}
_QKV = ('q_proj', 'k_proj', 'v_proj')


@pytest.mark.parametrize(
  'arch, kind, changes',
  [
    ('smollm3', 'smollm3', {'rope_of_layer': (0, 0, 0, 1) * 2}),
    ('olmo2', 'olmo2', {'head_dim': 8}),
    (
      'olmo2',
      'olmo2',
      {
        'head_dim': 8,
        'windows': (8, 8, 8, None),
        'ropes': (Rope(500.0, Yarn(16, 4.0, 1.3)), Rope(500.0)),
        'rope_of_layer': (1, 1, 1, 0),
      },
    ),
    ('gemma2', 'gemma', {'norms': NORMS, **_CAPS}),
    ('gemma2', 'gemma', {'norms': NORMS, 'windows': (8, None) * 3, **_CAPS}),
    (
      'gemma3',
      'gemma',
      {
        'norms': NORMS,
        'qk_norm': 'head',
        'windows': _FIVE_OF_SIX,
        'ropes': _LOCAL,
        'rope_of_layer': tuple(int(w is not None) for w in _FIVE_OF_SIX),
      },
    ),
    ('glm4', 'gqa', {'norms': NORMS, 'biases': _QKV, 'rotary_dim': 6}),
    ('llama', 'gqa', {'biases': _QKV, 'rotary_dim': 6}),
  ],
)
def test_features_come_back(arch, kind, changes, random_params, tmp_path):
  """Of models that have as many layers as these features are of."""
  config = sizes(kind, unequal=False)
  by_layer = changes.get('windows') or changes.get('rope_of_layer')
  layers = config.layers[:1] * len(by_layer or config.layers)
  config = dataclasses.replace(config, layers=layers, **changes)
  assert_comes_back(config, arch, random_params, tmp_path)


@pytest.mark.parametrize('kind', ['qwen3', 'gemma'])
def test_another_scale_of_attention_is_in_the_norm_of_queries(
  kind, random_params, tmp_path
):
  config = dataclasses.replace(sizes(kind, unequal=False), attention_scale=0.2)
  if kind == 'gemma':
    with pytest.raises(UserError, match='no such scale of attention'):
      architecture(config)
    config = dataclasses.replace(config, norms=NORMS, qk_norm='head')
  params, path = random_params(config), tmp_path / 'a.gguf'
  write_gguf(path, params, config, base=None, dtype='f32', name='Tiny')
  model = open_gguf(path)
  assert model.config == dataclasses.replace(config, attention_scale=None)
  name = 'model.layers.1.self_attn.q_norm.weight'
  found = model.tensor_of(name) + config.norm_offset
  ours = dict(hf_tensors(params, config, np.float32))[name]
  np.testing.assert_allclose(
    found, (ours + config.norm_offset) * 0.2 * 12**0.5, rtol=1e-5
  )


@pytest.mark.parametrize('layers, scale', [(46, 32 // 4), (45, 12)])
def test_heads_of_the_largest_gemma_have_a_scale_of_their_own(layers, scale):
  config = sizes('gemma', unequal=False)
  config = dataclasses.replace(
    config, norms=NORMS, layers=config.layers[:1] * layers, **_CAPS
  )
  fits = dataclasses.replace(config, attention_scale=scale**-0.5)
  assert architecture(fits) == 'gemma2'
  other = dataclasses.replace(config, attention_scale=0.2)
  with pytest.raises(UserError, match='gemma2 has no such scale of attention'):
    architecture(other)


def test_a_sink_that_takes_something_is_refused(random_params, tmp_path):
  config = sizes('mistral_window', unequal=False)
  path = tmp_path / 'a.gguf'
  params = random_params(config)
  write_gguf(path, params, config, base=None, dtype='f32', name='Tiny')
  empty, taken = (np.float32(x).tobytes() for x in (EMPTY, 1.0))
  content = path.read_bytes()
  path.write_bytes(content.replace(empty, taken, 1))
  with pytest.raises(UserError, match='blk.0.attn_sinks.weight is a sink'):
    open_gguf(path)


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
