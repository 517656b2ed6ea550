"""One run of compare.py: made, scored and timed."""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
import subprocess
import sys
from typing import Any

from benchmarks.results_rows import SEQ_LEN, WINDOWS
import lorapr_jax as lp
from lorapr_jax.errors import UserError
from lorapr_jax.eval.benchmark import (
  NEW_TOKENS,
  PROMPT_TOKENS,
  REPEATS,
  benchmark,
)
from lorapr_jax.runtime.files import read_json

ROOT = Path(__file__).resolve().parent.parent


def prune(
  workdir: Path, flags: Sequence[str], environment: Mapping[str, str]
) -> None:
  """A run from where it stands to its end; what it says lies beside it."""
  command = [sys.executable, 'train.py', *flags, f'--workdir={workdir}']
  log = workdir.with_suffix('.log')
  with log.open('a', encoding='utf-8') as output:
    done = subprocess.run(
      command, cwd=ROOT, stdout=output, stderr=output, env=environment
    )
  if done.returncode:
    raise UserError(f'{workdir.name} ended with an error: see {log}')


def score(
  folder: Path, texts: Mapping[str, str], known: Mapping[str, float]
) -> dict[str, float]:
  """{name: perplexity} of a folder on each text that is not known yet."""
  return {
    name: known.get(name)
    or lp.evaluate(folder, spec, SEQ_LEN, max_windows=WINDOWS).perplexity
    for name, spec in texts.items()
  }


def answers(
  folder: Path,
  tasks: Sequence[str],
  include_path: Path | None,
  known: Mapping[str, str],
) -> dict[str, str]:
  """{task: a 1 for each question that a folder answers right, else a 0}."""
  missing = [task for task in tasks if task not in known]
  if not missing:
    return dict(known)
  scores = lp.evaluate_tasks(folder, missing, include_path=include_path)
  for score in scores:
    if 'acc' not in score.by_question:
      raise UserError(f'--tasks: {score.task} has no accuracy')
  found = {score.task: score.by_question['acc'] for score in scores}
  return {
    **known,
    **{
      task: ''.join(str(int(x)) for x in values)
      for task, values in found.items()
    },
  }


def timed(export: Path, dense: Path) -> dict[str, dict[str, float]]:
  """Seconds of a prompt and of a token that follows, beside the dense model."""
  report = benchmark(
    {'model': str(export), 'against': str(dense)},
    [1],
    prompt_tokens=PROMPT_TOKENS,
    new_tokens=NEW_TOKENS,
    repeats=REPEATS,
  )
  return {
    row['phase']: {
      'model': row['model']['seconds'],
      'against': row['against']['seconds'],
      'speedup': row['speedup'],
    }
    for row in report['results']
  }


def measure(
  workdir: Path,
  flags: Sequence[str],
  texts: Mapping[str, str],
  known: Mapping[str, Any],
  environment: Mapping[str, str],
  tasks: Sequence[str] = (),
  include_path: Path | None = None,
  against: Path | None = None,
) -> dict[str, Any]:
  """What one run came to; it is made if that is not known.

  It is timed beside `against`, if that is given.
  """
  perplexity, answered = known.get('perplexity', {}), known.get('tasks', {})
  is_scored = (
    texts.keys() <= perplexity.keys() and set(tasks) <= answered.keys()
  )
  if is_scored and (against is None or 'times' in known):
    return dict(known)
  if not (workdir / 'summary.json').exists():
    prune(workdir, flags, environment)
  summary = read_json(workdir / 'summary.json')
  export = workdir / 'export'
  return {
    'date': str(date.today()),
    'kept': summary['params_pruned'] / summary['params_dense'],
    'memory': summary['peak_memory_bytes'],
    'speed': summary['tokens_per_second'],
    'versions': summary['versions'],
    'perplexity': score(export, texts, perplexity),
    'tasks': answers(export, tasks, include_path, answered),
    **({'times': timed(export, against)} if against else {}),
  }
