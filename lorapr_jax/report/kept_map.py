"""Draws the report's map of the members that every layer keeps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorapr_jax.report.plots import locator
from lorapr_jax.report.svg import CUT, KEPT, figure

# The most columns of a map.
MAX_COLUMNS = 64
_SHADES = 8


def kept_map(name: str, label: str, kept: np.ndarray) -> str:
  """Maps which members (in the plural: `label`) every layer keeps.

  More than 64 members are put into bins; the shade of a bin is the share of its
  members that is kept. `kept` is (layers, members), bool.
  """
  layers, members = kept.shape
  columns = min(members, MAX_COLUMNS)
  edges = np.linspace(0, members, columns + 1).round().astype(int)
  shares = np.add.reduceat(kept, edges[:-1], axis=1) / np.diff(edges)
  counts = kept.sum(axis=1)

  def draw(axes):
    axes.patch.set_visible(False)
    gap = 0.12 if columns == members else 0.0
    _draw_squares(axes, shares, members / columns, gap)
    axes.set_xlim(0, members)
    axes.set_ylim(layers, 0)
    axes.grid(False)
    axes.spines['bottom'].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(label)
    axes.set_ylabel('layer')
    if columns == members:
      marks = _marks(members)
      axes.set_xticks([i + 0.44 for i in marks], [str(i) for i in marks])
    else:
      axes.xaxis.set_major_locator(locator())
    marks = _marks(layers)
    axes.set_yticks([i + 0.44 for i in marks], [str(i) for i in marks])
    for first, last in runs(counts):
      axes.text(
        members * 1.02,
        (first + last) / 2 + 0.44,
        f'{counts[first]:,}',
        va='center',
      )

  height = 56 + min(max(11 * layers, 90), 620)
  return figure(name, f'{label} kept by layer', draw, height)


def _draw_squares(
  axes: Any, shares: np.ndarray, width: float, gap: float
) -> None:
  """Draws a rectangle for each share; `gap` is the part of it left free."""
  from matplotlib.patches import PathPatch
  from matplotlib.path import Path

  square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], float)
  shades = np.ceil(shares * _SHADES).astype(int)
  for shade in range(_SHADES + 1):
    at = np.argwhere(shades == shade)[:, ::-1]
    if not len(at):
      continue
    # One path for all squares of a shade keeps the file small.
    corners = at[:, None] * [width, 1] + square * [(1 - gap) * width, 0.88]
    codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY] * len(at)
    axes.add_patch(
      PathPatch(
        Path(corners.reshape(-1, 2), codes),
        color=KEPT if shade else CUT,
        alpha=shade / _SHADES if shade else 0.3,
        lw=0,
      )
    )


def _marks(count: int) -> range:
  every = next(step for step in (1, 2, 5, 10, 20, 50) if count <= 12 * step)
  return range(0, count, every)


def runs(counts: Sequence[int]) -> list[tuple[int, int]]:
  """The (first, last) index of each run of equal counts."""
  starts = [i for i, c in enumerate(counts) if not i or c != counts[i - 1]]
  ends = [*(start - 1 for start in starts[1:]), len(counts) - 1]
  return list(zip(starts, ends, strict=True))
