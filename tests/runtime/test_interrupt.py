"""Ctrl-C and SIGTERM, within one process; whole runs are in test_train.py."""

import errno
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from lorapr_jax.errors import Stopped
from lorapr_jax.runtime import interrupt
from lorapr_jax.runtime.interrupt import StopSignals

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handlers():
  """Python's own at the start, whatever the shell has set; back at the end."""
  old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
  signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
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


def test_ctrl_c_in_another_command_is_one_line(tmp_path):
  # The command waits for its config.json, until somebody writes it.
  config = tmp_path / 'config.json'
  os.mkfifo(config)
  process = subprocess.Popen(
    [sys.executable, '-m', 'lorapr_jax', 'inspect', '--model', str(tmp_path)],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  writer = open_when_read(process, config)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  os.close(writer)
  assert process.returncode == 130
  assert (out, err) == ('', 'stopped\n')


def open_when_read(process, fifo):
  """Opens a FIFO for writing as soon as the process reads it."""
  deadline = time.monotonic() + 120
  while process.poll() is None and time.monotonic() < deadline:
    try:
      return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
      if error.errno != errno.ENXIO:
        raise
      time.sleep(0.01)
  raise AssertionError(process.communicate()[1])
