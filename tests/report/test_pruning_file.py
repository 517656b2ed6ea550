"""pruning.json: what it says of layers that are gone, and what it may not."""

import json

import numpy as np
import pytest

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError
from lorapr_jax.exporting.cards import pruning_report
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.pruning.groups import CHANNELS, QUERIES
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.pruning.shrink import shrunk_config
from lorapr_jax.pruning.targets import Targets
from lorapr_jax.report.pruning_file import read_pruning

CONFIG = ModelConfig(16, 8, 4, (LayerShape(2, 3, 4),) * 4)
KEPT = {QUERIES: np.array([[0, 2], [1, 2]]), CHANNELS: np.array([0, 3])}
GONE = {QUERIES: np.zeros((2, 0), int), CHANNELS: np.zeros(0, int)}


def write(path, kept):
  targets = Targets(layers_target=0.5, heads='queries', protect='none')
  plan = plan_pruning(CONFIG, targets)
  base = {'name': 'A', 'sha256': None, 'config': config_to_hf(CONFIG)}
  path.write_text(json.dumps(pruning_report(plan, kept, base, {})))
  return json.loads(path.read_text())


@pytest.mark.parametrize('groups', [(QUERIES, CHANNELS), (CHANNELS,), ()])
def test_a_layer_that_is_gone_is_null(groups, tmp_path):
  stays, gone = (
    {g: x[g] for g in groups} | {LAYERS: np.arange(n)}
    for x, n in ((KEPT, 1), (GONE, 0))
  )
  kept = (gone, stays, stays, gone)
  written = write(path := tmp_path / 'pruning.json', kept)
  assert [x is None for x in written['kept']] == [True, False, False, True]
  assert written['sparsity']['layers'] == {'target': 0.5, 'achieved': 0.5}
  found = read_pruning(path)
  for ours, theirs in zip(found.kept, kept, strict=True):
    assert ours.keys() == theirs.keys()
    for group, indices in theirs.items():
      np.testing.assert_array_equal(ours[group], indices)
  left = shrunk_config(CONFIG, found.kept)
  assert left == shrunk_config(CONFIG, kept) and len(left.layers) == 2


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda kept: [None] * 4, 'kept has no layer that is there'),
    (lambda kept: [*kept[:3], 0], 'kept.3 is 0'),
    (lambda kept: [*kept[:3], {}], 'kept.3 has other groups than kept.1'),
    (lambda kept: kept[:3], 'kept has 3 layers, and base.config 4'),
  ],
)
def test_what_cannot_be_is_named(change, words, tmp_path):
  stays = {CHANNELS: KEPT[CHANNELS], LAYERS: np.arange(1)}
  gone = {CHANNELS: GONE[CHANNELS], LAYERS: np.arange(0)}
  path = tmp_path / 'pruning.json'
  written = write(path, (gone, stays, stays, gone))
  written['kept'] = change(written['kept'])
  path.write_text(json.dumps(written))
  with pytest.raises(UserError, match=words):
    read_pruning(path)
