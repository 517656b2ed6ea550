"""A ladder: one run leaves many sizes, nested, whenever it was cut short."""

import gc
import json
import shutil

import jax
import pytest

from lorapr_jax.cli.main import main
from lorapr_jax.exporting import write
from lorapr_jax.hf.load import load_config
from lorapr_jax.pruning.masks import without_layers
from lorapr_jax.report.pruning_file import read_pruning
from tests.runs import assert_same_run, metrics, train
from tests.training.test_shrinking import cut_short

RUN = [
  *('--config.train.steps=12', '--config.train.log_every=1'),
  *('--config.train.checkpoint_every=1', '--config.data.eval_windows=8'),
  *('--config.train.batch_size=8', '--config.train.micro_batch_size=8'),
  '--config.train.checkpoints_kept=100',
  *('--config.prune.every=2', '--config.lora.targets=q_proj,gate_proj'),
  *('--config.export.ladder=0.9,0.8', '--config.prune.protect=none'),
]
ONCE = [
  *(*RUN, '--config.prune.order=prune_then_tune'),
  *('--config.prune.calibration_steps=3', '--config.prune.rung_steps=3,2'),
]
RUNGS = '0.9', '0.8'
WEIGHTS = 'model.safetensors'


def live_bytes():
  gc.collect()
  arrays = jax.live_arrays()
  return sum(x.nbytes for x in arrays if not x.is_deleted())


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  """A run that prunes three times at once, and trains in between.

  And the bytes on devices beside what is exported, at each export.
  """
  workdir = tmp_path_factory.mktemp('ladder') / 'run'
  beside, check, before = [], write._check, live_bytes()

  def checked(route, model, weights, places):
    own = sum(x.nbytes for x in jax.tree.leaves(weights.merged))
    beside.append(live_bytes() - before - own)
    return check(route, model, weights, places)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(write, '_check', checked)
    train(workdir, ONCE)
  return workdir, beside


@pytest.fixture(scope='module')
def once(measured):
  return measured[0]


def exports(workdir):
  """The folders of all sizes, the largest first."""
  return [
    *(workdir / 'rungs' / share / 'export' for share in RUNGS),
    workdir / 'export',
  ]


def kept(folder):
  """What an export has, as (layer, group, index)."""
  layers = read_pruning(folder / 'pruning.json').kept
  return {
    (i, group, int(n))
    for i, groups in enumerate(layers)
    for group, indices in without_layers(groups).items()
    for n in indices.flat
  }


def check(workdir):
  """Every size is finished, has the planned counts, and is in the one before.

  Gives the summary.
  """
  plan = json.loads((workdir / 'run.json').read_text())['resolved']
  counts = [*(plan['ladder'][share] for share in RUNGS), plan['keep']]
  summary = json.loads((workdir / 'summary.json').read_text())
  dense, before = summary['params_dense'], None
  for folder, keep in zip(exports(workdir), counts, strict=True):
    found, config = kept(folder), load_config(folder)
    assert before is None or found < before
    before = found
    stay = keep.get('layers', [1] * len(keep['mlp']))
    dims = [n for n, there in zip(keep['mlp'], stay, strict=True) if there]
    assert [layer.mlp_dim for layer in config.layers] == dims
  for rung, share in zip(summary['rungs'], RUNGS, strict=True):
    config = load_config(workdir / 'rungs' / share / 'export')
    assert rung['share'] == float(share)
    assert rung['params_pruned'] == config.num_parameters
    assert rung['params_pruned'] <= rung['share'] * dense
    assert rung['exports']['hf']['max_logit_difference'] < 1e-4
    pruning = read_pruning(workdir / 'rungs' / share / 'export/pruning.json')
    asked = pruning.contents['sparsity']['params']
    assert asked['target'] == pytest.approx(1 - rung['share'])
    assert asked['achieved'] >= asked['target']
  return summary


def test_every_size_is_finished_and_lies_in_the_larger_one(once):
  summary = check(once)
  assert [rung['steps'] for rung in summary['rungs']] == [6, 8]
  values = [rung['perplexity']['pruned'] for rung in summary['rungs']]
  assert all(value['windows'] == 8 for value in values)
  assert len({value['value'] for value in values}) == 2
  records = metrics(once)
  left = [record['params_kept'] for record in records]
  dense = summary['params_dense']
  sizes = [rung['params_pruned'] for rung in summary['rungs']]
  sizes = [dense, *sizes, summary['params_pruned']]
  assert left == pytest.approx(
    [size / dense for size in (sizes[:1] * 2 + sizes[1:2] * 4)]
    + [size / dense for size in (sizes[2:3] * 2 + sizes[3:] * 4)]
  )
  # Each rung and the last size have a learning rate that falls to its end.
  rates = [record['lr'] for record in records]
  assert rates[:3] == [0.0] * 3
  peaks = [step for step in range(12) if rates[step] == pytest.approx(1e-2)]
  assert peaks == [3, 6, 8]


