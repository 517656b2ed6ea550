"""The cost of a model, against counts by hand and by the compiler."""

import jax
import pytest

from lorapr_jax.models import decoder
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.cost import (
  forward_flops_per_token,
  kv_cache_bytes_per_token,
)
from lorapr_jax.models.trees import param_shapes

SHAPES = (LayerShape(2, 3, 40), LayerShape(1, 2, 8))


def model(tied):
  return ModelConfig(
    vocab_size=50,
    embed_dim=16,
    head_dim=4,
    layers=SHAPES,
    tie_embeddings=tied,
  )


@pytest.mark.parametrize('tied', [True, False])
def test_two_operations_for_each_weight_and_the_attention(tied):
  weights = 50 * 16  # The output matrix, once.
  attention = 0
  for shape in SHAPES:
    queries, kv = shape.num_heads * 4, shape.num_kv_heads * 4
    weights += 16 * (2 * queries + 2 * kv + 3 * shape.mlp_dim)
    # Tokens 1, 2, 3 meet 1, 2, 3 keys and values: a multiplication and an
    # addition for each element.
    attention += 2 * 2 * queries * (1 + 2 + 3) / 3
  found = forward_flops_per_token(model(tied), 3)
  assert found == pytest.approx(2 * weights + attention)
  # Of a prompt, one token's logits are enough.
  prefill = forward_flops_per_token(model(tied), 3, with_logits=1 / 3)
  assert found - prefill == pytest.approx(2 * (2 / 3) * 50 * 16)


def test_the_compiler_counts_as_many():
  config = ModelConfig(
    vocab_size=512,
    embed_dim=256,
    head_dim=32,
    layers=(LayerShape(4, 2, 1024),),
    tie_embeddings=True,
  )
  shapes = param_shapes(config, 'float32')
  tokens = jax.ShapeDtypeStruct((1, 64), 'int32')

  def forward(params, tokens):
    return decoder.logits(
      params, decoder.hidden_states(params, tokens, config), config
    )

  compiled = jax.jit(forward).lower(shapes, tokens).compile()
  # XLA computes the masked half of the attention too, and counts the rest.
  counted = compiled.cost_analysis()['flops'] / 64
  assert forward_flops_per_token(config, 64) == pytest.approx(counted, rel=0.05)


def test_a_key_and_a_value_for_each_kv_head():
  assert kv_cache_bytes_per_token(model(True), 2) == 2 * (2 + 1) * 4 * 2
