"""Ours beside PyTorch, on one model and the same batches: `make bench`.

  PYTHONPATH=. python benchmarks/bench.py [--steps 80] [--torch_steps 6]

SmolLM2-135M-Instruct with its KV heads repeated, 8 x 128 tokens of news a step,
half of the groups:

  reference        the reference's algorithm in PyTorch (reference_torch.py)
  peft             transformers and PEFT, LoRA alone (peft_lora.py)
  masked           train.py, all cuts at the end
  masked, float32  the same, of float32 products, for a quarter of the steps
  shrinking        train.py, one cut on the way

Each in a process of its own, one after the other, the PyTorch ones before ours
and after; all in the dtype that is fastest here. Writes docs/benchmarks.md and
its figure, in twenty minutes on two cores.
"""

import argparse
from datetime import date
from importlib.metadata import version
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import jax
from matplotlib.figure import Figure
import numpy as np

from benchmarks.compare import Row, arguments, make_model, write_data
from benchmarks.input import batches_of
from benchmarks.step import matmul_peak
from benchmarks.svg import write_svg
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.hf.load import load_config
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.cost import forward_flops_per_token
from lorapr_jax.runtime.files import read_json, write_text
from lorapr_jax.runtime.processor import processor
from lorapr_jax.settings.run import split_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'benchmarks.md'
FIGURE = ROOT / 'docs' / 'figures' / 'bench.svg'
TOKENS, SEQ_LEN = 8 * 128, 128
TORCH = {'reference': 'reference_torch', 'peft': 'peft_lora'}
# The first steps compile, touch memory and start threads.
WARM = 2


def training_flops(config: ModelConfig) -> float:
  """Of a LoRA step at full size: forward, and as much back to the inputs."""
  return 2 * TOKENS * forward_flops_per_token(config, SEQ_LEN)


