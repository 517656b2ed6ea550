"""The forward pass is transformers'; masked is cut; dropout is LoRA's alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.rope import Rope
from lorapr_jax.models.trees import init_lora, param_shapes
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.masks import by_stack, initial_masks, select_masks
from lorapr_jax.pruning.shrink import kept_groups, shrunk_config
from lorapr_jax.training.base import cut_params
from lorapr_jax.training.cut import cut_adapters

SMALL = ModelConfig(
  vocab_size=96,
  embed_dim=32,
  head_dim=8,
  layers=(LayerShape(2, 3, 48),) * 2,
)
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
HALF = dataclasses.replace(LORA, dropout=0.5)
# Positions beyond the 32 that the llama3 model was first trained on.
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 64))


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, config):
  hidden = decoder.hidden_states(params, TOKENS, config)
  return decoder.logits(params, hidden, config)


@functools.partial(jax.jit, static_argnames=('lora_config', 'dtype'))
def _hidden(params, lora=None, lora_config=None, key=None, dtype=jnp.float32):
  return decoder.hidden_states(
    params,
    TOKENS[:, :8],
    SMALL,
    lora=lora,
    lora_config=lora_config,
    dropout_key=key,
    dtype=dtype,
  )


def _torch_logits(folder):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS)).logits.numpy()


def _check_logits(folder, load):
  config, params = load(folder)
  want = _torch_logits(folder)
  assert want.std() > 0.5
  np.testing.assert_allclose(_logits(params, config), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize('kind', ['gqa_tied', 'mistral'])
@pytest.mark.parametrize(
  'saved', [{'max_shard_size': '20KB'}, {'dtype': 'bfloat16'}]
)
def test_logits_equal_transformers_however_saved(kind, saved, save_hf, load):
  folder = save_hf(kind, **saved)
  files = list(folder.glob('*.safetensors'))
  assert (len(files) > 2) == ('max_shard_size' in saved)
  _check_logits(folder, load)


def test_the_kinds_differ_in_what_they_are_named_for(save_hf, load):
  config = {kind: load(save_hf(kind))[0] for kind in ('mha', 'gqa', 'llama3')}
  assert config['mha'].layers == (LayerShape(4, 1, 48),) * 2
  assert config['gqa'].layers == (LayerShape(2, 2, 48),) * 2
  params = load(save_hf('llama3'))[1]
  unscaled = dataclasses.replace(config['llama3'], ropes=(Rope(500.0),))
  difference = _logits(params, config['llama3']) - _logits(params, unscaled)
  assert jnp.abs(difference).max() > 0.1


def test_a_bf16_computation_is_near_the_float32_one(random_params):
  params = random_params(SMALL)
  hidden = _hidden(params, dtype=jnp.bfloat16)
  exact = _hidden(params)
  assert (hidden.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32)
  assert decoder.logits(params, hidden, SMALL).dtype == jnp.float32
  # Three decimal digits a rounding, some tens of them in a row.
  error = jnp.linalg.norm(hidden.astype(jnp.float32) - exact)
  assert error < 0.1 * jnp.linalg.norm(exact)


def test_adapters_at_step_0_change_nothing_even_with_dropout(random_params):
  # B is zero, so that whatever dropout does can only be on LoRA's side.
  params = random_params(SMALL)
  lora = init_lora(jax.random.key(0), SMALL, LORA)
  want = _hidden(params)
  for key in (None, jax.random.key(3)):
    got = _hidden(params, lora, HALF, key)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_dropout_needs_a_key_and_a_rate(random_params, random_lora):
  params, lora = random_params(SMALL), random_lora(SMALL, LORA)
  key = jax.random.key(3)
  plain = _hidden(params, lora, LORA)
  assert jnp.all(_hidden(params, lora, HALF) == plain)
  assert jnp.all(_hidden(params, lora, LORA, key) == plain)
  assert jnp.abs(_hidden(params, lora, HALF, key) - plain).max() > 0.1


def test_dropout_is_decided_by_its_key(random_params, random_lora):
  params, lora = random_params(SMALL), random_lora(SMALL, HALF)
  first = _hidden(params, lora, HALF, jax.random.key(3))
  assert jnp.all(_hidden(params, lora, HALF, jax.random.key(3)) == first)
  other = _hidden(params, lora, HALF, jax.random.key(4))
  assert jnp.abs(other - first).max() > 0.1


def test_an_adapter_of_the_wrong_shape_is_refused(random_params, random_lora):
  params = random_params(SMALL)
  lora = random_lora(SMALL, dataclasses.replace(LORA, rank=2))
  with pytest.raises(ValueError, match=r'q_proj/a is .*, expected \(32, 4\)'):
    _hidden(params, lora, LORA)


@pytest.mark.parametrize(
  'keep',
  [
    {KV_HEADS: (1, 1), CHANNELS: (30, 20)},
    {QUERIES: (1, 2), CHANNELS: (48, 1)},
  ],
)
def test_masked_is_cut_where_there_are_biases(keep, random_params, random_lora):
  config = SMALL.with_biases(LORA_TARGETS)
  params, lora = random_params(config), random_lora(config, LORA)
  masks = initial_masks(tuple(keep), ((2, config.sizes(config.layers[0])),))
  rng = np.random.default_rng(0)
  scores = jax.tree.map(lambda x: rng.normal(size=x.shape), masks)
  masks = select_masks(scores, masks, by_stack(keep, config))
  kept = kept_groups(masks)
  small = shrunk_config(config, kept)
  assert small.biases == config.biases
  cut = cut_params(params, kept, config)
  run = functools.partial(decoder.hidden_states, lora_config=LORA)
  np.testing.assert_allclose(
    run(cut, TOKENS, small, lora=cut_adapters(lora, kept, config, LORA)),
    run(params, TOKENS, config, lora=lora, masks=masks),
    atol=2e-5,
  )
  shapes = jax.tree.map(lambda x: x.shape, param_shapes(small, 'float32'))
  assert jax.tree.map(lambda x: x.shape, cut) == shapes


@pytest.mark.parametrize(
  ('dtype', 'scale'), [('float32', 59.866516), ('bfloat16', 59.75)]
)
def test_the_scale_of_embeddings_is_rounded_as_they_are(dtype, scale):
  config = dataclasses.replace(SMALL, embed_scale=3584**0.5)
  tokens = np.array([[0, 1]])
  valid = np.array([[True, False]])
  x = decoder.embedded(jnp.ones((2, 3)), tokens, config, dtype, valid)
  assert x.dtype == dtype
  np.testing.assert_allclose(x[0, :, 0].astype(np.float32), [scale, 0])
