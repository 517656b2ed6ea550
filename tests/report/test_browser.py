"""The pages in a real browser, in both themes, on a screen and a phone."""

import importlib.util
import os
from pathlib import Path

import pytest

from lorapr_jax.exploring.page import render_exploration
from lorapr_jax.report.page import render_comparison, render_report
from tests.report.explored import RESULT

_PATH = Path(__file__).with_name('chromium.py')
_SPEC = importlib.util.spec_from_file_location('chromium', _PATH)
chromium = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(chromium)

_MISSING = 'Chromium is not on the PATH: apt-get install chromium'
# Where changes are checked a skip would go unseen: there the tests fail.
pytestmark = [
  pytest.mark.browser,
  pytest.mark.skipif(
    chromium.PATH is None and not os.environ.get('CI'), reason=_MISSING
  ),
]
_MESSAGES = (
  *('Log.entryAdded', 'Runtime.consoleAPICalled', 'Runtime.exceptionThrown'),
  'Network.requestWillBeSent',
)


@pytest.fixture(scope='module')
def browser():
  assert chromium.PATH is not None, _MISSING
  with chromium.Browser() as browser:
    yield browser


@pytest.fixture(scope='module')
def pages(finished_run, tmp_path_factory):
  texts = {
    'report': render_report(finished_run),
    'comparison': render_comparison([finished_run, finished_run]),
    'explored': render_exploration(RESULT, {}),
  }
  folder = tmp_path_factory.mktemp('pages')
  paths = {name: folder / f'{name}.html' for name in texts}
  for name, text in texts.items():
    paths[name].write_text(text, encoding='utf-8')
  return paths


def messages(browser):
  """What the page logged and asked for, but for the page itself."""
  found = [e for e in browser.events if e.get('method') in _MESSAGES]
  return found[1:] if found[0]['params'].get('type') == 'Document' else found


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1200, 390, 320])
@pytest.mark.parametrize('name', ['report', 'comparison', 'explored'])
def test_a_page_is_quiet_and_fits(browser, pages, name, width, theme):
  browser.open(pages[name], width=width, theme=theme)
  assert browser.evaluate('document.querySelectorAll("svg").length') > 0
  assert messages(browser) == []
  assert browser.evaluate('document.documentElement.scrollWidth') <= width


def test_a_message_and_a_request_would_be_seen(browser, tmp_path):
  page = tmp_path / 'loud.html'
  page.write_text('<script>console.log(1)</script><img src="x.png">')
  browser.open(page, width=390, theme='light')
  methods = {event['method'] for event in messages(browser)}
  assert {'Runtime.consoleAPICalled', 'Network.requestWillBeSent'} <= methods


# WCAG's contrast of two colours, each as the browser resolves it.
_CONTRAST = """(() => {
  const channel = (v) =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => {
    const [r, g, b] = color.match(/[0-9.]+/g).map((v) => channel(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  const of = (name) => {
    const node = document.createElement('i');
    node.style.color = `var(--${name})`;
    document.body.append(node);
    const other = luminance(getComputedStyle(node).color);
    node.remove();
    const [low, high] = [page, other].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  return Object.fromEntries(
    ['ink', 'muted', 'kept', 'cut', 'dense'].map((name) => [name, of(name)]));
})()"""


def test_the_themes_differ_and_colours_stand_out(browser, pages):
  grounds = set()
  for theme in ('light', 'dark'):
    browser.open(pages['report'], width=390, theme=theme)
    grounds.add(
      browser.evaluate('getComputedStyle(document.body).backgroundColor')
    )
    contrast = browser.evaluate(_CONTRAST)
    assert contrast['ink'] > 7 and contrast['muted'] > 4.5, (theme, contrast)
    assert min(contrast.values()) > 3, (theme, contrast)
  assert len(grounds) == 2


def test_a_figure_is_legible_on_a_phone(browser, pages):
  browser.open(pages['report'], width=375, theme='light')
  # A rotated label has its scale in b.
  sizes = browser.evaluate(
    '[...document.querySelectorAll("svg text")].map((text) => {'
    'const {b, d} = text.getScreenCTM();'
    'return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(b, d)})'
  )
  assert len(sizes) > 80 and min(sizes) > 9


def test_it_prints(browser, pages, tmp_path):
  browser.open(pages['report'], width=1200, theme='dark')
  browser.pdf(tmp_path / 'report.pdf')
  assert (tmp_path / 'report.pdf').read_bytes().startswith(b'%PDF-')
