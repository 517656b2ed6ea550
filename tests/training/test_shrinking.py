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
from lorapr_jax.pruning.masks import without_layers
from lorapr_jax.pruning.milestones import Milestones
from lorapr_jax.training.checkpoint import read_state
from lorapr_jax.training.event import PruningEvent
from tests.devices import one_device
from tests.runs import assert_same_run, metrics, train

STEPS = 18
RUN = [
  f'--config.train.steps={STEPS}',
  *('--config.prune.every=3', '--config.lora.dropout=0.0'),
  *('--config.train.log_every=1', '--config.data.eval='),
]
# So that less is traced and compiled, and computed. The first projection is cut
# by its outputs, the second by its inputs.
LESS = (
  'lora.targets=q_proj,down_proj',
  *('train.batch_size=8', 'train.micro_batch_size=8'),
)
FEW = [f'--config.{setting}' for setting in LESS]
# Settings of both runs, and the mesh of the one that is cut on the way.
CASES = {
  # Of 4 KV heads an odd number cannot be split: a masked one stays a while.
  'kv_heads': ((), ('mesh.data=2', 'mesh.tensor=2')),
  'mha': (
    (
      *('model.sizes.num_key_value_heads=8', 'prune.protect=none'),
      *('recover.steps=2', 'prune.compensate=ridge'),
      *('model.base_dtype=int8', 'prune.layer_profile=2,3'),
    ),
    (),
  ),
  'int8': (
    (
      *('model.base_dtype=int8', 'prune.compensate=none'),
      *('recover.steps=2', *LESS),
    ),
    ('mesh.data=2', 'mesh.tensor=2'),
  ),
  'layers': (
    (
      *('prune.layers_target=0.34', 'model.sizes.num_hidden_layers=7'),
      *('model.base_dtype=int8', 'prune.compensate=none'),
    ),
    (),
  ),
  'queries': (
    (
      *('prune.heads=queries', 'prune.protect=none'),
      *('prune.criterion=gradient', 'train.seed=1'),
    ),
    ('mesh.data=2', 'mesh.sequence=2'),
  ),
}
# int8 has what kv_heads has, and more; tests/pruning/test_shrink.py has single
# queries, tests/families whole runs, and repaired runs are cut short below.
MARKS = {
  'kv_heads': (pytest.mark.slow, pytest.mark.mesh),
  'mha': pytest.mark.slow,
  'layers': pytest.mark.slow,
  'int8': pytest.mark.mesh,
  'queries': (pytest.mark.slow, pytest.mark.mesh),
}


def cuts_of(workdir):
  return json.loads((workdir / 'run.json').read_text())['resolved']['cuts']


@pytest.fixture
def events(monkeypatch):
  """Of each pruning event: the importance, and the masks before and after."""
  found, prune = [], PruningEvent.__call__

  def recorded(self, state, *rest):
    before = jax.device_get((state.importance, state.masks))
    state, base = prune(self, state, *rest)
    found.append((*before, jax.device_get(state.masks)))
    return state, base

  monkeypatch.setattr(PruningEvent, '__call__', recorded)
  return found


def smallest_gap(events):
  """Between what was masked and what stayed, over all events of a run."""
  gaps = []
  for stacks in events:
    # Layers are measured in the event.
    for group, masks in without_layers(stacks[-1][0]).items():
      scores, before = (stack[0][group] for stack in stacks[:2])
      rows = (-1, masks.shape[-1])
      stayed = np.where(masks > 0, scores, np.inf).reshape(rows).min(axis=-1)
      gone = (before > 0) & (masks == 0)
      went = np.where(gone, scores, -np.inf).reshape(rows).max(axis=-1)
      gaps.append((stayed - went).min())
  return min(gaps)


@functools.partial(jax.jit, static_argnames='config')
def logits_of(params, config):
  tokens = np.random.default_rng(0).integers(0, 256, (2, 32))
  return logits(params, hidden_states(params, tokens, config), config)


@pytest.mark.parametrize(
  'case', [pytest.param(case, marks=MARKS.get(case, ())) for case in CASES]
)
def test_masks_and_model_do_not_depend_on_when_groups_are_cut(
  case, events, tmp_path
):
  settings, mesh = CASES[case]
  settings = [*RUN, *(f'--config.{x}' for x in settings)]
  # On one device, whatever the mesh of the other.
  with one_device():
    train(end := tmp_path / 'end', settings)
  gap = smallest_gap(events)
  cut = ['--config.prune.shrink=0.3,0.7', *(f'--config.{x}' for x in mesh)]
  train(found := tmp_path / 'found', [*settings, *cut])
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
  # Two scores that each move by less than half of it keep their order.
  assert difference < gap / 2
  for name in (n for n in expected if n.endswith('.mask')):
    np.testing.assert_array_equal(scores[name], expected[name], err_msg=name)
  for name in ('kept', 'sparsity'):
    ours, theirs = (
      json.loads((w / 'export' / 'pruning.json').read_text())[name]
      for w in (found, end)
    )
    assert ours == theirs
  with one_device():
    ours, theirs = (load(w / 'export') for w in (found, end))
    np.testing.assert_allclose(
      *(logits_of(model.params, model.config) for model in (ours, theirs)),
      atol=3e-4,
    )
  for ours, theirs in zip(metrics(found), metrics(end), strict=True):
    assert ours['loss'] == pytest.approx(theirs['loss'], abs=1e-5)
    for key in ('heads_sparsity', 'channels_sparsity', 'params_kept'):
      assert ours[key] == theirs[key]


SHRINK = [
  *(*RUN, *FEW, '--config.prune.shrink=0.3,0.7'),
  *('--config.train.checkpoint_every=1', '--config.train.checkpoints_kept=100'),
]
# What is compiled: the step for each of three sizes, and the repair for the two
# in which something is masked.
COMPILED = {'none': 3, 'ridge': 5}


def flags_of(kind):
  return [*SHRINK, f'--config.prune.compensate={kind}']


@pytest.fixture(scope='module')
def shrunk(tmp_path_factory):
  """Runs that were cut twice on the way."""

  @functools.cache
  def run(kind):
    workdir = tmp_path_factory.mktemp('shrunk') / 'run'
    err = train(workdir, flags_of(kind))
    assert err.count('compile\n') == COMPILED[kind]
    assert err.count('cut\n') == 3 and len(cuts_of(workdir)) == 2
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
  err = train(workdir, flags_of(kind))
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
  tmp_path, monkeypatch
):
  # As if a cut cost nothing; so short a run pays for none.
  monkeypatch.setattr(
    Milestones,
    'fastest',
    functools.partialmethod(Milestones.fastest, cut_steps=0),
  )
  workdir = tmp_path / 'run'
  flags = [
    *RUN,
    *FEW,
    '--config.prune.every=6',
    '--config.prune.compensate=none',
  ]
  said = train(workdir, [*flags, '--config.prune.shrink=auto'])
  assert cuts_of(workdir) == [7, 13]
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['cuts_on_the_way'] == [7, 13]
  known = (
    'masked groups are cut out before steps 7, 13, and after the last step'
  )
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