def torch_program(name: str, model: Path, tokens: Path) -> dict[str, Any]:
  """The dtype, the seconds of each step but the first ones, the peak memory."""
  done = subprocess.run(
    [
      *(sys.executable, '-m', f'benchmarks.{name}'),
      *('--model', str(model), '--tokens', str(tokens)),
    ],
    cwd=ROOT,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  result = json.loads(done.stdout.splitlines()[-1])
  return {
    'dtype': result['dtype'],
    'seconds': result['seconds'][WARM:],
    'memory': result['peak_bytes'],
  }


def our_run(flags: list[str], workdir: Path) -> dict[str, Any]:
  """The same of train.py; `loop` is all steps, compiling and cutting."""
  subprocess.run(
    [sys.executable, 'train.py', *flags, f'--workdir={workdir}'],
    cwd=ROOT,
    check=True,
  )
  lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
  summary = read_json(workdir / 'summary.json')
  cuts = summary['cuts_on_the_way']
  # After a cut, the first step is over before its functions are compiled, and
  # its time is counted as theirs.
  records = [r for r in map(json.loads, lines) if r['step'] not in cuts]
  seconds = [record['seconds'] for record in records]
  return {
    'dtype': read_json(workdir / 'run.json')['resolved']['matmul_dtype'],
    'seconds': seconds[WARM:],
    'memory': summary['peak_memory_bytes'],
    'loop': sum(summary['seconds'][k] for k in ('prune', 'cut', 'compile')),
    'cuts': cuts,
  }


def step_seconds(result: dict[str, Any]) -> float:
  """Of the median step; of the mean one where steps differ in size."""
  average = statistics.mean if result.get('cuts') else statistics.median
  return average(result['seconds'])


def page(
  results: dict[str, dict[str, Any]],
  peaks: dict[str, float],
  flops: float,
  steps: int,
) -> str:
  """docs/benchmarks.md."""
  reference = step_seconds(results['reference'])
  rows = []
  for name, result in results.items():
    each = step_seconds(result)
    # Where arrays shrink, the share would be of operations not done.
    shares = [
      '' if result.get('cuts') else f'{flops / each / peak:.0%}'
      for peak in peaks.values()
    ]
    loop = {
      'reference': f'{steps * each:.0f}',
      'masked': f'{results["masked"]["loop"]:.0f}',
      'shrinking': f'{results["shrinking"]["loop"]:.0f}',
    }.get(name, '')
    rows.append(
      f'| {name} | {result["dtype"]} | {TOKENS / each:.0f} | '
      f'{reference / each:.2f} | {" | ".join(shares)} | '
      f'{result["memory"] / 1e9:.2f} | {loop} |'
    )
  table = '\n'.join(rows)
  measured = ' and '.join(
    f'{peak / 1e9:.0f} GFLOP/s of {dtype} operands'
    for dtype, peak in peaks.items()
  )
  cuts = ', '.join(map(str, results['shrinking']['cuts'])) or 'none'
  versions = ', '.join(
    f'{name} {version(name)}' for name in ('torch', 'transformers', 'peft')
  )
  columns = ' | '.join(f'of the {dtype} peak' for dtype in peaks)
  return f"""# Benchmarks

{date.today()}; {processor()}, {os.cpu_count()} cores. Written by `make bench`:
jax {jax.__version__}, {versions}.

The model is SmolLM2-135M-Instruct with its KV heads repeated. A step has
8 x 128 tokens, LoRA has rank 8 on every projection, and half of the groups go.
Each run has a process of its own, one after the other, the PyTorch ones before
ours and after.

- `reference` is the reference's algorithm in PyTorch.
- `peft` is LoRA alone with transformers and PEFT.
- `masked` is train.py with one cut, at the end.
- `shrinking` is train.py with prune.shrink=0.33 (cuts on the way before steps:
  {cuts}).

Tokens a second are those of the median step, or of the mean step where there
are cuts on the way. The dtype is that of the products' operands. Ours add up,
and keep activations, in float32.

| | dtype | tokens/s | over reference | {columns} | peak GB | {steps} steps, s |
|---|---|---|---|{'---|' * len(peaks)}---|---|
{table}

The peaks are those of a product of 2048 x 2048 matrices in JAX, in the same
run: {measured}.
A step counts 4 N operations a token for the weights, and the attention and the
output matrix. The last column is the time to the same sparsity. For ours it is
the time of all steps, with compiling and cutting. For the reference it is the
median step as many times. Peak memory is the process's; ours evaluate, merge
and export in the same process.

![Tokens a second](figures/bench.svg)
"""


def draw(results: dict[str, dict[str, Any]]) -> Figure:
  """Tokens a second."""
  figure = Figure(figsize=(6, 2.4))
  axes = figure.add_subplot()
  speeds = [TOKENS / step_seconds(result) for result in results.values()]
  bars = axes.barh(list(results), speeds, color='#2a6fbb')
  axes.bar_label(bars, fmt='{:.0f}', padding=3)
  axes.invert_yaxis()
  axes.set_xlabel('tokens a second')
  axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  return figure


def main() -> None:
  """Measures and publishes."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--steps', type=int, default=80, help='of ours')
  parser.add_argument('--torch_steps', type=int, default=6)
  args = parser.parse_args()
  # The run in float32 takes a quarter of the steps.
  if min(args.steps // 4, args.torch_steps) <= WARM:
    parser.error(
      f'the first {WARM} steps of each are left out: too few are asked for'
    )
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder)
    train, _ = write_data(out)
    model = make_model()
    flags = arguments(Row(50, 'joint', 'lora'), 0, model, train)
    flags.append('--config.train.log_every=1')
    settings = split_config(parse_flags([*flags, '--workdir=none'])[0])
    operands = settings.compute.matmul_dtype.name
    flags.append(f'--config.model.base_dtype={operands}')
    (batch_at,) = batches_of(settings).streams.values()
    batches = [batch_at(t)['tokens'][0] for t in range(args.torch_steps)]
    np.save(out / 'tokens.npy', np.stack(batches))

    def ours(name: str, steps: int, *more: str) -> dict[str, Any]:
      count = f'--config.train.steps={steps}'
      return our_run([*flags, count, *more], out / name)

    def torch(name: str) -> dict[str, Any]:
      return torch_program(name, model, out / 'tokens.npy')

    dtypes = dict.fromkeys(('float32', operands))
    peaks = {dtype: matmul_peak(dtype) for dtype in dtypes}
    results = {
      **{name: torch(program) for name, program in TORCH.items()},
      'masked': ours('masked', args.steps),
      'masked, float32': ours(
        'float32',
        args.steps // 4,
        '--config.model.matmul_dtype=float32',
        '--config.model.base_dtype=float32',
      ),
      'shrinking': ours('shrinking', args.steps, '--config.prune.shrink=0.33'),
    }
    for name, program in (
      ('reference', 'reference_torch'),
      ('peft', 'peft_lora'),
    ):
      results[name]['seconds'] += torch(program)['seconds']
  flops = training_flops(load_config(model))
  write_text(PAGE, page(results, peaks, flops, args.steps))
  write_svg(draw(results), FIGURE)
  print(json.dumps(results, indent=2))


if __name__ == '__main__':
  main()
