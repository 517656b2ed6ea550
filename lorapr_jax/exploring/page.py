"""The page of an exploration: one HTML file, as the report is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import json
from typing import Any, NamedTuple

import numpy as np

from lorapr_jax.exploring.asked import DENSE, QUANTIZED
from lorapr_jax.exploring.ways import WAYS
from lorapr_jax.report import svg, units
from lorapr_jax.report.page import render
from lorapr_jax.report.plots import log_axis

# In what a way is drawn, by the names of the style sheet.
_COLORS = {'kept': svg.KEPT, 'cut': svg.CUT, 'ink': svg.INK}
_ROLES = dict(zip(WAYS, _COLORS, strict=True))

Row = Mapping[str, Any]


class Against(NamedTuple):
  """What perplexities are drawn against.

  Attributes:
    name: of the figure, unique in the page.
    label: along the horizontal axis.
    of: what of a row that is; None: it has none.
    form: how that is written.
  """

  name: str
  label: str
  of: Callable[[Row], float | None]
  form: Callable[[float], str]


def render_exploration(
  result: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
  """The page of what `describe` gives, with the settings behind it."""
  return render(
    'explore.html.jinja',
    result=result,
    roles=_roles(result['rows']),
    figures=[
      {'title': x.label, 'marks': x == BYTES, 'svg': draw(x, result['rows'])}
      for x in _figures(result)
    ],
    config_json=json.dumps(config, indent=2, ensure_ascii=False),
  )


def _roles(rows: Sequence[Row]) -> dict[str, str]:
  """What each way that rows have is drawn in."""
  ways = {row['way'] for row in rows}
  return {way: role for way, role in _ROLES.items() if way in ways}


BYTES = Against(
  'bytes', 'Bytes of the weights', lambda row: row['bytes'], units.size
)


def _figures(result: Mapping[str, Any]) -> Iterator[Against]:
  rows = result['rows']
  dense = rows[0]['parameters']

  def of_sizes(of: Callable[[Row], float]) -> Callable[[Row], float | None]:
    return lambda row: None if row['way'] in QUANTIZED else of(row)

  def seconds(phase: str) -> Callable[[Row], float | None]:
    return lambda row: row['latency'] and row['latency'][phase]['seconds']

  share = of_sizes(lambda row: row['parameters'] / dense)
  yield Against('parameters', 'Parameters that stay', share, '{:.0%}'.format)
  yield BYTES
  if len({row['kv_cache_bytes'] for row in rows}) > 1:
    label = f'KV cache of {result["context"]:,} tokens'
    cache = of_sizes(lambda row: row['kv_cache_bytes'])
    yield Against('cache', label, cache, units.size)
  if result['timed_on']:
    for phase, what in (('prefill', 'prompt'), ('decode', 'token')):
      of, form = seconds(phase), units.milliseconds
      yield Against(phase, f'Time of a {what}', of, form)


def draw(against: Against, rows: Sequence[Row]) -> str:
  """Plots the perplexities of a result that are finite."""

  def points(*ways: str) -> np.ndarray:
    found = [
      (x, row['perplexity']['value'])
      for row in rows
      if row['way'] in ways and (x := against.of(row)) is not None
    ]
    found = np.array(found, float).reshape(-1, 2)
    return found[np.isfinite(found[:, 1])]

  def drawn(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for way, role in _roles(rows).items():
      axes.plot(*points(DENSE, way).T, 'o-', color=_COLORS[role], ms=4)
    axes.plot(*points(DENSE).T, 'o', color=svg.DENSE, mfc='none', ms=9)
    for kind in QUANTIZED:
      for point in points(kind):
        axes.plot(*point, 'D', color=svg.INK, ms=5)
        axes.annotate(kind, point, xytext=(6, 5), textcoords='offset points')
    values = points(DENSE, *WAYS, *QUANTIZED)[:, 1]
    if values.size and values.max() > 8 * values.min():
      log_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    form = FuncFormatter(lambda x, _: against.form(x))
    axes.xaxis.set_major_formatter(form)
    axes.set_xlabel(against.label)
    axes.margins(0.1)

  return svg.figure(against.name, f'Perplexity: {against.label}', drawn, 260)
