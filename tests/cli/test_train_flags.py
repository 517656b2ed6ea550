"""Flags to settings, and every mistake that stops a run before any work."""

import json
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import lorapr_jax as lp
from lorapr_jax import train
from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.cli import train as train_command
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.cli.main import main
from lorapr_jax.errors import UserError
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.write import export_model
from lorapr_jax.models.trees import init_params
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS, QUERIES
from lorapr_jax.settings.files import REMOVED, read_config
from lorapr_jax.settings.run import split_config

CONFIGS = Path(__file__).parents[2] / 'configs'
TINY = f'--config={CONFIGS}/tiny.py'
DEFAULT = f'--config={CONFIGS}/default.py'


def parse(*overrides):
  config, workdir = parse_flags([TINY, '--workdir=somewhere', *overrides])
  assert workdir == 'somewhere'
  return config


def settings(*overrides):
  return split_config(parse(*overrides))


def flat(tree, prefix=''):
  """{'train.steps': 60, ...}"""
  leaves = {}
  for key, value in tree.items():
    inner = isinstance(value, dict)
    leaves |= flat(value, f'{prefix}{key}.') if inner else {prefix + key: value}
  return leaves


@pytest.mark.parametrize(
  'override, expected',
  [
    ('train.steps=7', 7),
    ('train.learning_rate=3e-4', 3e-4),
    ('prune.target=0', 0.0),
    ('prune.heads_target=0.25', 0.25),
    ('prune.speedup=2', 2.0),
    ('prune.fit=8GB', '8GB'),
    ('prune.channels=false', False),
    ('prune.norm=True', True),
    ('prune.heads=queries', 'queries'),
    ('lora.targets=q_proj,v_proj', 'q_proj,v_proj'),
    ('data.train=synthetic:3?windows=64', 'synthetic:3?windows=64'),
    ('model.sizes.hidden_size=32', 32),
    ('mesh.data=-1', -1),
  ],
)
def test_an_override_has_the_type_of_its_setting(override, expected):
  key, _, _ = override.partition('=')
  found = flat(parse(f'--config.{override}').to_dict())
  assert found == flat(parse().to_dict()) | {key: expected}
  assert type(found[key]) is type(expected)


def test_a_setting_is_unset_again_by_none():
  set_in_a_file = (
    '--config.prune.target=0.25',
    '--config.prune.heads_target=1',
  )
  unset = ('--config.prune.target=None', '-config.prune.heads_target=None')
  assert parse(*set_in_a_file, *unset) == parse()
  # It is a word elsewhere.
  assert parse('--config.log.wandb=None').log.wandb == 'None'
  with pytest.raises(UserError, match='train.steps=None'):
    parse('--config.train.steps=None')
  demo = [f'--config={CONFIGS}/smollm2_135m.py', '--workdir=somewhere']
  config, _ = parse_flags([*demo, *unset, '--config.prune.fit=1GB'])
  assert config.prune.target is config.prune.heads_target is None


def test_the_processs_own_arguments_do_not_matter(monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['x', '--config.prune.tarot=1'])
  assert parse('--config.prune.target=0.25').prune.target == 0.25


def test_the_defaults_are_filled_in():
  found = settings()
  assert found.model.folder is None
  assert found.compute.lora.targets == LORA_TARGETS
  assert found.compute.config.num_parameters < 300_000
  assert (found.data.eval_seq_len, found.train.seq_len) == (32, 32)
  assert found.base_dtype == found.compute.dtype == jnp.float32
  assert found.pruning.schedule.total_steps == 60
  # Layer 3, the last, is protected.
  assert found.plan.keep == {
    KV_HEADS: (2, 2, 2, 4),
    CHANNELS: (64, 64, 64, 128),
  }


def test_options_of_the_compiler_reach_the_step_that_trains():
  found = settings(
    '--config.train.compiler_options=xla_cpu_enable_fast_math=True, '
    'xla_backend_optimization_level=1'
  )
  assert found.compute.compiler_options == (
    ('xla_cpu_enable_fast_math', True),
    ('xla_backend_optimization_level', '1'),
  )
  assert settings().compute.compiler_options == ()


