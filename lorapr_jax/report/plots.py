"""Draws the report's figures. Empty data draw an empty figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorapr_jax.report.run import Scores
from lorapr_jax.report.svg import CUT, DENSE, INK, KEPT, RULE, figure

# The quantiles at the edges of a band of importance.
_LOW, _HIGH = 0.1, 0.9

Records = Sequence[Mapping[str, Any]]


def _series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
  points = [(r['step'] + 1, r[key]) for r in records if key in r]
  steps, values = np.array(points, float).reshape(-1, 2).T
  return steps, np.where(np.isfinite(values), values, np.nan)


def ramp(records: Records) -> tuple[float, float] | None:
  """The logged steps between which groups were masked.

  None where as many groups were masked at the first as at the last.
  """
  steps, kept = _series(records, 'params_kept')
  if not kept.size or kept[0] == kept[-1]:
    return None
  first = max(0, np.flatnonzero(kept != kept[0])[0] - 1)
  last = np.flatnonzero(kept == kept[-1])[0]
  return steps[first], steps[last]


def _shade_ramp(axes: Any, records: Records) -> None:
  if steps := ramp(records):
    axes.axvspan(*steps, color=RULE, alpha=0.45, lw=0)


def _step_axis(axes: Any) -> None:
  axes.set_xlabel('step')
  axes.margins(x=0.02)
  axes.xaxis.set_major_locator(locator())


def locator() -> Any:
  """Places at most five marks of an axis, at whole numbers."""
  from matplotlib.ticker import MaxNLocator

  return MaxNLocator(5, integer=True)


def loss(records: Records) -> str:
  """Plots the loss of every logged step, and its running mean."""
  steps, values = _series(records, 'loss')

  def draw(axes):
    _shade_ramp(axes, records)
    finite = np.isfinite(values)
    width = 2 * (finite.sum() // 20) + 1
    strength = 0.55 if width > 1 else 1
    axes.plot(steps, values, 'o-', color=KEPT, lw=0.9, ms=1.8, alpha=strength)
    if width > 1:
      padded = np.pad(values[finite], width // 2, mode='reflect')
      mean = np.convolve(padded, np.full(width, 1 / width), 'valid')
      axes.plot(steps[finite], mean, color=KEPT)
    _step_axis(axes)

  return figure('loss', 'Loss over steps', draw)


def sparsity(records: Records) -> str:
  """Plots the shares that are removed, of parameters and of each kind."""

  def draw(axes):
    from matplotlib.ticker import PercentFormatter

    lines = (
      ('channels_sparsity', CUT, '-'),
      ('heads_sparsity', KEPT, '--'),
      ('layers_sparsity', INK, '-'),
    )
    for key, color, style in lines:
      steps, values = _series(records, key)
      axes.step(steps, values, style, where='post', color=color)
    steps, kept = _series(records, 'params_kept')
    axes.step(steps, 1 - kept, ':', where='post', color=DENSE)
    axes.set_ylim(0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _step_axis(axes)

  return figure('sparsity', 'Shares removed over steps', draw)


def perplexity(
  records: Records, dense: float, pruned: float, last_step: int
) -> str:
  """Plots the perplexity over steps, and that of the dense and pruned model."""
  steps, values = _series(records, 'perplexity')

  def draw(axes):
    _shade_ramp(axes, records)
    axes.axhline(dense, color=DENSE, ls='--', lw=1.4)
    axes.plot(steps, values, 'o-', color=KEPT, ms=3.5)
    axes.plot([last_step], [pruned], 'D', color=CUT, ms=6)
    seen = np.array([dense, pruned, *values[np.isfinite(values)]])
    if seen.max() > 8 * seen.min():
      log_axis(axes)
    axes.set_xlim(0)
    _step_axis(axes)

  return figure('perplexity', 'Perplexity over steps', draw)


def log_axis(axes: Any) -> None:
  """Makes the vertical axis logarithmic, with few marks."""
  from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

  axes.set_yscale('log')
  low, high = axes.get_ylim()
  wide = high > 10 * low
  locator = (
    LogLocator(subs=(1.0, 3.0)) if wide else MaxNLocator(5, steps=[1, 2, 5, 10])
  )
  axes.yaxis.set_major_locator(locator)
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:.3g}'))
  axes.minorticks_off()


def importance_bands(
  name: str, label: str, scores: Mapping[int, Scores]
) -> str:
  """Plots the importance of kept and of cut groups by layer.

  It shows the median, and a band from the 10% to the 90% quantile.
  """

  def draw(axes):
    for kept, color in ((False, CUT), (True, KEPT)):
      levels = np.full((3, max(scores) + 1), np.nan)
      for layer, (values, mask) in scores.items():
        chosen = values[(mask == kept) & (values > 0)]
        if chosen.size:
          levels[:, layer] = np.quantile(chosen, (_LOW, 0.5, _HIGH))
      at = np.arange(levels.shape[1])
      axes.fill_between(at, levels[0], levels[2], color=color, alpha=0.2, lw=0)
      axes.plot(at, levels[1], 'o-', color=color, ms=3)
    log_axis(axes)
    axes.set_xlabel('layer')
    axes.xaxis.set_major_locator(locator())

  return figure(name, f'Importance of {label} by layer', draw)


def over_cut_line(scores: Mapping[int, Scores]) -> dict[str, np.ndarray]:
  """The importance of kept and of cut groups, divided by their row's cut line.

  As many groups are above the cut line as were kept. The line is the geometric
  mean of the two values on either side of it. Values that are not positive have
  no logarithm and are left out, and so are rows of which all was kept or cut.
  """
  found: dict[str, list[np.ndarray]] = {'kept': [], 'cut': []}
  for values, mask in scores.values():
    for row, kept in zip(values, mask, strict=True):
      count = int(kept.sum())
      ranked = np.sort(row)[::-1]
      if count in (0, len(row)) or not ranked[count] > 0:
        continue
      line = np.sqrt(ranked[count - 1] * ranked[count])
      for name, chosen in (('kept', kept), ('cut', ~kept)):
        found[name].append(row[chosen & (row > 0)] / line)
  return {
    name: np.concatenate(parts) if parts else np.empty(0)
    for name, parts in found.items()
  }


def importance_histogram(
  name: str, label: str, ratios: Mapping[str, np.ndarray]
) -> str:
  """Plots how far from the cut line the groups are; see `over_cut_line`."""
  values = np.log2(np.concatenate([ratios['cut'], ratios['kept']]))
  low, high = np.quantile(values, (0.002, 0.998))
  # The cut line is an edge of two bins.
  width = max((high - low) / 40, 1e-6)
  edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)

  def draw(axes):
    from matplotlib.ticker import FuncFormatter

    for kind, color in (('cut', CUT), ('kept', KEPT)):
      inside = np.clip(np.log2(ratios[kind]), edges[0], edges[-1])
      counts, _ = np.histogram(inside, edges)
      axes.stairs(counts, edges, color=color, fill=True, alpha=0.35, lw=0)
      axes.stairs(counts, edges, color=color, lw=1.4)
    axes.axvline(0, color=INK, lw=1, ls='--')
    axes.xaxis.set_major_locator(locator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{2**x:.3g}'))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f'{y:,.0f}'))
    axes.yaxis.set_major_locator(locator())
    axes.set_xlabel('importance over the cut line')

  return figure(name, f'Distribution of importance of {label}', draw)


def perplexity_against_size(
  points: Sequence[tuple[str, float, float]],
  dense: Sequence[tuple[float, float]],
) -> str:
  """Plots the perplexity of runs against the share of parameters they keep.

  A point is (label, share kept, perplexity); `dense` are those of the models
  before pruning, without labels.
  """

  def draw(axes):
    from matplotlib.ticker import PercentFormatter

    axes.plot(*zip(*dense, strict=True), 'o', color=DENSE, mfc='none', ms=7)
    for mark, share, value in points:
      axes.plot([share], [value], 'o', color=KEPT, ms=6)
      axes.annotate(
        mark,
        (share, value),
        xytext=(6, 5),
        textcoords='offset points',
      )
    values = [value for *_, value in (*points, *dense)]
    if max(values) > 8 * min(values):
      log_axis(axes)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel('parameters kept')
    axes.margins(0.1)

  return figure('comparison', 'Perplexity against parameters kept', draw, 280)
