"""What people read commands no terminal, whatever a stranger named."""

import ast
import io
import logging
import os
from pathlib import Path
import shlex
import subprocess
import sys

import pytest
from rich.table import Table

import lorapr_jax
from lorapr_jax.runtime import terminal

NAME = 'r[/bold]x :smile: \x1b[31m\x9b2J\r\x07\u202e\udcff\x00'
SHOWN = r'r[/bold]x :smile: \x1b[31m\x9b2J\r\x07\u202e\udcff\x00'


def test_only_control_characters_are_written_out():
  every = ''.join(map(chr, range(0x110000)))
  changed = {c for c in every if terminal.visible(c) != c}
  # What Python's repr leaves as it is, and white space, is shown as it is.
  assert all(not c.isprintable() for c in changed)
  assert all(c in changed for c in every[:32] if c not in '\t\n')
  assert terminal.visible('größe\t字\n😀') == 'größe\t字\n😀'
  assert terminal.visible(NAME) == SHOWN
  terminal.visible(every).encode()


def test_a_line_stays_one(capsys):
  terminal.say(f'{NAME}\nerror: no', 'second')
  terminal.say(NAME, error=True)
  terminal.say_piece(f'{NAME}\n')
  out, err = capsys.readouterr()
  assert out == f'{SHOWN}\\nerror: no\nsecond\n{SHOWN}\n'
  assert err == f'{SHOWN}\n'


def test_a_table_is_shown_as_it_is():
  table = Table(title=NAME)
  table.add_column(NAME)
  table.add_row(NAME)
  out = io.StringIO()
  terminal.PlainConsole(file=out, width=99, force_terminal=True).print(
    NAME, table
  )
  assert out.getvalue().count(SHOWN) == 4
  assert not set(out.getvalue()) & set('\x9b\r\x07\u202e\udcff\x00')
  assert '\x1b[31m' not in out.getvalue()


def test_a_logged_warning_is_a_line(monkeypatch, capsys):
  monkeypatch.setattr(logging.root, 'handlers', [])
  terminal.show_warnings()
  logging.getLogger('lorapr_jax.data').warning('%s: cut', f'{NAME}\n')
  assert capsys.readouterr().err == f'warning: {SHOWN}\\n: cut\n'


PACKAGE = Path(lorapr_jax.__path__[0])
FILES = {
  str(path.relative_to(PACKAGE)): path
  for path in sorted(PACKAGE.rglob('*.py'))
  if 'remote_code' not in path.parts
}


@pytest.mark.parametrize('name', sorted(FILES.keys() - {'runtime/terminal.py'}))
def test_nothing_is_printed_elsewhere(name):
  calls = {
    ast.unparse(node.func)
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding='utf-8')))
    if isinstance(node, ast.Call)
  }
  written = {'sys.stdout.write', 'sys.stderr.write'}
  assert calls.isdisjoint({'print', 'Console'} | written)


SHOWS = """
from rich.table import Table
from lorapr_jax.runtime.terminal import PlainConsole, say, show_all
show_all()
table = Table(title='größe 字')
table.add_column('字')
table.add_row('字')
for error in False, True:
  say('größe 字', error=error)
  PlainConsole(stderr=error).print(table)
"""


@pytest.mark.parametrize(
  'encoding, shown',
  [
    ('utf-8', 'größe 字'),
    ('latin-1', 'größe \\u5b57'),
    ('ascii', 'gr\\xf6\\xdfe \\u5b57'),
    ('ascii:strict', 'gr\\xf6\\xdfe \\u5b57'),
  ],
)
def test_a_stream_of_another_encoding_shows_all(encoding, shown):
  ended = subprocess.run(
    [sys.executable, '-c', SHOWS],
    env=os.environ | {'PYTHONIOENCODING': encoding, 'PYTHONUTF8': '0'},
    capture_output=True,
  )
  assert ended.returncode == 0, ended.stderr
  for stream in ended.stdout, ended.stderr:
    text = stream.decode(encoding.partition(':')[0])
    assert text.splitlines()[0] == shown
    assert text.count(shown.split()[1]) == 4  # The table's title is cut in two.


SAYS = """
import sys
from lorapr_jax.runtime.terminal import PlainConsole, say
sys.stdin.read()
say('lost', error=True)
console = PlainConsole(stderr=True)
for _ in range(100):
  console.print('x' * 1000)
say('lost', error=True)
say('done')
"""


@pytest.mark.parametrize('stderr', ['gone', 'full', 'closed'])
def test_no_failure_to_write_to_standard_error_ends_anything(stderr):
  command = [sys.executable, '-c', SAYS]
  if stderr == 'closed':
    command = ['sh', '-c', f'{shlex.join(command)} 2>&-']
  with open('/dev/full', 'w') as full:
    process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=full if stderr == 'full' else subprocess.PIPE,
      text=True,
    )
  if stderr == 'gone':
    process.stderr.close()
    process.stderr = None
  out, _ = process.communicate(timeout=60)
  assert (process.returncode, out) == (0, 'done\n')
