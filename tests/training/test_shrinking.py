"""Groups cut out on the way: the same masks and model as cut at the end."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lorapr_jax.cli.main import main
from lorapr_jax.hf.load import load, load_config
from lorapr_jax.models.decoder import hidden_states, logits
from lorapr_jax.pruning.milestones import Milestones
from lorapr_jax.training.checkpoint import read_state
from tests.runs import assert_same_run, finish, metrics, start

STEPS = 18
RUN = [
  f'--config.train.steps={STEPS}',
  *('--config.prune.every=3', '--config.lora.dropout=0.0'),
  '--config.train.log_every=1',
]
EVERY_STATE = [
  *('--config.train.checkpoint_every=1', '--config.train.checkpoints_kept=100'),
]
CASES = {
  # Of 4 KV heads an odd number cannot be split: a masked one stays a while.
  'kv_heads': ['--config.mesh.data=2', '--config.mesh.tensor=2'],
  'mha': [
    *('--config.model.sizes.num_key_value_heads=8', '--config.mesh.data=-1'),
    *('--config.mesh.fsdp=1', '--config.prune.protect=none'),
    *('--config.recover.steps=2', '--config.prune.compensate=ridge'),
    *('--config.model.base_dtype=int8', '--config.prune.layer_profile=2,3'),
  ],
  'int8': [
    *('--config.model.base_dtype=int8', '--config.mesh.data=2'),
    *('--config.mesh.fsdp=2', '--config.mesh.tensor=2'),
    '--config.prune.compensate=none',
  ],
  'queries': [
    *('--config.prune.heads=queries', '--config.mesh.data=2'),
    '--config.mesh.sequence=2',
    *('--config.prune.protect=none', '--config.prune.criterion=gradient'),
  ],
}


def train(workdir, *settings):
  flags = ['--config=configs/tiny.py', f'--workdir={workdir}', *settings]
  assert main(['train', *flags]) == 0
  return workdir


def cuts_of(workdir):
  return json.loads((workdir / 'run.json').read_text())['resolved']['cuts']


def smallest_gap(workdir):
  """Between what was masked and what stayed, over all steps of a run."""
  checkpoints = workdir / 'checkpoints'
  states = []
  for step in range(1, STEPS + 1):
    alone = workdir / 'alone' / 'checkpoints'
    shutil.rmtree(alone, ignore_errors=True)
    alone.mkdir(parents=True)
    (alone / str(step)).symlink_to(checkpoints / str(step))
    states.append(read_state(workdir / 'alone', 'checkpoints'))
  gaps = []
  for before, after in zip(states, states[1:], strict=False):
    for group, masks in after['masks'][0].items():
      scores = after['importance'][0][group]
      rows = (-1, masks.shape[-1])
      stayed = np.where(masks > 0, scores, np.inf).reshape(rows).min(axis=-1)
      gone = (before['masks'][0][group] > 0) & (masks == 0)
      went = np.where(gone, scores, -np.inf).reshape(rows).max(axis=-1)
      gaps.append((stayed - went).min())
  return min(gaps)


def logits_of(folder):
  model = load(folder)
  tokens = np.random.default_rng(0).integers(0, 256, (2, 32))
  return logits(model.params, hidden_states(model.params, tokens, model.config))


# int8 has what kv_heads has, and more.
SLOW = {'kv_heads': pytest.mark.slow}


@pytest.mark.mesh
@pytest.mark.parametrize(
  'case', [pytest.param(case, marks=SLOW.get(case, ())) for case in CASES]
)
def test_masks_and_model_do_not_depend_on_when_groups_are_cut(case, tmp_path):
  end = train(tmp_path / 'end', *RUN, *EVERY_STATE, *CASES[case])
  found = train(
    tmp_path / 'found', *RUN, *CASES[case], '--config.prune.shrink=0.3,0.7'
  )
  assert cuts_of(end) == [] and len(cuts_of(found)) == 2
  sizes = [
    sum(x.size for x in jax.tree.leaves(read_state(w, 'checkpoints')['lora']))
    for w in (found, end)
  ]
  assert sizes[0] < sizes[1]

  expected, scores = (
    load_file(w / 'importance.safetensors') for w in (end, found)
  )
  difference = max(np.abs(scores[k] - x).max() for k, x in expected.items())
  assert difference < smallest_gap(end) / 10
  for name in (n for n in expected if n.endswith('.mask')):
    np.testing.assert_array_equal(scores[name], expected[name], err_msg=name)
  for name in ('kept', 'sparsity'):
    ours, theirs = (
      json.loads((w / 'export' / 'pruning.json').read_text())[name]
      for w in (found, end)
    )
    assert ours == theirs
  np.testing.assert_allclose(
    logits_of(found / 'export'), logits_of(end / 'export'), atol=1e-4
  )
  for ours, theirs in zip(metrics(found), metrics(end), strict=True):
    assert ours['loss'] == pytest.approx(theirs['loss'], abs=1e-5)
    for key in ('heads_sparsity', 'channels_sparsity', 'params_kept'):
      assert ours[key] == theirs[key]


SHRINK = [*RUN, *EVERY_STATE, '--config.prune.shrink=0.3,0.7']
# What is compiled: the step for each of three sizes, and the repair for the two
# in which something is masked.
COMPILED = {'none': 3, 'ridge': 5}


def flags_of(kind):
  return [*SHRINK, f'--config.prune.compensate={kind}']


@pytest.fixture(scope='module')
def shrunk(tmp_path_factory):
  """Runs of a process of their own that were cut twice on the way."""

  @functools.cache
  def run(kind):
    workdir = tmp_path_factory.mktemp('shrunk') / 'run'
    _, err = finish(start(workdir, flags_of(kind)))
    assert err.count('compile\n') == COMPILED[kind]
    assert err.count('cut\n') == 3
    return workdir

  return run


def cut_short(workdir, copy, last):
  """As a kill would have left it after the checkpoint of step `last`."""
  shutil.copytree(workdir, copy)
  for step in (copy / 'checkpoints').iterdir():
    if int(step.name) > last:
      shutil.rmtree(step)
  for name in ('summary.json', 'importance.safetensors', 'report.html'):
    (copy / name).unlink()
  shutil.rmtree(copy / 'export')
  return copy


@pytest.mark.parametrize(
  'kind, cut, after',
  [
    pytest.param('none', 0, 2, marks=pytest.mark.slow),
    *(('ridge', 0, 0), ('ridge', 0, 2), ('ridge', 1, 1)),
  ],
)
def test_a_run_cut_short_goes_on_bit_for_bit(
  shrunk, tmp_path, kind, cut, after
):
  whole = shrunk(kind)
  last = cuts_of(whole)[cut] + after
  workdir = cut_short(whole, tmp_path / 'run', last)
  _, err = finish(start(workdir, flags_of(kind)))
  assert f'resuming at step {last} of {STEPS}' in err
  assert_same_run(workdir, whole, 'checkpoints', STEPS)
  for name in ('importance.safetensors', 'export/model.safetensors'):
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_an_unfinished_run_is_exported_in_the_base_models_numbering(
  shrunk, tmp_path, capsys
):
  whole = shrunk('ridge')
  last = cuts_of(whole)[0] + 2
  workdir, out = cut_short(whole, tmp_path / 'run', last), tmp_path / 'out'
  assert main(['export', str(workdir), str(out)]) == 0, capsys.readouterr().err
  state = read_state(workdir, 'checkpoints')
  alive = [
    int(count) for x in state['masks'] for count in x['mlp'].sum(axis=-1)
  ]
  assert [layer.mlp_dim for layer in load_config(out).layers] == alive
  final, now = (
    json.loads((folder / 'pruning.json').read_text())['kept']
    for folder in (whole / 'export', out)
  )
  # What is left at the end was there on the way.
  for ours, theirs in zip(now, final, strict=True):
    for group, indices in ours.items():
      assert set(theirs[group]) <= set(indices)
  assert 64 < alive[0] < 128


def test_the_cuts_of_auto_are_known_before_the_first_step(
  tmp_path, capsys, monkeypatch
):
  # As if a cut cost nothing; so short a run pays for none.
  monkeypatch.setattr(
    Milestones,
    'fastest',
    functools.partialmethod(Milestones.fastest, cut_steps=0),
  )
  workdir = train(
    tmp_path / 'run',
    *(f'--config.train.steps={STEPS}', '--config.prune.every=6'),
    '--config.prune.shrink=auto',
  )
  assert cuts_of(workdir) == [7, 13]
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['cuts_on_the_way'] == [7, 13]
  said = capsys.readouterr().err
  known = 'masked groups are cut out before steps 7, 13, and after the last'
  assert 0 < said.index(known) < said.index('compile')


def test_a_run_with_other_cuts_is_not_gone_on_with(shrunk, tmp_path, capsys):
  workdir = cut_short(shrunk('ridge'), tmp_path / 'run', 10)
  path = workdir / 'run.json'
  run = json.loads(path.read_text())
  # As a release with another price of a cut would have had it.
  run['resolved']['cuts'][0] -= 3
  path.write_text(json.dumps(run))
  flags = ['--config=configs/tiny.py', f'--workdir={workdir}']
  assert main(['train', *flags, *flags_of('ridge')]) == 1
  assert 'a run with another resolved.cuts' in capsys.readouterr().err


def test_there_is_nothing_to_cut_on_the_way_without_a_ramp(tmp_path, capsys):
  for settings in (
    ['--config.prune.order=none'],
    ['--config.prune.target=0'],
  ):
    flags = ['--config=configs/tiny.py', f'--workdir={tmp_path / "run"}']
    flags += [*settings, '--config.prune.shrink=0.5']
    assert main(['train', *flags]) == 1
    assert 'there is no ramp' in capsys.readouterr().err
