"""LoRAPrune beside the alternatives, on one model, one text, one budget.

  PYTHONPATH=. python benchmarks/compare.py [--full] [--jobs 2]
    [--text 'PTB validation=file:ptb.valid.txt?lines' ...]
    [--tasks piqa,arc_easy [--include_path DIR]] [--known docs/results.json]
    [--only='-(width|depth|both)-']

Prunes SmolLM2-135M-Instruct with its KV heads repeated (benchmarks/make_mha.py;
as many KV heads as heads, so that 20% and 50% of them can go) by every
criterion, order and addition of the list below, 100 steps of 8 x 128 tokens of
news in file order: the setting in which the reference implementation was run
(docs/method.md). Three runs have 1,000 steps. After each run docs/results.md,
its figure and results.json have what is known so far. What --out holds already
is not run again, nor what --known does, and a run that was cut short goes on.
What is pruned by width, by depth and by both is timed beside the dense model
too. With --tasks the dense model and the first seeds of LoRA alone, of the
paper's method and of the best are scored in tasks of lm_eval too.
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
import itertools
import json
import os
from pathlib import Path
import re
import shlex
import subprocess
import sys
from typing import Any

from benchmarks.compare_runs import answers, measure, score
from benchmarks.results_figures import draw, draw_best
from benchmarks.results_page import page
from benchmarks.results_rows import (
  ADDITIONS,
  EVERYTHING,
  MORE_STEPS,
  NEWS,
  TOGETHER,
  Row,
  collect,
)
from benchmarks.svg import write_svg
from lorapr_jax.data.demo import all_news_texts
from lorapr_jax.data.sources import identity, parse_spec
from lorapr_jax.errors import UserError
from lorapr_jax.exploring.ways import WAYS, Dense
from lorapr_jax.hf.load import load_config
from lorapr_jax.pruning.importance import CRITERIA
from lorapr_jax.runtime.files import (
  cache_dir,
  read_json,
  write_json,
  write_text,
)
from lorapr_jax.settings.model import ORDERS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'results.md'
RECORD = PAGE.with_suffix('.json')
FIGURES = ROOT / 'docs' / 'figures'
MIN_CHARACTERS, HELD_OUT = 500, 60
# What the reference prunes of 9 heads and 1536 channels at 20% and at 50%.
TARGETS = {
  0: (0.0, 0.0),
  20: (1 / 9, 284 / 1536),
  35: (3 / 9, 538 / 1536),
  50: (4 / 9, 768 / 1536),
}
_, NOT_DISTILLED, NO_LAYER_PROTECTED, UNTRAINED, SHORT_RAMP = TOGETHER
ROWS = (
  Row(0, 'joint', 'lora'),
  Row(50, 'joint', 'lora', (0, 1, 2)),
  *(Row(50, 'joint', name) for name in ('gradient', 'magnitude', 'random')),
  *(
    Row(50, order, criterion)
    for order in ORDERS[1:]
    for criterion in ('lora', 'gradient')
  ),
  Row(20, 'joint', 'lora', (0, 1, 2)),
  *(Row(20, 'joint', criterion) for criterion in ('gradient', 'magnitude')),
  Row(50, 'prune_then_tune', 'obs', (0, 1, 2), EVERYTHING),
  Row(50, 'prune_then_tune', 'obs', (0,), NOT_DISTILLED),
  Row(50, 'prune_then_tune', 'obs', (0,), NO_LAYER_PROTECTED),
  *(
    Row(50, order, criterion, added=added)
    for criterion in ('fluctuation', 'lora', 'gradient')
    for order, added in (
      ('prune_then_tune', EVERYTHING),
      ('joint', SHORT_RAMP),
      ('joint', EVERYTHING),
    )
  ),
  Row(50, 'none', 'obs', (0,), UNTRAINED),
  Row(35, 'prune_then_tune', 'obs', (0,), EVERYTHING),
  Row(20, 'prune_then_tune', 'obs', (0, 1, 2), EVERYTHING),
  *(
    Row(percent, 'joint', 'lora', (0, 1), added)
    for percent, added in itertools.product((20, 50), ADDITIONS)
  ),
  *(
    Row(percent, 'prune_then_tune', 'obs', (0,), EVERYTHING, way)
    for percent, way in itertools.product((20, 34), WAYS)
  ),
  Row(50, 'joint', 'lora', steps=MORE_STEPS),
  Row(50, 'prune_then_tune', 'fluctuation', steps=MORE_STEPS),
  Row(50, 'prune_then_tune', 'obs', added=EVERYTHING, steps=MORE_STEPS),
)
FULL = tuple(
  Row(percent, order, criterion, (0, 1, 2))
  for percent, order, criterion in itertools.product((50, 20), ORDERS, CRITERIA)
)


def write_data(out: Path) -> tuple[Path, Path]:
  """The rows of over 500 characters; the last 60, joined, are held out."""
  rows = [text for text in all_news_texts() if len(text) > MIN_CHARACTERS]
  train, held_out = out / 'train.jsonl', out / 'heldout.txt'
  lines = (json.dumps({'text': row}) + '\n' for row in rows[:-HELD_OUT])
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


def targets(row: Row, dense: Dense) -> dict[str, Any]:
  """How much goes, as settings."""
  if row.way:
    own = {
      'heads_target': None,
      'channels_target': None,
      **WAYS[row.way](dense, (100 - row.percent) / 100),
    }
  else:
    heads, channels = TARGETS[row.percent]
    own = {'heads_target': heads, 'channels_target': channels}
  return {f'prune.{key}': value for key, value in own.items()}


def arguments(
  row: Row, seed: int, model: Path, train: Path, dense: Dense
) -> list[str]:
  """The flags of a run; `dense` is the model before it."""
  settings = {
    'model.path': model,
    'data.train': f'file:{train}',
    'data.shuffle': 'false',
    'data.eval': '',
    'train.steps': row.steps,
    'train.seed': seed,
    'prune.order': row.order,
    'prune.criterion': row.criterion,
    'prune.heads': 'kv_groups',
    'report.prompts': '()',
    'export.ladder': '',
    **targets(row, dense),
  }
  config = 'configs/smollm2_135m.py'
  if row.added in TOGETHER:
    settings |= TOGETHER[row.added]
  else:
    config = 'configs/paper.py:smollm2_135m'
    settings |= {'train.learning_rate': 1e-3, **ADDITIONS.get(row.added, {})}
  return [
    f'--config={config}',
    *(f'--config.{key}={value}' for key, value in settings.items()),
  ]


def described(texts: Mapping[str, str]) -> dict[str, dict[str, str]]:
  """Of each text, a spec without folders, and a hash of what it is."""
  found = {}
  for name, text in texts.items():
    spec = parse_spec(text)
    shown = text.replace(spec.path, Path(spec.path).name)
    found[name] = {'spec': shown, 'sha256': identity(spec).hex()}
  return found


def merged(known: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
  """What is known, with the texts of a record.

  Raises:
    UserError: naming a text that was another one where runs were measured.
  """
  for name, text in record['texts'].items():
    if known['texts'].get(name, text)['sha256'] != text['sha256']:
      raise UserError(
        f'{name} is {text["spec"]} now, and another text where runs were '
        'measured before: give it another name'
      )
  return {**record, **known, 'texts': record['texts']}


def publish(
  record: Mapping[str, Any], rows: Sequence[Row], command: str
) -> None:
  """Writes the record, and the page and the figures of its runs."""
  write_json(RECORD, record)
  dense, results, missing = collect(record, rows)
  about = record['texts'], missing, command, record.get('dense_tasks', {})
  write_text(PAGE, page(dense, results, *about))
  for name, make in (('compare', draw), ('best', draw_best)):
    write_svg(make(dense, results), FIGURES / f'{name}.svg')


def command(args: argparse.Namespace, texts: Mapping[str, Any]) -> str:
  """How the same is measured again."""
  parts = ['python', 'benchmarks/compare.py', '--jobs', str(args.jobs)]
  parts += ['--full'] if args.full else []
  for name, text in texts.items():
    if name != NEWS:
      parts += ['--text', f'{name}={text["spec"]}']
  parts += ['--tasks', ','.join(args.tasks)] if args.tasks else []
  if args.include_path:
    parts += ['--include_path', args.include_path.name]
  return shlex.join(parts)


def main() -> None:
  """Runs what is missing."""
  try:
    compare(parse_arguments())
  except UserError as error:
    sys.exit(f'error: {error}')


def parse_arguments() -> argparse.Namespace:
  """From the command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', type=Path, default=ROOT / 'runs' / 'compare')
  parser.add_argument('--full', action='store_true', help='126 runs')
  parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
  parser.add_argument(
    '--only', default='', help='make no other runs than this pattern finds'
  )
  parser.add_argument(
    '--text', action='append', default=[], help='NAME=SPEC, to measure on too'
  )
  parser.add_argument(
    '--tasks',
    type=lambda text: text.split(','),
    default=[],
    help='names of lm_eval tasks that have an accuracy',
  )
  parser.add_argument(
    '--include_path', type=Path, help='a folder of more tasks'
  )
  parser.add_argument(
    '--known', type=Path, help='a results.json, whose runs are not run again'
  )
  return parser.parse_args()


