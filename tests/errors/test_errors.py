"""Every mistake of the table gets its line, and changes nothing.

docs/errors.md is made from what the cases give:

  REWRITE=1 python -m pytest tests/errors

writes it anew; without REWRITE a line that differs from it is a failure.
"""

import contextlib
import hashlib
import os
from pathlib import Path
import re
import resource
import sys

import pytest

from lorapr_jax.cli.main import main
from tests.devices import cache
from tests.errors import (
  commands,
  conversions,
  data,
  folders,
  outputs,
  runs,
  settings,
)
from tests.errors.case import Place

TABLE = Path(__file__).parents[2] / 'docs' / 'errors.md'
HEAD = """\
# Errors

What a mistake looks like. The program stops with exit status 1 and one line on
standard error, before any long work; what was there before is as it was.
"""
SECTIONS = {
  'Commands and flags': commands.CASES,
  'Settings': settings.CASES,
  'Model folders and tokenizers': folders.CASES,
  'Data': data.CASES,
  'Workdirs, checkpoints and disks': runs.CASES,
  'Conversion': conversions.CASES,
  'Export, generate, report': outputs.CASES,
}
CASES = [case for cases in SECTIONS.values() for case in cases]


@pytest.fixture(scope='session')
def messages():
  """What the cases said, by what the user did; writes the table at the end."""
  said = {}
  yield said
  if os.environ.get('REWRITE') and said.keys() == {c.did for c in CASES}:
    TABLE.write_text(render(said), encoding='utf-8')


def render(said):
  """The text of docs/errors.md."""
  text = HEAD
  for title, cases in SECTIONS.items():
    text += f'\n## {title}\n\n| what you did | what it says |\n|---|---|\n'
    for case in cases:
      message = said[case.did].replace('|', '\\|')
      text += f'| {case.did} | ``{message}`` |\n'
  return text


def read_table():
  """The committed messages, by what the user did."""
  rows = re.findall(r'^\| (.*?) \| ``(.*)`` \|$', TABLE.read_text(), re.M)
  return {did: message.replace('\\|', '|') for did, message in rows}


def contents(folder):
  """{path: what is there}, of all that lies in a folder."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    if path.is_file()
    else 'no file'
    for path in folder.rglob('*')
  }


@contextlib.contextmanager
def max_file_bytes(most):
  """Writing past `most` bytes of a file fails, as on a full disk."""
  if most is None:
    yield
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
  try:
    with cache(False):  # JAX would cut short what it keeps.
      yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(
      case, id=case.did, marks=[pytest.mark.mesh] if case.devices > 1 else []
    )
    for case in CASES
  ],
)
def test_a_mistake_is_one_line_and_changes_nothing(
  case, good, messages, tmp_path, monkeypatch, capfd
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'CACHE'))
  # ml_collections would take an earlier config's functions for this one's.
  monkeypatch.delitem(sys.modules, 'config_config', raising=False)
  argv = case.argv(Place(tmp_path, good))
  before = contents(tmp_path)
  capfd.readouterr()
  with max_file_bytes(case.max_file_bytes):
    status = main(argv)
  out, err = capfd.readouterr()
  *progress, line = err.splitlines()

  assert status == 1
  assert out == ''
  assert line.startswith('error: ')
  assert 'Traceback' not in err and err.count('error') == line.count('error')
  assert case.late or not progress
  after = contents(tmp_path)
  assert {path: after.get(path) for path in before} == before
  kept = tuple(path for path in case.leaves if path.endswith('/'))
  new = after.keys() - before.keys() - set(case.leaves)
  assert {path for path in new if not path.startswith(kept)} == set()

  message = line.removeprefix('error: ').replace(f'{tmp_path}/', '')
  if case.varies:
    assert re.search(case.varies, message)
    message = re.sub(case.varies, '…', message)
  messages[case.did] = message
  if not os.environ.get('REWRITE'):
    assert message == read_table().get(case.did)


@pytest.mark.skipif('REWRITE' in os.environ, reason='it is written at the end')
def test_the_table_is_what_the_cases_give():
  assert len(CASES) == len({case.did for case in CASES}) >= 40
  table = read_table()
  assert list(table) == [case.did for case in CASES]
  assert TABLE.read_text(encoding='utf-8') == render(table)
