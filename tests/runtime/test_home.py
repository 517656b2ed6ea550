"""The home folder, and where there is none."""

import os
from pathlib import Path

import pytest

import lorapr_jax as lp
from lorapr_jax.data.hub import parse_hub
from lorapr_jax.data.text_files import find_files
from lorapr_jax.errors import UserError
from lorapr_jax.runtime.compilation_cache import keep_compiled
from lorapr_jax.runtime.files import cache_dir
from lorapr_jax.runtime.paths import path_of
from lorapr_jax.settings.files import find_config


def test_a_tilde_is_the_home_folder_wherever_a_name_enters(
  tmp_path, monkeypatch
):
  home, here = tmp_path / 'home', tmp_path / 'here'
  for folder in home, here, home / 'data':
    folder.mkdir()
  monkeypatch.chdir(here)
  monkeypatch.setenv('HOME', str(home))
  (home / 'a.txt').write_text('word')
  (home / 'c.py').write_text('')
  assert path_of('~/a.txt') == home / 'a.txt'
  assert path_of('~') == home
  assert find_files('~/a.txt') == find_files('~/*.txt') == [home / 'a.txt']
  assert find_config('~/c.py') == home / 'c.py'
  assert parse_hub('~/data').name == str(home / 'data')
  # What is called so is no home.
  assert path_of('./~') == path_of(Path('~')) == Path('~')
  assert path_of('~nobody-of-this-name/x') == Path('~nobody-of-this-name/x')
  with pytest.raises(UserError, match=f'{home}/none is not a folder'):
    lp.load('~/none')


@pytest.fixture
def no_home(monkeypatch):
  """As in a container, for a user that it does not know."""
  monkeypatch.delenv('HOME')
  monkeypatch.delenv('LORAPR_CACHE', raising=False)

  def unknown(number):
    raise KeyError(number)

  monkeypatch.setattr('pwd.getpwuid', unknown)


@pytest.mark.usefixtures('no_home')
def test_without_a_home_folder_what_needs_one_says_so(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='~/runs/x: there is no home folder'):
    path_of('~/runs/x')
  with pytest.raises(UserError, match='set LORAPR_CACHE to a folder'):
    cache_dir()
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  keep_compiled()
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path))
  assert cache_dir() == tmp_path
