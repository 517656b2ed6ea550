"""explore: every size of a model, measured without training."""

import dataclasses
import json
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.cli.explore import command
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.cli.main import main
from lorapr_jax.eval.benchmark import PROMPT_TOKENS
from lorapr_jax.exploring.asked import Size
from lorapr_jax.exploring.page import render_exploration
from lorapr_jax.exploring.table import choose, stored_bytes, verdict
from lorapr_jax.hf.load import load_or_draw
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.cost import kv_cache_bytes_per_token, weight_bytes
from lorapr_jax.models.trees import init_lora
from lorapr_jax.pruning.compensation import (
  repaired_of,
  with_repaired,
  without_repaired,
)
from lorapr_jax.pruning.masks import by_stack, initial_masks
from lorapr_jax.report import units
from lorapr_jax.settings.files import read_config
from lorapr_jax.settings.run import split_config
from lorapr_jax.training.base import Places, cut_params, kept_of
from lorapr_jax.training.batches import (
  Batches,
  device_batches,
  load_held_out,
)
from lorapr_jax.training.event import make_prune_layers
from tests.report.explored import RESULT
from tests.report.test_page import check_alone

# Room for what is timed; the calibration is short.
TINY = [
  '--config=configs/tiny.py',
  '--config.model.sizes.max_position_embeddings=256',
  '--config.prune.calibration_steps=3',
]
SIZES = 0.8, 0.6


def explore(capsys, *arguments):
  status = main(['explore', *TINY, *arguments])
  out, err = capsys.readouterr()
  return status, out, err


@pytest.fixture(scope='module')
def explored(tmp_path_factory):
  """The folder of an exploration in which the sizes were timed."""
  folder = tmp_path_factory.mktemp('explored') / 'sizes'
  sizes = ','.join(map(str, SIZES))
  flags = [f'--sizes={sizes}', '--latency', f'--workdir={folder}']
  assert main(['explore', *TINY, *flags]) == 0
  return folder


@pytest.fixture
def result(explored):
  return json.loads((explored / 'explored.json').read_text())


def by_name(result):
  return {row['name']: row for row in result['rows']}


def pruned_by_hand(share):
  """(params, compute, held out) of a size: the event of a run, and its cut."""
  flags = [*TINY, '--workdir=none', '--config.prune.unit=params']
  flags += [f'--config.prune.target={round(1 - share, 3)}']
  flags += ['--config.prune.criterion=obs', '--config.prune.order=none']
  config, _ = parse_flags(flags)
  settings = split_config(config, jax.devices()[:1])
  compute, dense = settings.compute, settings.compute.config
  data, train, pruning = settings.data, settings.train, settings.pruning
  places = Places.of(
    settings.mesh, dense, settings.base_dtype, train.micro_batch
  )
  params = load_or_draw(None, dense, places.base, settings.base_dtype, 0)
  loaded = Batches.load([data.train], None, dense.vocab_size, data, train)
  stream = loaded.streams[data.train]
  with device_batches(stream, places.batch, loaded.rows, range(3)) as read:
    batches = tuple(read)
  lora = init_lora(jax.random.key(0), dense, compute.lora)
  masks = initial_masks(
    tuple(pruning.plan.keep),
    tuple((s.size, dense.sizes(s.shape)) for s in dense.stacks),
  )
  prune = make_prune_layers(compute, pruning.criterion, True, places)
  pruned = prune(
    *(repaired_of(params), without_repaired(params), lora, masks),
    jax.tree.map(jnp.zeros_like, masks),
    *(by_stack(pruning.plan.keep, dense), batches),
  )
  params = with_repaired(params, pruned.repaired)
  small = cut_params(params, kept_of(pruned.masks), dense)
  held_out = load_held_out(None, dense.vocab_size, data, 8)
  return small, settings.plan.pruned_config, compute, held_out


