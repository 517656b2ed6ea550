"""docs/results.md and its figure, from what the runs of compare.py came to."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import operator
import statistics
from typing import Any

from matplotlib.figure import Figure

from lorapr_jax.pruning.importance import CRITERIA
from lorapr_jax.settings.model import ORDERS

NEWS = 'held-out news'
SEQ_LEN, WINDOWS = 128, 80
COLORS = dict(
  zip(
    CRITERIA,
    ('#2a6fbb', '#c44e52', '#55a868', '#dd8452', '#8172b2', '#888', '#17becf'),
    strict=True,
  )
)
MARKERS = dict(zip(ORDERS, 'osx', strict=True))
# What may be added to the paper's method, one at a time, and its settings.
ADDITIONS: dict[str, dict[str, Any]] = {
  'own': {'prune.lora_gradient': 'own'},
  'compensation': {'prune.compensate': 'ridge'},
  'distillation': {'train.distill': 0.5, 'train.distill_top_k': 64},
  'recovery': {'train.steps': 60, 'recover.steps': 40},
}
# The demo's config, which has what is best together, with the share of its
# steps that only measure.
TOGETHER: dict[str, dict[str, Any]] = {
  'everything': {'prune.calibration_steps': 24},
}
ADDED = dict(zip((*ADDITIONS, *TOGETHER), 'pd<>*', strict=True))


@dataclasses.dataclass(frozen=True)
class Row:
  """Runs that differ by their seed alone.

  Attributes:
    percent: of the groups, a key of TARGETS.
    order: prune.order.
    criterion: prune.criterion.
    seeds: train.seed of each run.
    added: a key of ADDITIONS or TOGETHER; nothing is the paper's method.
  """

  percent: int
  order: str
  criterion: str
  seeds: tuple[int, ...] = (0,)
  added: str = ''

  @property
  def method(self) -> str:
    """The criterion, and what is added."""
    return ' + '.join(filter(None, (self.criterion, self.added)))

  @property
  def is_plain(self) -> bool:
    """Whether it is what the others are compared with: LoRAPrune."""
    return (self.order, self.method) == ('joint', 'lora')

  @property
  def is_best(self) -> bool:
    """Whether it is the demo's config as it is."""
    return self.added == 'everything'

  def name(self, seed: int) -> str:
    """Of a run's workdir."""
    method = self.method.replace(' ', '').replace(',', '-')
    return f'{self.order}-{method}-{self.percent}-seed{seed}'


Results = dict[Row, list[dict[str, Any]]]


def collect(
  record: Mapping[str, Any], rows: Iterable[Row]
) -> tuple[dict[str, float], Results, list[str]]:
  """Of a record: the dense model, each row's runs, and which are missing.

  Runs that were not measured on all of its texts are missing too.
  """
  results: Results = {}
  missing = []
  for row in rows:
    for name in map(row.name, row.seeds):
      run = record.get(name, {'perplexity': {}})
      if record['texts'].keys() <= run['perplexity'].keys():
        results.setdefault(row, []).append(run)
      else:
        missing.append(name)
  return record['dense'], results, missing


def spread(values: Sequence[float], form: str = '{:.1f}') -> str:
  """The mean, and in brackets the range where there is one."""
  mean = form.format(statistics.mean(values))
  if len(values) == 1:
    return mean
  return f'{mean} ({form.format(min(values))}-{form.format(max(values))})'


