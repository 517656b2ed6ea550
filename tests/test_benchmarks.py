"""The benchmarks' tools that others rely on."""

import importlib.util
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import compare_runs, step
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.exploring.ways import Dense
from lorapr_jax.hf.load import load_config, load_params
from lorapr_jax.hf.write import export_model
from lorapr_jax.models import decoder
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.trees import init_params, param_shapes
from lorapr_jax.pruning.importance import CRITERIA
from lorapr_jax.pruning.planner import plan_pruning
from lorapr_jax.settings.model import ORDERS, PruneSettings
from lorapr_jax.settings.sections import read_section
from tests.xla_flags import environment

ROOT = Path(__file__).parent.parent
# SmolLM2 with a KV head for each head.
MHA = ModelConfig(
  vocab_size=49152,
  embed_dim=576,
  head_dim=64,
  layers=(LayerShape(9, 1, 1536),) * 30,
  tie_embeddings=True,
)
DENSE = Dense.of(MHA, 'reference')


def test_the_mha_copy_is_the_same_function(tmp_path):
  config = ModelConfig(
    vocab_size=32,
    embed_dim=24,
    head_dim=4,
    layers=(LayerShape(2, 3, 16),) * 2,
    tie_embeddings=True,
  )
  params = init_params(jax.random.key(0), config, np.float32)
  export_model(tmp_path / 'gqa', params, config)
  subprocess.run(
    [
      *(sys.executable, 'benchmarks/make_mha.py'),
      *(tmp_path / 'gqa', tmp_path / 'mha'),
    ],
    cwd=ROOT,
    env=environment(),
    check=True,
  )
  copy = load_config(tmp_path / 'mha')
  assert copy.layers == (LayerShape(6, 1, 16),) * 2
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  places = jax.tree.map(lambda _: device, param_shapes(copy, np.float32))
  repeated = load_params(tmp_path / 'mha', copy, places, np.float32)
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)
  np.testing.assert_allclose(
    decoder.hidden_states(repeated, tokens, copy),
    decoder.hidden_states(params, tokens, config),
    atol=1e-5,
  )