def test_no_second_copy_is_there_while_a_rung_is_exported(measured):
  workdir, beside = measured
  summary = json.loads((workdir / 'summary.json').read_text())
  assert len(beside) == 3
  # Adapters, moments, scores and batches; with the base it would be twice that.
  for rung, found in zip(summary['rungs'], beside[:2], strict=True):
    assert found < 0.8 * rung['bytes']['pruned']


@pytest.mark.parametrize(
  'last, there',
  [
    # Killed after an export, with no checkpoint since.
    (3, '0.9'),
    # While the export was written; right before, right after, and much later.
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in ((3, ''), (2, ''), (4, '0.9'), (5, '0.9'), (5, '0.9,0.8'))
    ),
  ],
)
def test_a_run_cut_short_goes_on_bit_for_bit(once, tmp_path, last, there):
  workdir, there = cut_short(once, tmp_path / 'run', last), there.split(',')
  written = {}
  for share in RUNGS:
    folder = workdir / 'rungs' / share
    if share in there:
      written[share] = (folder / 'export' / WEIGHTS).stat().st_mtime_ns
    else:  # What is there of it is not finished.
      folder.with_name(f'{share}.json').unlink()
      (folder / 'export' / 'config.json').unlink()
  err = train(workdir, ONCE)
  assert f'resuming at step {3 + last} of 12' in err
  assert_same_run(workdir, once, 'checkpoints', 9)
  for ours, theirs in zip(exports(workdir), exports(once), strict=True):
    for name in (WEIGHTS, 'pruning.json', 'config.json'):
      assert (ours / name).read_bytes() == (theirs / name).read_bytes()
  check(workdir)
  for share, then in written.items():
    path = workdir / 'rungs' / share / 'export' / WEIGHTS
    assert path.stat().st_mtime_ns == then


def test_an_unfinished_run_is_exported_as_it_is(once, tmp_path, capsys):
  workdir, out = cut_short(once, tmp_path / 'run', 3), tmp_path / 'out'
  assert main(['export', str(workdir), str(out)]) == 0, capsys.readouterr().err
  rung = once / 'rungs' / '0.9' / 'export'
  assert kept(out) == kept(rung)
  # What it computes is the rung: at this step it was exported.
  assert (out / WEIGHTS).read_bytes() == (rung / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_the_first_rung_is_what_a_run_to_its_size_gives(once, tmp_path):
  # Channels alone, so that a target can say the counts of the rung.
  alone = [*ONCE, '--config.prune.heads=none', '--config.prune.target=0.9']
  alone += ['--config.prune.compensate_batches=3']
  train(workdir := tmp_path / 'ladder', alone)
  keep = json.loads((workdir / 'run.json').read_text())['resolved']['ladder']
  share = 1 - keep['0.9']['mlp'][0] / 128
  single = [x for x in alone if 'ladder' not in x and 'rung_steps' not in x]
  single += [f'--config.prune.target={share}', '--config.train.steps=6']
  train(tmp_path / 'single', single)
  ours = workdir / 'rungs' / '0.9' / 'export' / WEIGHTS
  theirs = tmp_path / 'single' / 'export' / WEIGHTS
  assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
  'settings',
  [
    (
      *('prune.shrink=0.5', 'train.distill=0.5', 'export.format=hf,peft'),
      'prune.protect=reference',
    ),
    (
      *('model.base_dtype=int8', 'prune.layers_target=0.34'),
      *('model.sizes.num_hidden_layers=7', 'prune.heads=none'),
      *('prune.target=0.3', 'recover.steps=2'),
    ),
    ('prune.layer_profile=0.5,1.5', 'prune.criterion=obs', 'prune.shrink=auto'),
    (
      *('prune.order=prune_then_tune', 'prune.calibration_steps=3'),
      *('prune.layers_target=0.34', 'model.sizes.num_hidden_layers=7'),
      *('model.base_dtype=int8', 'train.distill=0.5', 'prune.target=0.3'),
      'prune.protect=reference',
      'prune.compensate_data=synthetic:7',
    ),
  ],
)
def test_a_ladder_goes_with_everything_and_is_gone_on_with(settings, tmp_path):
  flags = [*RUN, '--config.train.steps=20', '--config.prune.cooldown=0.2']
  flags += [f'--config.{setting}' for setting in settings]
  train(whole := tmp_path / 'whole', flags)
  check(whole)
  summary = json.loads((whole / 'summary.json').read_text())
  first = summary['rungs'][0]['steps']
  for case in 'before', 'at', 'after':
    workdir = tmp_path / case
    last = first + {'before': -1, 'at': 0, 'after': 1}[case]
    last -= 3 if 'prune.order=prune_then_tune' in settings else 0
    cut_short(whole, workdir, last)
    shutil.rmtree(workdir / 'checkpoints-recover', ignore_errors=True)
    shutil.rmtree(workdir / 'export-peft', ignore_errors=True)
    train(workdir, flags)
    steps = max(int(x.name) for x in (whole / 'checkpoints').iterdir())
    assert_same_run(workdir, whole, 'checkpoints', steps)
    for ours, theirs in zip(exports(workdir), exports(whole), strict=True):
      assert (ours / WEIGHTS).read_bytes() == (theirs / WEIGHTS).read_bytes()
