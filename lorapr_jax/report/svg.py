"""Turns matplotlib drawings into SVG elements of a page.

A figure is as wide as a phone's screen, so that its text is legible there. Its
colours are named by their use; the page's style sheet has a light and a dark
colour for each. Its text is in the page's font. Equal data gives equal SVG.
"""

from collections.abc import Callable
import html
import io
import re
from typing import Any

# In pixels; the page scales a figure to the room that it has.
WIDTH, HEIGHT = 360, 230
# matplotlib knows no CSS variables: each of these colours stands for one.
_NAMES = 'ink', 'muted', 'rule', 'kept', 'cut', 'dense'
_ROLES = {f'#0000a{i}': name for i, name in enumerate(_NAMES, 1)}
INK, MUTED, RULE, KEPT, CUT, DENSE = _ROLES
_STYLE = {
  'axes.axisbelow': True,
  'axes.edgecolor': MUTED,
  'axes.grid': True,
  'axes.grid.axis': 'y',
  'axes.labelcolor': MUTED,
  'axes.labelsize': 11,
  'axes.spines.left': False,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'font.sans-serif': ['DejaVu Sans'],
  'font.size': 11,
  'grid.color': RULE,
  'grid.linewidth': 0.8,
  'lines.linewidth': 1.8,
  'lines.solid_capstyle': 'round',
  'lines.solid_joinstyle': 'round',
  'svg.fonttype': 'none',
  'svg.hashsalt': 'lorapr_jax',
  'text.color': INK,
  'text.parse_math': False,
  'xtick.color': MUTED,
  'xtick.labelsize': 11,
  'ytick.color': MUTED,
  'ytick.labelsize': 11,
  'ytick.major.size': 0,
  'ytick.minor.size': 0,
}


def figure(
  name: str, label: str, draw: Callable[[Any], None], height: int = HEIGHT
) -> str:
  """An SVG element with what `draw` draws on matplotlib axes.

  `name` is a prefix of the ids, unique in the page; `label` says what the
  figure shows, for readers who cannot see it; `height` is in pixels.
  """
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context():
    # The user's own style must not change the report.
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    drawing = Figure((WIDTH / 72, height / 72), layout='constrained')
    draw(drawing.subplots())
    text = io.StringIO()
    nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    drawing.savefig(text, format='svg', transparent=True, metadata=nothing)
  return _inline(text.getvalue(), name, label)


def _inline(svg: str, name: str, label: str) -> str:
  box = re.search(r'viewBox="[^"]*"', svg)
  if box is None:
    raise ValueError('the SVG has no viewBox')
  body = svg[svg.index('>', box.end()) + 1 :]
  body = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', body)
  body = body.replace('url(#', f'url(#{name}-')
  body = body.replace('xlink:href="#', f'href="#{name}-')
  # A style sheet here would hold for the whole page.
  body = re.sub(r'<style.*?</style>', '', body, flags=re.S)
  # A hundredth of a pixel is enough.
  body = re.sub(
    r' d="[^"]*"',
    lambda path: re.sub(r'(\.\d\d)\d+', r'\1', path.group()),
    body,
  )
  for color, role in _ROLES.items():
    body = body.replace(color, f'var(--{role})')
  return (
    f'<svg {box.group()} stroke-linejoin="round" role="img" '
    f'aria-label="{html.escape(label)}">' + body.strip()
  )