@pytest.fixture(scope='module')
def compare():
  """benchmarks/compare.py, which is no part of the package."""
  spec = importlib.util.spec_from_file_location(
    'compare', ROOT / 'benchmarks' / 'compare.py'
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules['compare'] = module  # Where its dataclasses look.
  spec.loader.exec_module(module)
  return module


def test_the_comparison_has_the_runs_that_it_should(compare):
  runs = [(row, seed) for row in compare.ROWS for seed in row.seeds]
  assert len({row.name(seed) for row, seed in runs}) == len(runs) == 56
  assert sum(len(row.seeds) for row in compare.FULL) == 126
  for row, seed in runs:
    flags = compare.arguments(row, seed, 'MODEL', 'TRAIN', DENSE)
    config, _ = parse_flags([*flags, '--workdir=DIR'])
    steps = config.train.steps + config.recover.steps
    assert steps == row.steps and config.train.batch_size == 8
    assert config.train.seq_len == 128 and config.train.seed == seed
    assert config.prune.criterion in CRITERIA
    # The paper's own way, but in the rows that are what is best.
    everything = row.added.startswith('everything')
    terms = 'own' if everything or row.added == 'own' else 'full'
    assert config.prune.lora_gradient == terms
    assert config.prune.compensate == ('ridge' if everything else 'none')
    assert config.prune.order in ORDERS
    if row.way:
      check_way(row, config)
      continue
    targets = config.prune.heads_target, config.prune.channels_target
    removed = {
      0: (0, 0),
      20: (1, 284),
      35: (3, 538),
      50: (4, 768),
    }[row.percent]
    assert (9 * targets[0], 1536 * targets[1]) == pytest.approx(removed)


def check_way(row, config):
  """As large as it says, by layers, by what is in them, or by both."""
  targets = read_section(PruneSettings, config.prune).targets(1)
  plan = plan_pruning(MHA, targets)
  kept = plan.pruned_config.num_parameters / MHA.num_parameters
  share = 1 - row.percent / 100
  layer = MHA.layer_parameters(MHA.layers[0]) / MHA.num_parameters
  within, gone = plan.within_layers, len(plan.going)
  assert (within, gone > 0) == {
    'width': (True, False),
    'depth': (False, True),
    'both': (True, True),
  }[row.way]
  if row.way == 'depth':
    assert share - layer < kept <= share
  else:
    assert kept == pytest.approx(share, abs=2e-4)
  if row.way == 'both':
    assert gone * layer == pytest.approx((1 - share) / 2, abs=layer / 2)


def a_run(news):
  return {
    'date': '2026-11-26',
    'perplexity': {'held-out news': news},
    'kept': 0.6,
    'memory': 3e9,
    'speed': 100.0,
    'versions': {'jax': '0.10.2'},
  }


TEXTS = {'held-out news': {'spec': 'file:heldout.txt', 'sha256': 'ab'}}
RECORD = {
  'texts': TEXTS,
  'dense': {'held-out news': 40.0},
  'joint-lora-50-seed0': a_run(90.0),
  'joint-lora-50-seed1': a_run(110.0),
  'joint-gradient-50-seed0': a_run(80.0),
  'joint-random-50-seed0': a_run(300.0),
  'joint-lora+own-50-seed0': a_run(70.0),
  'none-lora-50-seed0': a_run(105.0),
  # Nothing to compare it with, since joint lora at 20% is not run.
  'joint-magnitude-20-seed0': a_run(60.0),
}


def test_the_comparison_says_where_lora_wins_and_where_not(compare):
  dense, results, missing = compare.collect(RECORD, compare.ROWS)
  page = compare.page(dense, results, TEXTS, missing, 'python compare.py', {})
  assert '- 50%, joint, gradient: 20% lower on held-out news\n' in page
  assert '- 50%, joint, random: 200% higher on held-out news\n' in page
  assert '- 50%, joint, lora + own: 30% lower' in page
  inside = '5% higher on held-out news, within the range of its seeds'
  assert f'- 50%, none, lora: {inside}\n' in page
  assert '| 50% | joint | lora | 2 | 60.0% | 100.0 (90.0-110.0) |' in page
  assert '| 20% | joint | magnitude | 1 | 60.0% | 60.0 |' in page
  assert '- 20%' not in page
  assert (
    '- The lowest at 50%: joint lora + own on held-out news (70.0)\n'
    '- The lowest at 20%: joint magnitude on held-out news (60.0)\n'
  ) in page
  assert '- held-out news is `file:heldout.txt`\n' in page
  assert '\nPYTHONPATH=. python compare.py\n' in page
  assert '| 0% | dense |  |  | 100% | 40.0 |' in page
  assert (
    '| dense | 100% | 40.0 |\n'
    "| the paper's method, 2 seeds | 60.0% | 100.0 (90.0-110.0) |\n"
    '| FLAP + LoRA (apart) | 66.3% | 79.4 |\n'
  ) in page
  assert '2026-11-26; jax 0.10.2.' in page
  # From the dense model to each share of groups that was run.
  best = compare.draw_best(dense, results).axes[0]
  shown = dict(zip(*best.get_legend_handles_labels()[::-1], strict=True))
  paper = "the paper's method"
  peers = ['FLAP + LoRA', 'LLM-Pruner + LoRA']
  assert sorted(shown) == sorted([paper, 'lorapr_jax', *peers])
  line = shown[paper].lines[0]
  assert line.get_xdata().tolist() == [0.6, 1.0]
  assert line.get_ydata().tolist() == [100.0, 40.0]
  # One legend entry and one mark for each row, and the dense model's.
  axes = compare.draw(dense, results).axes[0]
  assert len(axes.get_legend_handles_labels()[1]) == 7


def test_the_comparison_says_what_it_has_not_run(compare):
  dense, results, missing = compare.collect(RECORD, compare.ROWS)
  assert len(missing) == 56 - 7
  assert (
    'joint-lora-50-seed2' in missing and 'none-lora-50-seed0' not in missing
  )
  page = compare.page(dense, results, TEXTS, missing, 'python compare.py', {})
  assert f'not made yet: {", ".join(missing)}.' in page
  # A run that is not measured on every text is missing too.
  record = {**RECORD, 'texts': {**TEXTS, 'PTB': TEXTS['held-out news']}}
  more = compare.collect(record, compare.ROWS)
  assert not more[1] and len(more[2]) == 56


def test_equal_figures_are_equal_files(compare, tmp_path):
  results = compare.collect(RECORD, compare.ROWS)[:2]
  paths = [tmp_path / folder / 'compare.svg' for folder in 'ab']
  for path in paths:
    path.parent.mkdir()
    compare.write_svg(compare.draw(*results), path)
  first, second = (path.read_bytes() for path in paths)
  assert b'<svg' in first and first == second


def test_ways_are_compared_in_perplexity_and_time(compare):
  times = {'model': 0.02, 'against': 0.05, 'speedup': 2.5}
  depth = a_run(70.0) | {'kept': 0.797}
  depth['times'] = {'prefill': times, 'decode': {**times, 'model': 0.025}}
  name = 'prune_then_tune-obs+everything-depth-20-seed0'
  results = compare.collect({**RECORD, name: depth}, compare.ROWS)
  page = compare.page(*results[:2], TEXTS, results[2], 'python', {})
  found = page.partition('## Width, depth, or both')[2].partition('## All')[0]
  assert '| 100% | nothing | 40.0 | 50.0 |  | 50.0 |  |' in found
  assert '| 79.7% | depth | 70.0 | 20.0 | x 2.50 | 25.0 | x 2.50 |' in found
  # Its share is of the parameters: it is in no table of shares of groups.
  without = compare.collect(RECORD, compare.ROWS)
  before = compare.page(*without[:2], TEXTS, without[2], 'python', {})
  assert '## Width' not in before
  assert page.partition('## All')[2] == before.partition('## All')[2]
  axes = compare.draw(*results[:2]).axes[0]
  assert len(axes.get_legend_handles_labels()[1]) == 7


def test_what_is_best_is_the_demos_config_alone(compare):
  best = [row for row in compare.ROWS if row.is_best]
  assert [row.percent for row in best] == [50, 35, 20]
  assert {(row.order, row.criterion) for row in best} == {
    ('prune_then_tune', 'obs')
  }


def test_runs_of_more_steps_are_apart(compare):
  name = 'prune_then_tune-fluctuation-50-1000steps-seed0'
  results = compare.collect({**RECORD, name: a_run(50.0)}, compare.ROWS)
  page = compare.page(*results[:2], TEXTS, results[2], 'python', {})
  found, _, rest = page.partition('## After 1,000')[2].partition('## All')
  assert '| 60.0% | prune_then_tune | fluctuation | 50.0 |' in found
  assert '| 100% | dense |  | 40.0 |' in found
  without = compare.collect(RECORD, compare.ROWS)
  before = compare.page(*without[:2], TEXTS, without[2], 'python', {})
  assert '## After' not in before and rest == before.partition('## All')[2]


def test_a_run_is_timed_beside_the_dense_model(monkeypatch):
  def benchmark(folders, batch_sizes, **how):
    assert folders == {'model': 'export', 'against': 'dense'}
    assert batch_sizes == [1] and how['repeats'] > 1
    times = {'seconds': 0.5, 'tokens_per_second': 2.0}
    own = {'batch_size': 1, 'model': times, 'against': times, 'speedup': 1.1}
    phases = ('prefill', 'decode')
    return {'results': [{**own, 'phase': phase} for phase in phases]}

  monkeypatch.setattr(compare_runs, 'benchmark', benchmark)
  found = compare_runs.timed(Path('export'), Path('dense'))
  own = {'model': 0.5, 'against': 0.5, 'speedup': 1.1}
  assert found == {'prefill': own, 'decode': own}


def test_models_are_compared_question_by_question(compare):
  record = {
    **RECORD,
    'joint-lora-50-seed0': a_run(90.0) | {'tasks': {'a': '1000', 'b': '10'}},
    'prune_then_tune-obs+everything-50-seed0': a_run(60.0)
    | {'tasks': {'a': '1100', 'b': '01'}},
  }
  dense, results, missing = compare.collect(record, compare.ROWS)
  answers = {'a': '1101', 'b': '11'}
  about = TEXTS, missing, 'python compare.py', answers
  page = compare.page(dense, results, *about)
  assert '| dense | 100.0% | 75.0% | 100.0% | 87.5% | 100.0% |  |  |' in page
  # The paper's: task a differs by 0, 1, 0, 1 and task b by 0, 1: variances of
  # 1/3 and 1/2, and 1.96 sqrt(1/12 + 1/4) / 2 is 0.566.
  row = "| the paper's method | 60.0% | 25.0% | 50.0% | 37.5% | 42.9% |"
  assert f'{row} -50.0% ± 56.6% |  |' in page
  # Variances of 1/4 and 1/2, and of 1/4 and 2.
  assert '-37.5% ± 54.8% | +12.5% ± 101.0% |' in page


def test_the_page_says_how_it_is_measured_again(compare, monkeypatch):
  flags = ['--jobs', '2', '--tasks', 'a,b', '--include_path', 'folder/tasks']
  monkeypatch.setattr(sys, 'argv', ['compare.py', *flags, '--out', 'folder'])
  texts = {**TEXTS, 'PTB': {'spec': 'file:a.txt?lines'}}
  assert compare.command(compare.parse_arguments(), texts) == (
    'python benchmarks/compare.py --jobs 2 --text '
    "'PTB=file:a.txt?lines' --tasks a,b --include_path tasks"
  )


def test_another_text_needs_another_name(compare, tmp_path):
  (tmp_path / 'a.txt').write_text('one')
  texts = compare.described({'PTB': f'file:{tmp_path}/a.txt?lines'})
  assert texts['PTB']['spec'] == 'file:a.txt?lines'
  run = a_run(90.0)
  known = {'texts': texts, 'dense': {}, 'run': run}
  new = {'texts': {**texts, 'news': texts['PTB']}, 'other': run}
  assert compare.merged(known, new) == {**known, **new}
  (tmp_path / 'a.txt').write_text('another')
  now = compare.described({'PTB': f'file:{tmp_path}/a.txt?lines'})
  with pytest.raises(compare.UserError, match='PTB is file:a.txt'):
    compare.merged(known, {'texts': now})


def test_what_is_known_of_a_run_is_not_measured_again(compare, tmp_path):
  known = a_run(90.0)
  texts = {'held-out news': 'file:not-there.txt'}
  folder = tmp_path / 'not-there'
  assert compare.measure(folder, [], texts, known, {}) == known
  known['times'] = {}
  dense = tmp_path / 'dense'
  found = compare.measure(folder, [], texts, known, {}, against=dense)
  assert found == known


def test_a_step_is_measured():
  config, _ = parse_flags(['--config=tiny', '--workdir=none'])
  settings = step.configured(
    config.model.sizes.to_dict() | {'num_hidden_layers': 3},
    **{'tokens': 16, 'sequences': 2, 'rank': 2},
    flags=['--config.prune.criterion=gradient'],
  )
  found = step.measure(settings, repeats=1, packed=True)
  assert found.importance > 0 and 0 < found.step < found.compiling
  assert found.temporaries > 0


def test_the_input_is_measured_beside_the_step(tmp_path):
  done = subprocess.run(
    [sys.executable, 'benchmarks/input.py', '--config=tiny'],
    cwd=ROOT,
    env=environment(LORAPR_CACHE=str(tmp_path)),
    capture_output=True,
    text=True,
  )
  figures = dict(line.split()[:2] for line in done.stdout.splitlines())
  assert list(figures) == ['input', 'step', 'ratio'], done.stderr
  values = {k: float(v.replace(',', '')) for k, v in figures.items()}
  ratio = values['input'] / values['step']
  assert values['ratio'] == pytest.approx(ratio, abs=1)
  # Nothing is asked of a tiny model, but the status must follow from them.
  assert done.returncode == int(ratio < 20)
