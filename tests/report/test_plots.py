"""The figures: what they show, and that they can stand in one page."""

import re
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from lorapr_jax.report import kept_map, plots
from lorapr_jax.report.run import Scores
from lorapr_jax.report.svg import KEPT, figure


def records(steps=40, **more):
  return [
    {
      'step': step,
      'loss': 5.0 - step / 20,
      'heads_sparsity': min(step / 60, 0.5),
      'channels_sparsity': min(step / 60, 0.5),
      'params_kept': 1 - min(step / 60, 0.5) / 2,
      **{name: value[step] for name, value in more.items()},
    }
    for step in range(steps)
  ]


def random_scores(rows=1, members=200, kept=120, layers=3):
  rng = np.random.default_rng(0)
  scores = {}
  for layer in range(1, 1 + layers):
    values = rng.lognormal(-6, 0.5, (rows, members))
    ranks = (-values).argsort(axis=1).argsort(axis=1)
    scores[layer] = Scores(values, ranks < kept)
  return scores


FIGURES = {
  'loss': lambda: plots.loss(records()),
  'sparsity': lambda: plots.sparsity(records()),
  'perplexity': lambda: plots.perplexity(
    records(perplexity=[30.0 + s for s in range(40)]), 30.0, 65.0, 40
  ),
  'kept-0': lambda: kept_map.kept_map(
    'kept-0', 'channels', random_scores()[1].kept.repeat(4, axis=0)
  ),
  'bands-0': lambda: plots.importance_bands(
    'bands-0', 'channels', random_scores()
  ),
  'cut-0': lambda: plots.importance_histogram(
    'cut-0', 'channels', plots.over_cut_line(random_scores())
  ),
  'comparison': lambda: plots.perplexity_against_size(
    [('1', 0.7, 100.0), ('2', 0.5, 900.0)], [(1.0, 40.0)]
  ),
}


def texts(svg):
  return re.findall(r'<text[^>]*>([^<]*)</text>', svg)


@pytest.mark.parametrize('name', FIGURES)
def test_a_figure_is_small_repeatable_and_keeps_to_itself(name):
  svg = FIGURES[name]()
  assert svg == FIGURES[name]()
  assert len(svg) < 60_000
  tree = ET.fromstring(svg)
  ids = [node.get('id') for node in tree.iter() if node.get('id')]
  assert len(ids) == len(set(ids))
  assert all(one.startswith(f'{name}-') for one in ids)
  used = re.findall(r'(?:url\(|href=")#([^)"]+)', svg)
  assert set(used) <= set(ids)
  # Colours are the page's: none but `var(--...)` is left.
  assert not re.search(r'(?:fill|stroke): #', svg)
  assert 'var(--muted)' in svg
  assert '://' not in svg and '<style' not in svg
  assert tree.get('viewBox') and tree.get('aria-label')
  assert tree.get('width') is None


def test_the_users_matplotlib_settings_neither_count_nor_change():
  plain = FIGURES['loss']()
  with matplotlib.rc_context({'font.size': 30, 'svg.fonttype': 'path'}):
    assert FIGURES['loss']() == plain
    assert matplotlib.rcParams['font.size'] == 30


def test_text_is_text_and_is_escaped():
  svg = figure('x', '<b> & "c"', lambda axes: axes.set_title('<i> $a$ & b'))
  assert '&lt;i&gt; $a$ &amp; b' in svg
  assert ET.fromstring(svg).get('aria-label') == '<b> & "c"'


def test_a_colour_stands_for_the_pages():
  svg = figure('x', 'a line', lambda axes: axes.plot([0, 1], color=KEPT))
  assert 'stroke: var(--kept)' in svg
  assert KEPT not in svg


def test_loss_that_is_not_finite_leaves_a_gap():
  some = records()
  some[3]['loss'] = float('nan')
  some[4]['loss'] = float('inf')
  assert 'nan' not in plots.loss(some) and 'inf' not in plots.loss(some)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('steps', [1, 2, 30])
def test_few_records_draw(steps):
  for draw in (plots.loss, plots.sparsity):
    assert draw(records(steps)).endswith('</svg>')


def test_a_wide_range_of_perplexity_is_shown_by_factors():
  narrow = texts(plots.perplexity(records(), 30.0, 60.0, 40))
  wide = texts(plots.perplexity(records(), 30.0, 3000.0, 40))
  assert {'100', '300', '1e+03'} <= set(wide)
  assert '100' not in narrow


def test_the_map_says_how_many_each_layer_keeps():
  kept = np.ones((6, 8), bool)
  kept[1:5, 5:] = False
  svg = kept_map.kept_map('kept', 'KV heads', kept)
  assert texts(svg)[-3:] == ['8', '5', '8']
  # One path of squares for kept and one for cut.
  squares = [path.count('M') for path in re.findall(r' d="([^"]*)"', svg)]
  assert {36, 12} <= set(squares)


def test_a_map_of_many_members_shows_shares_of_bins():
  kept = np.zeros((2, 1000), bool)
  kept[0] = True
  kept[1, ::2] = True
  svg = kept_map.kept_map('kept', 'channels', kept)
  assert texts(svg)[-2:] == ['1,000', '500']
  # Bins that keep all are opaque, bins that keep half are not.
  opacities = re.findall(r'var\(--kept\)[^"]*?opacity: ([0-9.]+)', svg)
  assert len(opacities) <= 3 and all(0.4 < float(o) < 0.7 for o in opacities)
  squares = [path.count('M') for path in re.findall(r' d="([^"]*)"', svg)]
  assert 64 in squares


def test_runs_of_equal_counts():
  assert kept_map.runs([9, 9, 6, 6, 6, 9]) == [(0, 1), (2, 4), (5, 5)]
  assert kept_map.runs([3]) == [(0, 0)]


def test_the_cut_line_parts_as_many_as_were_kept():
  values = np.array([[8.0, 4.0, 2.0, 1.0]])
  masks = np.array([[True, True, False, False]])
  ratios = plots.over_cut_line({0: Scores(values, masks)})
  line = np.sqrt(8.0)
  np.testing.assert_allclose(ratios['kept'], [8 / line, 4 / line])
  np.testing.assert_allclose(ratios['cut'], [2 / line, 1 / line])


def test_the_cut_line_is_each_rows_own():
  values = np.array([[4.0, 1.0], [100.0, 400.0]])
  masks = np.array([[True, False], [True, False]])
  ratios = plots.over_cut_line({0: Scores(values, masks)})
  np.testing.assert_allclose(ratios['kept'], [2.0, 0.5])
  np.testing.assert_allclose(ratios['cut'], [0.5, 2.0])


def test_what_has_no_logarithm_is_left_out():
  values = np.array([[4.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
  masks = np.array([[True, False, False], [True, False, False]])
  ratios = plots.over_cut_line({0: Scores(values, masks)})
  np.testing.assert_allclose(ratios['kept'], [2.0])
  np.testing.assert_allclose(ratios['cut'], [0.5])
