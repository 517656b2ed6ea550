"""How long train.py takes to its first step, with a filled cache.

  PYTHONPATH=. python benchmarks/startup.py [--starts 3]
    [--config=configs/paper.py:smollm2_135m ...]

Starts train.py --starts times and once before, so that what it compiles and the
dense model's perplexity are in the cache. Of each start prints the seconds to
the first line of metrics.jsonl, those of a step, and their difference: when the
first step began. The goal is 15.
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3


def start(flags: list[str], workdir: Path) -> tuple[float, float]:
  """Seconds to the end of the first step, and of one of the others."""
  command = [sys.executable, 'train.py', *flags, f'--workdir={workdir}']
  command += [f'--config.train.steps={STEPS}', '--config.train.log_every=1']
  log, records = workdir.with_suffix('.log'), workdir / 'metrics.jsonl'
  began, first = time.perf_counter(), None
  with log.open('w') as output:
    run = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    while run.poll() is None:
      if first is None and records.exists() and records.stat().st_size:
        first = time.perf_counter() - began
      time.sleep(0.02)
  if run.returncode or first is None:
    sys.exit(log.read_text())
  lines = records.read_text().splitlines()[1:]
  return first, min(json.loads(line)['seconds'] for line in lines)


def main() -> None:
  """Starts and prints."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--starts', type=int, default=3)
  parser.add_argument('--config', default='configs/paper.py:smollm2_135m')
  args, more = parser.parse_known_args()
  flags = [f'--config={args.config}', '--config.report.prompts=()', *more]
  with tempfile.TemporaryDirectory() as folder:
    start(flags, Path(folder) / 'fill')
    print('| to the first line, s | a step, s | first step began after, s |')
    print('|---|---|---|')
    for i in range(args.starts):
      first, step = start(flags, Path(folder) / str(i))
      print(f'| {first:.1f} | {step:.1f} | {first - step:.1f} |', flush=True)


if __name__ == '__main__':
  main()
