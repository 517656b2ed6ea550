"""plan: memory and work of a run's functions, compiled and not run."""

import importlib.util
import json

import jax
import pytest

from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.cli.main import main
from lorapr_jax.cli.plan import show
from lorapr_jax.hf.load import load_or_draw
from lorapr_jax.models.cost import (
  attention_flops_per_token,
  forward_flops_per_token,
)
from lorapr_jax.planning import compiled
from lorapr_jax.planning import needs as plan_lib
from lorapr_jax.planning.functions import loop_functions
from lorapr_jax.planning.topology import CHIPS, Topology
from lorapr_jax.settings.run import split_config
from lorapr_jax.training.base import Places

pytestmark = pytest.mark.mesh

TINY = ['--config=configs/tiny.py', '--topology=cpu:8']
# So that less is traced and compiled.
FEW = '--config.lora.targets=q_proj,down_proj'


@pytest.fixture(autouse=True)
def _as_it_was():
  before = jax.config.jax_platforms
  assert len(jax.devices()) == 8  # Made before any command counts them.
  yield
  jax.config.update('jax_platforms', before)


def plan(capsys, *arguments):
  assert main(['plan', *TINY, FEW, *arguments, '--json']) == 0
  return json.loads(capsys.readouterr().out)


def by_phase(report):
  return {(p['criterion'], p['phase']): p for p in report['phases']}


def test_every_phase_of_both_criteria_is_compiled(capsys):
  report = plan(capsys, '--criteria=lora,gradient', '--mesh=data=2,fsdp=4')
  assert report['devices'] == 8 and report['fits'] is None
  mesh = {'data': 2, 'fsdp': 4, 'sequence': 1, 'tensor': 1}
  assert report['mesh'] == mesh
  found = by_phase(report)
  phases = ('step', 'importance', 'pruning event', 'optimiser', 'evaluation')
  assert set(found) == {(c, p) for c in ('lora', 'gradient') for p in phases}
  for phase in found.values():
    own = phase['compiled']
    sizes = (own['arguments'], own['outputs'], own['temporaries'])
    assert phase['total'] == sum(sizes) + phase['beside'] > 0
  # The gradients of the base, in float32 like the base here, come out.
  more = {
    criterion: found[criterion, 'step']['compiled']['outputs']
    for criterion in ('lora', 'gradient')
  }
  assert more['gradient'] > more['lora'] + 4 * 4 * 64 * 64 // 4
  # All gather their weights; the optimiser has none.
  assert 'all-gather' in found['lora', 'step']['compiled']['collectives']
  assert not found['lora', 'optimiser']['compiled']['collectives']


def test_a_step_of_one_device_takes_the_operations_of_its_model(capsys):
  # No padding of the loss's tokens; no block is computed twice.
  flags = ['--config.train.loss_chunk=64', '--config.model.remat=none']
  flags += ['--config.model.matmul_dtype=float32', '--config.lora.rank=1']
  main(['plan', TINY[0], '--topology=cpu:1', *flags, '--json'])
  found = by_phase(json.loads(capsys.readouterr().out))
  config, _ = parse_flags([TINY[0], '--workdir=none'])
  settings = split_config(config, jax.devices()[:1])
  train, sizes = settings.train, settings.compute.config
  # Forward and back, which in attention takes twice as many as forward.
  least = 2 * forward_flops_per_token(sizes, train.seq_len)
  least += attention_flops_per_token(sizes, train.seq_len)
  least *= train.batch_size * train.seq_len
  # Attention on a CPU takes all pairs of positions, and LoRA is not counted.
  assert 1.0 < found['lora', 'step']['compiled']['flops'] / least < 1.3


def test_the_shapes_are_those_of_a_run(capsys):
  config, _ = parse_flags([TINY[0], '--workdir=none'])
  settings = split_config(config)
  places = Places.of(
    settings.mesh,
    settings.compute.config,
    settings.base_dtype,
    settings.train.micro_batch,
  )
  base = load_or_draw(
    None, settings.compute.config, places.base, settings.base_dtype, 0
  )
  phase = next(loop_functions(config, settings.devices))
  params = phase.lowered.in_avals[0][0]
  for array, shape in zip(
    jax.tree.leaves(base), jax.tree.leaves(params), strict=True
  ):
    assert array.shape == shape.shape and array.dtype == shape.dtype


