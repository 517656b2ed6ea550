"""Accuracies in tasks: their part of docs/results.md."""

from collections.abc import Mapping
import statistics

from benchmarks.results_rows import Results, markdown

# By task, a 1 for each question that a model answers right, else a 0.
Answers = Mapping[str, str]


def accuracy(answers: Answers) -> float:
  """The mean over tasks of the share of 1s."""
  return statistics.mean(x.count('1') / len(x) for x in answers.values())


def paired(ours: Answers, other: Answers) -> tuple[float, float]:
  """By how much our accuracy is above another's, question by question.

  Returns:
    The mean over tasks of the mean difference d, and half of its 95% interval,
    1.96 sqrt(sum_t var(d_t) / n_t) / tasks.
  """
  differences = [
    [int(a) - int(b) for a, b in zip(ours[task], other[task], strict=True)]
    for task in ours
  ]
  errors = [statistics.variance(d) / len(d) for d in differences]
  mean = statistics.mean(map(statistics.mean, differences))
  return mean, 1.96 * sum(errors) ** 0.5 / len(errors)


def zero_shot(dense: Answers, results: Results) -> str:
  """Accuracies in tasks, of the rows that have them."""
  tasks = tuple(dense)
  lines = [
    (
      '',
      'parameters',
      *tasks,
      'mean',
      'of dense',
      'minus dense',
      'minus paper',
    ),
    ('---',) * (6 + len(tasks)),
  ]

  def add(name: str, kept: float, answers: Answers, paper: Answers) -> None:
    mean = accuracy(answers)
    others = (
      '{:+.1%} ± {:.1%}'.format(*paired(answers, x)) if x else ''
      for x in (dense if answers is not dense else {}, paper)
    )
    each = (f'{x.count("1") / len(x):.1%}' for x in answers.values())
    share = f'{mean / accuracy(dense):.1%}'
    lines.append((name, f'{kept:.1%}', *each, f'{mean:.1%}', share, *others))

  add('dense', 1.0, dense, {})
  papers = {
    row.percent: runs[0]['tasks']
    for row, runs in results.items()
    if row.is_plain and runs[0].get('tasks')
  }
  for row, runs in sorted(results.items(), key=lambda item: item[0].percent):
    if row.leader and (answers := runs[0].get('tasks')):
      paper = {} if row.is_plain else papers.get(row.percent, {})
      add(row.leader, runs[0]['kept'], answers, paper)
  return markdown(lines)


def section(dense: Answers, results: Results) -> str:
  """Of docs/results.md; nothing where no task was asked for."""
  if not dense:
    return ''
  count = max(map(len, dense.values()))
  return f"""
## Zero-shot tasks

Accuracy (lm_eval's `acc`) in {len(dense)} tasks of up to {count} questions, of
the first seed. `of dense` is the mean accuracy as a share of the dense model's.
The last two columns are mean differences, question by question, with their 95%
intervals.

{zero_shot(dense, results)}
"""
