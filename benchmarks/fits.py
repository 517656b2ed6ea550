"""What models of all sizes take on slices of TPUs, and whether they fit.

  JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/fits.py --results fits.jsonl

Prints the table of docs/scaling.md: for each model the most that a phase of
training takes of a chip, as `plan` counts it, with a base in bfloat16 and in
int8 and, in bfloat16, with the gradient criterion; without compensation. 128
sequences of 512 tokens a step, one on each chip at a time; no dropout, whose
random bits take the compiler as long as the rest. It needs no TPU, but its
compiler: pip install "jax[tpu]". It takes more than an hour; what --results
holds already is not compiled again.
"""

import argparse
import json
from pathlib import Path
import sys

import jax

from configs import models
from lorapr_jax.planning.search import Tried, try_mesh
from lorapr_jax.planning.topology import Topology
from lorapr_jax.runtime.sharding import mesh_sizes

SIZES = [name for name in models.SIZES if name.startswith('llama')]
SIZES += ['qwen3-8b', 'gemma3-12b']
TOPOLOGIES = ('v5e:2x4', 'v5e:8x8', 'v5p:2x2x1')
# The base's dtype and the criterion.
WAYS = (('bfloat16', 'lora'), ('int8', 'lora'), ('bfloat16', 'gradient'))


def tried(size: str, dtype: str, criterion: str, topology: Topology) -> Tried:
  """A model on a slice."""
  config, chips = models.get_config(size), len(topology.devices)
  config.train.micro_batch_size = chips
  config.model.base_dtype = dtype
  config.prune.criterion = criterion
  config.prune.compensate = 'none'
  config.lora.dropout = 0.0
  config.data.eval = ''  # Its evaluation takes less than a step.
  return try_mesh(config, topology, mesh_sizes(1, -1, 1, devices=chips))


def main() -> None:
  """Compiles what is not known yet, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--results', type=Path, required=True)
  results = parser.parse_args().results
  # What is compiled for devices that are not there cannot be read back.
  jax.config.update('jax_enable_compilation_cache', False)
  cells = {}
  if results.exists():
    for line in results.read_text(encoding='utf-8').splitlines():
      *key, cell = json.loads(line)
      cells[tuple(key)] = cell
  for name in TOPOLOGIES:
    topology = Topology.of(name)
    for size in SIZES:
      for way in WAYS:
        key = (size, *way, name)
        if key in cells:
          continue
        found = tried(size, *way, topology)
        most = max((x.total for x in found.needs), default=found.base)
        cells[key] = f'{most / 1e9:.1f}' + ': no' * (not found.fits)
        with results.open('a', encoding='utf-8') as file:
          file.write(json.dumps([*key, cells[key]]) + '\n')
        print(*key, cells[key], file=sys.stderr, flush=True)
  print('| model | base | criterion | ' + ' | '.join(TOPOLOGIES) + ' |')
  print('|---' * (3 + len(TOPOLOGIES)) + '|')
  for size in SIZES:
    for way in WAYS:
      row = (size, *way, *(cells[size, *way, name] for name in TOPOLOGIES))
      print(f'| {" | ".join(row)} |')


if __name__ == '__main__':
  main()
