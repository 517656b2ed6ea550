"""Pruned models of every family, as every folder and file that holds them."""

from collections.abc import Iterator
from pathlib import Path

from checks import Export
import jax
import numpy as np
import tiny

from lorapr_jax.errors import UserError
from lorapr_jax.exporting.model import Description, Weights, merge
from lorapr_jax.exporting.routes import Route
from lorapr_jax.exporting.write import write
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.load import load
from lorapr_jax.models.config import LoraConfig
from lorapr_jax.models.families import FAMILIES
from lorapr_jax.models.trees import init_lora
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS
from lorapr_jax.pruning.masks import by_stack, initial_masks, select_masks
from lorapr_jax.pruning.shrink import kept_groups, shrunk_config
from lorapr_jax.training.base import cut_params
from tests.kinds import KINDS

# What each of the three layers keeps of 2 KV heads and 64 channels.
_KEPT = {
  'equal': {KV_HEADS: (1, 1, 1), CHANNELS: (32, 32, 32)},
  'unequal': {KV_HEADS: (1, 2, 1), CHANNELS: (32, 64, 32)},
}
# The families whose windows llama.cpp puts where it likes, if the file does not
# say where they are; and what of a kind a GGUF does not hold.
_WINDOWS = {
  'gemma2': {'query_pre_attn_scalar': 12},
  'gemma3_text': {},
  'olmo3': {'head_dim': 8, 'rope_scaling': None},
}
_ELSEWHERE = {'layer_types': ['full_attention'] * 2 + ['sliding_attention']}
_LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0)
_SIZES = {
  'vocab_size': tiny.VOCAB_SIZE,
  'bos_token_id': 1,
  'eos_token_id': 0,
  'intermediate_size': 64,
  'num_hidden_layers': 3,
  'max_position_embeddings': 128,
}


def make_exports(folder: Path, text: Path) -> Iterator[Export]:
  """Writes a pruned model of each family by every route that holds it.

  The runs of make_exports.py have llama and mistral already. Of some there is
  one more, whose windows are where llama.cpp would have none.
  """
  for family in sorted(FAMILIES.keys() - {'llama', 'mistral'}):
    kind = next(
      name for name, kind in KINDS.items() if kind.keys['model_type'] == family
    )
    base = folder / f'{kind}-base'
    tiny.make_base(base, config_from_hf(KINDS[kind].keys | _SIZES), text)
    for layers, keep in _KEPT.items():
      yield from _exports(base, folder / f'{kind}-{layers}', keep)
  yield from _exports_with_windows(folder, text)


def _exports_with_windows(folder: Path, text: Path) -> Iterator[Export]:
  """Models that lose channels alone, since not all may lose heads."""
  for kind, more in _WINDOWS.items():
    base = folder / f'{kind}-windows-base'
    keys = KINDS[kind].keys | _SIZES | _ELSEWHERE | more
    tiny.make_base(base, config_from_hf(keys), text)
    keep = {CHANNELS: _KEPT['equal'][CHANNELS]}
    yield from _exports(base, folder / f'{kind}-windows', keep)


def _exports(base: Path, path: Path, keep) -> Iterator[Export]:
  """The routes that hold the model; why others do not is printed."""
  model, weights = _pruned(base, keep)
  routes = [
    Route('hf', path),
    Route('gguf', path.with_suffix('.gguf'), dtype='f32'),
  ]
  if model.config.is_uniform:  # What adapters are over does not change them.
    routes.append(Route('peft', path.with_name(f'{path.name}-peft')))
  for route in routes:
    try:
      write(route, model, weights)
    except UserError as reason:
      print(f'{route.path.name}: {reason}')
      if route.kind == 'hf':  # Which the file is compared with.
        return
      continue
    yield Export(
      name=f'{path.name}, {route.kind}',
      kind='family' if route.kind == 'hf' else route.kind,
      path=str(route.path),
      truth=str(path),
      remote_code=any(route.path.rglob('*.py')),
      dtype='f32' if route.kind == 'gguf' else 'float32',
    )


def _pruned(base: Path, keep) -> tuple[Description, Weights]:
  """A model without the groups of which random scores think least.

  It has random adapters.
  """
  loaded = load(base)
  config, params = loaded.config, loaded.params
  stacks = tuple((s.size, config.sizes(s.shape)) for s in config.stacks)
  masks = initial_masks(tuple(keep), stacks)
  rng = np.random.default_rng(0)
  scores = jax.tree.map(lambda x: rng.normal(size=x.shape), masks)
  kept = kept_groups(select_masks(scores, masks, by_stack(keep, config)))
  model = Description(
    name=base.name,
    config=shrunk_config(config, kept),
    dtype='float32',
    base=base,
    before=config,
    kept=kept,
  )
  lora = jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.1).astype(x.dtype),
    init_lora(jax.random.key(0), model.config, _LORA),
  )
  params = cut_params(params, kept, config)
  return model, merge(params, lora, _LORA, unmerged=True)
