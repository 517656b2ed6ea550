"""explore: every size of a model, measured without training."""

import dataclasses
import json
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapr_jax.axes import LAYERS, LORA_TARGETS
from lorapr_jax.cli.explore import command
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.cli.main import main
from lorapr_jax.errors import TargetError
from lorapr_jax.eval.benchmark import PROMPT_TOKENS
from lorapr_jax.exploring.asked import ask
from lorapr_jax.exploring.page import render_exploration
from lorapr_jax.exploring.table import (
  choose,
  pruning,
  stored_bytes,
  verdict,
)
from lorapr_jax.exploring.ways import WAYS, Dense, Size, both, depth
from lorapr_jax.hf.load import load_or_draw
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.cost import kv_cache_bytes_per_token, weight_bytes
from lorapr_jax.pruning.masks import of_layers
from lorapr_jax.report import units
from lorapr_jax.settings.files import read_config
from lorapr_jax.settings.run import split_config
from lorapr_jax.training.base import Base, Places, kept_of
from lorapr_jax.training.batches import (
  Batches,
  device_batches,
  load_held_out,
)
from lorapr_jax.training.event import PruningEvent
from lorapr_jax.training.state import init_state
from tests.report.explored import RESULT
from tests.report.test_page import check_alone

# Room for what is timed; the calibration is short, and a layer small.
TINY = [
  '--config=configs/tiny.py',
  '--config.model.sizes.max_position_embeddings=256',
  '--config.prune.calibration_steps=2',
  '--config.model.sizes.num_hidden_layers=6',
]
SIZES = 0.8, 0.6
ALL_WAYS = f'--ways={",".join(WAYS)}'


def explore(capsys, *arguments):
  status = main(['explore', *TINY, *arguments])
  out, err = capsys.readouterr()
  return status, out, err


@pytest.fixture(scope='module')
def explored(tmp_path_factory):
  """The folder of an exploration in which the sizes were timed."""
  folder = tmp_path_factory.mktemp('explored') / 'sizes'
  sizes = ','.join(map(str, SIZES))
  flags = [f'--sizes={sizes}', ALL_WAYS, '--latency']
  assert main(['explore', *TINY, *flags, f'--workdir={folder}']) == 0
  return folder


@pytest.fixture
def result(explored):
  return json.loads((explored / 'explored.json').read_text())


def by_name(result):
  return {row['name']: row for row in result['rows']}


def event_of_a_run(asked):
  """What a run of these settings leaves: (base, held out)."""
  flags = [*TINY, '--workdir=none']
  own = {**asked, 'criterion': 'obs', 'order': 'none'}
  flags += [f'--config.prune.{key}={value}' for key, value in own.items()]
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
  with device_batches(stream, places.batch, loaded.rows, range(2)) as read:
    batches = tuple(read)
  base = Base(params, compute, places)
  groups = tuple(pruning.plan.keep)
  state = init_state(jax.random.key(0), compute, groups, optax.identity())
  [step] = pruning.passes
  event = PruningEvent.of(pruning, base)
  state, base = event(state, base, step, batches)
  held_out = load_held_out(None, dense.vocab_size, data, 8)
  return base.cut(kept_of(state.masks)), state.masks, held_out


@pytest.mark.parametrize(
  'name', ['width 0.8', 'width 0.6', 'depth 0.6', 'both 0.6']
)
def test_a_size_is_what_a_run_would_choose_mask_repair_and_cut(result, name):
  row = by_name(result)[name]
  base, masks, held_out = event_of_a_run(row['settings'])
  sizes = base.compute.config
  cut = type(base.compute)(sizes, dtype=base.compute.dtype)
  expected = held_out.perplexity(base.params, cut).perplexity
  # Masked weights are zeros in the arrays; here they are gone.
  assert row['perplexity']['value'] == pytest.approx(expected, rel=1e-5)
  assert row['parameters'] == sizes.num_parameters
  assert row['bytes'] == 4 * sizes.num_parameters
  assert row['kv_cache_bytes'] == 256 * kv_cache_bytes_per_token(sizes, 4)
  gone = np.flatnonzero(of_layers(masks) == 0) if LAYERS in masks[0] else []
  assert sorted(row['gone']) == list(gone)
  repaired = row['repair'].get('error_left', {})
  if row['way'] == 'depth':
    assert not repaired
  else:
    assert 0 < repaired['synthetic:0?windows=512'] < 1
  for phase in ('prefill', 'decode'):
    assert row['latency'][phase]['speedup'] > 0


