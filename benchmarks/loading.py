"""What loading and exporting a model of several shards takes beside its arrays.

  PYTHONPATH=. python benchmarks/loading.py [--devices 1,8]

Writes a model of 2.2 GB in bfloat16, as shards of at most 500 MB, and
loads it onto so many CPU devices, sharded over all; each in a process of its
own. Prints the most anonymous memory (not that of the files, which the system
maps) that lay beside the arrays, and the largest tensor in the files.
"""

import argparse
from collections.abc import Iterator
import contextlib
import ctypes
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile
import threading
import time

SHARD_BYTES = 500_000_000


def anonymous_bytes() -> int:
  """Of this process, now; Linux alone says it."""
  text = Path('/proc/self/status').read_text(encoding='utf-8')
  return 1024 * int(re.search(r'RssAnon:\s+(\d+)', text)[1])


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
  """In its block a list whose last entry is the most memory above the start."""
  ctypes.CDLL(None).malloc_trim(0)  # What was freed would hide what comes.
  begin, peaks, done = anonymous_bytes(), [0], threading.Event()

  def watch() -> None:
    while not done.is_set():
      peaks.append(max(peaks[-1], anonymous_bytes() - begin))
      time.sleep(0.002)

  thread = threading.Thread(target=watch)
  thread.start()
  try:
    yield peaks
  finally:
    done.set()
    thread.join()


def measure(stage: str, folder: Path) -> None:
  """One stage, in this process: its line of the table."""
  import jax
  import jax.numpy as jnp

  from lorapr_jax.hf.load import load_params, weight_places
  from lorapr_jax.hf.write import export_model
  from lorapr_jax.models.config import LayerShape, ModelConfig
  from lorapr_jax.models.trees import param_shapes

  config = ModelConfig(
    vocab_size=32000,
    embed_dim=2048,
    head_dim=64,
    layers=(LayerShape(8, 4, 8192),) * 16,
  )
  shapes = param_shapes(config, jnp.bfloat16)
  places = weight_places(config, jnp.bfloat16)
  arrays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  if stage == 'export':
    # Drawing random ones leaves memory behind that is freed in between.
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)
    jax.block_until_ready(params)
    with watched() as peaks:
      export_model(folder, params, config, max_shard_bytes=SHARD_BYTES)
    beside = peaks[-1]
  else:
    with watched() as peaks:
      params = load_params(folder, config, places, jnp.dtype('bfloat16'))
      jax.block_until_ready(params)
    beside = peaks[-1] - arrays
  sizes = (arrays, beside, 2 * config.vocab_size * config.embed_dim)
  figures = ' | '.join(f'{size / 1e6:.0f}' for size in sizes)
  print(f'| {stage} | {jax.device_count()} | {figures} |', flush=True)


def main() -> None:
  """Writes, loads and prints."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--devices', default='1,8')
  parser.add_argument('--stage', help=argparse.SUPPRESS)
  parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.stage:
    measure(args.stage, args.folder)
    return
  print('| | devices | arrays, MB | beside, MB | the largest tensor, MB |')
  print('|---|---|---|---|---|', flush=True)
  with tempfile.TemporaryDirectory() as temporary:
    folder = str(Path(temporary) / 'model')
    for stage, devices in (
      ('export', '1'),
      *(('load', devices) for devices in args.devices.split(',')),
    ):
      flag = f'--xla_force_host_platform_device_count={devices}'
      subprocess.run(
        [sys.executable, __file__, '--stage', stage, '--folder', folder],
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flag},
        check=True,
      )


if __name__ == '__main__':
  main()
