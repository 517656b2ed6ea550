"""What people see: a panel on a terminal, lines elsewhere."""

import io
import itertools
import logging
import time

import pytest
from rich.text import Text

from lorapr_jax.report import units
from lorapr_jax.report.display import Display
from lorapr_jax.runtime.terminal import PlainConsole

RECORD = {
  'step': 11,
  'loss': 3.21,
  'heads_sparsity': 0.25,
  'channels_sparsity': 0.125,
  'params_kept': 0.9,
  'seconds': 6.0,
  'tokens_per_second': 1234.5,
}


@pytest.fixture
def display(monkeypatch):
  """Makes a display of 60 steps and gives it with its output."""
  monkeypatch.setenv('TERM', 'xterm')

  def make(terminal):
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=terminal, width=80)
    return Display(console, 'a [model]', 60), out

  return make


def test_elsewhere_each_phase_and_each_logged_step_is_a_line(display):
  shown, out = display(terminal=False)
  with shown:
    shown.start('data')
    shown.start('prune')
    shown.show(RECORD, 2_440_000_000)
    shown.notice_stop()
  assert out.getvalue() == (
    'data\n'
    'prune\n'
    'step 12 of 60  loss 3.210  '
    'pruned: heads 25.0%, channels 12.5%, parameters 10.0%  '
    '1,234 tokens/s  memory 2.44 GB  4 min 48 s left\n'
  )


def test_a_perplexity_is_shown_where_there_is_one(display):
  shown, out = display(terminal=False)
  with shown:
    shown.show(RECORD | {'perplexity': 41.5}, 0)
  assert 'of 60  loss 3.210  perplexity 41.50  pruned' in out.getvalue()


@pytest.mark.parametrize('seconds, lines', [(3.0, 9), (2.0, 0)])
def test_batches_that_take_long_are_a_line_a_tenth(
  display, monkeypatch, seconds, lines
):
  clock = itertools.count(0.0, seconds)
  monkeypatch.setattr(time, 'perf_counter', lambda: next(clock))
  shown, out = display(terminal=False)
  with shown:
    shown.start('teacher')
    for _ in range(9):
      next(clock)  # It compiles.
    for done in range(1, 26):
      shown.show_batches(done, 25)
  expected = [
    f'batch {done} of 25  {units.duration(seconds * (25 - done))} left'
    for done in (3, 5, 8, 10, 13, 15, 18, 20, 23)[:lines]
  ]
  assert out.getvalue().splitlines() == ['teacher', *expected]


def test_a_panel_shows_the_batches_of_its_phase_alone(display):
  shown, out = display(terminal=True)
  with shown:
    shown.start('teacher')
    shown.show_batches(2, 3)
    deadline = time.monotonic() + 60
    while 'batch 2 of 3' not in out.getvalue():  # It is drawn now and then.
      assert time.monotonic() < deadline
      time.sleep(0.05)
    shown.start('prune')
  assert 'batch' not in out.getvalue().rpartition('\x1b[2K')[2]


def test_a_share_of_nothing_has_no_sign(display):
  shown, out = display(terminal=False)
  nothing = {'heads_sparsity': 0.0, 'channels_sparsity': 0.0, 'params_kept': 1}
  with shown:
    shown.show(RECORD | nothing, 0)
  assert 'pruned: heads 0.0%, channels 0.0%, parameters 0.0%' in out.getvalue()
  assert '-' not in out.getvalue()


def test_no_time_is_left_at_the_end_or_known_while_it_compiles(display):
  shown, out = display(terminal=False)
  with shown:
    shown.start('compile')
    shown.start('prune')
    shown.show(RECORD, 0)
    shown.show(RECORD | {'step': 13, 'seconds': 2.0}, 0)
    shown.show(RECORD | {'step': 59, 'seconds': 2.0}, 0)
  compiled, timed, last = out.getvalue().splitlines()[2:]
  assert 'left' not in compiled and 'left' not in last
  assert timed.endswith('  1 min 32 s left')


def test_on_a_terminal_a_panel_is_drawn_in_place(display):
  shown, out = display(terminal=True)
  with shown:
    shown.start('compile')
    shown.start('prune')
    shown.show(RECORD, 2_440_000_000)
    shown.print('above [it]')
    shown.notice_stop()
  # What follows the last time that the cursor was moved up.
  drawn = Text.from_ansi(out.getvalue().rpartition('\x1b[2K')[2]).plain
  lines = [line.strip('│╭╮╰╯─ ') for line in drawn.split('\n')]
  assert lines[0] == 'a [model]'
  assert lines[1] == 'compile 0 s  prune 0 s'
  assert 'step 12 of 60' in lines[2]
  assert lines[3] == 'loss 3.210'
  assert lines[4] == 'pruned: heads 25.0%, channels 12.5%, parameters 10.0%'
  # The first step took long to compile: it does not say how long others take.
  assert lines[5] == '1,234 tokens/s  memory 2.44 GB'
  assert 'stopping after this step' in lines[6]
  assert Text.from_ansi(out.getvalue()).plain.count('above [it]\n') == 1


def test_the_time_of_a_phase_adds_up(display):
  shown, _ = display(terminal=False)
  with shown:
    for phase in ('evaluate', 'prune', 'evaluate'):
      shown.start(phase)
      time.sleep(0.02)
  assert list(shown.seconds) == ['evaluate', 'prune']
  assert shown.seconds['evaluate'] >= 0.04
  assert 0.02 <= shown.seconds['prune'] < shown.seconds['evaluate'] + 1
  spent = dict(shown.seconds)
  time.sleep(0.01)
  assert shown.seconds == spent


def test_logged_warnings_are_printed_and_kept_once(display, caplog):
  logger = logging.getLogger('lorapr_jax.data.pipeline')
  shown, out = display(terminal=False)
  with shown:
    for _ in range(2):
      logger.warning('%s: %d tokens [of 9] left out', 'file:x', 3)
    logger.info('no warning')
    shown.warn('another')
  logger.warning('after the run')
  first = 'file:x: 3 tokens [of 9] left out'
  assert shown.warnings == [first, 'another']
  assert out.getvalue() == f'warning: {first}\nwarning: another\n'
  # Outside a run a warning takes the usual way.
  assert caplog.messages == ['after the run']


def test_an_exception_leaves_the_terminal_and_the_logger_as_they_were(display):
  shown, out = display(terminal=True)
  with pytest.raises(KeyboardInterrupt), shown:
    raise KeyboardInterrupt
  assert out.getvalue().rstrip().endswith('\x1b[?25h')  # The cursor is back.
  assert logging.getLogger('lorapr_jax').handlers == []