@pytest.mark.parametrize('share', SIZES)
def test_a_size_is_what_a_run_would_mask_repair_and_cut(result, share):
  params, sizes, compute, held_out = pruned_by_hand(share)
  cut = type(compute)(sizes, dtype=compute.dtype)
  expected = held_out.perplexity(params, cut).perplexity
  row = by_name(result)[f'width {share:g}']
  # Masked weights are zeros in the arrays; here they are gone.
  assert row['perplexity']['value'] == pytest.approx(expected, rel=1e-5)
  assert row['parameters'] == sizes.num_parameters
  assert abs(row['parameters'] / result['rows'][0]['parameters'] - share) < 0.01
  assert row['bytes'] == 4 * sizes.num_parameters
  assert row['kv_cache_bytes'] == 256 * kv_cache_bytes_per_token(sizes, 4)
  assert 0 < row['repair']['error_left']['synthetic:0?windows=512'] < 1
  for phase in ('prefill', 'decode'):
    assert row['latency'][phase]['speedup'] > 0


def test_the_dense_model_stands_beside_itself_quantised(result):
  dense, int8, int4 = result['rows'][:3]
  assert (dense['name'], int8['name'], int4['name']) == (
    'dense',
    'int8',
    'int4',
  )
  assert dense['bytes'] > int8['bytes'] > int4['bytes'] > dense['bytes'] / 8
  values = [row['perplexity']['value'] for row in (dense, int8, int4)]
  np.testing.assert_allclose(values, values[0], rtol=0.01)
  assert len(set(values)) == 3
  beside = [row['latency']['decode']['dense'] for row in result['rows'][3:]]
  assert dense['latency']['decode']['seconds'] == np.median(beside)
  assert int8['latency'] is int4['latency'] is None


def test_bytes_are_of_values_and_scales():
  config = ModelConfig(10, 64, 8, (LayerShape(2, 3, 96),), family='llama')
  projections = 64 * 48 + 2 * 64 * 16 + 48 * 64 + 3 * 64 * 96
  others = config.num_parameters - projections
  outputs = 48 + 2 * 16 + 64 + 2 * 96 + 64
  assert stored_bytes(config, jnp.dtype('bfloat16')) == (
    2 * config.num_parameters
  )
  int8 = stored_bytes(config, jnp.dtype('bfloat16'), jnp.int8)
  assert int8 == projections + 4 * outputs + 2 * others
  assert int8 == weight_bytes(
    dataclasses.replace(config, quantized=LORA_TARGETS), 2
  )
  # A scale for 32 inputs; of o_proj for the 8 of a head.
  scales = (projections - 48 * 64) // 32 + 48 * 64 // 8
  int4 = stored_bytes(config, jnp.dtype('bfloat16'), jnp.int4)
  assert int4 == projections // 2 + 2 * scales + 2 * others


def test_it_goes_on_and_takes_sizes_that_are_added(
  explored, tmp_path, capsys, result
):
  folder = tmp_path / 'again'
  folder.mkdir()
  for file in ('run.json', 'explored.jsonl'):
    (folder / file).write_text((explored / file).read_text())
  lines = (folder / 'explored.jsonl').read_text().splitlines()
  assert [json.loads(line)['way'] for line in lines] == [
    *('dense', 'int8', 'int4', 'width', 'width')
  ]
  # As a process that was killed leaves it.
  (folder / 'explored.jsonl').write_text('\n'.join(lines[:4]) + '\n{"way": "w')
  flags = ['--sizes=0.8,0.6', '--latency', f'--workdir={folder}', '--json']
  status, out, err = explore(capsys, *flags)
  assert status == 0 and re.fullmatch(r'width 0\.6: perplexity .* s\n', err)
  again = json.loads(out)
  old, new = by_name(result), by_name(again)
  assert old.keys() == new.keys()
  for name in ('int8', 'int4', 'width 0.8'):
    assert old[name] == new[name]
  for name in ('dense', 'width 0.6'):  # Which were timed once more.
    assert old[name]['perplexity'] == new[name]['perplexity']
  assert json.loads((folder / 'explored.json').read_text()) == again
  # Nothing is left to measure: the weights are not even loaded.
  status, out, err = explore(capsys, *flags)
  assert (status, err) == (0, '') and json.loads(out) == again


