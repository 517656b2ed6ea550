"""The pages say what is true: commands run, links lead, tables are current."""

import importlib.util
import os
from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys
import warnings

import pytest

from lorapr_jax.cli.main import main
from tests.xla_flags import environment

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
# Blocks that run elsewhere, by what they contain, and where that is.
ELSEWHERE = {
  'make demo': 'by hand: it fetches 110 MB',
  'benchmarks/': 'by hand: it takes hours; see tests/test_benchmarks.py',
  'activate': 'a shell of its own',
  'import PeftModel': 'make test-export',
  'export.ladder': 'tests/training/test_ladder.py: it needs more steps',
  '--speedup': 'tests/eval/test_speedup.py: a tiny model is hardly faster',
}
# So that a training takes seconds. The pages' own flags stay.
SHORT = (
  '--config.train.steps=4 --config.train.batch_size=4 '
  '--config.train.micro_batch_size=4 --config.train.seq_len=16 '
  '--config.data.eval_windows=4 --config.prune.every=1 '
  '--config.prune.calibration_steps=2 --config.lora.targets=q_proj,gate_proj '
  '--config.report.max_new_tokens=4'
)
SHORT_IN_PYTHON = (
  "train={'steps': 12, 'batch_size': 4, 'micro_batch_size': 4, 'seq_len': 16}, "
  "report={'max_new_tokens': 4},"
)
# How a command starts, and what main takes for it.
SPELLINGS = {'python train.py ': ['train'], 'python -m lorapr_jax ': []}
PYTHON = 'python -c '
# It counts devices before JAX does: in a process of its own.
PLAN = 'python -m lorapr_jax plan '


def blocks(page):
  """(language, code) of every fenced block."""
  text = page.read_text(encoding='utf-8')
  return re.findall(r'^```(\w+)\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Runs a command in a sandbox: in this process, with the same arguments.

  A shell says once that each spelling of ours is a command.
  """
  started = set()
  cache = tmp_path_factory.mktemp('cache')

  def run(folder, command):
    command = command.replace('\\\n', ' ')
    if 'train.py' in command or 'lorapr_jax explore' in command:
      command = f'{command.rstrip()} {SHORT}'
    own = {'LORAPR_CACHE': str(cache)}
    spelling = next(filter(command.startswith, (*SPELLINGS, PYTHON)), None)
    alone = spelling is None or command.startswith(PLAN)
    if alone or (spelling == PYTHON and PYTHON not in started):
      started.add(spelling)
      start(folder, command, own)
      return
    if spelling not in started:
      started.add(spelling)
      start(folder, f'{spelling}--help', own)
    with pytest.MonkeyPatch.context() as patch:
      patch.chdir(folder)
      patch.setenv('LORAPR_CACHE', own['LORAPR_CACHE'])
      if spelling == PYTHON:
        exec(shlex.split(command)[-1], {'__name__': '__main__'})
        return
      argv = shlex.split(command.removeprefix(spelling), comments=True)
      assert main([*SPELLINGS[spelling], *argv]) == 0, command

  return run


@pytest.fixture(scope='module')
def finished(text_model, run, tmp_path_factory):
  """A sandbox after a short run, as the pages' commands find it."""
  folder = tmp_path_factory.mktemp('docs')
  (folder / 'models').mkdir()
  shutil.copytree(text_model, folder / 'models' / 'llama')
  text = 'The weather today is fine, and the news is old. ' * 40
  for name in ('heldout.txt', 'notes.txt'):
    (folder / name).write_text(text)
  (folder / 'corpus.jsonl').write_text(f'{{"text": "{text}"}}\n' * 4)
  (folder / 'configs').symlink_to(ROOT / 'configs')
  (folder / 'train.py').symlink_to(ROOT / 'train.py')
  command = (
    'python train.py --config=configs/default.py --workdir=runs/{} '
    '--config.model.path=models/llama --config.data.train=file:corpus.jsonl '
    '--config.data.eval=file:heldout.txt'
  )
  run(folder, command.format('first'))
  shutil.copytree(folder / 'runs' / 'first', folder / 'runs' / 'second')
  return folder


def start(folder, command, own):
  """Runs a command as a shell does."""
  path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
  done = subprocess.run(
    ['bash', '-ec', command],
    cwd=folder,
    env=os.environ | environment() | own | {'PATH': path},
    capture_output=True,
    text=True,
    stdin=subprocess.DEVNULL,
  )
  assert done.returncode == 0, f'{command}\n{done.stdout}\n{done.stderr}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_the_commands_run(page, finished, run, tmp_path):
  sandbox = tmp_path / 'sandbox'
  shutil.copytree(finished, sandbox, symlinks=True)
  made = re.findall(r'--workdir=(runs/\w+)', page.read_text(encoding='utf-8'))
  for workdir in made:
    shutil.rmtree(sandbox / workdir, ignore_errors=True)
  for language, code in blocks(page):
    if any(mark in code for mark in ELSEWHERE):
      continue
    if language == 'sh':
      commands = code.replace('\\\n', ' ').splitlines()
      for command in filter(None, commands):
        run(sandbox, command)
    elif language == 'python':
      code = code.replace(
        "'runs/notebook',", f"'runs/notebook', {SHORT_IN_PYTHON}"
      )
      run(sandbox, f'{PYTHON}{shlex.quote(code)}')
    else:
      raise AssertionError(f'{page}: a block of {language!r}')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_the_links_lead_somewhere(page):
  text = page.read_text(encoding='utf-8')
  for target in re.findall(r'\]\(([^)#:]+)\)', text):
    assert (page.parent / target).exists(), f'{page}: {target}'


def test_every_page_is_linked_from_the_readme():
  readme = (ROOT / 'README.md').read_text(encoding='utf-8')
  for page in PAGES[1:]:
    assert f'](docs/{page.name})' in readme, page.name


@pytest.fixture(scope='module')
def generate():
  """docs/generate.py, which is no package's module."""
  spec = importlib.util.spec_from_file_location(
    'docs_generate', ROOT / 'docs' / 'generate.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_configuration_page_is_current(generate):
  found = (ROOT / 'docs' / 'configuration.md').read_text(encoding='utf-8')
  assert found == generate.configuration(), 'run make docs'


def test_every_setting_has_its_comment(generate):
  for line in generate.configuration().splitlines():
    if line.startswith('| `'):
      assert not line.endswith('|  |'), line


def test_the_table_of_targets_is_current(generate):
  page = (ROOT / 'docs' / 'targets.md').read_text(encoding='utf-8')
  filled = generate.fill(page, 'targets', generate.target_table())
  assert page == filled, 'run make docs'


def test_the_table_of_families_is_current(generate):
  page = (ROOT / 'docs' / 'models.md').read_text(encoding='utf-8')
  filled = generate.fill(page, 'families', generate.family_table())
  assert page == filled, 'run make docs'


def test_the_figures_can_be_made(generate, tmp_path):
  generate.write_figures(tmp_path)
  for file in tmp_path.iterdir():
    assert (ROOT / 'docs' / 'figures' / file.name).exists()
    assert file.read_text().rstrip().endswith('</svg>')


def test_the_reference_is_made_from_the_docstrings(generate, tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    generate.write_reference(tmp_path)
  page = (tmp_path / 'lorapr_jax' / 'pruning' / 'importance.html').read_text()
  assert 'moving average' in page
  assert 'lp.prune' in (tmp_path / 'lorapr_jax.html').read_text()
