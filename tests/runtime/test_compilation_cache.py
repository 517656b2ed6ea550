"""Where what was compiled is kept."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

from lorapr_jax.runtime.compilation_cache import keep_compiled

FOLDER = 'JAX_COMPILATION_CACHE_DIR'
OTHERS = (
  'JAX_COMPILATION_CACHE_MAX_SIZE',
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS',
)


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch, tmp_path):
  for name in (FOLDER, *OTHERS):
    # Set first, so that it is put back whatever was there.
    monkeypatch.setenv(name, '')
    del os.environ[name]
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'new'))


def test_by_default_it_is_a_folder_of_the_cache_for_this_kind_of_cpu(tmp_path):
  keep_compiled()
  folder = Path(os.environ[FOLDER])
  assert folder.parent == tmp_path / 'new' / 'compiled'
  assert all(name in os.environ for name in OTHERS)


@pytest.mark.parametrize('umask', [0o000, 0o077])
def test_nobody_else_may_put_programs_there(umask, tmp_path):
  before = os.umask(umask)
  try:
    for mode in (None, 0o777):
      if mode:
        Path(os.environ.pop(FOLDER)).chmod(mode)
      keep_compiled()
      assert Path(os.environ[FOLDER]).stat().st_mode & 0o777 == 0o700
  finally:
    os.umask(before)


def test_nothing_is_kept_in_a_folder_of_another_user(monkeypatch, caplog):
  keep_compiled()
  folder = Path(os.environ.pop(FOLDER))
  folder.chmod(0o755)
  monkeypatch.setattr(os, 'geteuid', lambda: 12345)
  keep_compiled()
  assert FOLDER not in os.environ
  assert folder.stat().st_mode & 0o777 == 0o755
  [message] = caplog.messages
  assert message.startswith(f'{folder}: what is compiled is not kept (it is of')


def test_a_file_in_place_of_the_folder_is_told(caplog):
  keep_compiled()
  folder = Path(os.environ.pop(FOLDER))
  folder.rmdir()
  folder.write_text('')
  keep_compiled()
  assert FOLDER not in os.environ
  assert 'is not kept (File exists)' in caplog.text


@pytest.mark.parametrize('chosen', ['', 'elsewhere'])
def test_a_folder_that_was_chosen_stays(monkeypatch, chosen):
  monkeypatch.setenv(FOLDER, chosen)
  keep_compiled()
  assert os.environ[FOLDER] == chosen
  assert not any(name in os.environ for name in OTHERS)


def test_nothing_is_kept_in_a_home_that_may_not_be_entered(
  monkeypatch, tmp_path
):
  exists = Path.exists

  # By hand: root, who may run this, may enter any folder.
  def refuse(path):
    if path.is_relative_to(tmp_path):
      raise PermissionError(13, 'Permission denied', str(path))
    return exists(path)

  monkeypatch.setattr(Path, 'exists', refuse)
  keep_compiled()
  assert FOLDER not in os.environ


def test_nothing_is_kept_where_nothing_may_be_written(monkeypatch):
  monkeypatch.setattr(os, 'access', lambda path, mode: False)
  keep_compiled()
  assert FOLDER not in os.environ


ON_A_MESH = """
import jax
from lorapr_jax.runtime.sharding import make_mesh

x = jax.numpy.arange(8.0)
x = jax.device_put(x, jax.NamedSharding(make_mesh({'fsdp': %d}), jax.P('fsdp')))
assert jax.jit(jax.numpy.sum)(x) == 28
"""


@pytest.mark.parametrize('devices', [1, 8])
def test_no_program_of_many_cpu_devices_is_kept(devices, tmp_path):
  simulated = f'--xla_force_host_platform_device_count={devices}'
  cache = {FOLDER: str(tmp_path), OTHERS[1]: '0', 'XLA_FLAGS': simulated}
  cache['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
  subprocess.run(
    [sys.executable, '-c', ON_A_MESH % devices],
    env=os.environ | cache,
    check=True,
  )
  kept = [path.name for path in tmp_path.iterdir()]
  assert any('sum' in name for name in kept) == (devices == 1)
