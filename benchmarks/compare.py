"""LoRAPrune beside the alternatives, on one model, one text, one budget.

  PYTHONPATH=. python benchmarks/compare.py [--full]
    [--text 'PTB validation=file:ptb.valid.txt?lines' ...]

Prunes SmolLM2-135M-Instruct with its KV heads repeated (benchmarks/make_mha.py;
as many KV heads as heads, so that 20% and 50% of them can go) by every
criterion and order of the list below, 100 steps of 8 x 128 tokens of news in
file order: the setting in which the reference implementation was run
(docs/method.md). What --out holds already is not run again, and a run that was
cut short goes on. Then writes docs/results.md and its figure.
"""

import argparse
from collections.abc import Sequence
import itertools
import json
from pathlib import Path
import shlex
import subprocess
import sys
from typing import Any

from benchmarks.results_page import (
  NEWS,
  SEQ_LEN,
  WINDOWS,
  Row,
  draw,
  page,
  table,
)
import lorapr_jax as lp
from lorapr_jax.data.demo import all_news_texts, cache_dir
from lorapr_jax.files import read_json, write_json, write_text
from lorapr_jax.pruning.importance import CRITERIA
from lorapr_jax.settings import ORDERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'results.md'
FIGURE = ROOT / 'docs' / 'figures' / 'compare.svg'
MIN_CHARACTERS, HELD_OUT = 500, 60
# What the reference prunes of 9 heads and 1536 channels at 20% and at 50%.
TARGETS = {20: (1 / 9, 284 / 1536), 50: (4 / 9, 768 / 1536)}
ROWS = (
  Row(50, 'joint', 'lora', (0, 1, 2)),
  *(
    Row(50, 'joint', criterion) for criterion in CRITERIA if criterion != 'lora'
  ),
  *(
    Row(50, order, criterion)
    for order in ORDERS[1:]
    for criterion in ('lora', 'gradient')
  ),
  *(Row(20, 'joint', c) for c in ('lora', 'gradient', 'magnitude')),
)
FULL = tuple(
  Row(percent, order, criterion, (0, 1, 2))
  for percent, order, criterion in itertools.product((50, 20), ORDERS, CRITERIA)
)


def write_data(out: Path) -> tuple[Path, Path]:
  """The rows of over 500 characters, and the last 60 joined by a space."""
  rows = [text for text in all_news_texts() if len(text) > MIN_CHARACTERS]
  train, held_out = out / 'train.jsonl', out / 'heldout.txt'
  lines = (json.dumps({'text': row}) + '\n' for row in rows)
  train.write_text(''.join(lines), encoding='utf-8')
  held_out.write_text(' '.join(rows[-HELD_OUT:]), encoding='utf-8')
  return train, held_out


def make_model() -> Path:
  """The MHA copy of the demo's model, in the cache."""
  source = cache_dir() / 'smollm2-135m-instruct'
  copy = source.with_name(f'{source.name}-mha')
  if not (copy / 'config.json').exists():
    tool = ROOT / 'benchmarks' / 'make_mha.py'
    subprocess.run([sys.executable, tool, source, copy], cwd=ROOT, check=True)
  return copy


def arguments(row: Row, seed: int, model: Path, train: Path) -> list[str]:
  """The flags of a run."""
  heads, channels = TARGETS[row.percent]
  settings = {
    'model.path': model,
    'data.train': f'file:{train}',
    'data.shuffle': 'false',
    'data.eval': '',
    'train.steps': 100,
    'train.seed': seed,
    'prune.order': row.order,
    'prune.criterion': row.criterion,
    'prune.heads': 'kv_groups',
    'prune.heads_target': heads,
    'prune.channels_target': channels,
    'report.prompts': '()',
  }
  return [
    '--config=configs/smollm2_135m.py',
    *(f'--config.{key}={value}' for key, value in settings.items()),
  ]


def score(folder: Path, notes: Path, texts: dict[str, str]) -> dict[str, float]:
  """The perplexity of a folder on each text, measured once and noted."""
  known = read_json(notes) if notes.exists() else {}
  for spec in texts.values():
    if spec not in known:
      result = lp.evaluate(folder, spec, SEQ_LEN, max_windows=WINDOWS)
      known[spec] = result.perplexity
      write_json(notes, known)
  return {name: known[spec] for name, spec in texts.items()}


def measure(
  row: Row, seed: int, out: Path, flags: Sequence[str], texts: dict[str, str]
) -> dict[str, Any]:
  """What one run came to; it is made if it is not there."""
  workdir = out / row.name(seed)
  if not (workdir / 'summary.json').exists():
    print(f'--- {workdir.name}', flush=True)
    command = [sys.executable, 'train.py', *flags, f'--workdir={workdir}']
    subprocess.run(command, cwd=ROOT, check=True)
  summary = read_json(workdir / 'summary.json')
  return {
    'kept': summary['params_pruned'] / summary['params_dense'],
    'memory': summary['peak_memory_bytes'],
    'speed': summary['tokens_per_second'],
    'versions': summary['versions'],
    **score(workdir / 'export', out / f'{workdir.name}.json', texts),
  }


def main() -> None:
  """Runs what is missing and writes the page."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', type=Path, default=ROOT / 'runs' / 'compare')
  parser.add_argument('--full', action='store_true', help='90 runs')
  parser.add_argument(
    '--text', action='append', default=[], help='NAME=SPEC, to measure on too'
  )
  args = parser.parse_args()
  out = args.out.absolute()
  out.mkdir(parents=True, exist_ok=True)
  train, held_out = write_data(out)
  texts = {NEWS: f'file:{held_out}'}
  for text in args.text:
    name, _, spec = text.partition('=')
    texts[name] = spec
  model, results = make_model(), {}
  for row in FULL if args.full else ROWS:
    results[row] = [
      measure(row, seed, out, arguments(row, seed, model, train), texts)
      for seed in row.seeds
    ]
  dense = score(model, out / 'dense.json', texts)
  flags = ['--full'] if args.full else []
  for name in list(texts)[1:]:
    flags += ['--text', f'{name}=...']
  command = shlex.join(['python', 'benchmarks/compare.py', *flags])
  draw(dense, results).savefig(
    FIGURE, facecolor='white', metadata={'Date': None, 'Creator': None}
  )
  write_text(PAGE, page(dense, results, texts, command))
  print(table(dense, results, texts))


if __name__ == '__main__':
  main()
