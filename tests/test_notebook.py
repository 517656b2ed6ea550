"""examples/quickstart.ipynb runs as it stands."""

from pathlib import Path
import re

import nbclient
import nbformat
import pytest

from tests.xla_flags import environment

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / 'examples' / 'quickstart.ipynb'


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def test_outputs_are_cleared(notebook):
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert cells
  for cell in cells:
    assert cell.outputs == [] and cell.execution_count is None


def test_the_quickstart_runs(notebook, tmp_path, monkeypatch):
  # One device, as a user's kernel would have; nothing in the user's folders.
  for name in ('XLA_FLAGS', 'PYTHONPATH'):
    monkeypatch.setenv(name, environment()[name])
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
  monkeypatch.setenv('JUPYTER_RUNTIME_DIR', str(tmp_path / 'jupyter'))
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  client = nbclient.NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': str(tmp_path)}}
  )
  client.execute()
  printed = '\n'.join(
    output.text
    for cell in notebook.cells
    for output in cell.get('outputs', ())
    if output.output_type == 'stream' and output.name == 'stdout'
  )
  dense, pruned = re.findall(r'([\d,]+) parameters', printed)
  sizes = [int(number.replace(',', '')) for number in (dense, pruned)]
  assert sizes[1] < 0.8 * sizes[0]
  before, after = map(float, re.findall(r'perplexity ([\d.]+)', printed))
  # Random weights know nothing: training helps more than the cut harms.
  assert after < before
