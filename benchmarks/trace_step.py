"""Where the time of a training step goes: a profile by part of the model.

  PYTHONPATH=. python benchmarks/trace_step.py [--sizes smollm2-135m]
    [--batch 8] [--seq_len 128] [--config.model.remat=dots ...]

Runs a step under JAX's profiler and adds up its operations' times on all
threads by the scope that they come from. Prints a table in Markdown, and the
seconds of the step without the profiler.
"""

import argparse
import collections
import gzip
import json
from pathlib import Path
import re
import tempfile
import time

import jax

from benchmarks.step import SIZES, compiled_step, configured

# The first pattern that the name of an operation's source has.
PARTS = {
  'loss': r'\bloss\b',
  'attention': r'\battention\b',
  'RoPE': r'\brope\b',
  'dropout': r'\bdropout\b|threefry|random_bits',
  'projections of the base and LoRA': r'_proj/',
  'masks': r'\bmasks\b',
  'norms': r'norm',
  'silu and products of channels': r'\bmlp\b',
  'residuals that are kept': r'dynamic_(update_)?(index|slice)|broadcast',
}


def sources(text: str) -> dict[str, str]:
  """Of each instruction of a compiled program, the name of its source."""
  found = {}
  for line in text.splitlines():
    name = re.match(r'\s*(?:ROOT )?%?([\w.-]+) = ', line)
    source = re.search(r'op_name="([^"]*)"', line)
    if name:
      found[name[1]] = source[1] if source else ''
  return found


def part_of(source: str) -> str:
  """Of a source's name, the part of PARTS."""
  for part, pattern in PARTS.items():
    if re.search(pattern, source):
      return part
  return 'the rest'


def main() -> None:
  """Traces and prints."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--sizes', choices=SIZES, default='smollm2-135m')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--seq_len', type=int, default=128)
  args, flags = parser.parse_known_args()
  settings = configured(
    SIZES[args.sizes],
    tokens=args.seq_len,
    sequences=args.batch,
    rank=8,
    flags=flags,
  )
  step = compiled_step(settings)
  arguments = (*step.arguments(step.state), jax.random.key(2))
  seconds = []
  for _ in range(4):
    start = time.perf_counter()
    jax.block_until_ready(step.gradients(*arguments))
    seconds.append(time.perf_counter() - start)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(step.gradients(*arguments))
    (trace,) = Path(folder).rglob('*.trace.json.gz')
    events = json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
  source = sources(step.gradients.as_text())
  spent: collections.Counter[str] = collections.Counter()
  for event in events:
    operation = event.get('args', {}).get('hlo_op')
    # A loop's time is that of its operations.
    if operation in source and not operation.startswith(('while', 'call')):
      spent[part_of(source[operation])] += event['dur'] / 1e6
  total = sum(spent.values())
  print(f'a step: {min(seconds[1:]):.2f} s; its operations: {total:.2f} s\n')
  print('| part | s, of all threads | share |\n|---|---|---|')
  for part, each in spent.most_common():
    print(f'| {part} | {each:.2f} | {each / total:.0%} |')


if __name__ == '__main__':
  main()
