"""Files of families that store tensors in another way: in, and out again.

The truth is transformers' model of the family, and PEFT's adapter over it.
"""

import functools
import json

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file
import torch
import transformers

from lorapr_jax.errors import UserError
from lorapr_jax.exporting.convert import convert
from lorapr_jax.hf.adapter import read_adapter, write_adapter
from lorapr_jax.hf.layout import hf_config
from lorapr_jax.hf.load import load_config
from lorapr_jax.hf.write import export_model
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LoraConfig
from lorapr_jax.models.families import row_of
from lorapr_jax.models.lora import merge_adapters

SIZES = {
  'vocab_size': 96,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'max_position_embeddings': 128,
  'rope_theta': 500.0,
  'bos_token_id': None,
  'eos_token_id': None,
  'pad_token_id': None,
  'tie_word_embeddings': False,
}
# Joined rows; heads whose rows are pairs; both, in a part of a head.
FAMILIES = ('phi3', 'ernie4_5', 'glm4')
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.0)
SOME = LoraConfig(rank=3, alpha=6.0, dropout=0.0, targets=('q_proj', 'up_proj'))


@pytest.fixture(scope='module', params=FAMILIES)
def source(request, tmp_path_factory):
  """(transformers' model, the folder that it was saved in)."""
  model = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(model_type=request.param, **SIZES)
  )
  _randomise(model, 1.0)
  folder = tmp_path_factory.mktemp(request.param) / 'model'
  model.save_pretrained(folder)
  return model, folder


def _randomise(model, norm):
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      mean = norm if 'norm' in name else 0.0
      weight.normal_(mean, 0.3, generator=generator)


def _theirs(model):
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS)).logits.numpy()


@functools.partial(jax.jit, static_argnums=1)
def _ours(params, config):
  hidden = decoder.hidden_states(params, TOKENS, config)
  return decoder.logits(params, hidden, config)


def _assert_near(got, want):
  assert want.std() > 0.5
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * abs(want).max())


def _bits(folder):
  tensors = load_file(folder / 'model.safetensors')
  return {name: (x.dtype, x.tobytes()) for name, x in tensors.items()}


def test_it_is_the_same_function(source, load):
  model, folder = source
  config, params = load(folder)
  _assert_near(_ours(params, config), _theirs(model))


def test_out_comes_what_came_in(source, load, tmp_path):
  model, folder = source
  family = model.config.model_type
  config, params = load(folder)
  export_model(tmp_path / 'out', params, config)
  convert(str(folder), tmp_path / 'converted')
  for out in (tmp_path / 'out', tmp_path / 'converted'):
    assert _bits(out) == _bits(folder)
    again = load_config(out)
    assert again == config
    assert again.family == config.family == family
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    _assert_near(_theirs(loaded), _theirs(model))


def test_a_mistral_is_made_of_it(source, load, tmp_path):
  model, folder = source
  config, params = load(folder)
  if config.family == 'glm4':
    with pytest.raises(UserError, match='use export.model_type=glm4'):
      hf_config(config, 'float32', 'auto', 'mistral')
    return
  export_model(tmp_path / 'out', params, config, model_type='mistral')
  mistral, info = transformers.MistralForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(info.values()), info
  _assert_near(_theirs(mistral), _theirs(model))


@pytest.mark.parametrize('lora_config', [LORA, SOME], ids=['all', 'some'])
def test_peft_adapts_it(lora_config, source, load, random_lora, tmp_path):
  _, folder = source
  config, params = load(folder)
  lora = random_lora(config, lora_config)
  write_adapter(tmp_path, lora, config, lora_config, row_of(config.family))
  merged = merge_adapters(params, lora, lora_config.scale)
  base = transformers.AutoModelForCausalLM.from_pretrained(folder)
  adapted = peft.PeftModel.from_pretrained(base, tmp_path)
  want = np.asarray(_ours(merged, config))
  _assert_near(_theirs(adapted), want)

  read, read_config = read_adapter(tmp_path, config)
  again = merge_adapters(params, read, read_config.scale)
  np.testing.assert_array_equal(_ours(again, config), want)


@pytest.mark.mesh
def test_each_device_gets_its_slices(source, load):
  import jax.numpy as jnp

  from lorapr_jax.hf.load import load_params, weight_places
  from lorapr_jax.runtime import sharding

  _, folder = source
  config, want = load(folder)
  mesh = sharding.make_mesh(sharding.mesh_sizes(1, 4, 2))
  places = weight_places(config, jnp.float32, mesh)
  got = load_params(folder, config, places, np.dtype('float32'))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_of_a_gemma_3_that_sees_the_text_model_is_read(load, tmp_path):
  text = {'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2}
  text |= {'head_dim': 8, 'vocab_size': 96, 'sliding_window': 8}
  vision = {'hidden_size': 16, 'intermediate_size': 16, 'image_size': 28}
  vision |= {'num_attention_heads': 2, 'num_hidden_layers': 1}
  model = transformers.Gemma3ForConditionalGeneration(
    transformers.Gemma3Config(
      text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
  )
  _randomise(model, 0.0)
  model.save_pretrained(tmp_path / 'gemma3')
  # The Hub's say little more than the sizes, and no number of heads.
  path = tmp_path / 'gemma3' / 'config.json'
  keys = {'model_type': 'gemma3', 'text_config': text, 'eos_token_id': [1, 9]}
  path.write_text(json.dumps(keys | {'vision_config': vision}))
  config, params = load(path.parent)
  assert config.layers[0].num_heads == 8
  _assert_near(_ours(params, config), _theirs(model))
  export_model(tmp_path / 'out', params, config)
  exported, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'out', output_loading_info=True
  )
  assert not any(info.values()), info
  assert type(exported) is transformers.Gemma3ForCausalLM
  _assert_near(_theirs(exported), _theirs(model))