def test_a_folder_of_other_settings_is_refused(explored, capsys):
  before = {path: path.read_bytes() for path in explored.iterdir()}
  for flag, named in (
    ('--config.prune.protect=none', 'config.prune.protect'),
    ('--tokens=2048', 'config.prune.calibration_steps'),
  ):
    status, out, err = explore(
      capsys, flag, f'--workdir={explored}', '--sizes=0.8', '--latency'
    )
    assert (status, out) == (1, '') and err.count('\n') == 1
    assert f'belongs to a run with another {named}' in err
  status, _, err = explore(capsys, f'--workdir={explored}', '--sizes=0.8')
  assert status == 1 and 'another explore.latency' in err
  assert {path: path.read_bytes() for path in explored.iterdir()} == before


def test_the_page_holds_every_number(explored, result):
  text = (explored / 'explored.html').read_text(encoding='utf-8')
  page = check_alone(text)
  expected = [
    'random weights, explored',
    result['verdict'],
    '1,536 tokens of synthetic:0?windows=512',
    'synthetic:1?windows=32, 32 windows of 32 tokens',
    'float32, the cache of 256 tokens',
    f'A prompt has {PROMPT_TOKENS} tokens',
    result['command'],
    units.duration(result['seconds']),
    '"hidden_size": 64',
  ]
  for row in result['rows']:
    expected += [
      f'{row["name"]} {row["parameters"]:,} {units.size(row["bytes"])} '
      f'{units.size(row["kv_cache_bytes"])} {row["perplexity"]["value"]:.2f}'
    ]
    for phase in row['latency'] or {}:
      times = row['latency'][phase]
      expected.append(units.milliseconds(times['seconds']))
      expected += [f'x {times["speedup"]:.2f}'] if 'speedup' in times else []
  for piece in expected:
    assert piece in page.text, piece
  # Against parameters, bytes, cache, and the two times.
  assert text.count('<svg') == 5


def test_without_times_or_a_smaller_cache_there_are_two_figures():
  rows = [
    {**row, 'kv_cache_bytes': 8, 'latency': None} for row in RESULT['rows']
  ]
  text = render_exploration({**RESULT, 'rows': rows, 'timed_on': None}, {})
  page = check_alone(text)
  assert 'A prompt has' not in page.text and 'Time of' not in page.text
  # The size with an infinite perplexity is in the table, and in no figure.
  assert 'width 0.5 67,257,504 269 MB 8 B inf' in page.text
  assert text.count('<svg') == 2


def test_the_command_prunes_to_the_size(result):
  words = shlex.split(result['command'])
  assert words[:2] == ['python', 'train.py']
  config, workdir = parse_flags(words[2:])
  plan = split_config(config, jax.devices()[:1]).plan
  chosen = by_name(result)[result['chosen']]
  assert workdir == 'runs/random-pruned'
  assert plan.pruned_config.num_parameters == chosen['parameters']
  # All else is as the config has it.
  assert config.prune.criterion == 'lora' and config.prune.order == 'joint'


def test_a_table_for_people(explored, capsys, result, monkeypatch):
  monkeypatch.setenv('COLUMNS', '120')
  flags = ['--sizes=0.8,0.6', '--latency', f'--workdir={explored}']
  status, out, err = explore(capsys, *flags)
  assert (status, err) == (0, '')
  for row in result['rows']:
    assert re.search(
      rf'{row["name"]} .*{row["perplexity"]["value"]:.2f}', out
    ), row['name']
  assert result['verdict'] in out and result['command'] in out
  assert f'page: {explored / "explored.html"}' in out


