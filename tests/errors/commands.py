"""Commands and their flags."""

from tests.errors.case import CONFIGS, Case, evaluate, train_tiny, with_argv

# How argparse quotes choices is up to Python's version.
CHOICES = r'(?<=choose from ).*(?=\) \(python)'
TINY = f'--config={CONFIGS}/tiny.py'


def _config_file(text, *more):
  def argv(place):
    place.write('MINE.py', text)
    return ['train', '--config=MINE.py', '--workdir=RUN', *more]

  return argv


def _bad_evaluate(*more):
  def argv(place):
    place.copy('MODEL')
    place.text()
    return evaluate(*more)

  return argv


def _evaluate(*what):
  def argv(place):
    place.copy('MODEL')
    return ['evaluate', '--model', 'MODEL', *what]

  return argv


def _own_task(place):
  place.write(
    'TASKS/mine.yaml',
    'task: mine\ntest_split: test\ndataset_path: json\n'
    'dataset_kwargs:\n  data_files: {test: NONE.jsonl}\n'
    'output_type: multiple_choice\ndoc_to_text: "{{q}}"\n'
    'doc_to_choice: "{{ways}}"\ndoc_to_target: answer\n',
  )
  return _evaluate('--tasks', 'mine', '--include_path', 'TASKS')(place)


def _benchmark(*more):
  def argv(place):
    place.copy('MODEL')
    return ['benchmark', '--model', 'MODEL', *more]

  return argv


def _plan(*more):
  return with_argv('plan', TINY, *more)


def _inspect(*more):
  def argv(place):
    place.copy('MODEL')
    return ['inspect', '--model', 'MODEL', *more]

  return argv


def _explore(*more):
  return with_argv('explore', TINY, *more)


def _own_failing_task(place):
  argv = _own_task(place)
  place.write('NONE.jsonl', '{"q": "word", "ways": ["word"], "answer": 0}\n')
  file = place.folder / 'TASKS' / 'mine.yaml'
  file.write_text(file.read_text().replace('"{{q}}"', '!function mine.text'))
  place.write('TASKS/mine.py', 'def text(doc):\n  return doc["title"]\n')
  return argv