def test_a_way_takes_its_part_of_what_goes(result):
  rows = by_name(result)
  dense = rows['dense']['parameters']
  layer = (64 * 192 + 3 * 64 * 128 + 2 * 64) / dense
  for share in SIZES:
    wide, deep, mixed = (rows[f'{way} {share:g}'] for way in WAYS)
    kept = [row['parameters'] / dense for row in (wide, deep, mixed)]
    assert kept == pytest.approx([share] * 3, abs=layer)
    assert abs(kept[0] - share) < 0.01 and abs(kept[2] - share) < 0.01
    # The fewest layers with which it is not above the size.
    assert kept[1] <= share < kept[1] + layer
    assert kept[1] == pytest.approx(1 - len(deep['gone']) * layer)
    # The number of layers nearest to half, which is at least one.
    half = (1 - share) / 2 / layer
    assert len(mixed['gone']) == max(1, round(half))
    assert wide['gone'] == []
  # One is on the way to the other.
  assert rows['depth 0.6']['gone'][:2] == rows['depth 0.8']['gone']


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
    *('dense', 'int8', 'int4', 'width', 'width', 'depth', 'depth'),
    *('both', 'both'),
  ]
  # As a process that was killed leaves it, which had measured other sizes.
  text = '\n'.join(lines[:-2]) + '\n{"way": "b'
  (folder / 'explored.jsonl').write_text(text)
  # What is to fit is in bfloat16, and what is shown in float32.
  old = by_name(result)
  most = old['width 0.6']['bytes'] + old['width 0.6']['kv_cache_bytes']
  fit = f'fit={most // 2}B'
  flags = [
    *('--sizes=0.8', f'--{fit}', ALL_WAYS, '--latency'),
    *(f'--workdir={folder}', '--json'),
  ]
  status, out, err = explore(capsys, *flags)
  assert status == 0
  fitting = [f'{way} {fit}' for way in WAYS]
  measured = [*fitting[:2], 'both 0.8', fitting[2]]
  assert [line.partition(': ')[0] for line in err.splitlines()] == measured
  again = json.loads(out)
  new = by_name(again)
  assert list(new) == [
    *('dense', 'int8', 'int4'),
    *(f'{way} {size}' for way in WAYS for size in ('0.8', fit)),
  ]
  for name, row in new.items():
    if name in fitting:
      assert row['bytes'] + row['kv_cache_bytes'] <= most
      same = old[f'{row["way"]} 0.6']
      assert row['gone'] == same['gone']
      if row['way'] == 'both':  # Layers that are gone leave room in the cache.
        assert row['parameters'] > same['parameters']
      else:
        assert row['perplexity'] == same['perplexity']
    elif name in ('dense', 'both 0.8'):  # Which were timed once more.
      assert row['perplexity'] == old[name]['perplexity']
      assert row['gone'] == old[name]['gone']
    else:
      assert row == old[name]
  assert again['chosen'] in fitting
  config, _ = parse_flags(shlex.split(again['command'])[2:])
  plan = split_config(config, jax.devices()[:1]).plan
  chosen = new[again['chosen']]
  assert plan.pruned_config.num_parameters == chosen['parameters']
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
    '1,024 tokens of synthetic:0?windows=512',
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
  flags = ['--sizes=0.8,0.6', ALL_WAYS, '--latency', f'--workdir={explored}']
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
    **Size(way, size / 100)._asdict(),
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
  # Of ways to one size, the best.
  depth = row('depth', 60, 19.0) | {'parameters': 61}
  assert choose([dense, *sizes, depth])['name'] == 'depth 60'
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
      '0.1 of the parameters cannot be reached by width or depth; the '
      'nearest that can is 0.',
    ),
    (['--sizes=0.9999', '--ways=width'], 'is 0.99'),
    (['--sizes=0.9', '--ways=both'], 'is 0.84'),
    (['--sizes='], '--sizes is : shares of the parameters'),
    (['--sizes=', '--fit=9GB'], 'prune.fit=9GB: the model fits as it is'),
    (['--fit=5KB'], 'prune.fit=5KB: the embeddings alone take'),
    (['--fit=1GB', '--speedup=2'], 'prune.fit and prune.speedup are set'),
    (['--ways=wide'], "--ways is 'wide': choose from width, depth, both"),
    (['--ways='], "--ways is ''"),
    (
      ['--config.prune.layer_profile=1,2'],
      'prune.layer_profile is 1,2, which is of widths',
    ),
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
  flags = ['--sizes=0.6', '--ways=both', *mesh]
  status, out, err = explore(capsys, *flags)
  assert status == 0, err
  for name, row in by_name(json.loads(out)).items():
    expected = by_name(result)[name]['perplexity']['value']
    assert row['perplexity']['value'] == pytest.approx(expected, rel=1e-4)


