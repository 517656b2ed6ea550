"""lm_eval's tasks: the numbers of its own model `hf` on the same folder."""

import itertools
import json
import os
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
import pytest

from lorapr_jax.cli.main import main
from lorapr_jax.errors import UserError
from lorapr_jax.eval import harness, zero_shot
from lorapr_jax.eval.harness import HarnessModel, read_generation_kwargs
from lorapr_jax.hf.load import Model

ROOT = Path(__file__).parents[2]
# In lm_eval's words; each takes its data from a file beside it.
TASKS = {
  'ends': """\
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ways}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
""",
  'whole': """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{start}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
  'goes_on': """\
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{ways[0]}}"
generation_kwargs:
  until: ["o", "dog"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
}
STARTS = (
  # Beyond the 512 positions: the beginning of a context is lost, a whole text
  # goes in windows.
  'jumps over the lazy dog and ' * 90,
  'The quick brown fox jumps over',
  'A dog, lazy as ever,',
  'the other one ' * 12,
  'Do foxes jump? Answer:',
)
WAYS = (
  [' jumps', ' the brown fox'],
  [' the lazy dog', ' a', ' the moon, which is far away', ' it'],
  [' sleeps', ' sleeps and sleeps'],
  [' and the other', '.', ' fox'],
  [' yes', ' no'],
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Of the tasks."""
  folder = tmp_path_factory.mktemp('tasks')
  lines = [
    json.dumps({'start': start.strip(), 'ways': ways, 'answer': i % 2}) + '\n'
    for i, (start, ways) in enumerate(zip(STARTS, WAYS, strict=True))
  ]
  for name, text in TASKS.items():
    # Two short ones to go on from: each length would be compiled.
    kept = lines[1:3] if name == 'goes_on' else lines
    (folder / f'{name}.jsonl').write_text(''.join(kept))
    (folder / f'{name}.yaml').write_text(
      f'task: {name}\ntest_split: test\ndataset_path: json\n'
      f'dataset_kwargs:\n  data_files:\n    test: {folder}/{name}.jsonl\n{text}'
    )
  return folder


@pytest.fixture(scope='module')
def theirs(text_model):
  """lm_eval's own model."""
  return get_model('hf')(
    pretrained=str(text_model), device='cpu', dtype='float32', batch_size=4
  )


@pytest.fixture(scope='module')
def ours(text_model, load):
  config, params = load(text_model)
  model = Model(params, config, text_model, jnp.dtype('float32'))
  return HarnessModel(model, batch_size='auto')


@pytest.fixture(scope='module')
def expected(theirs, folder):
  """What it makes of the tasks."""
  return lm_eval.simple_evaluate(
    model=theirs,
    tasks=[*TASKS],
    task_manager=TaskManager(include_path=folder, include_defaults=False),
    bootstrap_iters=0,
  )


def asked(expected, task, kind):
  """The requests of a task, and what `hf` answered."""
  requests, answers = [], []
  for sample in expected['samples'][task]:
    for arguments, answer in zip(
      sample['arguments'], sample['resps'], strict=True
    ):
      requests.append(Instance(kind, {}, tuple(arguments), 0))
      answers.append(answer[0])
  return requests, answers


def test_the_command_finds_the_same_scores(
  expected, text_model, folder, capsys
):
  args = ('--model', text_model, '--tasks', ','.join(TASKS))
  args += ('--include_path', folder, '--json')
  assert main(['evaluate', *map(str, args)]) == 0
  report = json.loads(capsys.readouterr().out)
  assert [task['task'] for task in report['tasks']] == [*TASKS]
  # Not every task has an accuracy.
  assert report['mean'] == {}
  for task in report['tasks']:
    theirs = expected['results'][task['task']]
    count = 2 if task['task'] == 'goes_on' else len(STARTS)
    assert task['documents'] == count and task['shots'] == 0
    for metric, value in task['metrics'].items():
      assert value == pytest.approx(theirs[f'{metric},none'], rel=1e-5)
    for metric, values in task['by_question'].items():
      samples = expected['samples'][task['task']]
      assert values == [sample[metric] for sample in samples]
  ends, whole, goes_on = (set(task['metrics']) for task in report['tasks'])
  assert ends == {'acc', 'acc_norm'}
  assert whole == {'word_perplexity', 'bits_per_byte'}
  assert goes_on == {'exact_match'}
  assert report['tasks'][0]['errors'].keys() == {'acc', 'acc_norm'}
  assert report['tasks'][0]['by_question'].keys() == {'acc', 'acc_norm'}


def test_log_likelihoods_are_theirs(expected, ours):
  requests, answers = asked(expected, 'ends', 'loglikelihood')
  assert len(answers) == sum(map(len, WAYS))
  found = ours.loglikelihood(requests)
  for (ours_is, ours_greedy), (theirs_is, theirs_greedy) in zip(
    found, answers, strict=True
  ):
    assert ours_is == pytest.approx(float(theirs_is), abs=1e-3)
    assert str(ours_greedy) == str(theirs_greedy)


def test_an_empty_context_is_theirs(ours, theirs):
  request = [Instance('loglikelihood', {}, ('', 'the lazy dog'), 0)]
  (found,), (answer,) = (
    ours.loglikelihood(request),
    theirs.loglikelihood(request),
  )
  assert found[0] == pytest.approx(answer[0], abs=1e-3)


def test_whole_texts_are_theirs(expected, ours):
  requests, answers = asked(expected, 'whole', 'loglikelihood_rolling')
  lengths = [len(ours.tok_encode(request.args[0])) for request in requests]
  assert max(lengths) > ours.max_length
  found = ours.loglikelihood_rolling(requests)
  assert found == pytest.approx([float(a) for a in answers], abs=1e-3)


def test_generations_are_theirs(expected, ours):
  requests, answers = asked(expected, 'goes_on', 'generate_until')
  found = ours.generate_until(requests)
  assert found == answers
  assert any(found) and not any('o' in text for text in found)


def test_chats_are_theirs(ours, theirs):
  chat = [{'role': 'user', 'content': 'Go on.'}]
  template = ours.apply_chat_template(chat)
  assert template == theirs.apply_chat_template(chat)
  assert template.endswith('<|assistant|>')
  half = [*chat, {'role': 'assistant', 'content': 'I '}]
  assert ours.apply_chat_template(half, False) == theirs.apply_chat_template(
    half, False
  )
  assert ours.chat_template(True) == theirs.chat_template(True)
  assert 'text' in ours.tokenizer_name and '/' not in ours.tokenizer_name
  with pytest.raises(UserError, match='no system message, please'):
    ours.apply_chat_template([{'role': 'system', 'content': 'Be kind.'}])


def test_the_table_has_acc_and_acc_norm(expected, text_model, folder, capsys):
  args = ('--model', text_model, '--tasks', 'ends', '--include_path', folder)
  args += ('--limit', 2, '--apply_chat_template')
  assert main(['evaluate', *map(str, args)]) == 0
  lines = capsys.readouterr().out.splitlines()
  rows = [line.split() for line in lines if line.strip().startswith('ends')]
  assert [row[:4] for row in rows] == [
    ['ends', '0', '2', 'acc'],
    ['ends', '0', '2', 'acc_norm'],
  ]


def test_means_take_acc_where_there_is_no_acc_norm():
  def score(**metrics):
    return zero_shot.TaskScore('', '1', 0, 10, metrics, {}, {})

  scores = [score(acc=0.5), score(acc=0.2, acc_norm=0.4)]
  means = zero_shot.mean_accuracies(scores)
  assert means == pytest.approx({'acc': 0.35, 'acc_norm': 0.45})
  assert zero_shot.mean_accuracies([*scores, score(exact_match=1.0)]) == {}


def test_generation_kwargs():
  sampling, until = read_generation_kwargs({'until': 'x', 'num_beams': 1}, 3)
  assert (sampling.max_new_tokens, sampling.temperature) == (256, 0.0)
  assert (until, sampling.seed) == (['x'], 3)
  sampling, until = read_generation_kwargs(
    {'temperature': 0.5, 'top_p': 0.9, 'max_new_tokens': 7}, 0
  )
  assert (sampling.max_new_tokens, sampling.temperature) == (7, 0.5)
  assert (sampling.top_p, until) == (0.9, [])
  sampling, _ = read_generation_kwargs(
    {'do_sample': False, 'temperature': 1}, 0
  )
  assert sampling.temperature == 0.0
  with pytest.raises(UserError, match='generation_kwargs top_k: only until'):
    read_generation_kwargs({'top_k': 5}, 0)


@pytest.mark.parametrize(
  'seconds, end',
  [
    # 496 hours, were this what a batch takes.
    ((480,), '8/30000 [00:00]'),
    # A second for each of the 29,984 that are left.
    ((480, 8), '16/30000 [00:00, 8:19:44 left]'),
    ((480, 8, 24), '24/30000 [00:00, 16:39:12 left]'),
  ],
)
def test_the_time_left_is_not_that_of_compiling(
  monkeypatch, capsys, seconds, end
):
  clock = itertools.accumulate((0, *seconds))
  time = SimpleNamespace(perf_counter=clock.__next__)
  monkeypatch.setattr(harness, 'time', time)
  with harness.Progress('questions', 30000, hidden=False) as progress:
    for _ in seconds:
      progress.add(8)
  assert capsys.readouterr().err.endswith(f'| {end}\n')


def test_a_generation_needs_room(ours):
  request = Instance('generate_until', {}, ('a', {'max_gen_toks': 512}), 0)
  with pytest.raises(UserError, match='max_gen_toks is 512, but the model has'):
    ours.generate_until([request])


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'batch_size': '0'}, 'batch_size is 0'),
    ({'batch_size': 'auto:4'}, 'batch_size is auto:4'),
  ],
)
def test_settings_that_cannot_be(text_model, settings, message):
  with pytest.raises(UserError, match=message):
    HarnessModel(str(text_model), **settings)


