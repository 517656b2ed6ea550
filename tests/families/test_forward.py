"""Every family's forward pass is transformers', and each feature shows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lorapr_jax.eval.generation import Sampling, stream_tokens
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.load import weight_places
from lorapr_jax.models import decoder
from lorapr_jax.models.compute import Compute, run_model
from lorapr_jax.models.config import LoraConfig
from lorapr_jax.models.families import FAMILIES
from lorapr_jax.runtime import sharding
from tests.families.cover import TRAITS, cover, each
from tests.kinds import KINDS, torch_model

# More than every window, and than the positions that scaled RoPE was made for.
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 40))
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.0)
# Of the largest logit.
TOLERANCE = 1e-4


@functools.partial(jax.jit, static_argnames=('config', 'dtype'))
def _logits(params, config, tokens=TOKENS, segments=None, dtype=jnp.float32):
  hidden = run_model(
    params, tokens, Compute(config, dtype=dtype), segments=segments
  )
  return decoder.logits(params, hidden, config)


@functools.cache
def _torch_model(folder, dtype=torch.float32):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=dtype, attn_implementation='eager'
  )


def _torch_logits(model, tokens=TOKENS):
  with torch.no_grad():
    out = model(torch.from_numpy(tokens), use_cache=False)
  return out.logits.float().numpy()


def _near(found, expected):
  found, expected = np.asarray(found), np.asarray(expected)
  largest = np.abs(expected).max()
  assert largest > 0.5
  return np.abs(found - expected).max() < TOLERANCE * largest


def test_every_family_has_a_kind():
  assert {kind.keys['model_type'] for kind in KINDS.values()} == set(FAMILIES)


@pytest.mark.parametrize('kind', KINDS)
def test_logits_are_those_of_transformers(kind, save_hf, load):
  folder = save_hf(kind)
  expected = _torch_logits(_torch_model(folder))
  config, params = load(folder)
  assert _near(_logits(params, config), expected)
  # The newer style, which transformers 5 saves, says the same.
  hf = transformers.AutoConfig.from_pretrained(folder).to_dict()
  hf['eos_token_id'] = KINDS[kind].keys['eos_token_id']
  assert config_from_hf(hf) == config


@pytest.mark.parametrize(
  ('kind', 'feature'), [(k, f) for k in KINDS for f in KINDS[k].features]
)
def test_without_a_feature_logits_are_others(kind, feature):
  keys, change = KINDS[kind].keys, KINDS[kind].features[feature]
  keys, without = (
    (keys | change, ()) if isinstance(change, dict) else (keys, change)
  )
  expected = _torch_logits(torch_model(KINDS[kind].keys))
  found = _torch_logits(torch_model(keys, without))
  assert np.abs(found - expected).max() > 0.05 * np.abs(expected).max()


@pytest.mark.parametrize('kind', each(TRAITS))
def test_cached_text_is_that_of_transformers_beyond_the_window(
  kind, save_hf, load
):
  folder = save_hf(kind)
  config, params = load(folder)
  # Longer than what LongRoPE calls short: the same factors all the way.
  prompt, new = TOKENS[0, :18], 18
  got = list(
    stream_tokens(params, config, prompt, Sampling(new), dtype='float32')
  )
  ids = torch.from_numpy(prompt[None])
  # Anew: under a dynamic RoPE a model remembers its longest text.
  whole = _torch_model.__wrapped__(folder).generate(
    ids,
    attention_mask=torch.ones_like(ids),
    do_sample=False,
    max_new_tokens=new,
    eos_token_id=None,
    pad_token_id=0,
  )
  assert got == whole[0, len(prompt) :].tolist()
  if kind == 'llama_dynamic':  # Keys in the cache turned by other angles.
    return
  text = np.zeros_like(TOKENS)
  text[0, : whole.shape[1]] = whole[0]
  best = _logits(params, config, text)[0].argmax(-1)
  assert got == best[len(prompt) - 1 : whole.shape[1] - 1].tolist()


@pytest.mark.parametrize('kind', each(TRAITS))
def test_texts_that_share_a_row_are_as_if_alone(kind, save_hf, load):
  config, params = load(save_hf(kind))
  first = 17
  segments = np.ones_like(TOKENS)
  segments[:, first:] = 2
  packed = _logits(params, config, TOKENS, segments)
  for start, end in ((0, first), (first, TOKENS.shape[1])):
    again = np.roll(TOKENS, -start, axis=1)
    # A scaled RoPE asks how long a text is: what follows is padding.
    there = (np.arange(TOKENS.shape[1]) < end - start) * np.ones_like(TOKENS)
    alone = _logits(params, config, again, there)[:, : end - start]
    assert _near(packed[:, start:end], alone)


@pytest.mark.parametrize('kind', each(TRAITS))
def test_bfloat16_is_as_near_as_that_of_transformers(kind, save_hf, load):
  folder = save_hf(kind, 'bfloat16')
  exact = _torch_logits(_torch_model(folder))
  theirs = _torch_logits(_torch_model(folder, torch.bfloat16))
  config, params = load(folder, 'bfloat16')
  ours = _logits(params, config, dtype=jnp.bfloat16)
  error, bound = (np.std(x - exact) for x in (ours, theirs))
  assert 0 < error < 1.5 * bound


@functools.partial(jax.jit, static_argnames=('config', 'remat', 'scan_layers'))
def _gradient(lora, params, config, remat, scan_layers):
  def loss(lora):
    hidden = decoder.hidden_states(
      params,
      TOKENS,
      config,
      lora=lora,
      lora_config=LORA,
      remat=remat,
      scan_layers=scan_layers,
    )
    return jnp.log(jnp.cosh(decoder.logits(params, hidden, config))).mean()

  return jax.grad(loss)(lora)


@pytest.mark.families
@pytest.mark.parametrize('kind', cover(TRAITS))
def test_gradients_do_not_depend_on_remat_or_the_loop(
  kind, save_hf, load, random_lora
):
  config, params = load(save_hf(kind))
  lora = random_lora(config, LORA)
  want = _gradient(lora, params, config, 'blocks', True)
  got = _gradient(lora, params, config, 'none', False)

  def check(one, other):
    size = jnp.abs(other).max()
    assert size > 0 and jnp.abs(one - other).max() < 1e-3 * size

  jax.tree.map(check, got, want)


@pytest.mark.mesh
@pytest.mark.parametrize('kind', each(TRAITS))
def test_eight_devices_compute_what_one_computes(kind, save_hf, load):
  config, params = load(save_hf(kind))
  want = _logits(params, config)
  tensor = math.gcd(2, config.layers[0].num_kv_heads)
  sizes = {'fsdp': 2, 'sequence': 4 // tensor, 'tensor': tensor}
  mesh = sharding.make_mesh(sizes)
  places = weight_places(config, jnp.float32, mesh)
  place = sharding.sharding(mesh, ('batch', 'length'), TOKENS.shape)
  tokens = jax.device_put(TOKENS, place)
  with jax.set_mesh(mesh):
    got = _on_mesh(jax.device_put(params, places), tokens, config, mesh)
  assert _near(got, want)


@functools.partial(jax.jit, static_argnames=('config', 'mesh'))
def _on_mesh(params, tokens, config, mesh):
  hidden = run_model(params, tokens, Compute(config), mesh=mesh)
  return decoder.logits(params, hidden, config)
