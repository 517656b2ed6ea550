"""What bends files does so, and what reads them sees every fault."""

import json

import pytest

from lorapr_jax.errors import UserError
from tests.errors.bend import Bent, bent_bytes, bent_json
from tests.errors.survive import ACCEPTED, Kind, survive


def test_one_place_of_a_json_file_is_bent():
  good = {'a': [1, {'b': 'text'}]}
  files = bent_json(good, 9, values={'two': '2'})
  assert {did: json.loads(text) for did, text in files} == {
    'the file is two': 2,
    'a is two': {'a': 2},
    'a is gone': {},
    'a.0 is two': {'a': [2, {'b': 'text'}]},
    'a.0 is gone': {'a': [{'b': 'text'}]},
    'a.1 is two': {'a': [1, 2]},
    'a.1 is gone': {'a': [1]},
    'a.1.b is two': {'a': [1, {'b': 2}]},
    'a.1.b is gone': {'a': [1, {}]},
  }


@pytest.mark.parametrize(
  'bend, good',
  [(bent_json, {'a': [1, {'b': 2.5}]}), (bent_bytes, b'some content')],
)
def test_a_seed_always_bends_the_same(bend, good):
  files = list(bend(good, 12, seed=3))
  assert files == list(bend(good, 12, seed=3))
  assert files != list(bend(good, 12, seed=4))
  assert len({did for did, _ in files}) == 12


def _read(folder):
  match (folder / 'a').read_text():
    case 'two lines':
      raise UserError('one\ntwo')
    case 'a traceback':
      raise KeyError('a')
    case 'memory':
      bytearray(2 * 10**9)
    case 'written':
      (folder / 'b' / 'c').mkdir(parents=True)
      raise UserError('something is wrong')
    case 'another status':
      return 3
    case 'a long line':
      raise UserError('x' * 2000)
    case 'refused':
      raise UserError('something is wrong')


def test_every_fault_is_seen(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  file = tmp_path / 'here' / 'a'
  dids = (
    *('two lines', 'a traceback', 'memory', 'written', 'another status'),
    *('a long line', 'refused', 'as before'),
  )
  kind = Kind(
    make=lambda folder: file.write_text('good') and file,
    bend=lambda good: [Bent(did, did.encode()) for did in dids],
    read=_read,
  )
  wrong = {did: x for did, x, _ in survive(kind, file.parent)}
  assert wrong == {
    'two lines': 'status 1, 2 lines',
    'a traceback': wrong['a traceback'],
    'memory': wrong['memory'],
    'written': 'something was written',
    'another status': 'status 3, 0 lines',
    'a long line': 'a long line',
    'refused': '',
    'as before': ACCEPTED,
  }
  assert wrong['a traceback'].startswith('status 2')
  assert wrong['memory'].startswith('status 2')
  assert [path.name for path in file.parent.iterdir()] == ['a']