def test_settings_follow_the_overrides():
  found = settings(
    '--config.prune.heads=queries',
    '--config.prune.channels_target=0.25',
    '--config.prune.protect=none',
    '--config.prune.every=3',
    '--config.prune.score=square',
    '--config.prune.criterion=magnitude',
    '--config.lora.targets=q_proj, up_proj',
    '--config.lora.rank=4',
    '--config.model.compute_dtype=bfloat16',
    '--config.data.eval_seq_len=16',
    '--config.train.batch_size=24',
    '--config.export.layout=uniform',
  )
  assert found.plan.keep == {QUERIES: (1,) * 4, CHANNELS: (96,) * 4}
  assert found.pruning.schedule.every == 3
  criterion = found.pruning.criterion
  assert (criterion.name, criterion.score) == ('magnitude', 'square')
  assert found.compute.lora.targets == ('q_proj', 'up_proj')
  assert found.compute.lora.scale == 4.0
  assert found.compute.dtype == jnp.bfloat16 and found.base_dtype == jnp.float32
  assert found.data.eval_seq_len == 16
  assert found.train.batch_size == 24
  assert found.export.layout == 'uniform'
  assert found.export.routes == ('hf',)


def test_a_padded_export_needs_no_layers_of_one_size():
  found = settings('--config.export.layout=padded')
  assert not found.plan.pruned_config.is_uniform
  assert found.export.layout == 'padded'


def test_tuning_alone_has_no_plan():
  assert settings('--config.prune.target=0').plan is None
  with pytest.raises(UserError, match='prune.compensate=bias was removed'):
    settings('--config.prune.target=0', '--config.prune.compensate=bias')


def test_without_pruning_and_training_nothing_is_left_to_do():
  with pytest.raises(UserError, match='prune.target is 0.*order=none'):
    settings('--config.prune.target=0', '--config.prune.order=none')


@pytest.mark.parametrize('order', ['joint', 'prune_then_tune'])
def test_without_pruning_lora_trains_from_the_first_step(order):
  # No importance is measured, to which a teacher could be a hindrance.
  (phase,) = settings(
    *('--config.prune.target=0', f'--config.prune.order={order}'),
    '--config.train.distill=1',
  ).phases
  assert phase.pruning is None
  assert (phase.first_step, phase.steps, phase.peak) == (0, 60, 1e-2)


def test_calibration_leaves_steps_to_tune():
  with pytest.raises(UserError, match='leaves none of train.steps 10'):
    settings('--config.prune.order=prune_then_tune', '--config.train.steps=10')


@pytest.mark.parametrize(
  'overrides, expected',
  [
    ([], [('prune', 0, 60, 0, 1e-2)]),
    (['prune.order=none'], [('calibrate', 0, 10, 0, 0.0)]),
    (
      ['prune.order=prune_then_tune', 'recover.steps=7'],
      [
        ('calibrate', 0, 10, 0, 0.0),
        ('tune', 10, 50, 10, 1e-2),
        ('recover', 60, 7, 60, 1e-2),
      ],
    ),
    (
      [
        *('recover.steps=7', 'recover.data=synthetic:5'),
        'recover.learning_rate=0.5',
      ],
      [('prune', 0, 60, 0, 1e-2), ('recover', 60, 7, 0, 0.5)],
    ),
  ],
)
def test_the_order_decides_the_phases(overrides, expected):
  found = settings(*(f'--config.{x}' for x in overrides)).phases
  assert [
    (p.name, p.first_step, p.steps, p.first_batch, p.peak) for p in found
  ] == expected
  # Only the first masks, and pruning at once does so at its last step.
  assert [p.pruning is not None for p in found] == [
    i == 0 for i in range(len(found))
  ]
  if found[0].name == 'calibrate':
    steps = range(found[0].steps)
    schedule = found[0].pruning.schedule
    masked = [s for s in steps if schedule.is_pruning_step(s)]
    assert masked == [9] and schedule.progress(9) == 1.0