CASES = [
  Case('`prune`, which is no command', with_argv('prune')),
  Case('`train` without `--workdir`', with_argv('train', TINY)),
  Case('`train` without `--config`', with_argv('train', '--workdir=RUN')),
  Case('`train --workdir=`', with_argv('train', TINY, '--workdir=')),
  Case(
    '`train --workdir=` with a name that is not UTF-8',
    with_argv('train', TINY, '--workdir=RUN\udcff'),
  ),
  Case(
    '`train --steps=3`, an unknown flag', with_argv(*train_tiny(), '--steps=3')
  ),
  Case('`train ... more`', with_argv(*train_tiny(), 'more')),
  Case(
    '`--config=NONE.py`, which does not exist',
    with_argv('train', '--config=NONE.py', '--workdir=RUN'),
  ),
  Case(
    '`--config=MINE.py`, which is not Python', _config_file('steps = = 3\n')
  ),
  Case(
    '`--config=MINE.py`, which has no `get_config`', _config_file('steps = 3\n')
  ),
  Case(
    '`--config=MINE.py`, which imports what is not there',
    _config_file('import nothing_like_this\n'),
  ),
  Case(
    '`--config=MINE.py`, which sets an unknown key',
    _config_file(
      'from lorapr_jax.settings.files import read_config\n\n\n'
      'def get_config():\n'
      '  config = read_config("default")\n  config.train.step = 3\n'
      '  return config\n'
    ),
  ),
  Case(
    '`--config=MINE.py`, which sets a key to another type',
    _config_file(
      'from lorapr_jax.settings.files import read_config\n\n\n'
      'def get_config():\n'
      '  config = read_config("default")\n  config.train.steps = "3"\n'
      '  return config\n'
    ),
  ),
  Case(
    '`--config=MINE.py`, which does not start from configs/default.py',
    _config_file(
      'from ml_collections import config_dict\n\n\ndef get_config():\n'
      '  return config_dict.create(train=dict(steps=3))\n'
    ),
  ),
  Case(
    '`--config=MINE.py`, whose `get_config` returns a dict',
    _config_file('def get_config():\n  return {"steps": 3}\n'),
  ),
  Case(
    '`evaluate` without `--data`, `--suite` and `--tasks`',
    with_argv('evaluate', '--model', 'MODEL'),
  ),
  Case(
    '`evaluate --data` without `--seq_len`',
    with_argv('evaluate', '--model', 'MODEL', '--data', 'file:TEXT.txt'),
  ),
  Case('`evaluate --seq_len 1`', _bad_evaluate('--seq_len', '1')),
  Case('`evaluate --seq_len many`', _bad_evaluate('--seq_len', 'many')),
  Case(
    '`evaluate --seq_len 999`, more than the model has positions',
    _bad_evaluate('--seq_len', '999'),
  ),
  Case(
    "`evaluate --data ''`",
    _evaluate('--data', '', '--seq_len', '32'),
  ),
  Case("`evaluate --tasks ''`", _evaluate('--tasks', '')),
  Case(
    "`evaluate --suite paper --ptb ''`",
    _evaluate('--suite', 'paper', '--ptb', ''),
  ),
  Case('`evaluate --batch_size 0`', _bad_evaluate('--batch_size', '0')),
  Case(
    '`evaluate --dtype int8`', _bad_evaluate('--dtype', 'int8'), varies=CHOICES
  ),
  Case(
    '`evaluate --suite paper --seq_len 512`, more than the model has positions',
    _evaluate('--suite', 'paper', '--seq_len', '512'),
  ),
  Case(
    '`evaluate --suite paper --limit 3`, a flag of `--tasks`',
    _evaluate('--suite', 'paper', '--limit', '3'),
  ),
  Case(
    '`evaluate --tasks piqa --limit 0`', _evaluate('--tasks=piqa', '--limit=0')
  ),
  Case(
    '`evaluate --tasks piqa --include_path NONE`, no folder',
    _evaluate('--tasks', 'piqa', '--include_path', 'NONE'),
  ),
  Case(
    '`evaluate --tasks piqa --apply_chat_template`, where there is no template',
    _evaluate('--tasks', 'piqa', '--apply_chat_template'),
  ),
  Case(
    '`evaluate --tasks mine`, whose data is not there',
    _own_task,
    varies=r'(?<=read: ).*',
  ),
  Case(
    '`evaluate --tasks mine`, whose function fails',
    _own_failing_task,
    late=True,
    leaves=('TASKS/__pycache__/',),
  ),
  Case('`inspect` without `--model`', with_argv('inspect')),
  Case('`inspect --target 1.5`', _inspect('--target', '1.5')),
  Case('`inspect --target half`', _inspect('--target', 'half')),
  Case('`inspect --protect last`', _inspect('--protect', 'last')),
  Case(
    '`inspect --channels maybe`',
    _inspect('--channels', 'maybe'),
    varies=CHOICES,
  ),
  Case('`inspect --blocks 3`, an unknown flag', _inspect('--blocks', '3')),
  Case(
    '`explore` without `--data`',
    with_argv('explore', TINY, '--config.data.train='),
  ),
  Case('`explore` without `--eval`', _explore('--config.data.eval=')),
  Case('`explore --sizes 0.9,1`', _explore('--sizes', '0.9,1')),
  Case('`explore --sizes half`', _explore('--sizes', 'half')),
  Case(
    '`explore --sizes 0.9,0.1`, less than must stay',
    _explore('--sizes', '0.9,0.1'),
  ),
  Case('`explore --tokens 10`', _explore('--tokens', '10')),
  Case(
    '`explore --context 999`, more than the model has positions',
    _explore('--context', '999'),
  ),
  Case(
    '`explore --latency`, of a model with few positions', _explore('--latency')
  ),
  Case(
    '`explore --latency` on several devices', _explore('--latency'), devices=8
  ),
  Case(
    '`explore --config.model.base_dtype=int8`',
    _explore('--config.model.base_dtype=int8'),
  ),
  Case('`plan` without `--topology`', with_argv('plan', TINY)),
  Case('`plan --topology=v7x:2x2`', _plan('--topology=v7x:2x2')),
  Case(
    '`plan --search --topology=v5e:2x2`',
    _plan('--topology=v5e:2x2', '--search'),
  ),
  Case(
    '`plan --search --mesh=fsdp=4`',
    _plan('--topology=v5e', '--search', '--mesh=fsdp=4'),
  ),
  Case(
    '`plan --mesh=data`', _plan('--topology=cpu:8', '--mesh=data'), devices=8
  ),
  Case(
    '`plan --mesh=rows=2`',
    _plan('--topology=cpu:8', '--mesh=rows=2'),
    devices=8,
  ),
  Case(
    '`plan --criteria=taylor`',
    _plan('--topology=cpu:8', '--criteria=taylor'),
    devices=8,
  ),
  Case('`benchmark` without `--model`', with_argv('benchmark')),
  Case('`benchmark --batch_sizes 0`', _benchmark('--batch_sizes', '0')),
  Case(
    '`benchmark --batch_sizes 1,many`', _benchmark('--batch_sizes', '1,many')
  ),
  Case('`benchmark --new_tokens 1`', _benchmark('--new_tokens', '1')),
  Case('`benchmark --repeats 0`', _benchmark('--repeats', '0')),
  Case(
    '`benchmark --prompt_tokens 99`, more than the model has positions',
    _benchmark('--prompt_tokens', '99'),
  ),
  Case(
    '`benchmark --against NONE`, no folder',
    _benchmark(
      *('--prompt_tokens', '8', '--new_tokens', '8', '--against', 'NONE')
    ),
  ),
]
