"""What LLaMAs of all sizes take on slices of TPUs, and whether they fit.

  JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/fits.py --results fits.jsonl

Prints the table of docs/scaling.md: for each model the most that a phase of
training takes of a chip, as `plan` counts it, with a base in bfloat16 and in
int8 and, in bfloat16, with the gradient criterion. 128 sequences of 512 tokens
a step, one on each chip at a time; no dropout, whose random bits take the
compiler as long as the rest. It needs no TPU, but its compiler: pip install
"jax[tpu]". What --results holds is not compiled again; all takes an hour and a
half on two cores.
"""

import argparse
import json
from pathlib import Path
import sys
from typing import Any

import jax

from configs import llama
from lorapr_jax.inputs import weight_shapes
from lorapr_jax.plan import bytes_of, plan_run
from lorapr_jax.settings import split_config
from lorapr_jax.topology import Topology

TOPOLOGIES = ('v5e:2x4', 'v5e:8x8', 'v5p:2x2x1')
# The base's dtype and the criterion.
WAYS = (('bfloat16', 'lora'), ('int8', 'lora'), ('bfloat16', 'gradient'))


def most(size: str, dtype: str, criterion: str, topology: Topology) -> Any:
  """{'bytes', 'fits'} of the phase that takes most, or of the base alone."""
  config = llama.get_config(size)
  chips = len(topology.devices)
  # As many sequences as there are rows of chips: 128 at most.
  tensor = max(1, chips // 128)
  config.mesh.update(data=1, fsdp=chips // tensor, tensor=tensor)
  config.train.micro_batch_size = chips // tensor
  config.model.base_dtype = dtype
  config.prune.criterion = criterion
  config.lora.dropout = 0.0
  config.data.eval = ''  # Its evaluation takes less than a step.
  settings = split_config(config, topology.devices)
  base = bytes_of(weight_shapes(settings, settings.step.config))
  if base > topology.chip.hbm:
    return {'bytes': base, 'fits': False}
  largest, fits = 0, True
  for needs in plan_run(config, topology, elsewhere=False):
    largest = max(largest, needs.refused or needs.total)
    fits = fits and needs.fits
    if not fits:
      break
  return {'bytes': largest, 'fits': fits}


def main() -> None:
  """Compiles what is not known yet, and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--results', type=Path, required=True)
  parser.add_argument('--models', default=','.join(llama.SIZES))
  parser.add_argument('--topologies', default=','.join(TOPOLOGIES))
  args = parser.parse_args()
  # What is compiled for devices that are not there cannot be read back.
  jax.config.update('jax_enable_compilation_cache', False)
  known = {}
  if args.results.exists():
    for line in args.results.read_text(encoding='utf-8').splitlines():
      *key, found = json.loads(line)
      known[tuple(key)] = found
  names, models = args.topologies.split(','), args.models.split(',')
  topologies = {name: Topology.of(name) for name in names}
  for name, topology in topologies.items():
    for size in models:
      for way in WAYS:
        key = (size, *way, name)
        if key in known:
          continue
        known[key] = most(size, *way, topology)
        with args.results.open('a', encoding='utf-8') as file:
          file.write(json.dumps([*key, known[key]]) + '\n')
        print(*key, known[key], file=sys.stderr, flush=True)
  print('| model | base | criterion | ' + ' | '.join(names) + ' |')
  print('|---' * (3 + len(names)) + '|')
  for size in models:
    for way in WAYS:
      found = [known[size, *way, name] for name in names]
      cells = [
        f'{each["bytes"] / 1e9:.1f}' + ('' if each['fits'] else ': no')
        for each in found
      ]
      print(f'| {size} | ' + ' | '.join((*way, *cells)) + ' |')


if __name__ == '__main__':
  main()