@pytest.mark.parametrize(
  'argv',
  [['--config=tiny'], ['--config', 'tiny'], ['-config=configs/tiny.py']],
)
def test_shipped_configs_are_found_by_name(tmp_path, monkeypatch, argv):
  expected = parse('--config.train.steps=7')
  monkeypatch.chdir(tmp_path)
  rest = ['--workdir=somewhere', '--config.train.steps=7']
  assert parse_flags([*argv, *rest])[0] == expected
  # A file of the user's comes first.
  (tmp_path / 'configs').mkdir()
  text = (CONFIGS / 'tiny.py').read_text().replace('steps = 60', 'steps = 61')
  (tmp_path / 'configs' / 'tiny.py').write_text(text)
  argv = ['--config=configs/tiny.py', '--workdir=somewhere']
  assert parse_flags(argv)[0].train.steps == 61


def refusal(capsys, workdir, *argv):
  """The line that `train` prints for a mistake."""
  assert main(['train', *argv]) == 1
  out, err = capsys.readouterr()
  assert out == ''
  assert not workdir.exists()
  *progress, line = err.splitlines()
  # At most it says that it reads the data, and what it leaves out of them.
  assert not [p for p in progress if p != 'data' and 'left out' not in p]
  assert line.startswith('error: ')
  return line


@pytest.mark.parametrize(
  'override, message',
  [
    # Keys.
    (
      'prune.tarot=0.3',
      'config.prune.tarot; did you mean config.prune.target?',
    ),
    ('purne.target=0.3', 'config.purne.target; did you mean config.prune?'),
    ('zzz=1', 'unknown setting --config.zzz; config has data, export, log'),
    ('train.steps.many=1', 'unknown setting --config.train.steps.many'),
    # Types.
    ('train.steps=many', 'config.train.steps'),
    ('train.steps=1.5', 'config.train.steps'),
    ('lora.rank=8.5', 'config.lora.rank'),
    ('prune.target=half', 'config.prune.target'),
    ('prune.heads_target=half', 'config.prune.heads_target'),
    ('prune.channels=maybe', 'config.prune.channels'),
    ('prune=3', 'config.prune'),
    # Data and model.
    ('data.train=', 'data.train is empty'),
    ('data.train=file:nowhere.txt', 'nowhere.txt is not a file'),
    ('data.eval=file:nowhere.txt', 'nowhere.txt is not a file'),
    ('data.eval=wikitext2', "data spec 'wikitext2' is not known"),
    ('data.train=synthetic:1?windows=15', 'fewer than one batch of 16'),
    ('data.train=synthetic:1?windows=0', 'at least one window'),
    (f'data.train=file:{__file__}', 'files of .py'),
    (
      'data.eval_seq_len=129',
      'data.eval_seq_len is 129, but the model has 128',
    ),
    ('data.eval_seq_len=1', 'data.eval_seq_len 1'),
    ('data.eval_windows=-1', 'data.eval_windows -1'),
    ('model.path=nowhere', 'set one of them'),
    (
      'model.remat=all',
      "model.remat is 'all': choose from offload, blocks, dots, none",
    ),
    ('model.base_dtype=int4', "model.base_dtype is 'int4': choose from auto"),
    ('model.sizes.model_type=gpt2', "model_type is 'gpt2'"),
    # Training.
    ('train.seq_len=129', 'train.seq_len is 129, but the model has 128 posit'),
    ('train.seq_len=1', 'train.seq_len is 1'),
    ('train.steps=0', 'train.steps is 0: it must be positive'),
    ('train.learning_rate=-1', 'train.learning_rate is -1.0: it must be pos'),
    ('train.lr_schedule=step', "train.lr_schedule is 'step': choose from lin"),
    (
      'train.micro_batch_size=5',
      'train.batch_size 16 is not a multiple of train.micro_batch_size 5',
    ),
    ('lora.rank=0', 'lora.rank is 0'),
    ('lora.dropout=1', 'lora.dropout is 1.0'),
    ('lora.targets=qproj', "lora.targets has ['qproj']: choose from q_proj"),
    ('lora.targets=', 'lora.targets has no projection'),
    ('mesh.tensor=3', 'mesh.tensor=3 do not multiply to the'),
    # Pruning.
    ('prune.target=1.2', 'prune.target is 1.2: it must be in [0, 1)'),
    ('prune.target=nan', 'prune.target is nan'),
    ('prune.order=later', "prune.order is 'later': choose from joint"),
    ('prune.calibration_steps=0', 'prune.calibration_steps is 0'),
    ('recover.steps=-1', 'recover.steps is -1'),
    ('recover.learning_rate=-1.0', 'recover.learning_rate is -1.0'),
    ('recover.data=synthetic:2', 'but recover.steps is 0'),
    ('prune.target=0.001', 'rounds to nothing pruned; the nearest that works'),
    ('prune.criterion=taylor', "prune.criterion is 'taylor': choose from lora"),
    ('prune.score=cube', "prune.score is 'cube'"),
    ('prune.unit=flops', "prune.unit is 'flops'"),
    ('prune.every=0', 'prune.every is 0'),
    ('prune.warmup=0.95', 'prune.warmup 0.95 and prune.cooldown 0.1'),
    ('prune.heads_multiple_of=0', 'prune.heads_multiple_of is 0'),
    (
      'lora.targets=gate_proj',
      'lora.targets gate_proj has no projection of the heads',
    ),
    (
      'lora.targets=q_proj,o_proj',
      'has no projection of the channels: prune.criterion=lora cannot rank',
    ),
    # Export.
    (
      'export.layout=uniform',
      'prune with prune.protect=none and prune.layer_profile=1, or export',
    ),
    ('export.layout=zip', "export.layout is 'zip': choose from auto"),
    ('export.dtype=int8', "export.dtype is 'int8'"),
    ('export.dtype=q8_0', "export.dtype is 'q8_0'"),
    ('export.gguf_dtype=q4_0', "export.gguf_dtype is 'q4_0': choose from auto"),
    ('export.format=gguf', "export.format is 'gguf': hf alone, or with gguf"),
    ('export.format=hf,onnx', "export.format is 'hf,onnx'"),
    ('export.max_shard_size=5', "export.max_shard_size is '5': a number and"),
  ],
)
def test_a_mistake_is_one_line_before_any_work(
  capsys, tmp_path, override, message
):
  workdir = tmp_path / 'run'
  argv = [TINY, f'--workdir={workdir}', f'--config.{override}']
  assert message in refusal(capsys, workdir, *argv)


