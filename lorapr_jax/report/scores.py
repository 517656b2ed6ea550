"""Writes importance.safetensors: the score of each group, and what was cut."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from lorapr_jax.models.config import ModelConfig
from lorapr_jax.runtime.files import write_bytes


def write_scores(
  path: Path,
  groups: Mapping[str, Any],
  config: ModelConfig,
  layers: Iterable[int],
) -> None:
  """Writes the importance and the mask of every group, in float32.

  The tensors are `layers.{i}.{group}.importance`, as in the state, and
  `layers.{i}.{group}.mask` (1 kept, 0 cut), in the shape of the group's axes,
  or one number of a whole layer. A group that was cut has the importance of the
  step at which it was masked.

  Args:
    path: the file. An old one is replaced: a run that is repeated from its last
      checkpoint writes the same file again.
    groups: {'masks', 'importance'} at the end, by stack of the uncut model.
    config: the sizes before the cut.
    layers: the layers that are not protected.
  """
  tensors, wanted = {}, set(layers)
  for i, stack in enumerate(config.stacks):
    trees = {'importance': groups['importance'][i], 'mask': groups['masks'][i]}
    for name, tree in trees.items():
      for group, stacked in tree.items():
        for layer, values in enumerate(np.asarray(stacked), stack.start):
          if layer in wanted:
            values = np.atleast_1d(values).copy()
            tensors[f'layers.{layer}.{group}.{name}'] = values
  write_bytes(path, save(tensors))
