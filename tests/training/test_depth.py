"""Runs that remove whole layers: cut on the way, resumed, exported, shown."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorapr_jax.cli.main import main
from lorapr_jax.hf.load import load, load_config
from lorapr_jax.report.page import render_report
from lorapr_jax.report.run import read_run
from tests.runs import assert_same_run, metrics, train
from tests.training.test_shrinking import (
  SHRINK,
  STEPS,
  cut_short,
  cuts_of,
  logits_of,
)

LAYERS = 7
FLAGS = [
  *SHRINK,
  f'--config.model.sizes.num_hidden_layers={LAYERS}',
  '--config.prune.layers_target=0.5',
  '--config.prune.heads=none',
  # Two layers go before the first cut, and one after it.
  '--config.prune.shrink=0.1,0.7',
]


@pytest.fixture(scope='module')
def shrunk(tmp_path_factory):
  """A run that loses three of six layers, and is cut twice on the way."""
  workdir = tmp_path_factory.mktemp('depth') / 'run'
  said = train(workdir, FLAGS)
  assert 'layers: 3 of the 6 not protected kept' in said
  assert len(cuts_of(workdir)) == 2
  return workdir


def kept_of(folder):
  return json.loads((folder / 'pruning.json').read_text())['kept']


def test_as_many_layers_go_as_asked(shrunk):
  summary = json.loads((shrunk / 'summary.json').read_text())
  assert summary['sparsity']['layers'] == {'target': 0.5, 'achieved': 0.5}
  assert summary['sparsity']['channels']['achieved'] == 0.5
  config = load_config(shrunk / 'export')
  assert [x.mlp_dim for x in config.layers] == [64] * 3 + [128]
  kept = kept_of(shrunk / 'export')
  assert kept.count(None) == 3 and kept[-1] is not None
  assert all(set(x) == {'mlp'} for x in kept if x)
  shares = [record['layers_sparsity'] for record in metrics(shrunk)]
  assert shares == sorted(shares) and len(set(shares)) == 3
  left = metrics(shrunk)[-1]['params_kept']
  assert left == pytest.approx(
    summary['params_pruned'] / summary['params_dense']
  )


@pytest.mark.parametrize(
  'cut, after', [pytest.param(0, 0, marks=pytest.mark.slow), (0, 2)]
)
def test_a_run_cut_short_goes_on_bit_for_bit(shrunk, tmp_path, cut, after):
  last = cuts_of(shrunk)[cut] + after
  workdir = cut_short(shrunk, tmp_path / 'run', last)
  assert f'resuming at step {last} of {STEPS}' in train(workdir, FLAGS)
  assert_same_run(workdir, shrunk, 'checkpoints', STEPS)
  for name in ('importance.safetensors', 'export/model.safetensors'):
    assert (workdir / name).read_bytes() == (shrunk / name).read_bytes()


def test_scores_and_masks_are_of_all_layers(shrunk):
  found = load_file(shrunk / 'importance.safetensors')
  gone = [i for i, x in enumerate(kept_of(shrunk / 'export')) if x is None]
  for i in range(LAYERS - 1):
    mask, score = (
      found[f'layers.{i}.layers.{x}'] for x in ('mask', 'importance')
    )
    assert mask.shape == score.shape == (1,)
    assert mask[0] == (i not in gone) and 0 < score[0] < 10
    assert found[f'layers.{i}.mlp.mask'].any() == (i not in gone)


def test_the_report_shows_the_layers_that_are_gone(shrunk):
  kept = read_run(shrunk).kept
  gone = [i for i, x in enumerate(kept_of(shrunk / 'export')) if x is None]
  np.testing.assert_array_equal(
    kept['layers'][:, 0], ~np.isin(np.arange(LAYERS), gone)
  )
  assert not kept['mlp'][gone].any()
  page = render_report(shrunk)
  assert '<h3>Layers</h3>' in page
  assert '0 for one that is cut as a whole' in page
  assert page.count('<svg') > 6


@pytest.mark.parametrize(
  'source', [pytest.param('run', marks=pytest.mark.slow), 'folder']
)
def test_padded_layers_add_nothing(shrunk, source, tmp_path, capsys):
  export, out = shrunk / 'export', tmp_path / 'out'
  given = export if source == 'folder' else shrunk
  argv = ['export', str(given), str(out), '--layout=padded']
  assert main(argv) == 0, capsys.readouterr().err
  ours, theirs = load(out), load(export)
  assert len(ours.config.layers) == LAYERS and ours.config.is_uniform
  np.testing.assert_allclose(
    *(logits_of(model.params, model.config) for model in (ours, theirs)),
    atol=1e-5,
  )
  gone = [i for i, x in enumerate(kept_of(export)) if x is None]
  (stack,) = ours.params['stacks']
  for i in gone:
    assert not any(x[i].any() for x in jax.tree.leaves(stack))
  # The zeros are told from what stays.
  again = tmp_path / 'again'
  assert main(['export', str(out), str(again), '--layout=padded']) == 0
  assert kept_of(again) == kept_of(export)


def test_a_gguf_has_as_many_blocks(shrunk, tmp_path, capsys):
  from lorapr_jax.gguf.read import open_gguf

  out = tmp_path / 'a.gguf'
  argv = ['export', str(shrunk), str(out), '--format=gguf', '--dtype=f32']
  assert main(argv) == 0, capsys.readouterr().err
  assert open_gguf(out).config.layers == load_config(shrunk / 'export').layers


def test_an_unfinished_run_is_exported_without_the_layers_gone_by_then(
  shrunk, tmp_path, capsys
):
  last = cuts_of(shrunk)[0] + 2
  workdir, out = cut_short(shrunk, tmp_path / 'run', last), tmp_path / 'out'
  assert main(['export', str(workdir), str(out)]) == 0, capsys.readouterr().err
  now, final = kept_of(out), kept_of(shrunk / 'export')
  assert now.count(None) == 2
  for ours, theirs in zip(now, final, strict=True):
    assert ours is not None or theirs is None