def test_a_table_says_what_its_columns_are(capsys):
  assert main(['plan', *TINY, FEW]) == 0
  out = capsys.readouterr().out
  # What of the mesh is left to the devices is resolved.
  assert out.startswith('cpu:8: 8 devices; data=1,fsdp=8,sequence=1,tensor=1\n')
  for said in ('importance', 'received', 'beside:', 'floor'):
    assert said in out


def test_eighty_columns_hold_the_widest_figures(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  devices = tuple(jax.devices()[:1])
  needs = plan_lib.Needs(
    name='importance',
    beside=99_900_000_000,
    compiled=compiled.Compiled(
      arguments=99_900_000_000,
      outputs=99_900_000_000,
      temporaries=99_900_000_000,
      flops=2.45e15,
      collectives={'all-gather': {'count': 1, 'bytes': 2_490_000_000_000}},
      text='',
    ),
    total=399_600_000_000,
    fits=True,
  )
  topology = Topology('v5e:1x1', devices, CHIPS['v5e'])
  show([('gradient', needs)], topology, {'data': 1, 'fsdp': 1, 'tensor': 1})
  out = capsys.readouterr().out
  assert 'interconnect' in out and '…' not in out
  assert max(map(len, out.splitlines()[:8])) <= 80


def test_what_the_compiler_refuses_is_shown_by_its_figure(monkeypatch, capsys):
  # By hand: there is no TPU compiler here; tests/aot has the real one's word.
  topology = Topology('v5e:1x2', tuple(jax.devices()[:2]), CHIPS['v5e'])
  of, refused = compiled.Compiled.of, []

  def once(lowered):
    if not refused:
      refused.append(lowered)
      message = 'RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.'
      raise compiled.OutOfMemory(message)
    return of(lowered)

  monkeypatch.setattr(compiled.Compiled, 'of', once)
  config, _ = parse_flags([TINY[0], '--workdir=none'])
  step, *others = plan_lib.plan_run(config, topology)
  assert (step.fits, step.compiled) == (False, None)
  assert step.total == round(20.5 * 2**30)
  assert all(x.fits and x.compiled for x in others)
  found = [('lora', needs) for needs in (step, *others)]
  show(found, topology, {'data': 1, 'fsdp': 2})
  out = capsys.readouterr().out
  assert out.count(' step ') == 1 and '22.0 GB' in out
  assert 'The compiler refuses' in out


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--topology=v7x:2x2'], 'such as v5e:4x4 or v5p:2x2x1, or cpu:8'),
    (['--topology=v5e'], '--topology=v5e: KIND:AxB'),
    (['--topology=cpu:9'], 'there are 8 CPU devices'),
    ([TINY[1], '--mesh=data'], '--mesh=data: AXIS=SIZE,...'),
    ([TINY[1], '--mesh=rows=2'], 'unknown setting --config.mesh.rows'),
    ([TINY[1], '--mesh=fsdp=3'], 'do not multiply to the 8 devices'),
    ([TINY[1], '--criteria=taylor'], 'choose from lora, gradient'),
    ([TINY[1], '--config=models:8b'], 'NAME of llama-7b, llama-13b, llama-30b'),
  ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
  assert main(['plan', TINY[0], *arguments]) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ') and message in err and err.count('\n') == 1


@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is not None, reason='it is here'
)
def test_the_compiler_that_is_missing_is_named(capsys):
  assert main(['plan', TINY[0], '--topology=v5e:2x4']) == 1
  assert (
    "compiler is missing: pip install 'jax[tpu]'" in capsys.readouterr().err
  )


def test_compensation_is_a_phase_where_it_is_asked_for(capsys):
  report = plan(capsys, '--config.prune.compensate=ridge')
  found = by_phase(report)['lora', 'pruning event']['compiled']
  # What is repaired takes the place of what was.
  assert found['outputs'] < 4000 < found['temporaries']
  without = by_phase(plan(capsys, '--config.prune.compensate=none'))
  assert ('lora', 'pruning event') not in without


def test_the_step_that_is_planned_learns_though_the_first_phase_does_not(
  capsys,
):
  ways = ('--config.prune.order=prune_then_tune', '--config.prune.order=none')
  tuned, untrained, joint = (
    by_phase(plan(capsys, '--criteria=obs', *way))['obs', 'step']['compiled']
    for way in ((ways[0],), (ways[1],), ())
  )
  assert tuned['flops'] == joint['flops'] > untrained['flops']
