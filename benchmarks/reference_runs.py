"""Repeats the reference implementation's runs on a real model.

The setting of the README's comparison: SmolLM2-135M-Instruct with its KV heads
repeated (benchmarks/make_mha.py), 100 steps of 8 x 128 tokens of news in file
order, half of the heads and channels.

  PYTHONPATH=. python benchmarks/reference_runs.py \\
    --model FOLDER --out DIR [--ptb FILE]

Runs what DIR does not hold yet and prints held-out news and PTB perplexities
(128 tokens, first 80 windows).
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys

from lorapr_jax.data.demo import all_news_texts

ROOT = Path(__file__).resolve().parent.parent
RUNS = [('lora', 0), ('lora', 1), ('lora', 2), ('magnitude', 0)]
MIN_CHARACTERS, HELD_OUT = 500, 60


def write_data(out: Path) -> tuple[Path, Path]:
  """The rows of over 500 characters, and the last 60 joined by a space."""
  rows = [text for text in all_news_texts() if len(text) > MIN_CHARACTERS]
  train, held_out = out / 'train.jsonl', out / 'heldout.txt'
  lines = (json.dumps({'text': row}) + '\n' for row in rows)
  train.write_text(''.join(lines), encoding='utf-8')
  held_out.write_text(' '.join(rows[-HELD_OUT:]), encoding='utf-8')
  return train, held_out


def command(*arguments: str) -> str:
  """Standard output of a command of ours."""
  done = subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, check=True
  )
  return done.stdout.decode()


def perplexity(model: Path, data: str) -> float:
  """Of a folder, by the evaluate command."""
  arguments = ['--seq_len', '128', '--max_windows', '80', '--json']
  output = command(
    *('-m', 'lorapr_jax', 'evaluate', '--model', str(model)),
    *('--data', data, *arguments),
  )
  return json.loads(output)['perplexity']


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--model', type=Path, required=True)
  parser.add_argument('--out', type=Path, required=True)
  parser.add_argument('--ptb', type=Path, help='PTB validation, plain text')
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  train, held_out = write_data(args.out)
  for criterion, seed in RUNS:
    workdir = args.out.absolute() / f'{criterion}-{seed}'
    if not (workdir / 'summary.json').exists():
      command(
        'train.py',
        '--config=configs/smollm2_135m.py',
        f'--workdir={workdir}',
        f'--config.model.path={args.model.absolute()}',
        f'--config.data.train=file:{train.absolute()}',
        '--config.data.shuffle=false',
        '--config.data.eval=',
        '--config.train.steps=100',
        f'--config.train.seed={seed}',
        f'--config.prune.criterion={criterion}',
        '--config.prune.heads=kv_groups',
        '--config.prune.heads_target=0.5',
      )
    summary = json.loads((workdir / 'summary.json').read_text())
    export = workdir / 'export'
    figures = {
      'heldout': perplexity(export, f'file:{held_out.absolute()}'),
      'tokens/s': summary['tokens_per_second'],
      'peak GB': summary['peak_memory_bytes'] / 1e9,
    }
    if args.ptb:
      figures['PTB'] = perplexity(export, f'file:{args.ptb.absolute()}?lines')
    print(
      f'{criterion}, seed {seed}: '
      + ', '.join(f'{name} {value:.2f}' for name, value in figures.items()),
      flush=True,
    )


if __name__ == '__main__':
  main()