def test_a_name_that_is_not_known_gets_others_like_it():
  known = ['arc_easy', 'arc_challenge', 'piqa']
  zero_shot.check_names(['piqa'], known)
  with pytest.raises(UserError, match="'arc_eazy' is no task.*mean arc_easy"):
    zero_shot.check_names(['piqa', 'arc_eazy'], known)


@pytest.mark.parametrize('field', ['local', 'hub'])
def test_data_that_is_not_there_is_one_line(
  text_model, tmp_path, capsys, field
):
  where = {
    'local': f'json\ndataset_kwargs:\n  data_files: {tmp_path}/none.jsonl',
    'hub': 'nobody-here/no-such-data',
  }[field]
  (tmp_path / 'task.yaml').write_text(
    f'task: missing\ntest_split: test\ndataset_path: {where}\n{TASKS["ends"]}'
  )
  args = ('--model', text_model, '--tasks', 'missing')
  assert main(['evaluate', *map(str, args), '--include_path', str(tmp_path)])
  out, err = capsys.readouterr()
  assert out == '' and err.splitlines()[-1].startswith(
    'error: the data of task missing cannot be read: '
  )


def test_without_lm_eval_there_is_one_line():
  code = (
    "import sys; sys.modules['lm_eval'] = None\n"
    'from lorapr_jax.cli.main import main\n'
    "sys.exit(main(['lm_eval', 'ls', 'tasks']))"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 1 and done.stdout == ''
  assert done.stderr == (
    'error: tasks need the package lm_eval (lm_eval is missing): '
    "pip install 'lorapr-jax[eval]'\n"
  )


def test_it_hands_over_to_lm_evals_own_command_line(capsys, monkeypatch):
  monkeypatch.setattr('sys.argv', ['pytest'])
  with pytest.raises(SystemExit) as done:
    main(['lm_eval', 'run', '--help'])
  assert done.value.code == 0
  assert '--model_args' in capsys.readouterr().out


# As where torch is not installed, which nothing finds, and without a network.
WITHOUT_TORCH = """
import os
import socket
import sys
def refuse(*_):
  os._exit(9)  # No one swallows that.
socket.getaddrinfo = socket.socket.connect = refuse
from importlib.machinery import PathFinder
class Finder(PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    return None if name == 'torch' else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
from lorapr_jax.cli.main import main
status = main(sys.argv[1:])
assert 'torch' not in sys.modules
sys.exit(status)
"""


def test_tasks_need_neither_torch_nor_a_network(text_model, folder):
  # Offline, the libraries would not even try.
  env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'}
  done = subprocess.run(
    [
      *(sys.executable, '-c', WITHOUT_TORCH, 'evaluate'),
      *('--model', str(text_model)),
      *('--tasks', 'ends', '--limit', '2', '--include_path', str(folder)),
    ],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'acc_norm' in done.stdout


@pytest.mark.slow  # It looks through the thousands of tasks that lm_eval has.
def test_lm_evals_own_command_line_knows_our_model(
  text_model, folder, capsys, monkeypatch
):
  monkeypatch.setattr('sys.argv', ['pytest'])
  args = ('run', '--model', 'lorapr', '--tasks', 'ends', '--limit', 2)
  args += ('--model_args', f'pretrained={text_model},dtype=float32')
  assert main(['lm_eval', *map(str, args), '--include_path', str(folder)]) == 0
  out = capsys.readouterr().out
  assert 'acc_norm' in out and '|ends ' in out


@pytest.mark.slow
def test_an_unknown_task_is_one_line(text_model, capsys):
  argv = ['evaluate', '--model', str(text_model), '--tasks', 'piqa,hellaswg']
  assert main(argv) == 1
  assert "'hellaswg' is no task of lm_eval: did you mean hellaswag" in (
    capsys.readouterr().err
  )
