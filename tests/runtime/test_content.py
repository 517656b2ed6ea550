"""A file's hash is of what it holds, and is made once."""

import contextlib
import hashlib
import os
import threading

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.runtime import content
from lorapr_jax.runtime.content import hashing, sha256_of


def sha256(data):
  return hashlib.sha256(data).hexdigest()


@pytest.fixture
def file(tmp_path, monkeypatch):
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  path = tmp_path / 'file'
  path.write_bytes(b'one')
  return path


def test_what_was_just_written_is_read_each_time(file):
  for data in (b'one', b'two', b'six'):
    file.write_bytes(data)
    os.utime(file, ns=(0, 0))  # As a copy that keeps its time.
    assert sha256_of(file) == sha256(data)
  assert not (file.parent / 'cache').exists()


def test_a_file_that_has_not_changed_is_read_once(file, monkeypatch):
  monkeypatch.setattr(content, '_SETTLED_NS', 0)
  monkeypatch.setattr(content, '_LARGE', 1)
  assert sha256_of(file) == sha256(b'one')
  [entry] = (file.parent / 'cache' / 'hashes').iterdir()
  assert entry.read_text() == sha256(b'one')
  # What the cache says is taken by the next process, but not by this one.
  entry.write_text(sha256(b'of the cache'))
  assert sha256_of(file) == sha256(b'one')
  monkeypatch.setattr(content, '_known', {})
  assert sha256_of(file) == sha256(b'of the cache')
  file.write_bytes(b'two!')
  assert sha256_of(file) == sha256(b'two!')


@pytest.mark.parametrize('text', [b'', b'0' * 63, b'\xff' * 64, b'g' * 64])
def test_a_damaged_entry_is_made_anew(text, file, monkeypatch):
  monkeypatch.setattr(content, '_SETTLED_NS', 0)
  monkeypatch.setattr(content, '_LARGE', 1)
  sha256_of(file)
  [entry] = (file.parent / 'cache' / 'hashes').iterdir()
  entry.write_bytes(text)
  monkeypatch.setattr(content, '_known', {})
  assert sha256_of(file) == sha256(b'one') == entry.read_text()


def test_the_cache_need_not_take_it(file, monkeypatch):
  monkeypatch.setattr(content, '_SETTLED_NS', 0)
  monkeypatch.setattr(content, '_LARGE', 1)
  (file.parent / 'cache').write_text('a file in the way')
  assert sha256_of(file) == sha256(b'one')


def test_what_cannot_be_read_is_named(tmp_path):
  with pytest.raises(UserError, match='nothing cannot be read: No such file'):
    sha256_of(tmp_path / 'nothing')
  with (
    pytest.raises(UserError, match='nothing cannot be read'),
    hashing([tmp_path / 'nothing']) as hashes,
  ):
    hashes()


def test_hashing_ends_with_its_block(tmp_path):
  endless, written = tmp_path / 'endless', threading.Event()
  os.mkfifo(endless)

  def write():
    with contextlib.suppress(BrokenPipeError), endless.open('wb') as pipe:
      while True:
        pipe.write(bytes(2**20))
        written.set()

  writer = threading.Thread(target=write, daemon=True)
  with hashing([endless]):
    writer.start()
    written.wait()
  writer.join(60)
  assert not writer.is_alive()  # Nobody reads any more.
