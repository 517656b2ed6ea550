"""Nothing that comes with a model is ever run: no pickle, no code of it."""

import ast
from pathlib import Path
import pickle

import pytest

import lorapr_jax
from lorapr_jax.cli.main import main
from lorapr_jax.data.tokenizer import Tokenizer
from tests.errors import strangers
from tests.errors.case import Place

FILES = sorted(Path(lorapr_jax.__path__[0]).rglob('*.py'))
# Modules whose loading runs what a file says.
MODULES = {'cloudpickle', 'dill', 'joblib', 'marshal', 'pickle', 'shelve'}
FUNCTIONS = {'__import__', 'compile', 'eval', 'exec'}
METHODS = {'torch.load', 'yaml.load', 'yaml.unsafe_load', 'runpy.run_path'}


def dangers(source):
  """What in a module's syntax tree would run what a file says."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = {alias.name.partition('.')[0] for alias in node.names}
      yield from names & MODULES
    elif isinstance(node, ast.ImportFrom):
      yield from {(node.module or '').partition('.')[0]} & MODULES
    elif isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      if name in FUNCTIONS | METHODS:
        yield name
      keywords = {k.arg: k.value for k in node.keywords}
      if 'allow_pickle' in keywords:
        yield 'allow_pickle'
      trusted = keywords.get('trust_remote_code')
      asked = name.endswith('.from_pretrained') or trusted is not None
      if asked and getattr(trusted, 'value', None) is not False:
        yield f'{name} without trust_remote_code=False'


@pytest.mark.parametrize(
  'source',
  [
    'import pickle',
    'from dill import load',
    'import torch\ntorch.load("x")',
    'np.load("x", allow_pickle=True)',
    'eval("1")',
    'exec(text)',
    'AutoTokenizer.from_pretrained(folder)',
    'AutoTokenizer.from_pretrained(folder, trust_remote_code=True)',
    'load(folder, trust_remote_code=trust)',
  ],
)
def test_a_danger_is_found(source):
  assert list(dangers(source))


def test_no_module_has_one():
  assert len(FILES) > 50
  found = {
    str(path): danger
    for path in FILES
    for danger in dangers(path.read_text(encoding='utf-8'))
  }
  assert found == {}


def test_only_a_config_is_run_as_a_program():
  users = [path for path in FILES if 'exec_module' in path.read_text()]
  assert [path.parts[-2:] for path in users] == [('settings', 'files.py')]


def test_a_strangers_code_is_not_run_where_it_is_not_needed(
  good, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  model = Place(tmp_path, good).copy('MODEL')
  strangers.add_pickle(model)
  strangers.add_model_code(model)
  strangers.add_tokenizer_code(model)
  assert main(['convert', 'MODEL', 'OUT']) == 0, capsys.readouterr().err
  assert Tokenizer(model).encode('word').tolist() == [2]
  assert not Path(strangers.MARK).exists()
  # Nor is it passed on.
  names = {path.name for path in Path('OUT').iterdir()}
  assert names.isdisjoint({'stranger.py', 'pytorch_model.bin'})
  # It would have left its mark.
  pickle.loads((model / 'pytorch_model.bin').read_bytes())
  assert Path(strangers.MARK).exists()
