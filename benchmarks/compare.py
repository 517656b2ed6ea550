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
from collections.abc import Iterable, Sequence
import dataclasses
from datetime import date
import itertools
import json
from pathlib import Path
import shlex
import statistics
import subprocess
import sys
from typing import Any

from matplotlib.figure import Figure

import lorapr_jax as lp
from lorapr_jax.data.demo import all_news_texts, cache_dir
from lorapr_jax.files import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'results.md'
FIGURE = ROOT / 'docs' / 'figures' / 'compare.svg'
NEWS = 'held-out news'
MIN_CHARACTERS, HELD_OUT = 500, 60
SEQ_LEN, WINDOWS = 128, 80
# What the reference prunes of 9 heads and 1536 channels at 20% and at 50%.
TARGETS = {20: (1 / 9, 284 / 1536), 50: (4 / 9, 768 / 1536)}
CRITERIA = ('lora', 'gradient', 'activation', 'magnitude', 'random')
ORDERS = ('joint', 'prune_then_tune', 'none')
COLORS = dict(
  zip(
    CRITERIA, ('#2a6fbb', '#c44e52', '#55a868', '#8172b2', '#888'), strict=True
  )
)
MARKERS = dict(zip(ORDERS, 'osx', strict=True))


@dataclasses.dataclass(frozen=True)
class Row:
  """Runs that differ by their seed alone.

  Attributes:
    percent: of the groups, a key of TARGETS.
    order: prune.order.
    criterion: prune.criterion.
    seeds: train.seed of each run.
  """

  percent: int
  order: str
  criterion: str
  seeds: tuple[int, ...] = (0,)

  def name(self, seed: int) -> str:
    """Of a run's workdir."""
    return f'{self.order}-{self.criterion}-{self.percent}-seed{seed}'


ROWS = (
  Row(50, 'joint', 'lora', (0, 1, 2)),
  *(Row(50, 'joint', criterion) for criterion in CRITERIA[1:]),
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
    subprocess.run([sys.executable, tool, source, copy], check=True)
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


def spread(values: Sequence[float], form: str = '{:.1f}') -> str:
  """The mean, and in brackets the range where there is one."""
  mean = form.format(statistics.mean(values))
  if len(values) == 1:
    return mean
  return f'{mean} ({form.format(min(values))}-{form.format(max(values))})'


def table(
  dense: dict[str, float],
  results: dict[Row, list[dict[str, Any]]],
  texts: Iterable[str],
) -> str:
  """All runs; each row's figures are means over its seeds."""
  head = ('groups', 'order', 'criterion', 'seeds', 'parameters', *texts)
  head = (*head, 'tokens/s', 'peak GB')
  scores = (f'{dense[text]:.1f}' for text in texts)
  lines = [
    head,
    ('---',) * len(head),
    ('0%', 'dense', '', '', '100%', *scores, '', ''),
  ]
  for row, runs in results.items():
    figures = [spread([run[text] for run in runs]) for text in texts]
    lines.append(
      (
        f'{row.percent}%',
        row.order,
        row.criterion,
        str(len(runs)),
        f'{runs[0]["kept"]:.1%}',
        *figures,
        spread([run['speed'] for run in runs], '{:.0f}'),
        f'{max(run["memory"] for run in runs) / 1e9:.2f}',
      )
    )
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def findings(
  results: dict[Row, list[dict[str, Any]]], texts: Iterable[str]
) -> str:
  """LoRAPrune against each alternative, in words: also where it loses."""
  ours = {
    row.percent: runs
    for row, runs in results.items()
    if (row.order, row.criterion) == ('joint', 'lora')
  }
  texts, lines = list(texts), []
  for row, runs in results.items():
    if (row.order, row.criterion) == ('joint', 'lora'):
      continue
    parts = []
    for text in texts:
      base = [run[text] for run in ours[row.percent]]
      value = statistics.mean(run[text] for run in runs)
      change = value / statistics.mean(base) - 1
      word = 'higher' if change > 0 else 'lower'
      inside = min(base) <= value <= max(base) and len(base) > 1
      note = ', within the range of its seeds' if inside else ''
      parts.append(f'{abs(change):.0%} {word} on {text}{note}')
    lines.append(
      f'- {row.percent}%, {row.order}, {row.criterion}: ' + '; '.join(parts)
    )
  return '\n'.join(lines)


def draw(
  dense: dict[str, float], results: dict[Row, list[dict[str, Any]]]
) -> Figure:
  """Perplexity on held-out news against the parameters kept."""
  figure = Figure(figsize=(7, 4))
  axes = figure.add_subplot()
  axes.plot([1.0], [dense[NEWS]], 'D', color='black', label='dense')
  for row, runs in results.items():
    kept, values = runs[0]['kept'], [run[NEWS] for run in runs]
    mean = statistics.mean(values)
    errors = [[mean - min(values)], [max(values) - mean]]
    axes.errorbar(
      [kept],
      [mean],
      yerr=errors if len(values) > 1 else None,
      fmt=MARKERS[row.order],
      color=COLORS[row.criterion],
      capsize=3,
      label=f'{row.criterion}, {row.order}',
    )
  handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
  axes.legend(
    handles.values(),
    handles,
    loc='center left',
    bbox_to_anchor=(1, 0.5),
    frameon=False,
  )
  axes.set(
    xlabel='share of parameters kept',
    ylabel=f'perplexity, {NEWS}',
    yscale='log',
  )
  axes.xaxis.set_major_formatter('{x:.0%}')
  axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  return figure


def page(
  dense: dict[str, float],
  results: dict[Row, list[dict[str, Any]]],
  texts: dict[str, str],
  command: str,
) -> str:
  """docs/results.md."""
  versions = {
    f'{name} {version}'
    for runs in results.values()
    for run in runs
    for name, version in run['versions'].items()
  }
  return f"""# LoRAPrune beside the alternatives

Written by `{command}` on {date.today()}; {', '.join(sorted(versions))}.

SmolLM2-135M-Instruct with its three KV heads repeated to nine, 100 steps of
8 x 128 tokens of news, learning rate 1e-3 down to 0, rank 8; the first tenth of
the layers and the last one are left whole. Of the others, "50%" removes 4 of 9
heads and 768 of 1,536 channels, "20%" removes 1 and 284: the counts of the
reference implementation. `joint` prunes while LoRA trains, `prune_then_tune`
prunes after 10 steps that only measure and trains LoRA for the other 90, `none`
prunes after those 10. Perplexity at {SEQ_LEN} tokens, the first {WINDOWS}
windows. A range in brackets is that of the seeds; a row without one is a single
run.

{table(dense, results, texts)}

![Perplexity against the share of parameters kept](figures/compare.svg)

## What the numbers say

Against joint lora at the same share of groups:

{findings(results, texts)}

A difference smaller than the range of joint lora's seeds says nothing; where
there is one seed alone, that range is the only measure of chance. Peak memory
is the process's: `gradient` pays for a gradient of every weight. Tokens per
second are of one machine on which other work may have run.
"""


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
