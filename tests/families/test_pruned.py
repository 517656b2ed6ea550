"""Masked is cut is merged is what transformers computes from the export."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from lorapr_jax.axes import LAYERS
from lorapr_jax.hf.write import export_model
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LoraConfig
from lorapr_jax.models.lora import merge_lora
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.masks import (
  by_stack,
  initial_masks,
  select_masks,
  with_layers,
  without_layers,
)
from lorapr_jax.pruning.shrink import kept_groups, shrink, shrunk_config
from tests.families.cover import FILES, GROUPED, each
from tests.kinds import KINDS

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 40))
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.0)
# What each layer keeps of 2 KV heads, 2 queries of each, and 48 channels; where
# 0 of its layers, it is gone.
KEPT = {
  ('kv_heads', 'equal'): {KV_HEADS: (1, 1, 1), CHANNELS: (32, 32, 32)},
  ('kv_heads', 'unequal'): {KV_HEADS: (1, 2, 1), CHANNELS: (40, 48, 24)},
  ('queries', 'equal'): {QUERIES: (1, 1, 1), CHANNELS: (32, 32, 32)},
  ('queries', 'unequal'): {QUERIES: (2, 1, 1), CHANNELS: (24, 48, 24)},
  ('layers', 'equal'): {LAYERS: (1, 0, 1)},
  ('layers', 'unequal'): {
    LAYERS: (0, 1, 1),
    KV_HEADS: (1, 2, 1),
    CHANNELS: (40, 48, 24),
  },
}

# Every family, every feature, every way in which files are laid out, and each
# kind of head with each kind of layers.
CASES = {
  (kind, *how): {*KINDS[kind].features, *({*FILES} & GROUPED[kind])}
  | {KINDS[kind].keys['model_type'], how}
  for kind in GROUPED
  for how in KEPT
}


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, lora, config, masks=None):
  hidden = decoder.hidden_states(
    params, TOKENS, config, lora=lora, lora_config=LORA, masks=masks
  )
  return decoder.logits(params, hidden, config)


def _masks(config, keep):
  stacks = tuple((s.size, config.sizes(s.shape)) for s in config.stacks)
  masks = initial_masks(tuple(keep), stacks)
  rng = np.random.default_rng(0)
  scores = jax.tree.map(lambda x: rng.normal(size=x.shape), masks)
  inside, scores, counts = (
    tuple(map(without_layers, x))
    for x in (masks, scores, by_stack(keep, config))
  )
  inside = jax.jit(select_masks)(scores, inside, counts)
  masks = tuple(a | b for a, b in zip(masks, inside, strict=True))
  if LAYERS not in keep:
    return masks
  return with_layers(masks, np.asarray(keep[LAYERS], np.float32))


def _cut(params, lora, kept, config):
  """Smaller weights, smaller adapters, and both merged."""
  axes = block_axes(config, LORA)

  @jax.jit
  def cut(stacks, lora):
    stacks = shrink(stacks, axes['params'], kept, config)
    lora = shrink(lora, axes['lora'], kept, config)
    both = zip(stacks, lora, strict=True)
    return stacks, lora, tuple(merge_lora(*x, LORA.scale) for x in both)

  stacks, lora, merged = cut(params['stacks'], lora)
  return params | {'stacks': stacks}, lora, params | {'stacks': merged}


@pytest.mark.parametrize(('kind', 'heads', 'layers'), each(CASES))
def test_masked_is_cut_is_merged_is_the_export(
  kind, heads, layers, save_hf, load, random_lora, tmp_path
):
  config, params = load(save_hf(kind))
  lora = random_lora(config, LORA)
  keep = {
    group: kept[-len(config.layers) :]
    for group, kept in KEPT[heads, layers].items()
  }
  masks = _masks(config, keep)
  masked = np.asarray(_logits(params, lora, config, masks))
  kept = kept_groups(masks)
  small = shrunk_config(config, kept)
  assert small.is_uniform == (len(small.layers) == 1 or layers == 'equal')
  assert len(small.layers) == sum(keep.get(LAYERS, [1] * len(config.layers)))
  cut, small_lora, merged = _cut(params, lora, kept, config)
  bound = 1e-4 * np.abs(masked).max()
  found = _logits(cut, small_lora, small)
  np.testing.assert_allclose(found, masked, rtol=0, atol=bound)

  out = tmp_path / 'out'
  export_model(out, merged, small)
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    out,
    dtype=torch.float32,
    trust_remote_code=not small.is_uniform,
    attn_implementation='eager',
    output_loading_info=True,
  )
  assert not any(info.values()), info
  with torch.no_grad():
    found = model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
  np.testing.assert_allclose(found, masked, rtol=0, atol=bound)
