"""RoPE turns as transformers' does, in every scaling."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.models.rotation import (
  apply_rope,
  rope_frequencies,
  rope_rotation,
  turn_queries,
)

TRANSFORMERS_5 = int(transformers.__version__.split('.')[0]) > 4
HF = {
  'model_type': 'llama',
  'vocab_size': 96,
  'hidden_size': 96,
  'head_dim': 24,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'intermediate_size': 48,
  'max_position_embeddings': 64,
  'rope_theta': 500.0,
}
YARN = {'rope_type': 'yarn', 'factor': 4.0}
YARN['original_max_position_embeddings'] = 16
LONGROPE = {
  'rope_type': 'longrope',
  'short_factor': [1.0 + 0.1 * i for i in range(12)],
  'long_factor': [1.0 + 0.9 * i for i in range(12)],
  'original_max_position_embeddings': 16,
}
SCALINGS = {
  'default': None,
  'linear': {'rope_type': 'linear', 'factor': 4.0},
  'dynamic': {'rope_type': 'dynamic', 'factor': 4.0},
  'llama3': {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
  },
  'yarn': YARN,
  'yarn_betas': YARN | {'beta_fast': 4.0, 'beta_slow': 0.5, 'truncate': False},
  'yarn_mscale': YARN | {'mscale': 0.7, 'mscale_all_dim': 1.3},
  'yarn_attention': YARN | {'attention_factor': 1.2},
  'longrope': LONGROPE,
  'longrope_attention': LONGROPE | {'attention_factor': 1.2},
}


def _theirs(scaling, length):
  """transformers' frequencies and factor for a text of this length."""
  config = transformers.AutoConfig.for_model(
    **HF, rope_scaling=scaling and dict(scaling)
  )
  if scaling is None:
    return None, 1.0
  init = ROPE_INIT_FUNCTIONS[scaling['rope_type']]
  return init(config, torch.device('cpu'), seq_len=length)


@pytest.mark.parametrize('length', [16, 100])
@pytest.mark.parametrize('scaling', SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_transformers(scaling, length):
  if scaling and scaling['rope_type'] == 'longrope' and not TRANSFORMERS_5:
    pytest.skip('transformers 4 reads the original length elsewhere')
  config = config_from_hf({**HF, 'rope_scaling': scaling})
  rope, positions = config.ropes[0], config.max_positions
  ours = rope_frequencies(config.rotated, rope, length, positions)
  theirs, factor = _theirs(scaling, length)
  if scaling is None:
    theirs = 500.0 ** (-np.arange(0, 24, 2) / 24)
  np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  # The longest text is that of the last position, if it is not given.
  rotation = rope_rotation(config, jnp.arange(float(length)))
  size = jnp.hypot(rotation.cos, rotation.sin)
  np.testing.assert_allclose(size, factor, rtol=1e-6)
  angle = jnp.arctan2(rotation.sin[1], rotation.cos[1])
  np.testing.assert_allclose(angle, np.ravel(theirs), rtol=1e-5)


def test_each_row_has_a_longest_text_of_its_own():
  config = config_from_hf({**HF, 'rope_scaling': LONGROPE})
  short, long = jnp.arange(17.0) % 9, jnp.arange(17.0)
  both = rope_rotation(config, jnp.stack([short, long]))
  for row, positions in enumerate((short, long)):
    alone = rope_rotation(config, positions)
    np.testing.assert_array_equal(both.cos[row], alone.cos)
  given = rope_rotation(config, short, lengths=17)
  assert jnp.abs(given.cos - both.cos[0]).max() > 0.1


def test_queries_grow_with_their_positions():
  beta = YARN | {'llama_4_scaling_beta': 0.1}
  config = config_from_hf({**HF, 'rope_scaling': beta})
  rotation = rope_rotation(config, jnp.arange(50.0))
  q = np.random.default_rng(0).normal(size=(2, 50, 2, 2, 24))
  q = q.astype(np.float32)
  grown = 1 + 0.1 * np.log(1 + np.arange(50) // 16)
  want = apply_rope(q, rotation) * grown[:, None, None, None]
  np.testing.assert_allclose(turn_queries(q, rotation), want, rtol=1e-5)


def test_only_the_first_dimensions_turn():
  config = config_from_hf(HF)
  x = np.random.default_rng(0).normal(size=(2, 9, 2, 24)).astype(np.float32)
  partial = dataclasses.replace(config, rotary_dim=16)
  turned = apply_rope(x, rope_rotation(partial, jnp.arange(9.0)))
  inner = dataclasses.replace(config, head_dim=16)
  want = apply_rope(x[..., :16], rope_rotation(inner, jnp.arange(9.0)))
  np.testing.assert_array_equal(turned[..., :16], want)
  np.testing.assert_array_equal(turned[..., 16:], x[..., 16:])
