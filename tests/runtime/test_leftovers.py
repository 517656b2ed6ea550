"""What is half written, and what a killed process left of it."""

import os
from pathlib import Path
import resource
import subprocess
import sys
import threading

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.runtime import leftovers, lock
from lorapr_jax.runtime.files import new_in_cache, write_text
from lorapr_jax.runtime.paths import new_folder, new_path, remove
from lorapr_jax.runtime.workdir import check_workdir

ROOT = Path(__file__).parents[2]
# Writes a folder and a file, half, and waits to be killed. It imports no JAX.
WRITER = """
import sys, time
from pathlib import Path
from lorapr_jax.runtime import leftovers
from lorapr_jax.runtime.paths import new_folder

folder = Path(sys.argv[1])
with new_folder(folder / 'model') as partial:
  (partial / 'weights').write_bytes(bytes(1000))
  leftovers.half(folder / 'run.json').write_text('{')
  print('writes', flush=True)
  time.sleep(600)
"""


@pytest.fixture
def killed(tmp_path):
  """A process that writes, and is then killed by a call."""
  process = subprocess.Popen(
    [sys.executable, '-c', WRITER, tmp_path],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'writes\n'

  def kill():
    process.kill()
    process.wait()

  yield kill
  kill()
  process.stdout.close()


def write_folder(folder):
  with new_folder(folder / 'other') as partial:
    (partial / 'weights').write_text('x')


def write_file(folder):
  with new_path(folder / 'other') as partial:
    partial.write_text('x')


def write_to_cache(folder):
  with new_in_cache(folder / 'other', 'x') as partial:
    partial.write_text('x')


def take_lock(folder):
  with lock.holding(folder, print):
    (folder / 'other').write_text('x')


@pytest.mark.parametrize(
  'start', [write_folder, write_file, write_to_cache, take_lock]
)
def test_the_next_start_sweeps_what_a_dead_process_left(
  tmp_path, killed, start
):
  mine = {'.hidden', 'other.partial', '.x.12-3-4', '.x.tmp-1'}
  for name in mine:
    (tmp_path / name).write_text('mine')
  start(tmp_path)
  (tmp_path / 'other').rename(tmp_path / 'first')
  # Its process lives: nothing is taken from it.
  assert len(list(tmp_path.iterdir())) == len(mine) + 3
  killed()
  start(tmp_path)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == mine | {'first', 'other'}


def test_of_another_host_what_is_old_goes(tmp_path, monkeypatch):
  monkeypatch.setattr(leftovers, 'reach', lambda: 'far')
  old, new = (leftovers.half(tmp_path / name) for name in ('a', 'b'))
  monkeypatch.undo()
  for folder in old, new:
    folder.mkdir()
    (folder / 'weights').write_text('x')
    os.utime(folder, (0, 0))
  leftovers.sweep(tmp_path)
  assert old.exists()  # A file in it has just changed.
  os.utime(old / 'weights', (0, 0))
  leftovers.sweep(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == [new.name]


def test_two_that_write_one_file_do_not_disturb_each_other(tmp_path):
  path, errors = tmp_path / 'summary.json', []

  def write(text):
    try:
      for _ in range(50):
        write_text(path, text)
    except OSError as error:
      errors.append(error)

  threads = [threading.Thread(target=write, args=[c * 999]) for c in 'abcd']
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert errors == []
  assert path.read_text() in {c * 999 for c in 'abcd'}
  assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_is_named_and_nothing_is_left(tmp_path):
  path = tmp_path / 'run.json'
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
  try:
    with pytest.raises(OSError) as error:
      write_text(path, 'x' * 99)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert error.value.filename == str(path)
  assert error.value.strerror
  assert list(tmp_path.iterdir()) == []


def test_a_workdir_with_what_a_kill_left_is_new(tmp_path):
  leftovers.half(tmp_path / 'run.json').write_text('{')
  (tmp_path / lock.LOCK_FILE).write_text('{')
  check_workdir(tmp_path, {})
  (tmp_path / 'run.json.partial').write_text('{')
  with pytest.raises(UserError, match='no run of ours'):
    check_workdir(tmp_path, {})


def test_what_is_removed_is_gone_but_not_what_a_link_leads_to(tmp_path):
  target = tmp_path / 'target'
  target.mkdir()
  (target / 'x').write_text('x')
  link = tmp_path / 'link'
  link.symlink_to(target)
  remove(link)
  assert (target / 'x').exists() and not link.is_symlink()
  remove(target)
  remove(tmp_path / 'absent')
  assert list(tmp_path.iterdir()) == []


def test_a_long_name_can_be_half_written(tmp_path):
  path = tmp_path / ('字' * 80)
  write_text(path, 'x')
  assert list(tmp_path.iterdir()) == [path]
