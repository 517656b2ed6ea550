"""Figures of the pages, as files."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def write_svg(figure: Figure, path: Path) -> None:
  """Writes a figure as SVG. Equal figures are equal files."""
  with matplotlib.rc_context({'svg.hashsalt': path.stem}):
    figure.savefig(
      path, facecolor='white', metadata={'Date': None, 'Creator': None}
    )
