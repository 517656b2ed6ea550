"""What people see: a panel on a terminal, lines elsewhere."""

import io
import logging
import time

import pytest
from rich.console import Console
from rich.text import Text

from lorapr_jax.report.display import Display

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
    console = Console(file=out, force_terminal=terminal, width=80)
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
    '12/60  loss 3.210  heads -25.0%  channels -12.5%  '
    'parameters kept 90.0%  1,234 tokens/s  memory 2.44 GB  0:04:48 left\n'
  )


def test_a_perplexity_is_shown_where_there_is_one(display):
  shown, out = display(terminal=False)
  with shown:
    shown.show(RECORD | {'perplexity': 41.5}, 0)
  assert '12/60  loss 3.210  perplexity 41.50  heads' in out.getvalue()


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
  assert lines[3].endswith('parameters kept 90.0%')
  assert lines[4] == '1,234 tokens/s  memory 2.44 GB  0:04:48 left'
  assert 'stopping after this step' in lines[5]
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
