"""Ctrl-C, SIGTERM, SIGHUP; whole runs are in test_train.py."""

import os
from pathlib import Path
import shlex
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from lorapr_jax.errors import Stopped
from lorapr_jax.runtime import ending, interrupt
from lorapr_jax.runtime.interrupt import StopSignals

ROOT = Path(__file__).parents[2]
ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A command of one file that is half written, which waits for a signal. It
# imports no JAX.
COMMAND = """
import sys, time, types
from pathlib import Path
from lorapr_jax.cli.main import main
from lorapr_jax.runtime.paths import new_path

def wait(argv):
  with new_path(Path(argv[0])) as partial:
    partial.write_text('half')
    print('waits', flush=True)
    time.sleep(60)

name = 'lorapr_jax.cli.' + sys.argv[1]
sys.modules[name] = types.ModuleType(name)
sys.modules[name].main = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def handlers():
  """Python's own at the start, whatever the shell has set; back at the end."""
  old = {s: signal.getsignal(s) for s in ALL}
  signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  for signum, handler in old.items():
    signal.signal(signum, handler)


def test_the_first_is_noted_and_the_second_acts_as_ever():
  notices = []
  with StopSignals(lambda: notices.append(1)) as signals:
    assert signals.signum is None
    signal.raise_signal(signal.SIGINT)
    assert signals.signum == signal.SIGINT and notices == [1]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert notices == [1]


def test_sigterm_is_noted_too_and_the_handlers_come_back():
  with StopSignals(lambda: None) as signals:
    signal.raise_signal(signal.SIGTERM)
  assert signals.signum == signal.SIGTERM
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_puts_the_handlers_back():
  with pytest.raises(ValueError), StopSignals(lambda: None):
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    raise ValueError
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with StopSignals(lambda: None) as signals:
    signal.raise_signal(signal.SIGINT)
  assert signals.signum is None
  assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_another_thread_nothing_changes():
  inside = []

  def work():
    with StopSignals(lambda: None) as signals:
      inside.append((signals.signum, signal.getsignal(signal.SIGINT)))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert inside == [(None, signal.default_int_handler)]


def test_the_status_is_the_shells():
  assert Stopped('', signal.SIGINT).status == 130
  assert Stopped('', signal.SIGTERM).status == 143
  assert Stopped('', signal.SIGHUP).status == 129


def test_a_terminal_that_is_closed_hangs_up_twice():
  with StopSignals(lambda: None) as signals:
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    assert signals.signum == signal.SIGHUP
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.parametrize('signum', ALL)
@pytest.mark.parametrize('command', ['train', 'convert'])
def test_outside_the_loop_one_line_says_how_to_go_on(tmp_path, signum, command):
  """What is half written is removed."""
  arguments = [sys.executable, '-c', COMMAND, command, str(tmp_path / 'OUT')]
  process = subprocess.Popen(
    arguments,
    cwd=ROOT,
    stderr=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'waits\n'
  assert list(tmp_path.iterdir())
  process.send_signal(signum)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 128 + signum
  hint = '; to go on, run the same command again: ' + shlex.join(arguments)
  assert (out, err) == ('', f'stopped{hint if command == "train" else ""}\n')
  assert not list(tmp_path.iterdir())


def test_a_hangup_that_is_ignored_stays_ignored():
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  with ending.in_order():
    signal.raise_signal(signal.SIGHUP)
    with StopSignals(lambda: None) as signals:
      signal.raise_signal(signal.SIGHUP)
    assert signals.signum is None
    with pytest.raises(ending.Ended):
      signal.raise_signal(signal.SIGTERM)
  assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_is_handled_during_the_wait():
  @jax.jit
  def compute(x, steps):
    return jax.lax.fori_loop(0, steps, lambda _, x: jnp.tanh(x @ x), x)

  x = jnp.eye(256)
  compute(x, 1).block_until_ready()
  begin = time.perf_counter()
  compute(x, 20).block_until_ready()
  for_a_second = int(20 / (time.perf_counter() - begin)) + 1

  ready = []
  with StopSignals(lambda: ready.append(array.is_ready())):
    array = compute(x, for_a_second)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    interrupt.wait_for(array)
    timer.join()
  assert ready == [False] and array.is_ready()
