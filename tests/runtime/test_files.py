"""A JSON file is read within bounds, whatever lies in its place."""

import json
import os

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import SMALL, read_json


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