def row(way, size, perplexity):
  return {
    **Size(way)._asdict(),
    'name': f'{way} {size}',
    'parameters': size,
    'bytes': size,
    'perplexity': {'value': perplexity},
  }


def test_quantising_is_better_where_it_takes_no_more_bytes():
  dense = row('dense', 100, 10.0)
  sizes = [row('width', 70, 15.0), row('width', 40, 30.0)]
  found = verdict([dense, row('int8', 50, 10.5), row('int4', 40, 31.0), *sizes])
  assert found == (
    'Quantising alone is better than width 70: the dense model in int8 50 '
    'takes 50 B at a perplexity of 10.50.'
  )
  nothing = verdict(
    [dense, row('int8', 80, 10.5), row('int4', 60, 16.0), *sizes]
  )
  assert nothing.startswith('No size is beaten')
  # At as many bytes.
  assert 'width 40' in verdict([dense, row('int4', 40, 30.0), *sizes])


def test_the_smallest_that_training_can_make_up_for_is_chosen():
  dense = row('dense', 100, 10.0)
  sizes = [row('width', 70, 15.0), row('width', 60, 20.0)]
  more = [row('width', 50, 20.1)]
  assert choose([dense, *sizes, *more])['name'] == 'width 60'
  worse = [row('width', 70, 25.0), row('width', 60, 24.0)]
  assert choose([dense, *worse])['name'] == 'width 60'


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--sizes=0.9,1'], '--sizes is 0.9,1.0: shares of the parameters'),
    (['--sizes=0'], 'each between 0 and 1'),
    (['--sizes=half'], "--sizes is 'half'"),
    (
      ['--sizes=0.9,0.1'],
      '0.1 of the parameters cannot be reached by width; the nearest that can '
      'is 0.',
    ),
    (['--sizes=0.9999'], 'the nearest that can is 0.99'),
    (['--config.data.eval='], 'data.eval is empty: give --eval'),
    (['--config.model.base_dtype=int8'], 'model.base_dtype is int8'),
    (['--context=257'], '--context is 257: from 1 to the 256 positions'),
    (['--tokens=511'], '--tokens is 511: at least 512, two micro-batches'),
    (
      ['--latency', '--config.model.sizes.max_position_embeddings=128'],
      '--latency times 128 tokens and 32 that follow, more than the 128',
    ),
    (['more'], "explore takes flags only, not 'more'"),
  ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
  status, out, err = explore(capsys, *arguments)
  assert (status, out) == (1, '')
  assert err.startswith('error: ') and message in err and err.count('\n') == 1


@pytest.mark.mesh
def test_a_mesh_measures_what_one_device_does(capsys, result):
  mesh = ['--config.mesh.fsdp=4', '--config.mesh.tensor=2', '--json']
  status, out, err = explore(capsys, '--sizes=0.6', *mesh)
  assert status == 0, err
  for name, row in by_name(json.loads(out)).items():
    expected = by_name(result)[name]['perplexity']['value']
    assert row['perplexity']['value'] == pytest.approx(expected, rel=1e-4)


@pytest.mark.mesh
def test_several_devices_are_not_timed(capsys):
  status, _, err = explore(capsys, '--latency')
  assert status == 1 and '--latency times one device, and there are 8' in err


def test_the_nearest_size_that_is_named_can_be_reached(capsys):
  _, _, err = explore(capsys, '--sizes=0.1')
  nearest = re.search(r'is (0\.\d+)\n', err)[1]
  _, _, err = explore(capsys, f'--sizes={nearest}', '--context=999')
  assert '--context' in err


def test_a_target_of_the_config_is_unset_in_the_command():
  flags = ['--config=smollm2_135m', '--config.prune.target=0.5', '--config.a=b']
  config = read_config('smollm2_135m')
  assert command(flags, config, None) == [
    *('python', 'train.py', '--config=smollm2_135m', '--config.a=b'),
    *('--workdir=runs/random-pruned', '--config.prune.heads_target=None'),
  ]