def test_a_template_may_be_for_what_comes_after_the_cut(tmp_path):
  (tmp_path / 'a.jsonl').touch()
  records = f'file:{tmp_path}/a.jsonl'
  template = '--config.data.template={{ q }}'
  plain = '--config.data.train=demo:news:train'
  with pytest.raises(UserError, match='demo:news:train is plain text'):
    settings(plain, template)
  recover = ('--config.recover.steps=3', f'--config.recover.data={records}')
  assert settings(plain, template, *recover).phases[-1].data == records


def test_flags_that_are_not_there_or_unknown(capsys, tmp_path):
  workdir = tmp_path / 'run'
  place = f'--workdir={workdir}'
  for argv, message in (
    ([TINY], 'train needs --config=configs/X.py and --workdir=DIR'),
    ([place], 'train needs --config=configs/X.py and --workdir=DIR'),
    ([place, f'--config={tmp_path}/none.py'], 'none.py'),
    ([place, '--config=tinny'], "no config 'tinny': give the path of a file"),
    (
      [place, '--config=a/tiny.py'],
      'one of default, models, paper, smollm2_135m, tiny',
    ),
    ([place, '--config'], "no config ''"),
    ([place, '--config=paper:tinny'], "no config 'tinny'"),
    ([place, TINY, '--steps=3'], "'steps'"),
    ([place, TINY, '--proc=1'], "'proc'"),
    ([place, TINY, '--process_id=x'], "invalid int value: 'x'"),
    ([place, TINY, '--process_id=1'], 'go together: give all, or none'),
    ([place, TINY, 'more'], "train takes flags only, not 'more'"),
  ):
    assert message in refusal(capsys, workdir, *argv)


