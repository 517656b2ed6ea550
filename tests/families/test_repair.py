"""The pass of a pruning event computes every family's layers.

A member that is as another is masked: the repair lets the other one do its
work, and nothing of it is missed. That holds only where the pass gives each
layer what the model gives it.
"""

import functools

import jax
import numpy as np
import pytest

from lorapr_jax.axes import group_axes
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LoraConfig
from lorapr_jax.models.trees import block_axes, init_lora
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.pruning.masks import initial_masks
from tests.families.cover import GROUPED, each
from tests.training.test_layer_pass import batches, compensate

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.0)
UNSEEN = np.random.default_rng(2).integers(0, 96, (3, 12))


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, masks, config):
  hidden = decoder.hidden_states(params, UNSEEN, config, masks=masks)
  return decoder.logits(params, hidden, config)


def _doubled(params, config, group):
  """The last member is made as the first is; what reads them is not."""
  axis_name = group_axes(group)[-1]

  def double(x, names):
    if not set(group_axes(group)) <= set(names) or names[-1] == 'embed':
      return x
    x = np.moveaxis(np.array(x), 1 + names.index(axis_name), 0)
    x[-1] = x[0]
    return np.moveaxis(x, 0, 1 + names.index(axis_name))

  (stack,) = params['stacks']
  axes = block_axes(config)['params']
  return params | {'stacks': (jax.tree.map(double, stack, axes),)}


# A norm over all heads is another one without a double.
CASES = {
  (kind, group): GROUPED[kind] | {group}
  for kind in GROUPED
  for group in (CHANNELS, KV_HEADS, QUERIES)
  if group == CHANNELS or 'qk_norm=heads' not in GROUPED[kind]
}


@pytest.mark.parametrize(('kind', 'group'), each(CASES))
def test_a_member_that_has_a_double_goes_without_a_trace(
  kind, group, save_hf, load
):
  config, params = load(save_hf(kind))
  params = _doubled(params, config, group)
  lora = init_lora(jax.random.key(0), config, LORA)
  size = len(config.layers), config.sizes(config.layers[0])
  before = jax.device_get(initial_masks((group,), (size,)))
  mask = before[0][group].copy()
  mask[..., -1] = 0
  after = ({group: mask},)
  repaired, failed = compensate(
    params, lora, before, after, batches(2), config=config, adapters=LORA
  )
  assert int(failed) == 0
  expected = _logits(params, before, config)
  missed = np.abs(_logits(params, after, config) - expected).max()
  left = np.abs(_logits(repaired, after, config) - expected).max()
  assert missed > 0.02 * np.abs(expected).max()
  assert left < 0.01 * missed