@pytest.mark.mesh
def test_several_devices_are_not_timed(capsys):
  status, _, err = explore(capsys, '--latency')
  assert status == 1 and '--latency times one device, and there are 8' in err


@pytest.mark.parametrize(
  'way, share',
  [('width', 0.1), ('depth', 0.1), ('both', 0.05), ('both', 0.99)],
)
def test_the_nearest_size_that_is_named_can_be_reached(way, share, capsys):
  _, _, err = explore(capsys, f'--sizes={share}', f'--ways={way}')
  nearest = re.search(rf'is (0\.\d+), by {way}\n', err)[1]
  flags = [f'--sizes={nearest}', f'--ways={way}', '--context=999']
  assert '--context' in explore(capsys, *flags)[2]


def test_a_size_that_a_way_cannot_have_is_left_out():
  config, _ = parse_flags([*TINY, '--workdir=none'])
  asked = ask(config, list(WAYS), [0.6, 0.9])
  assert asked.left_out == ('both 0.9',)
  assert [size.name for size in asked.plans] == [
    *('width 0.9', 'width 0.6', 'depth 0.9', 'depth 0.6', 'both 0.6')
  ]


def test_a_way_that_does_not_come_to_what_is_asked_says_why(capsys):
  tiny = ['--config=tiny', '--workdir=none']
  config, _ = parse_flags([*tiny, '--config.prune.fit=200KB'])
  asked = ask(config, list(WAYS), [])
  assert [size.way for size in asked.plans] == ['width', 'both']
  [left_out] = asked.left_out
  assert left_out.startswith('depth fit=200KB (prune.fit=200KB: that is beyond')
  # By the one way that can.
  off = ['--config.prune.heads=none', '--config.prune.channels=False']
  config, _ = parse_flags([*tiny, *off, '--config.prune.fit=300KB'])
  asked = ask(config, list(WAYS), [])
  assert [size.way for size in asked.plans] == ['depth']
  assert asked.left_out == tuple(
    f'{way} fit=300KB (neither heads nor channels are pruned)'
    for way in ('width', 'both')
  )
  _, _, err = explore(capsys, '--sizes=', '--fit=100KB')
  assert 'by width: prune.fit=100KB: ' in err and '; by depth: ' in err
  one = [*off, '--config.model.sizes.num_hidden_layers=1', '--fit=70KB']
  _, _, err = explore(capsys, *one, '--config.prune.protect=none', '--sizes=')
  assert 'the one layer that is not protected stays' in err


def test_the_layers_of_a_model_without_protected_ones():
  # Each layer has a tenth of the parameters, and all may go.
  dense = Dense(parameters=1000, layer=100, layers=9)
  assert depth(dense, 0.9)['layers_target'] == round(1 / 9, 6)
  assert depth(dense, 0.85)['layers_target'] == round(2 / 9, 6)
  assert depth(dense, 0.2)['layers_target'] == round(8 / 9, 6)
  for share, gone in ((0.9, 1), (0.7, 2), (0.69, 2), (0.6, 2), (0.5, 3)):
    assert both(dense, share)['layers_target'] == round(gone / 9, 6), share
  for way, share, nearest in ((depth, 0.19, 0.8), (both, 0.91, 0.1)):
    with pytest.raises(TargetError) as error:
      way(dense, share)
    assert error.value.nearest == nearest


def test_settings_take_the_place_of_those_that_a_command_has():
  words = ['python', 'train.py', '--config.prune.heads=queries', '--config=a']
  assert pruning(words, {'heads': 'none', 'target': 0.5}) == [
    *('python', 'train.py', '--config=a'),
    *('--config.prune.heads=none', '--config.prune.target=0.5'),
  ]


def test_sizes_of_the_config_are_unset_in_the_command():
  flags = ['--config=smollm2_135m', '--config.prune.target=0.5', '--config.a=b']
  flags += ['--config.export.ladder=', '--config.prune.heads_target=None']
  config = read_config('smollm2_135m')
  assert command(flags, config, None) == [
    *('python', 'train.py', '--config=smollm2_135m', '--config.a=b'),
    *('--workdir=runs/random-pruned', '--config.prune.target=None'),
    *('--config.prune.heads_target=None', '--config.export.ladder='),
  ]