def compare(args: argparse.Namespace) -> None:
  """Makes the runs that are missing, and publishes after each."""
  out = args.out.absolute()
  out.mkdir(parents=True, exist_ok=True)
  train, held_out = write_data(out)
  texts = {NEWS: f'file:{held_out}'}
  for text in args.text:
    name, _, spec = text.partition('=')
    texts[name] = spec
  rows, model = FULL if args.full else ROWS, make_model()

  ours, record = out / RECORD.name, {'texts': described(texts)}
  for known in (args.known, ours if ours.exists() else None):
    if known:
      record = merged(read_json(known), record)
  record['dense'] = score(model, texts, record.get('dense', {}))
  tasks = args.tasks, args.include_path
  sizes = Dense.of(load_config(model), 'reference')
  record['dense_tasks'] = answers(model, *tasks, record.get('dense_tasks', {}))
  # As many threads for each as it would get of the cores.
  threads = max(1, (os.cpu_count() or 1) // args.jobs)
  environment = {**os.environ, 'NPROC': str(threads)}
  with ThreadPoolExecutor(args.jobs) as pool:
    runs = {
      pool.submit(
        measure,
        out / row.name(seed),
        arguments(row, seed, model, train, sizes),
        texts,
        record.get(row.name(seed), {}),
        environment,
        *(tasks if row.leader and seed == row.seeds[0] else ((), None)),
        model if row.way else None,
      ): row.name(seed)
      for row in rows
      for seed in row.seeds
      if re.search(args.only, row.name(seed))
    }
    try:
      for run in as_completed(runs):
        record[runs[run]] = run.result()
        write_json(ours, record)
        publish(record, rows, command(args, record['texts']))
        print(f'{runs[run]}: {record[runs[run]]["perplexity"]}', flush=True)
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


if __name__ == '__main__':
  main()
