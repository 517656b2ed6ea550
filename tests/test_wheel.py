"""The wheel: what it holds, and that it works where there is no checkout."""

import json
from pathlib import Path
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = Path(__file__).parent.parent
# In the wheel `configs` lies in the package: no second name is installed.
INSTALLED = Path('lorapr_jax')
pytestmark = pytest.mark.packaging


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
  """The files of the wheel, built from the sdist, and of the sdist."""
  # A copy: what an earlier build left behind would go into the wheel.
  source = tmp_path_factory.mktemp('source') / 'lorapr_jax'
  names = ['LICENSE', 'README.md', 'pyproject.toml', 'requirements.txt']
  for name in [*names, 'configs', 'lorapr_jax', 'tests', 'train.py']:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
    source.mkdir(exist_ok=True)
    copy(ROOT / name, source / name)
  out = tmp_path_factory.mktemp('dist')
  command = [sys.executable, '-m', 'build', '--outdir', str(out), str(source)]
  subprocess.run(command, check=True)
  return sorted(out.iterdir())


@pytest.fixture(scope='module')
def installed(distributions, tmp_path_factory):
  """The bin folder of an environment that has the wheel and its needs."""
  folder = tmp_path_factory.mktemp('environment')
  subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
  pip = [folder / 'bin' / 'python', '-m', 'pip', 'install', '--quiet']
  wheel = next(path for path in distributions if path.suffix == '.whl')
  subprocess.run([*pip, wheel], check=True)
  return folder / 'bin'


def run(installed, cwd, *command):
  """Runs a command of the environment, away from the checkout."""
  env = {'PATH': f'{installed}:/usr/bin:/bin', 'HOME': str(cwd)}
  return subprocess.run(
    [installed / command[0], *command[1:]],
    cwd=cwd,
    env=env,
    capture_output=True,
    text=True,
  )


def test_the_wheel_holds_what_runs_and_nothing_else(distributions):
  wheel = next(path for path in distributions if path.suffix == '.whl')
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  expected = {
    str(parent / path.relative_to(ROOT))
    for folder, parent in (('lorapr_jax', Path()), ('configs', INSTALLED))
    for path in (ROOT / folder).rglob('*')
    if path.is_file() and path.suffix != '.pyc'
  }
  assert {'lorapr_jax/configs/tiny.py', 'lorapr_jax/train.py'} < expected
  assert any(name.startswith('lorapr_jax/hf/remote_code/') for name in expected)
  others = {name for name in names if '.dist-info/' not in name}
  assert others == expected
  assert {name.partition('/')[0] for name in others} == {'lorapr_jax'}
  assert any(name.endswith('licenses/LICENSE') for name in names)


def test_the_sdist_builds_alone(distributions):
  sdist = next(path for path in distributions if path.name.endswith('.tar.gz'))
  with tarfile.open(sdist) as archive:
    names = {name.partition('/')[2] for name in archive.getnames()}
  assert {'LICENSE', 'README.md', 'pyproject.toml', 'requirements.txt'} < names
  assert {'configs/tiny.py', 'lorapr_jax/train.py'} < names


def test_import_and_version(installed, tmp_path):
  code = (
    'import importlib.metadata, lorapr_jax; '
    'print(importlib.metadata.version("lorapr-jax"), lorapr_jax.__version__); '
    'print(lorapr_jax.__file__)'
  )
  done = run(installed, tmp_path, 'python', '-c', code)
  assert done.returncode == 0, done.stderr
  versions, file = done.stdout.splitlines()
  assert len(set(versions.split())) == 1
  assert Path(file).is_relative_to(installed.parent)


def test_the_command_prunes_and_inspects(installed, tmp_path):
  done = run(installed, tmp_path, 'lorapr', '--help')
  assert done.returncode == 0 and 'prune a model by a config' in done.stdout
  settings = ['--config.train.steps=12', '--config.prune.every=3']
  train = ['train', '--config=tiny', '--workdir=run', *settings, '--json']
  done = run(installed, tmp_path, 'lorapr', *train)
  assert done.returncode == 0, done.stderr
  summary = json.loads(done.stdout)
  assert summary['sparsity']['channels']['achieved'] == 0.5
  # Layers of unequal size: the code that goes with them was in the wheel.
  assert list((tmp_path / 'run' / 'export').glob('modeling_*.py'))
  inspect = ['inspect', '--model', 'run/export', '--json']
  done = run(installed, tmp_path, 'lorapr', *inspect)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found['parameters'] == summary['params_pruned']


def test_the_package_needs_no_torch(installed, tmp_path):
  done = run(installed, tmp_path, 'python', '-c', 'import torch')
  assert 'ModuleNotFoundError' in done.stderr