def table(
  dense: dict[str, float],
  results: Results,
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
    figures = [
      spread([run['perplexity'][text] for run in runs]) for text in texts
    ]
    lines.append(
      (
        f'{row.percent}%',
        row.order,
        row.method,
        str(len(runs)),
        f'{runs[0]["kept"]:.1%}',
        *figures,
        spread([run['speed'] for run in runs], '{:.0f}'),
        f'{max(run["memory"] for run in runs) / 1e9:.2f}',
      )
    )
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def findings(results: Results, texts: Iterable[str]) -> str:
  """LoRAPrune against each alternative, in words: also where it loses."""
  ours = {row.percent: runs for row, runs in results.items() if row.is_plain}
  texts, lines = list(texts), []
  for row, runs in results.items():
    if row.is_plain or row.percent not in ours:
      continue
    parts = []
    for text in texts:
      base = [run['perplexity'][text] for run in ours[row.percent]]
      value = statistics.mean(run['perplexity'][text] for run in runs)
      change = value / statistics.mean(base) - 1
      word = 'higher' if change > 0 else 'lower'
      inside = min(base) <= value <= max(base) and len(base) > 1
      note = ', within the range of its seeds' if inside else ''
      parts.append(f'{abs(change):.0%} {word} on {text}{note}')
    lines.append(
      f'- {row.percent}%, {row.order}, {row.method}: ' + '; '.join(parts)
    )
  return '\n'.join(lines)


def leaders(results: Results, texts: Iterable[str]) -> str:
  """The lowest row on each text, in words."""
  texts, lines = list(texts), []
  for percent in dict.fromkeys(row.percent for row in results):
    means = {
      text: {
        row: statistics.mean(run['perplexity'][text] for run in runs)
        for row, runs in results.items()
        if row.percent == percent
      }
      for text in texts
    }
    best = {
      text: min(rows, key=rows.__getitem__) for text, rows in means.items()
    }
    parts = (
      f'{row.order} {row.method} on {text} ({means[text][row]:.1f})'
      for text, row in best.items()
    )
    lines.append(f'- The lowest at {percent}%: ' + ', '.join(parts))
  return '\n'.join(lines)


def draw(dense: dict[str, float], results: Results) -> Figure:
  """Perplexity on held-out news against the parameters kept."""
  figure = Figure(figsize=(7, 4))
  axes = figure.add_subplot()
  axes.plot([1.0], [dense[NEWS]], 'D', color='black', label='dense')
  for row, runs in results.items():
    kept, values = runs[0]['kept'], [run['perplexity'][NEWS] for run in runs]
    mean = statistics.mean(values)
    errors = [[mean - min(values)], [max(values) - mean]]
    axes.errorbar(
      [kept],
      [mean],
      yerr=errors if len(values) > 1 else None,
      fmt=ADDED.get(row.added, MARKERS[row.order]),
      color=COLORS[row.criterion],
      capsize=3,
      label=f'{row.method}, {row.order}',
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


def draw_best(dense: dict[str, float], results: Results) -> Figure:
  """The paper's method and everything: what the README shows.

  Means over seeds, and their ranges, on held-out news against the parameters
  kept; both lines go on to the dense model.
  """
  figure = Figure(figsize=(6, 3.2))
  axes = figure.add_subplot()
  for label, color, is_chosen in (
    ('LoRAPrune', '#888', operator.attrgetter('is_plain')),
    ('lorapr_jax', '#2a6fbb', operator.attrgetter('is_best')),
  ):
    points = [
      (runs[0]['kept'], [run['perplexity'][NEWS] for run in runs])
      for row, runs in results.items()
      if is_chosen(row)
    ]
    points = sorted([*points, (1.0, [dense[NEWS]])])
    means = [statistics.mean(values) for _, values in points]
    below = [m - min(v) for m, (_, v) in zip(means, points, strict=True)]
    above = [max(v) - m for m, (_, v) in zip(means, points, strict=True)]
    axes.errorbar(
      [kept for kept, _ in points],
      means,
      yerr=[below, above],
      fmt='o-',
      color=color,
      capsize=3,
      label=label,
    )
  axes.legend(frameon=False)
  axes.set(xlabel='share of parameters kept', ylabel=f'perplexity, {NEWS}')
  axes.xaxis.set_major_formatter('{x:.0%}')
  axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  return figure


def page(
  dense: dict[str, float],
  results: Results,
  texts: Mapping[str, Mapping[str, str]],
  missing: Sequence[str],
  command: str,
) -> str:
  """docs/results.md."""
  runs = [run for row in results.values() for run in row]
  versions = {
    f'{name} {version}'
    for run in runs
    for name, version in run['versions'].items()
  }
  dates = sorted({run['date'] for run in runs})
  period = ' to '.join(dict.fromkeys((dates[0], dates[-1])))
  specs = '; '.join(
    f'{name} is `{text["spec"]}`' for name, text in texts.items()
  )
  rest = ', '.join(missing) or 'none'
  return f"""# LoRAPrune beside the alternatives

{period}; {', '.join(sorted(versions))}. Every figure is in
[results.json](results.json). Runs of the list that are not made yet: {rest}.

```sh
PYTHONPATH=. {command}
```

The model is SmolLM2-135M-Instruct with its three KV heads repeated to nine. A
run takes 100 steps of 8 x 128 tokens of news, with rank 8 and a learning rate
of 1e-3, down to 0 in each phase. The first tenth of the layers and the last one
stay whole. In the other layers "50%" removes 4 of 9 heads and 768 of 1,536
channels, and "20%" removes 1 and 284: the counts of the reference
implementation. `joint` prunes while LoRA trains. `prune_then_tune` prunes after
10 steps that only measure, and then trains LoRA for the other 90. `none` prunes
after those 10. A row without a `+` is the paper's method
(`configs/paper.py:smollm2_135m`). After a `+` comes what is added to it, with
its own defaults:

- `own`: `prune.lora_gradient=own`
- `compensation`: `prune.compensate=ridge`
- `distillation`: `train.distill=0.5`, from the dense model's 64 most
  probable tokens
- `recovery`: the first 60 steps prune, the other 40 train what is left
- `everything`: `configs/smollm2_135m.py`, the demo's config, with 24 steps that
  only measure

Perplexity is at {SEQ_LEN} tokens, on the first {WINDOWS} windows of each text:
{specs}.
A range in brackets is that of the seeds. A row without one is a single run.

{table(dense, results, texts)}

![Perplexity against the share of parameters kept](figures/compare.svg)

## What the numbers say

{leaders(results, texts)}

Against joint lora at the same share of groups:

{findings(results, texts)}

A difference smaller than the range of joint lora's seeds says nothing. For a
row with one seed that range is the only measure of chance. Peak memory is the
process's; `gradient` pays for a gradient of every weight. Tokens per second say
little: other work ran beside each run, and not all runs were on one machine.
"""
