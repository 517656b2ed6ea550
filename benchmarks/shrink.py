"""What cutting masked groups on the way saves, and what it leaves to save.

  PYTHONPATH=. python benchmarks/shrink.py [--out runs/shrink] [--shrink 0.33]
    [--steps 100] [--turns 7] [--paired]

Prunes the demo's model by half of its channels and a third of its query heads.
First steps at full size and at the sizes after cuts at a third, two thirds and
the end of the ramp take turns, so that what else the machine does hits all
alike; prints the time of each over that at full size, and over what the
operations predict. Then, unless --paired, two whole runs, all cuts at the end
and with --shrink: the time of the second one's steps over what the first one's
and the operations of each size predict; and of both loops, compiling and
cutting included. Ten minutes a run on two cores; what --out holds is not run
again.
"""

import argparse
import dataclasses
from pathlib import Path
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from benchmarks.step import compiled_step
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.models.cost import forward_flops_per_token
from lorapr_jax.report.run import IMPORTANCE_FILE
from lorapr_jax.runtime.files import read_json
from lorapr_jax.settings.run import split_config

ROOT = Path(__file__).resolve().parent.parent
# Of a run's loop, by the names of its summary.
STEPS, REST = 'prune', ('compile', 'cut')


def run(flags: list[str], workdir: Path) -> dict[str, Any]:
  """The summary of a run, which is made unless it is there."""
  if not (workdir / 'summary.json').exists():
    command = [sys.executable, 'train.py', *flags, f'--workdir={workdir}']
    subprocess.run(command, cwd=ROOT, check=True)
  return read_json(workdir / 'summary.json')


def predicted(flags: list[str], cuts: list[int]) -> float:
  """The operations of a run's steps over those of as many at full size."""
  settings = split_config(parse_flags([*flags, '--workdir=none'])[0])
  found = settings.pruning.milestones
  steps = range(settings.train.steps)
  flops = [
    forward_flops_per_token(
      found.size_at(step + 1, tuple(cuts)), settings.train.seq_len
    )
    for step in steps
  ]
  return sum(flops) / (max(flops) * len(flops))


def take_turns(flags: list[str], turns: int) -> None:
  """Prints the steps' times by size, over those at full size."""
  settings = split_config(parse_flags([*flags, '--workdir=none'])[0])
  found = settings.pruning.milestones
  sizes = {'full size': settings.compute.config}
  sizes |= {
    f'cut at {share:.0%} of the ramp': found.size(cut)
    for share in (1 / 3, 2 / 3, 1.0)
    for cut in found.at((share,))
  }
  compiled = {
    name: compiled_step(
      dataclasses.replace(
        settings, compute=dataclasses.replace(settings.compute, config=size)
      )
    )
    for name, size in sizes.items()
  }
  states = {name: step.state for name, step in compiled.items()}
  seconds: dict[str, list[float]] = {name: [] for name in sizes}
  for turn in range(turns + 1):
    for name, step in compiled.items():
      start = time.perf_counter()
      arguments = step.arguments(states[name])
      results = step.gradients(*arguments, jax.random.key(turn))
      state, ok = step.rank_groups(states[name], results)
      states[name] = step.update(state, results[1], ok)
      jax.block_until_ready(states[name])
      seconds[name].append(time.perf_counter() - start)
  full, seq_len = seconds['full size'][1:], settings.train.seq_len
  operations = {
    name: forward_flops_per_token(size, seq_len) for name, size in sizes.items()
  }
  print('| | step, s | over full size | operations | over predicted |')
  print('|---|---|---|---|---|')
  for name, each in seconds.items():
    pairs = zip(each[1:], full, strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    share = operations[name] / operations['full size']
    print(
      f'| {name} | {statistics.median(each[1:]):.2f} | {ratio:.3f} | '
      f'{share:.3f} | {ratio / share:.3f} |'
    )


def overlap(one: Path, other: Path) -> float:
  """The share of cut groups that both runs cut."""
  ours, theirs = (load_file(run / IMPORTANCE_FILE) for run in (one, other))
  cut = both = 0
  for name in (n for n in ours if n.endswith('.mask')):
    cut += int(np.sum(ours[name] == 0))
    both += int(np.sum((ours[name] == 0) & (theirs[name] == 0)))
  return both / cut


def main() -> None:
  """Runs both and prints."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', type=Path, default=ROOT / 'runs' / 'shrink')
  parser.add_argument('--shrink', default='0.33')
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--turns', type=int, default=7)
  parser.add_argument('--paired', action='store_true', help='no runs')
  args = parser.parse_args()
  flags = [
    '--config=configs/paper.py:smollm2_135m',
    '--config.report.prompts=()',
  ]
  flags += [f'--config.train.steps={args.steps}', '--config.data.eval=']
  take_turns(flags, args.turns)
  if args.paired:
    return
  out = args.out.absolute()
  runs = {
    shrink: run([*flags, f'--config.prune.shrink={shrink}'], out / shrink)
    for shrink in ('end', args.shrink)
  }
  end, found = (runs[name]['seconds'] for name in ('end', args.shrink))
  cuts = runs[args.shrink]['cuts_on_the_way']
  share = predicted(flags, cuts)
  # The first step, and each after a cut, counts as compiling.
  counted = args.steps - 1
  each = found[STEPS] / (counted - len(cuts)), end[STEPS] / counted
  steps = each[0] / each[1]
  print(f'cut before steps  {", ".join(map(str, cuts)) or "none"}')
  print(f'operations left   {share:.3f}')
  print(f'a step, measured  {steps:.3f}')
  print(f'over predicted    {steps / share:.3f}')
  loops = [t[STEPS] + sum(t[name] for name in REST) for t in (found, end)]
  print(f'loop, all in      {loops[0] / loops[1]:.3f}')
  print(f'same groups cut   {overlap(out / args.shrink, out / "end"):.1%}')


if __name__ == '__main__':
  main()
