"""The lock of a workdir: of the living, of the dead, and of other hosts."""

import json
import os
from pathlib import Path
import subprocess
import sys
import threading
import time

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.runtime import lock
from lorapr_jax.runtime.leftovers import is_alive, reach

ROOT = Path(__file__).parents[2]
# Imports no JAX, and holds a lock until it is killed.
HOLDER = """
import sys, time
from pathlib import Path
from lorapr_jax.runtime import lock
lock.BEAT = 0.1
with lock.holding(Path(sys.argv[1]), print):
  print('held', flush=True)
  time.sleep(600)
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
  for name, seconds in ('BEAT', 0.1), ('SILENCE', 1.0), ('SETTLE', 0.1):
    monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def workdir(tmp_path):
  return tmp_path / 'runs' / 'mine'


def silent(text):
  raise AssertionError(text)


def start_holder(workdir):
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, workdir],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'held\n'
  return process


def of_another_host(path):
  record = json.loads(path.read_text())
  path.write_text(json.dumps(record | {'host': 'far', 'reach': 'far'}))
  return path


def test_it_is_there_in_the_block_and_leaves_nothing(workdir):
  with lock.holding(workdir, silent) as check:
    record = json.loads((workdir / 'run.lock').read_text())
    assert record['process'] == os.getpid()
    check()
  assert not workdir.parent.exists()
  workdir.mkdir(parents=True)
  with lock.holding(workdir, silent):
    (workdir / 'run.json').write_text('{}')
  assert [path.name for path in workdir.iterdir()] == ['run.json']


def test_of_a_living_process_it_is_refused_and_of_a_dead_one_it_is_free(
  workdir,
):
  process = start_holder(workdir)
  held = (workdir / 'run.lock').read_bytes()
  since, host = (json.loads(held)[key] for key in ('since', 'host'))
  with pytest.raises(UserError) as error, lock.holding(workdir, silent):
    pass
  assert str(error.value) == (
    f'another process is running in {workdir} since {since} (process '
    f'{process.pid} on {host}): wait until it has ended, or choose another '
    '--workdir'
  )
  assert (workdir / 'run.lock').read_bytes() == held

  process.kill()
  # It is free before its parent has asked how it ended, and after.
  begin = time.monotonic()
  while time.monotonic() - begin < 30:
    if not is_alive(process.pid):
      break
  assert process.returncode is None
  begin = time.monotonic()
  with lock.holding(workdir, silent) as check:
    check()
  assert time.monotonic() - begin < lock.SILENCE
  process.communicate()
  assert not is_alive(process.pid)


def test_of_another_host_it_is_free_after_a_silence(workdir):
  process = start_holder(workdir)
  process.kill()
  process.communicate()
  of_another_host(workdir / 'run.lock')
  said, begin = [], time.monotonic()
  with lock.holding(workdir, said.append) as check:
    check()
  assert time.monotonic() - begin > lock.SILENCE
  assert said == [
    f'waiting up to 1 s for a sign of process {process.pid} on far, which was '
    f'running in {workdir}'
  ]


def test_of_another_host_that_is_alive_it_is_refused(workdir):
  with lock.holding(workdir, silent):
    path = of_another_host(workdir / 'run.lock')
    ended = threading.Event()

    def touch():
      while not ended.wait(0.1):
        os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(UserError, match='on far'), lock.holding(workdir, print):
      pass
    ended.set()
    thread.join()


def test_who_has_lost_it_is_told(workdir):
  with lock.holding(workdir, silent) as check:
    path = of_another_host(workdir / 'run.lock')
    with pytest.raises(UserError, match='run.lock is not of this process any'):
      check()
  assert path.exists()  # It is another's.


@pytest.mark.parametrize(
  'content',
  [
    *(b'', b'{"since"', b'\xff\x00', b'[1]', b'null', b'{}'),
    *(b'{"process": "1"}', b'{"process": -1}', b'{"process": 1e99}'),
    b'{"process": 99999999999999999999}',
  ],
)
def test_one_that_says_nothing_is_free_after_a_silence(
  workdir, content, monkeypatch
):
  monkeypatch.setattr(lock, 'SILENCE', 0.1)
  workdir.mkdir(parents=True)
  record = content
  if content.startswith(b'{"process'):
    record = json.dumps(json.loads(content) | {'reach': reach()}).encode()
  (workdir / 'run.lock').write_bytes(record)
  with lock.holding(workdir, print) as check:
    check()
    assert (workdir / 'run.lock').read_bytes() != record
  assert not (workdir / 'run.lock').exists()


def test_one_of_many_gets_what_a_dead_process_left(workdir):
  process = start_holder(workdir)
  process.kill()
  process.communicate()
  together, ended = threading.Barrier(6), threading.Event()
  results = []

  def work():
    together.wait()
    try:
      with lock.holding(workdir, print) as check:
        ended.wait(30)
        check()
        results.append('held')
    except UserError as error:
      results.append(str(error).partition(' in ')[0])

  threads = [threading.Thread(target=work) for _ in range(6)]
  for thread in threads:
    thread.start()
  while len(results) < 5 and any(t.is_alive() for t in threads):
    time.sleep(0.01)
  ended.set()
  for thread in threads:
    thread.join()
  assert results == ['another process is running'] * 5 + ['held']
