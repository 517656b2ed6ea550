"""The figures of docs/results.md and of the README."""

import operator
import statistics

from matplotlib.figure import Figure

from benchmarks.peers import PEERS
from benchmarks.results_rows import (
  ADDITIONS,
  NEWS,
  OURS,
  PAPER,
  STEPS,
  TOGETHER,
  Results,
)
from lorapr_jax.pruning.importance import CRITERIA
from lorapr_jax.settings.model import ORDERS

COLORS = dict(
  zip(
    CRITERIA,
    ('#2a6fbb', '#c44e52', '#55a868', '#dd8452', '#8172b2', '#888', '#17becf'),
    strict=True,
  )
)
MARKERS = dict(zip(ORDERS, 'osx', strict=True))
ADDED = dict(zip((*ADDITIONS, *TOGETHER), 'pd<*8hX>', strict=True))


def draw(dense: dict[str, float], results: Results) -> Figure:
  """Perplexity on held-out news against the parameters kept."""
  figure = Figure(figsize=(7, 4))
  axes = figure.add_subplot()
  axes.plot([1.0], [dense[NEWS]], 'D', color='black', label='dense')
  for row, runs in results.items():
    if row.way or row.steps != STEPS:
      continue
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
  """The paper's method, the peers and everything: what the README shows.

  Means over seeds, and their ranges, on held-out news against the parameters
  kept; the lines go on to the dense model.
  """
  figure = Figure(figsize=(6, 3.2))
  axes = figure.add_subplot()
  for label, color, is_chosen in (
    (PAPER, '#888', operator.attrgetter('is_plain')),
    (OURS, '#2a6fbb', operator.attrgetter('is_best')),
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
  for peer, marker in zip(PEERS, 's^', strict=True):
    news = peer.perplexity[NEWS]
    axes.plot([peer.kept], [news], marker, color='#dd8452', label=peer.name)
  axes.legend(frameon=False)
  axes.set(xlabel='share of parameters kept', ylabel=f'perplexity, {NEWS}')
  axes.xaxis.set_major_formatter('{x:.0%}')
  axes.spines[['top', 'right']].set_visible(False)
  figure.tight_layout()
  return figure
