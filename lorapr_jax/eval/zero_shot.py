"""Evaluates a model on tasks of lm-evaluation-harness, with its own code."""

from collections.abc import Sequence
import contextlib
import dataclasses
import difflib
import os
from pathlib import Path
import sys
from types import ModuleType
from typing import Any

from lorapr_jax.data.hub import import_datasets, readable
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError, check_least, first_line
from lorapr_jax.hf.load import Model, folder_and_config, in_memory
from lorapr_jax.runtime.paths import expanded

# The seven of the papers (docs/method.md, evaluation).
PAPER_TASKS = (
  'boolq',
  'piqa',
  'hellaswag',
  'winogrande',
  'arc_easy',
  'arc_challenge',
  'openbookqa',
)
# Resamplings for the standard error of what is not a mean, such as perplexity.
_BOOTSTRAPS = 1000
# What lm_eval calls them.
_ACCURACIES = ('acc', 'acc_norm')
_NO_FILTER = 'none'


@dataclasses.dataclass(frozen=True)
class TaskScore:
  """The results of a task.

  Attributes:
    task: the task's name.
    version: the task's version. Results of different versions do not compare.
    shots: the number of examples before each question.
    documents: the number of questions.
    metrics: {name: value}. If a task has several filters, the name is
      METRIC,FILTER.
    errors: {name: standard error}, where there is one.
    by_question: {name: the score of each question, in order} of acc and
      acc_norm, so that two models can be compared question by question.
  """

  task: str
  version: str
  shots: int
  documents: int
  metrics: dict[str, float]
  errors: dict[str, float]
  by_question: dict[str, tuple[float, ...]]


def import_harness() -> ModuleType:
  """Imports eval/harness.py, which takes seconds and registers our model.

  Before that, it keeps lm_eval from forking, which JAX does not survive, and
  from telling the Hub which data sets it reads.

  Raises:
    UserError: if lm_eval is not installed.
  """
  os.environ['DISABLE_MULTIPROC'] = '1'
  try:
    import_datasets()
    from lorapr_jax.eval import harness
  except ModuleNotFoundError as error:
    missing = str(error.name).partition('.')[0]
    raise UserError(
      f'tasks need the package lm_eval ({missing} is missing): '
      "pip install 'lorapr-jax[eval]'"
    ) from None
  return harness


def evaluate_tasks(
  model: Model | str | Path,
  tasks: Sequence[str],
  *,
  include_path: str | Path | None = None,
  limit: int | None = None,
  num_fewshot: int | None = None,
  chat: bool = False,
  batch_size: int = 8,
  dtype: str = 'auto',
) -> list[TaskScore]:
  """Evaluates a model on tasks and groups of tasks of lm-evaluation-harness.

  Args:
    model: a model, or the Hugging Face folder of one.
    tasks: names of tasks or groups; PAPER_TASKS are the papers' seven.
    include_path: a folder with more tasks, as YAML files.
    limit: the most questions of each task; None: all.
    num_fewshot: examples before each question; None: as many as the task says.
    chat: whether to put each question as a user's message, with the tokenizer's
      chat template.
    batch_size: rows at a time.
    dtype: of weights and computation; a model in memory keeps its own.

  Raises:
    UserError: for a mistake in the arguments or the folder, for an unknown
      task, or for one whose data cannot be read.
  """
  check_least(
    limit=(limit, 1), num_fewshot=(num_fewshot, 0), batch_size=(batch_size, 1)
  )
  if include_path is not None:
    include_path = expanded(str(include_path))
    if not include_path.is_dir():
      raise UserError(f'include_path {include_path} is not a folder')
  folder, _ = folder_and_config(model)
  if chat and not Tokenizer(folder).has_chat_template:
    raise UserError(f'the tokenizer of {folder} has no chat template')
  harness = import_harness()
  import lm_eval

  manager = find_tasks(tasks, include_path)
  loaded = load_tasks(manager, tasks)
  language_model = harness.HarnessModel(
    in_memory(model, dtype), batch_size=batch_size
  )
  # lm_eval prints, but standard output is for results.
  with contextlib.redirect_stdout(sys.stderr):
    results = lm_eval.simple_evaluate(
      model=language_model,
      tasks=loaded,
      task_manager=manager,
      num_fewshot=num_fewshot,
      limit=limit,
      apply_chat_template=chat,
      bootstrap_iters=_BOOTSTRAPS,
    )
  return [_score(name, results) for name in results['results']]


def find_tasks(names: Sequence[str], include_path: str | Path | None) -> Any:
  """An lm_eval TaskManager that knows all the names.

  Raises:
    UserError: for a name that is not known, with similar ones.
  """
  from lm_eval.tasks import TaskManager

  if not names:
    raise UserError('no tasks are named')
  if include_path is not None:
    # To look through lm_eval's own tasks, thousands, takes seconds.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if set(names) <= set(manager.all_subtasks):
      return manager
  manager = TaskManager(include_path=include_path)
  check_names(names, manager.all_tasks)
  return manager


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
  """Raises a UserError for a name that is not known, with similar ones."""
  for name in names:
    if name not in known:
      close = difflib.get_close_matches(name, known)
      raise UserError(
        f'{name!r} is no task of lm_eval: '
        + (f'did you mean {", ".join(close)}? ' if close else '')
        + '`python -m lorapr_jax lm_eval ls tasks` shows all'
      )


def load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
  """The tasks and groups with their data, which are fetched if need be.

  Raises:
    UserError: for a task whose data cannot be read, or that cannot be made.
  """
  loaded = []
  for name in names:
    try:
      with readable(f'the data of task {name} cannot be read'):
        found = manager.load([name])
    except UserError:
      raise
    # Its file has templates and may name functions, which raise anything.
    except Exception as error:
      raise UserError(
        f'task {name} cannot be made of its file: {type(error).__name__}: '
        f'{first_line(error)}'
      ) from error
    loaded += found['groups'].values() or found['tasks'].values()
  return loaded


def _score(name: str, results: dict[str, Any]) -> TaskScore:
  metrics, errors = {}, {}
  for key, value in results['results'][name].items():
    metric, comma, filter_name = key.partition(',')
    if not comma or isinstance(value, str):
      continue
    kept = metrics
    if metric.endswith('_stderr'):
      metric, kept = metric.removesuffix('_stderr'), errors
    label = metric if filter_name == _NO_FILTER else f'{metric},{filter_name}'
    kept[label] = float(value)
  # A group of tasks has none.
  samples = [
    sample
    for sample in results['samples'].get(name, ())
    if sample['filter'] == _NO_FILTER
  ]
  return TaskScore(
    task=name,
    version=str(results['versions'].get(name)),
    shots=results['n-shot'].get(name, 0),
    documents=results['n-samples'].get(name, {}).get('effective', 0),
    metrics=metrics,
    errors=errors,
    by_question={
      name: tuple(float(sample[name]) for sample in samples)
      for name in _ACCURACIES
      if samples and name in metrics
    },
  )


def mean_accuracies(scores: Sequence[TaskScore]) -> dict[str, float]:
  """The means over tasks of acc and of acc_norm.

  A task without acc_norm counts there with its acc. If a task has no accuracy,
  there are no means: {}.
  """
  if not all('acc' in score.metrics for score in scores):
    return {}
  rows = [score.metrics for score in scores]
  means = {
    'acc': [row['acc'] for row in rows],
    'acc_norm': [row.get('acc_norm', row['acc']) for row in rows],
  }
  return {name: sum(values) / len(rows) for name, values in means.items()}
