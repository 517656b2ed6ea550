"""Ours beside PyTorch, on one model and the same batches: `make bench`.

  PYTHONPATH=. python benchmarks/bench.py [--steps 30] [--torch_steps 8]

SmolLM2-135M-Instruct with its KV heads repeated, 8 x 128 tokens of news a step,
half of the groups:

  reference  the reference's algorithm in plain PyTorch (reference_torch.py)
  peft       transformers and PEFT, LoRA alone (peft_lora.py)
  masked     train.py, all cuts at the end
  shrinking  train.py, prune.shrink=auto

Each in a process of its own, one after the other; the PyTorch ones in the dtype
that is faster here. Writes docs/benchmarks.md and its figure.
"""

import argparse
from datetime import date
import json
from pathlib import Path
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from benchmarks.compare import Row, arguments, make_model, write_data
from lorapr_jax.cli.train import parse_flags
from lorapr_jax.files import read_json, write_text
from lorapr_jax.hf.load import load_config
from lorapr_jax.inputs import load_data
from lorapr_jax.models.config import LlamaConfig
from lorapr_jax.models.cost import forward_flops_per_token
from lorapr_jax.settings import split_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'benchmarks.md'
FIGURE = ROOT / 'docs' / 'figures' / 'bench.svg'
TOKENS, SEQ_LEN = 8 * 128, 128
# The first step compiles, and threads start.
WARM = 1


def matmul_peak(size: int = 2048) -> float:
  """Floating-point operations a second of the fastest float32 product."""
  a = jnp.ones((size, size), jnp.float32)
  product = jax.jit(jnp.matmul)
  product(a, a).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    product(a, a).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def training_flops(config: LlamaConfig) -> float:
  """Of a LoRA step at full size: forward, and as much back to the inputs."""
  return 2 * TOKENS * forward_flops_per_token(config, SEQ_LEN)


def torch_program(name: str, model: Path, tokens: Path) -> dict[str, Any]:
  """Its median step and its peak memory."""
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
    'step': statistics.median(result['seconds'][WARM:]),
    'memory': result['peak_bytes'],
  }


def our_run(flags: list[str], workdir: Path) -> dict[str, Any]:
  """Its steps and their sum, with what compiling and cutting took."""
  subprocess.run(
    [sys.executable, 'train.py', *flags, f'--workdir={workdir}'],
    cwd=ROOT,
    check=True,
  )
  lines = (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
  seconds = [json.loads(line)['seconds'] for line in lines]
  summary = read_json(workdir / 'summary.json')
  return {
    'dtype': read_json(workdir / 'run.json')['resolved']['compute_dtype'],
    'step': statistics.median(seconds[WARM:]),
    'mean': statistics.mean(seconds[WARM:]),
    'memory': summary['peak_memory_bytes'],
    'loop': sum(summary['seconds'][k] for k in ('prune', 'cut', 'compile')),
    'cuts': summary['cuts_on_the_way'],
  }


def page(results: dict[str, dict[str, Any]], peak: float, flops: float) -> str:
  """docs/benchmarks.md."""
  reference = results['reference']['step']
  rows = []
  for name, result in results.items():
    each = result.get('mean', result['step'])
    # Where arrays shrink, the share would be of operations not done.
    share = '' if result.get('cuts') else f'{flops / each / peak:.0%}'
    loop = f'{result["loop"]:.0f}' if 'loop' in result else ''
    rows.append(
      f'| {name} | {result["dtype"]} | {TOKENS / each:.0f} | '
      f'{reference / each:.2f} | {share} | {result["memory"] / 1e9:.2f} | '
      f'{loop} |'
    )
  table = '\n'.join(rows)
  cuts = ', '.join(map(str, results['shrinking']['cuts'])) or 'none'
  return f"""# Benchmarks

{date.today()}; {platform.processor() or platform.machine()},
{jax.default_backend()}, jax {jax.__version__}. Written by `make bench`.

SmolLM2-135M-Instruct with its KV heads repeated, 8 x 128 tokens a step, rank 8
on every projection, half of the groups; each in a process of its own, one after
the other. `reference` is the reference's algorithm in PyTorch, `peft` LoRA
alone with transformers and PEFT, `masked` train.py with all cuts at the end,
`shrinking` with prune.shrink=auto (cuts before steps: {cuts}). Tokens a second
are those of the median step, of `masked` and `shrinking` of the mean one.

| | dtype | tokens/s | over reference | of the matmul peak | peak GB | loop, s |
|---|---|---|---|---|---|---|
{table}

The matmul peak is {peak / 1e9:.0f} GFLOP/s, of a float32 product of 2048 x 2048
matrices in JAX, in the same run. A step counts 4 N operations a token for the
weights, and the attention. The loop is all steps, compiling and cutting.

![Tokens a second](figures/bench.svg)
"""


def draw(results: dict[str, dict[str, Any]]) -> Figure:
  """Tokens a second."""
  figure = Figure(figsize=(6, 2.4))
  axes = figure.add_subplot()
  speeds = [TOKENS / r.get('mean', r['step']) for r in results.values()]
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
  parser.add_argument('--steps', type=int, default=30, help='of ours')
  parser.add_argument('--torch_steps', type=int, default=8)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder)
    train, _ = write_data(out)
    model = make_model()
    flags = arguments(Row(50, 'joint', 'lora'), 0, model, train)
    flags += [
      f'--config.train.steps={args.steps}',
      '--config.train.log_every=1',
    ]
    settings = split_config(parse_flags([*flags, '--workdir=none'])[0])
    spec = settings.data.train
    batch_at = load_data(settings, [spec])[0][spec]
    batches = [batch_at(t)['tokens'][0] for t in range(args.torch_steps)]
    np.save(out / 'tokens.npy', np.stack(batches))
    peak = matmul_peak()
    results = {
      'reference': torch_program('reference_torch', model, out / 'tokens.npy'),
      'peft': torch_program('peft_lora', model, out / 'tokens.npy'),
      'masked': our_run(flags, out / 'masked'),
      'shrinking': our_run(
        [*flags, '--config.prune.shrink=auto'], out / 'shrinking'
      ),
    }
  write_text(PAGE, page(results, peak, training_flops(load_config(model))))
  draw(results).savefig(
    FIGURE, facecolor='white', metadata={'Date': None, 'Creator': None}
  )
  print(json.dumps(results, indent=2))


if __name__ == '__main__':
  main()