@pytest.mark.parametrize(
  'name', ['tiny', 'models:phi4-14b', f'{CONFIGS}/tiny.py']
)
def test_the_papers_method_on_any_config(name):
  config, paper = (
    parse_flags([f'--config={x}', '--workdir=DIR'])[0]
    for x in (name, f'paper:{name}')
  )
  assert (paper.prune.criterion, paper.prune.order) == ('lora', 'joint')
  assert paper.prune.lora_gradient == 'full'
  assert paper.prune.compensate == 'none' and not paper.export.ladder
  assert paper.model == config.model and paper.data == config.data
  assert paper == read_config(f'paper:{name}')


def test_flags_that_are_not_its_own_pass_train_untouched(monkeypatch):
  runs = []
  monkeypatch.setattr(train, 'run', lambda *given: runs.append(given))
  monkeypatch.setattr(train_command, 'print_json', runs.append)
  argv = ['--workdir', 'here', '--json', TINY, '--config.train.steps=7']
  assert main(['train', *argv, '--config.data.template={{ q }} -- a']) == 0
  ((config, workdir), summary) = runs
  assert (workdir, summary) == ('here', None)
  assert config.train.steps == 7
  assert config.data.template == '{{ q }} -- a'


@pytest.mark.parametrize('key', ['template', 'response'])
def test_a_template_in_a_flag_may_have_line_ends_and_tabs(key):
  written = r"Q:\t{{ x }}\n\n{{ '\\n' }}\d"
  meant = 'Q:\t{{ x }}\n\n' + r"{{ '\\n' }}\d"
  flag = f'--config.data.{key}'
  for flags in ([f'{flag}={written}'], [flag, written], [f'{flag}={meant}']):
    assert parse(*flags).data[key] == meant
  # Other settings, and what a file says, stay as they are.
  assert parse(r'--config.data.eval=file:C:\notes.txt').data.eval == (
    r'file:C:\notes.txt'
  )
  for other in {'template', 'response'} - {key}:
    assert parse(f'{flag}={written}').data[other] == ''


def test_what_reads_the_groups_alone_cannot_rank_them_while_b_is_zero():
  later = '--config.prune.order=prune_then_tune'
  targets = '--config.lora.targets=q_proj,down_proj'
  with pytest.raises(UserError, match='of the channels what reads them alone'):
    settings(later, targets)
  with pytest.raises(UserError, match='prune.lora_gradient=full'):
    settings(
      '--config.prune.order=none', '--config.lora.targets=o_proj,up_proj'
    )
  for other in (
    '--config.prune.order=joint',
    '--config.prune.lora_gradient=full',
    '--config.prune.criterion=activation',
    '--config.lora.targets=q_proj,up_proj,down_proj',
  ):
    assert settings(later, targets, other).plan.keep


def test_queries_alone_need_a_projection_of_queries():
  # The keys belong to whole KV heads, but to no single query head.
  overrides = ('--config.prune.channels=false', '--config.lora.targets=k_proj')
  assert settings(*overrides).plan.keep.keys() == {KV_HEADS}
  with pytest.raises(UserError, match='has no projection of the heads'):
    settings(*overrides, '--config.prune.heads=queries')
  # A criterion that needs no gradients ranks them all the same.
  magnitude = '--config.prune.criterion=magnitude'
  queries = settings(*overrides, '--config.prune.heads=queries', magnitude)
  assert queries.plan.keep.keys() == {QUERIES}


@pytest.fixture
def folder(tmp_path):
  """A random model with a tokenizer."""
  folder = tmp_path / 'model'
  sizes = parse().model.sizes.to_dict()
  config = config_from_hf(sizes)
  params = init_params(jax.random.key(0), config, jnp.float32)
  export_model(folder, params, config)
  vocab = {'<eos>': 0, '<unk>': 1, 'word': 2}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<eos>'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


