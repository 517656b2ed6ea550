"""Sizes are counted; impossible adapters are refused."""

import dataclasses

import pytest

from lorapr_jax.axes import LORA_TARGETS, PROJECTIONS
from lorapr_jax.errors import UserError
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig, Stack
from lorapr_jax.models.rope import Rope

CONFIG = ModelConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=16,
  layers=(LayerShape(num_kv_heads=2, queries_per_kv=3, mlp_dim=48),) * 2,
  norm_eps=1e-5,
  ropes=(Rope(500000.0),),
  tie_embeddings=True,
  max_positions=128,
  bos_token_id=1,
  eos_token_id=(2, 3),
  pad_token_id=0,
)
UNEQUAL = dataclasses.replace(
  CONFIG,
  layers=(
    LayerShape(1, 3, 16),
    LayerShape(2, 3, 48),
    LayerShape(2, 3, 48),
    LayerShape(2, 1, 40),
  ),
)


def test_biases_are_counted():
  both = CONFIG.with_biases(reversed(LORA_TARGETS))
  assert both.biases == LORA_TARGETS and CONFIG.biases == ()
  # Of a layer: q, k, v and o; gate, up and down.
  attention, mlp = 96 + 32 + 32 + 32, 48 + 48 + 32
  for names, more in (
    (PROJECTIONS['self_attn'], attention),
    (PROJECTIONS['mlp'], mlp),
    (('k_proj',), 32),
    (both.biases, attention + mlp),
  ):
    found = CONFIG.with_biases(names).num_parameters
    assert found == CONFIG.num_parameters + 2 * more


def test_stacks_are_the_runs_of_equal_layers():
  a, b, c = LayerShape(1, 3, 16), LayerShape(2, 3, 48), LayerShape(2, 1, 40)
  assert UNEQUAL.stacks == (Stack(0, 1, a), Stack(1, 2, b), Stack(3, 1, c))
  assert CONFIG.stacks == (Stack(0, 2, b),)
  assert CONFIG.is_uniform and not UNEQUAL.is_uniform


def test_parameters_are_counted():
  # Of a layer: q and o, k and v, gate, up and down, two norms.
  layer = 2 * 32 * 6 * 16 + 2 * 32 * 2 * 16 + 3 * 32 * 48 + 2 * 32
  assert CONFIG.num_parameters == 96 * 32 + 2 * layer + 32
  untied = dataclasses.replace(CONFIG, tie_embeddings=False)
  assert untied.num_parameters == CONFIG.num_parameters + 96 * 32


@pytest.mark.parametrize(
  'options, key',
  [
    ({'rank': 0}, 'lora.rank'),
    ({'dropout': 1.0}, 'lora.dropout'),
    ({'dropout': -0.1}, 'lora.dropout'),
    ({'targets': ('q_proj', 'qkv_proj')}, 'qkv_proj'),
    ({'targets': ()}, 'lora.targets'),
  ],
)
def test_impossible_adapters_are_refused_by_their_key(options, key):
  with pytest.raises(UserError) as error:
    LoraConfig(**{'rank': 8, 'alpha': 16.0, 'dropout': 0.0, **options})
  assert key in str(error.value)
