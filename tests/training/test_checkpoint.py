"""Checkpoints that are incomplete or damaged, and the good ones beside them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.trees import param_shapes
from lorapr_jax.runtime import sharding
from lorapr_jax.runtime.files import write_json
from lorapr_jax.runtime.workdir import RUN_FILE
from lorapr_jax.settings.phases import Phase
from lorapr_jax.training import checkpoint
from lorapr_jax.training.base import Base, Places
from lorapr_jax.training.checkpoint import Checkpoints, Damaged
from lorapr_jax.training.resume import begin
from lorapr_jax.training.state import init_state

CONFIG = ModelConfig(
  vocab_size=48, embed_dim=16, head_dim=4, layers=(LayerShape(4, 2, 24),)
)
# Adapters of more than 1 KiB: smaller arrays share a file that has a check.
COMPUTE = Compute(CONFIG, LoraConfig(32, 4.0, 0.0, ('q_proj',)))
PHASE = Phase('tune', 'checkpoints', 0, 60, 'synthetic:0', 0, 1e-3, 'constant')
OPTIMIZER = optax.adam(1e-3)


def new_state(compute):
  return init_state(jax.random.key(0), compute, (), OPTIMIZER)


def state_at(step):
  state = new_state(COMPUTE)
  return state.replace(
    step=jnp.int32(step), lora=jax.tree.map(lambda x: x + step, state.lora)
  )


@pytest.fixture(scope='module')
def base():
  shapes = param_shapes(CONFIG, jnp.float32)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  mesh = sharding.make_mesh({})
  return Base(params, COMPUTE, Places.of(mesh, CONFIG, jnp.float32))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run') / 'checkpoints'
  with Checkpoints(folder, keep=2) as checkpoints:
    for step in 15, 30, 37:
      checkpoints.save(step, state_at(step))
  assert sorted(checkpoint.saved_steps(folder)) == [30, 37]
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'run' / 'checkpoints')


def begun(folder, base):
  """The step that a run goes on from, after a look at the state; warnings."""
  said = []
  state, _ = begin(folder, PHASE, base, new_state, said.append)
  assert_same(state, state_at(int(state.step)))
  return int(state.step), said


def assert_same(state, expected):
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_an_incomplete_newest_one_leaves_the_good_ones_alone(folder, base):
  (folder / '99').mkdir()
  step, said = begun(folder, base)
  aside = folder.parent / 'checkpoints-damaged' / '99'
  assert step == 37
  assert said == [
    f'{folder}/99 cannot be read, because it is damaged: it is now {aside}, '
    'and the run goes on from step 37'
  ]
  assert aside.is_dir()
  assert sorted(checkpoint.saved_steps(folder)) == [30, 37]
  # What is opened now goes on as if nothing had been.
  with Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.save(45, state_at(45))
  assert begun(folder, base) == (45, [])


@pytest.mark.parametrize('key', ['model', 'lora', 'sha256'])
def test_those_of_another_run_are_refused_and_stay(tmp_path, base, key):
  run = {
    'config': {'lora': {'rank': 32}},
    'resolved': {'model': {'hidden_size': 16}},
    'inputs': {'sha256': 'abc'},
  }
  changed = {
    'model': run | {'resolved': {'model': {'hidden_size': 8}}},
    'lora': run | {'config': {'lora': {'rank': 8}}},
    'sha256': run | {'inputs': {'sha256': 'def'}},
  }
  write_json(tmp_path / RUN_FILE, run)
  folder = tmp_path / 'checkpoints'
  with Checkpoints(folder, keep=2) as checkpoints:
    checkpoints.save(15, state_at(15))
  assert begun(folder, base) == (15, [])
  write_json(tmp_path / RUN_FILE, changed[key])
  message = 'checkpoints/15 is of a run with another model, base or LoRA than'
  with pytest.raises(UserError, match=message):
    begun(folder, base)
  with pytest.raises(UserError, match=message):
    checkpoint.read_state(tmp_path, 'checkpoints')
  write_json(tmp_path / RUN_FILE, run)
  assert begun(folder, base) == (15, [])


def test_two_that_are_cut_short_are_set_aside_and_again(folder, base):
  for _ in range(2):
    (folder / '99').mkdir(parents=True)
    shutil.rmtree(folder / '37' / 'default' / 'ocdbt.process_0')
    step, said = begun(folder, base)
    assert step == 30
    assert [text.partition(' ')[0] for text in said] == [
      f'{folder}/99',
      f'{folder}/37',
    ]
    with Checkpoints(folder, keep=2) as checkpoints:
      checkpoints.save(37, state_at(37))
  assert len(list((folder.parent / 'checkpoints-damaged').iterdir())) == 4


def test_nothing_is_moved_where_none_can_be_read(folder, base):
  for name in '30', '37':
    shutil.rmtree(folder / name / 'default')
  with pytest.raises(Damaged, match='checkpoints/37 cannot be read'):
    begun(folder, base)
  assert sorted(path.name for path in folder.iterdir()) == ['30', '37']
  assert [path.name for path in folder.parent.iterdir()] == ['checkpoints']


def test_what_is_no_damage_moves_nothing(folder, base, monkeypatch):
  def refuse(*_):
    raise ValueError('PERMISSION_DENIED: Error opening "zarr" driver')

  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, 'restore', refuse)
  with pytest.raises(UserError, match='37 is out of reach: PERM') as error:
    begun(folder, base)
  assert not isinstance(error.value, Damaged)

  def fail(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')

  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, 'restore', fail)
  with pytest.raises(jax.errors.JaxRuntimeError):
    begun(folder, base)
  assert sorted(path.name for path in folder.iterdir()) == ['30', '37']


def damages(content):
  """What may become of a file: bytes, or None where it is gone."""
  yield from (None, b'', content[: len(content) // 2])
  for at in range(0, len(content), max(1, len(content) // 5)):
    flipped = bytearray(content)
    flipped[at] ^= 4
    yield bytes(flipped)


def test_any_damage_to_the_arrays_is_seen_or_changes_nothing(folder, base):
  seen, shapes = {}, jax.eval_shape(lambda: new_state(COMPUTE))
  for path in (folder / '37').rglob('d/*'):
    content = path.read_bytes()
    seen[path] = 0
    for damaged in damages(content):
      path.unlink() if damaged is None else path.write_bytes(damaged)
      try:
        state = checkpoint.restore(folder, 37, shapes, base.places.state)
      except Damaged:
        seen[path] += 1
      else:
        assert_same(state, state_at(37))
      path.write_bytes(content)
  # Some of the files have been superseded by others, and how many there are
  # depends on how the writer's threads ran; the largest holds the arrays: gone,
  # empty and cut short are seen at the least.
  assert seen[max(seen, key=lambda path: path.stat().st_size)] >= 3
  assert_same(
    checkpoint.read_state(folder.parent, folder.name)['lora'],
    state_at(37).lora,
  )


def test_a_flipped_bit_of_an_array_is_seen_on_the_host_too(folder):
  largest = max(
    (folder / '37').rglob('d/*'), key=lambda path: path.stat().st_size
  )
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 4
  largest.write_bytes(content)
  with pytest.raises(Damaged, match='checkpoints/37 cannot be read'):
    checkpoint.read_state(folder.parent, folder.name)
