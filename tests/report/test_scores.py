"""importance.safetensors holds what the state holds, of the pruned layers."""

import jax
import numpy as np
from safetensors.numpy import load_file

from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.pruning.masks import initial_masks
from lorapr_jax.report.scores import write_scores

CONFIG = ModelConfig(
  vocab_size=8,
  embed_dim=8,
  head_dim=2,
  layers=(LayerShape(2, 2, 6), LayerShape(2, 3, 4), LayerShape(2, 3, 4)),
)
GROUPS = ('kv_heads,queries_per_kv', 'mlp')


def test_scores_and_masks_are_written_by_layer(tmp_path):
  stacks = tuple((s.size, CONFIG.sizes(s.shape)) for s in CONFIG.stacks)
  rng = np.random.default_rng(0)
  masks = jax.tree.map(
    lambda m: rng.integers(2, size=m.shape).astype(np.float32),
    initial_masks(GROUPS, stacks),
  )
  importance = jax.tree.map(lambda m: rng.random(m.shape, np.float32), masks)
  groups = {'masks': masks, 'importance': importance}
  path = tmp_path / 'importance.safetensors'
  for _ in range(2):  # A run that is repeated writes it again.
    write_scores(path, groups, CONFIG, layers=(0, 2))
  found = load_file(path)
  assert [p.name for p in tmp_path.iterdir()] == [path.name]
  assert set(found) == {
    f'layers.{layer}.{group}.{name}'
    for layer in (0, 2)
    for group in GROUPS
    for name in ('importance', 'mask')
  }
  for layer, (stack, row) in {0: (0, 0), 2: (1, 1)}.items():
    for group in GROUPS:
      for name, tree in (('importance', importance), ('mask', masks)):
        x = found[f'layers.{layer}.{group}.{name}']
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, tree[stack][group][row])
