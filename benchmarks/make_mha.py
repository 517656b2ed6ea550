"""Writes a copy of a GQA folder with its KV heads repeated: the same function.

  PYTHONPATH=. python benchmarks/make_mha.py SRC DST

Every query head gets its own copy of the KV head that it read, so that tools
that know no grouped-query attention can run on the copy.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import numpy as np

from lorapr_jax.hf.layout import hf_config
from lorapr_jax.hf.load import check_tensors, load_config
from lorapr_jax.hf.names import hf_shapes
from lorapr_jax.hf.shards import Shards
from lorapr_jax.hf.write import copy_companions, write_folder
from lorapr_jax.models.trees import param_shapes


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('source', type=Path)
  parser.add_argument('destination', type=Path)
  args = parser.parse_args()
  config, shards = load_config(args.source), Shards(args.source)
  layers = tuple(
    dataclasses.replace(shape, num_kv_heads=shape.num_heads, queries_per_kv=1)
    for shape in config.layers
  )

  def tensors():
    for name in check_tensors(shards, config):
      x = shards.slice_of(name)[:]
      if name.endswith(('k_proj.weight', 'v_proj.weight')):
        repeats = config.layers[int(name.split('.')[2])].queries_per_kv
        by_head = x.reshape(-1, config.head_dim, x.shape[-1])
        x = np.repeat(by_head, repeats, axis=0).reshape(-1, x.shape[-1])
      yield name, x

  copy = dataclasses.replace(config, layers=layers)
  write_folder(
    args.destination,
    hf_config(copy, shards.dtype.name, 'auto', 'auto'),
    hf_shapes(param_shapes(copy, shards.dtype), copy),
    tensors(),
    beside=functools.partial(copy_companions, args.source),
  )


if __name__ == '__main__':
  main()
