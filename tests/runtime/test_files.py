"""A JSON file is read within bounds, whatever lies in its place."""

import json
import math
import os
import random

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import (
  SMALL,
  new_in_cache,
  read_json,
  read_sealed,
  write_sealed,
)


def test_an_object_is_read(tmp_path):
  value = {'größe': [1, 2.5, None, {'a': [[[]]]}], 'b': '\u2028'}
  (tmp_path / 'a').write_text(json.dumps(value), encoding='utf-8')
  assert read_json(tmp_path / 'a') == value


@pytest.mark.parametrize(
  'make',
  [
    lambda path: os.mkfifo(path),
    lambda path: path.symlink_to('/dev/zero'),
    lambda path: path.mkdir(),
  ],
  ids=['pipe', 'device', 'folder'],
)
def test_what_is_no_file_is_not_opened(make, tmp_path):
  make(tmp_path / 'a')
  with pytest.raises(UserError, match='a is not a file$'):
    read_json(tmp_path / 'a')


@pytest.mark.parametrize('most, size', [(SMALL, 2**40), (10, 11)])
def test_no_more_is_read_than_allowed(most, size, tmp_path):
  with (tmp_path / 'a').open('wb') as file:
    file.write(b'{}')
    file.truncate(size)  # The rest takes no place on the disk.
  with pytest.raises(UserError, match='has more than'):
    read_json(tmp_path / 'a', most)


@pytest.mark.parametrize(
  'text, problem',
  [
    (f'{{"a": {"9" * 5000}}}', 'is not JSON: .*5000 digits$'),
    ('{"a": ' + '[' * 100 + ']' * 100 + '}', 'more than 100 deep'),
    ('{"a": ' * 10**5, 'more than 100 deep'),
    ('"\xff"', 'is not JSON'),
    ('[]', 'no JSON object'),
  ],
)
def test_what_cannot_be_used_is_named(text, problem, tmp_path):
  (tmp_path / 'a').write_bytes(text.encode('latin-1'))
  with pytest.raises(UserError, match=problem):
    read_json(tmp_path / 'a')


def test_what_is_just_deep_enough_is_read(tmp_path):
  text = '{"a": ' + '[' * 99 + ']' * 99 + '}'
  (tmp_path / 'a').write_text(text)
  assert read_json(tmp_path / 'a')['a']


def test_a_sealed_object_is_read_as_long_as_nothing_changes(tmp_path):
  value = {'größe': [1, 2.5, None], 'b': {'z': 0.25, 'a': math.inf}}
  path = tmp_path / 'a'
  write_sealed(path, value)
  assert read_sealed(path) == value
  text = path.read_text(encoding='utf-8')
  rng = random.Random(0)
  for _ in range(50):
    at = rng.randrange(len(text))
    if not text[at].isspace():  # Which is not a part of the object.
      path.write_text(text[:at] + text[at + 1 :], encoding='utf-8')
      with pytest.raises(UserError, match='is not'):
        read_sealed(path)


def test_what_is_new_in_the_cache_is_on_the_disk(tmp_path, monkeypatch):
  waited = set()
  monkeypatch.setattr(os, 'fsync', lambda n: waited.add(os.fstat(n).st_ino))
  for content, again in (('old', False), ('new', True), ('late', False)):
    with new_in_cache(tmp_path / 'cache' / 'a', 'a', again=again) as partial:
      # What is damaged goes; what another process has made stays.
      assert (tmp_path / 'cache' / 'a').exists() == (content == 'late')
      partial.mkdir()
      (partial / 'b').write_text(content)
    for path in ('cache', 'cache/a', 'cache/a/b'):
      written = (tmp_path / path).stat().st_ino in waited
      assert written == (content != 'late' or path == 'cache')
    waited.clear()
  assert (tmp_path / 'cache' / 'a' / 'b').read_text() == 'new'
  assert os.listdir(tmp_path / 'cache') == ['a']
