"""Imports point one way. Read from the syntax tree; nothing is run."""

import ast
from pathlib import Path
import subprocess
import sys

import pytest

import lorapr_jax
from lorapr_jax.models import families

PACKAGE = Path(lorapr_jax.__path__[0])

# Lowest first, a line a floor. A wing, which is a folder or a module of the
# package, imports from the floors below its own and from no other.
FLOORS = (
  ('errors', 'axes'),
  ('runtime',),
  ('models', 'data'),
  ('hf', 'pruning'),
  ('eval',),
  ('settings', 'gguf'),
  ('report',),
  ('training',),
  ('exporting', 'planning', 'exploring'),
  ('train',),
  ('api',),
  ('cli',),
  ('__main__',),
)
# Copied beside an export; not part of the package.
REMOTE_CODE = 'hf.remote_code'


def module_name(path):
  return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


def imported(path):
  """The full names that a file imports: modules, or names in modules."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      module = '.' * node.level + (node.module or '')
      yield from (f'{module}.{alias.name}' for alias in node.names)


def in_package(names, modules):
  """Those of our own modules, without what is imported out of them."""
  for name in names:
    if name == 'lorapr_jax' or not name.startswith('lorapr_jax.'):
      continue
    name = name.removeprefix('lorapr_jax.')
    yield name if name in modules else name.rpartition('.')[0]


MODULES = {
  module_name(path): path
  for path in sorted(PACKAGE.rglob('*.py'))
  if not module_name(path).startswith(REMOTE_CODE)
  and path.name != '__init__.py'
}
IMPORTS = {
  name: set(in_package(imported(path), MODULES))
  for name, path in MODULES.items()
}


def wing(module):
  """The folder or module of the package that a module is in."""
  return module.partition('.')[0]


FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def test_no_import_is_relative():
  for name, path in MODULES.items():
    assert not [i for i in imported(path) if i.startswith('.')], name


def test_the_syntax_trees_are_read():
  assert len(MODULES) > 30
  steps = IMPORTS['training.steps']
  assert steps >= {'models.trees', 'models.compute', 'pruning.importance'}
  assert {'training.event', 'training.steps'} <= IMPORTS['training.loop']


def test_every_wing_has_a_floor():
  assert {wing(module) for module in MODULES} == FLOOR.keys()


def test_no_wing_hides_a_function_of_the_package():
  # Importing a submodule sets the package's attribute of its name.
  assert not FLOOR.keys() & set(lorapr_jax.__all__)


@pytest.mark.parametrize('module', MODULES)
def test_a_module_imports_only_from_below(module):
  for other in IMPORTS[module]:
    assert other in MODULES, f'{module} imports {other}, which is no module'
    if wing(other) != wing(module):
      assert FLOOR[wing(other)] < FLOOR[wing(module)], (
        f'{module} imports {other}'
      )


def reached(module):
  """All of our modules that importing a module imports."""
  found, todo = set(), [module]
  while todo:
    for other in IMPORTS[todo.pop()] - found:
      found.add(other)
      todo.append(other)
  return found


def test_there_are_no_circles():
  for module in MODULES:
    assert module not in reached(module)


def third_party(module):
  """The names of the packages that a file itself imports."""
  return {name.partition('.')[0] for name in imported(MODULES[module])}


@pytest.mark.parametrize(
  'module', [name for name in MODULES if name.startswith('pruning.')]
)
def test_pruning_knows_neither_flax_nor_the_model(module):
  assert 'flax' not in third_party(module)
  models = {m for m in IMPORTS[module] if m.startswith('models')}
  assert models <= {'models.config', 'models.cost', 'models.lora'}


def test_only_the_models_and_the_step_import_flax():
  users = {name for name in MODULES if 'flax' in third_party(name)}
  assert users == {'models.layers', 'models.block', 'training.state'}


def test_families_are_known_where_files_are_read_and_written():
  users = {name for name in MODULES if 'models.families' in IMPORTS[name]}
  assert {wing(name) for name in users} <= {'hf', 'gguf'}
  names = {*families.FAMILIES, *families.REMOTE_CODE}
  for name, path in MODULES.items():
    tree = ast.walk(ast.parse(path.read_text(encoding='utf-8')))
    strings = {x.value for x in tree if isinstance(x, ast.Constant)}
    # llama.cpp has such names, of tokenizers too.
    if wing(name) != 'gguf' and name != 'models.families':
      assert not strings & names, name


def test_sizes_and_axes_need_no_jax():
  assert 'jax' not in third_party('models.config')
  assert reached('models.config') == {'errors', 'axes', 'models.rope'}


def test_only_the_files_beside_an_export_import_torch():
  assert not [name for name in MODULES if 'torch' in third_party(name)]
  copied = [p for p in PACKAGE.rglob('*.py') if p not in MODULES.values()]
  assert any('torch' in set(imported(path)) for path in copied)


@pytest.mark.parametrize(
  'module, package',
  [
    ('lorapr_jax', 'jax'),
    ('lorapr_jax.api', 'lm_eval'),
    ('lorapr_jax.api', 'torch'),
    ('lorapr_jax.data.sources', 'datasets'),
    ('lorapr_jax.data.sources', 'pyarrow'),
    ('lorapr_jax.data.sources', 'tensorflow_datasets'),
    ('lorapr_jax.train', 'torch'),
    # JAX reads where to keep what it compiles when it is imported.
    ('lorapr_jax.cli.main', 'jax'),
    ('lorapr_jax.cli.main', 'torch'),
  ],
)
def test_what_is_not_needed_is_not_loaded(module, package):
  code = f'import sys, {module}; sys.exit("{package}" in sys.modules)'
  root = PACKAGE.parent
  subprocess.run([sys.executable, '-c', code], check=True, cwd=root)
