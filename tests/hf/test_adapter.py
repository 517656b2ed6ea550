"""Adapters as PEFT stores them: names, shapes, and the product that counts."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorapr_jax.errors import UserError
from lorapr_jax.hf.adapter import read_adapter, write_adapter
from lorapr_jax.hf.write import hf_tensors
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.lora import merge_adapters

CONFIG = ModelConfig(
  vocab_size=16,
  embed_dim=12,
  head_dim=4,
  layers=(LayerShape(2, 3, 10), LayerShape(1, 3, 6), LayerShape(2, 3, 10)),
)
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.1)
SOME = LoraConfig(
  rank=3, alpha=6.0, dropout=0.0, targets=('v_proj', 'down_proj')
)
WEIGHTS = 'adapter_model.safetensors'


@pytest.fixture
def adapter(random_lora, tmp_path):
  """Writes the adapters of a LoraConfig: (folder, adapters)."""

  def write(lora_config):
    lora = random_lora(CONFIG, lora_config)
    write_adapter(tmp_path, lora, CONFIG, lora_config)
    return tmp_path, lora

  return write


def test_names_and_shapes_are_pefts(adapter):
  folder, _ = adapter(LORA)
  found = {name: x.shape for name, x in load_file(folder / WEIGHTS).items()}
  sizes = {}
  for i, (queries, keys, channels) in enumerate(
    ((24, 8, 10), (12, 4, 6), (24, 8, 10))
  ):
    for name, inputs, outputs in (
      ('self_attn.q_proj', 12, queries),
      ('self_attn.k_proj', 12, keys),
      ('self_attn.v_proj', 12, keys),
      ('self_attn.o_proj', queries, 12),
      ('mlp.gate_proj', 12, channels),
      ('mlp.up_proj', 12, channels),
      ('mlp.down_proj', channels, 12),
    ):
      path = f'base_model.model.model.layers.{i}.{name}'
      sizes[f'{path}.lora_A.weight'] = (2, inputs)
      sizes[f'{path}.lora_B.weight'] = (outputs, 2)
  assert found == sizes
  with safe_open(folder / WEIGHTS, framework='np') as file:
    assert file.metadata() == {'format': 'pt'}


def test_the_config_says_what_peft_asks(adapter):
  folder, _ = adapter(SOME)
  assert json.loads((folder / 'adapter_config.json').read_text()) == {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': 'base',
    'r': 3,
    'lora_alpha': 6.0,
    'lora_dropout': 0.0,
    'target_modules': ['v_proj', 'down_proj'],
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
  }


@pytest.mark.parametrize('lora_config', [LORA, SOME], ids=['all', 'some'])
def test_out_comes_what_went_in(lora_config, adapter):
  folder, lora = adapter(lora_config)
  read, read_config = read_adapter(folder, CONFIG)
  assert read_config == lora_config
  jax.tree.map(np.testing.assert_array_equal, read, lora)


@pytest.mark.parametrize('lora_config', [LORA, SOME], ids=['all', 'some'])
def test_pefts_product_is_the_merged_update(
  lora_config, adapter, random_params
):
  """W + (alpha / r) B A, on matrices (outputs, inputs)."""
  folder, lora = adapter(lora_config)
  params = random_params(CONFIG)
  merged = merge_adapters(params, lora, lora_config.scale)
  expected = dict(hf_tensors(merged, CONFIG, np.float32))
  stored = load_file(folder / WEIGHTS)
  adapted = 0
  for name, weight in hf_tensors(params, CONFIG, np.float32):
    path = f'base_model.model.{name.removesuffix(".weight")}'
    if f'{path}.lora_A.weight' in stored:
      a, b = (stored[f'{path}.lora_{factor}.weight'] for factor in 'AB')
      weight = weight + lora_config.scale * b @ a
      adapted += 1
    np.testing.assert_allclose(weight, expected[name], rtol=0, atol=1e-6)
  assert adapted == len(CONFIG.layers) * len(lora_config.targets)


NAME = 'base_model.model.model.layers.1.mlp.up_proj.lora_B.weight'


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda t: t.pop(NAME), f'lacks {NAME} of shape (6, 2)'),
    (lambda t: t.update({NAME: np.zeros((10, 2))}), f'lacks {NAME} of shape'),
    (lambda t: t.update(more=np.zeros(1)), 'has the unknown more'),
  ],
)
def test_tensors_of_another_model_are_refused(change, message, adapter):
  folder, _ = adapter(LORA)
  tensors = load_file(folder / WEIGHTS)
  change(tensors)
  save_file(tensors, folder / WEIGHTS)
  with pytest.raises(UserError) as error:
    read_adapter(folder, CONFIG)
  assert message in str(error.value)