@pytest.mark.parametrize(
  'text, message',
  [
    (' \n', 'corpus.txt holds no text'),
    ('word ' * 50, 'has 51 tokens: fewer than one window of 64'),
    ('word ' * 200, '3 windows of 64 tokens: fewer than one batch of 8'),
  ],
)
def test_a_corpus_that_is_too_short_stops_before_any_work(
  capsys, tmp_path, monkeypatch, folder, text, message
):
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'corpus.txt').write_text(text)
  workdir = tmp_path / 'run'
  argv = [
    DEFAULT,
    f'--workdir={workdir}',
    f'--config.model.path={folder}',
    f'--config.data.train=file:{tmp_path}/corpus.txt',
    '--config.data.packing=concatenate',
    '--config.train.seq_len=64',
    '--config.train.batch_size=8',
    '--config.train.micro_batch_size=8',
  ]
  assert message in refusal(capsys, workdir, *argv)


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda folder: (folder / 'config.json').unlink(), 'config.json does not'),
    (lambda folder: (folder / 'config.json').write_text('{'), 'is not JSON'),
    (
      lambda folder: (folder / 'config.json').write_text(
        '{"model_type": "gpt2"}'
      ),
      "model_type is 'gpt2'",
    ),
    (lambda folder: (folder / 'tokenizer.json').unlink(), 'tokenizer'),
    (lambda folder: folder.rename(folder.parent / 'moved'), 'is not a folder'),
  ],
  ids=['no config', 'no JSON', 'gpt2', 'no tokenizer', 'no folder'],
)
def test_a_wrong_folder_stops_before_any_work(
  capsys, tmp_path, monkeypatch, folder, change, message
):
  monkeypatch.setenv('LORAPR_CACHE', str(tmp_path / 'cache'))
  (tmp_path / 'corpus.txt').write_text('word ' * 10_000)
  change(folder)
  workdir = tmp_path / 'run'
  argv = [
    DEFAULT,
    f'--workdir={workdir}',
    f'--config.model.path={folder}',
    f'--config.data.train=file:{tmp_path}/corpus.txt',
    '--config.train.seq_len=64',
    '--config.train.batch_size=8',
    '--config.train.micro_batch_size=8',
  ]
  assert message in refusal(capsys, workdir, *argv)


REMOVED_KEY = 'prune.tarot'
ADVICE = f'config.{REMOVED_KEY} was removed: use prune.target'


@pytest.fixture
def removed(monkeypatch):
  monkeypatch.setitem(REMOVED, REMOVED_KEY, 'use prune.target')


def refused(*argv):
  with pytest.raises(UserError) as error:
    parse_flags([*argv, '--workdir=somewhere'])
  return str(error.value)


def test_a_removed_setting_says_what_to_use(removed):
  assert refused(TINY, f'--config.{REMOVED_KEY}=1') == f'--{ADVICE}'
  assert 'unknown setting' in refused(TINY, f'--config.{REMOVED_KEY}.more=1')
  with pytest.raises(UserError) as error:
    lp.prune('tiny', 'somewhere', prune={'tarot': 1})
  assert str(error.value) == ADVICE


@pytest.mark.parametrize(
  'body',
  [
    f'  config.{REMOVED_KEY} = 1\n',
    '  config.prune.update({"tarot": 1})\n',
    # A copy of an earlier default.py.
    f'  config.unlock()\n  config.{REMOVED_KEY} = 1\n  config.lock()\n',
  ],
)
def test_a_config_file_with_a_removed_setting(body, removed, tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(
    'from lorapr_jax.settings.files import read_config\n\n\n'
    f'def get_config():\n  config = read_config("default")\n{body}'
    '  return config\n'
  )
  assert refused(f'--config={path}') == f'--config={path}: {ADVICE}'
  with pytest.raises(UserError) as error:
    lp.prune(path, tmp_path / 'run')
  assert str(error.value) == f'{path}: {ADVICE}'
