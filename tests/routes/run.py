"""Tries every export in the tools that users load it with: make test-export.

  python tests/routes/run.py [--model HF_FOLDER] [--keep FOLDER]

Each tool runs in its own environment, .venvs/NAME. The exit status is 1 when
any check fails.
"""

import argparse
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

from checks import RESULTS
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = {
  'transformers4': 'check_transformers.py',
  'transformers5': 'check_transformers.py',
  'llama_cpp': 'check_llama_cpp.py',
  'lm_eval': 'check_lm_eval.py',
}


def main() -> int:
  """Makes the exports, runs the checks, prints the table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', help='prune this one, not a tiny random one')
  parser.add_argument('--keep', type=Path, help='a new folder for it all')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix='routes-') as temporary:
    folder = args.keep or Path(temporary) / 'exports'
    options = ['--model', args.model] if args.model else []
    failed = []
    if not run('exports', sys.executable, 'make_exports.py', folder, *options):
      return 1
    for name, script in ENVIRONMENTS.items():
      python = HERE.parents[1] / '.venvs' / name / 'bin/python'
      if not run(name, python, script, folder):
        failed.append(name)
    failed += show(folder / RESULTS)
  for failure in failed:
    print(f'FAILED {failure}')
  return 1 if failed else 0


def run(name: str, python: str | Path, script: str, *arguments: object) -> bool:
  """Runs a script; its output is shown only where it fails."""
  start = time.perf_counter()
  process = subprocess.run(
    [python, HERE / script, *map(str, arguments)],
    env=os.environ | environment(Path(str(arguments[0])), name),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  print(f'{name}: {time.perf_counter() - start:.0f} s', flush=True)
  if process.returncode:
    print(process.stdout, flush=True)
  return process.returncode == 0


def environment(folder: Path, name: str) -> dict[str, str]:
  """No network, and no cache shared with anyone: remote code is cached too."""
  return {
    'HF_HUB_OFFLINE': '1',
    'HF_HOME': str(folder.absolute().parent / f'home-{name}'),
    'TOKENIZERS_PARALLELISM': 'false',
    # Where `auto` means float32.
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(HERE.parents[1]) if name == 'exports' else '',
  }


def show(path: Path) -> list[str]:
  """Prints the figures, a row for each tool and export; returns failures."""
  rows, failed = {}, []
  for line in path.read_text().splitlines() if path.exists() else ():
    result = json.loads(line)
    tool, export, check = (result[k] for k in ('tool', 'export', 'check'))
    value, limit = result['value'], result['limit']
    rows.setdefault((tool, export), []).append(f'{check} {value:.2g}')
    # Not `value > limit`: a NaN fails.
    if not value <= limit:
      failed.append(f'{tool}: {export}: {check} {value:.2g}, limit {limit:g}')
  table = Table(title='exports in other tools: differences from our own')
  for column in ('tool', 'export', 'differences'):
    table.add_column(column)
  for (tool, export), figures in rows.items():
    table.add_row(tool, export, ', '.join(figures))
  Console(width=120).print(table)
  return failed


if __name__ == '__main__':
  sys.exit(main())
