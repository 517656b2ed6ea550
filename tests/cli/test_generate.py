"""generate: one prompt, lines, a conversation; its mistakes."""

import io
import json
import signal
import sys

import pytest

from lorapr_jax.cli import generate as command
from lorapr_jax.cli.main import main
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.eval import generation
from lorapr_jax.hf.write import export_model
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.runtime.terminal import visible

CONFIG = ModelConfig(
  vocab_size=300,
  embed_dim=32,
  head_dim=8,
  layers=(LayerShape(2, 2, 48), LayerShape(2, 1, 40)),
  max_positions=128,
)


@pytest.fixture(scope='module')
def folders(tmp_path_factory, random_params, add_tokenizer):
  """The same model with and without a chat template."""
  root = tmp_path_factory.mktemp('generate')
  params = random_params(CONFIG)
  for name, template in (('chat', 'chat_template.jinja'), ('raw', None)):
    export_model(root / name, params, CONFIG)
    add_tokenizer(root / name, template)
  return root


@pytest.fixture
def run(folders, capsys):
  """The exit status of the command with 8 tokens; what it printed."""

  def run(*args, name='raw'):
    model = ['--model', str(folders / name), '--dtype', 'float32']
    status = main(['generate', *model, '--max_new_tokens', '8', *args])
    return status, *capsys.readouterr()

  return run


@pytest.fixture
def expected(folders, load):
  """What follows a prompt that is given to the model as it is."""

  def expected(prompt):
    tokenizer = Tokenizer(folders / 'raw')
    config, params = load(folders / 'raw')
    sampling = generation.Sampling(8)
    ids = tokenizer.encode(prompt)
    pieces = generation.stream_text(
      params, config, tokenizer, ids, sampling, dtype='float32'
    )
    return ''.join(pieces)

  return expected


class Terminal(io.StringIO):
  """What a person types."""

  def isatty(self):
    return True


def test_a_prompt_is_continued(run, expected):
  assert run('--prompt', 'the dog') == (
    0,
    visible(expected('the dog')) + '\n',
    '',
  )


def test_with_a_template_a_prompt_is_a_message(run, expected):
  as_message = '<|user|>the dog\n<|assistant|>'
  for args, prompt in (([], as_message), (['--raw'], 'the dog')):
    _, out, _ = run('--prompt', 'the dog', *args, name='chat')
    assert out == visible(expected(prompt)) + '\n'
  assert expected(as_message) != expected('the dog')


def test_json_is_one_object_and_nothing_else(run, expected):
  status, out, err = run('--prompt', 'the dog', '--json')
  assert (status, err) == (0, '')
  result = json.loads(out)
  assert list(result) == [
    *('prompt', 'text', 'tokens', 'seconds', 'tokens_per_second')
  ]
  assert result['prompt'] == 'the dog'
  assert result['text'] == expected('the dog')
  assert result['tokens'] == 8
  assert result['seconds'] > 7 / result['tokens_per_second'] > 0


def test_one_token_has_no_speed(run):
  _, out, _ = run('--prompt', 'the', '--max_new_tokens', '1', '--json')
  result = json.loads(out)
  assert (result['tokens'], result['tokens_per_second']) == (1, None)


def test_the_arguments_reach_the_sampling(run):
  def draw(*args):
    return run('--prompt', 'the', '--temperature', '3', *args)[1]

  assert draw() == draw('--seed', '0') != draw('--seed', '1')
  # Where only the likeliest token is left, it is the greedy text.
  assert draw('--top_p', '1e-6') == run('--prompt', 'the')[1] != draw()


def test_each_line_of_a_file_is_a_prompt(run, expected, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('the dog\n\n the fox\r\n'))
  texts = expected('the dog'), expected(' the fox')
  assert run() == (0, ''.join(f'{visible(text)}\n' for text in texts), '')


def test_each_line_of_a_file_is_an_object(run, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('the dog\nthe fox'))
  _, out, _ = run('--json')
  lines = [json.loads(line)['prompt'] for line in out.splitlines()]
  assert lines == ['the dog', 'the fox']


def test_a_conversation_is_kept(run, expected, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', Terminal('the dog\n\nand?\n'))
  status, out, err = run(name='chat')
  first = expected('<|user|>the dog\n<|assistant|>')
  second = expected(
    f'<|user|>the dog\n<|assistant|>{first}\n<|user|>and?\n<|assistant|>'
  )
  assert out == f'> {first}\n> > {second}\n> \n'
  assert (status, err) == (0, 'Ctrl-C stops an answer, Ctrl-D ends.\n')


def test_a_conversation_outlives_a_mistake(run, expected, monkeypatch):
  typed = f'the dog\n{"x" * 128}\n'
  monkeypatch.setattr(sys, 'stdin', Terminal(typed))
  status, out, err = run()
  assert (status, out) == (0, f'> {visible(expected("the dog"))}\n> > \n')
  assert 'error: the prompt has 128 tokens' in err


@pytest.fixture
def ctrl_c():
  """SIGINT as in a terminal; in the background, shells have it ignored."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


@pytest.mark.usefixtures('ctrl_c')
def test_ctrl_c_stops_the_answer_alone(folders, capsys, monkeypatch):
  tokenizer = Tokenizer(folders / 'raw')
  seen = []

  def tokens(interrupted):
    yield from tokenizer.encode(' fox')
    if interrupted:
      signal.raise_signal(signal.SIGINT)
    yield from tokenizer.encode(' dog')

  def answer(messages):
    seen.append([m['content'] for m in messages])
    ids = tokenizer.encode('the')
    return command.Answer(tokenizer, ids, tokens(len(seen) == 1))

  monkeypatch.setattr(sys, 'stdin', Terminal('one\ntwo\n'))
  command.converse(answer)
  assert seen == [['one'], ['one', ' fox', 'two']]
  assert capsys.readouterr().out == '>  fox\n>  fox dog\n> \n'


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--prompt', ' '], 'the prompt is empty'),
    (['--prompt', 'x' * 128], 'the prompt has 128 tokens'),
    (['--prompt', 'a\udce9'], 'the prompt is not UTF-8 text'),
    (['--prompt', 'a', '--top_p', '0'], 'top_p is 0.0'),
    (['--prompt', 'a', '--temperature', '-1'], 'temperature is -1.0'),
    (['--prompt', 'a', '--max_new_tokens', '0'], 'max_new_tokens is 0'),
    (
      ['--prompt', 'a', '--seed', 'x'],
      "argument --seed: invalid int value: 'x'",
    ),
    (['--prompt', 'a', '--model', 'nowhere'], 'nowhere is not a folder'),
  ],
)
def test_mistakes_are_one_line(run, args, message):
  status, out, err = run(*args)
  assert (status, out) == (1, '')
  assert err.startswith('error: ') and err.count('\n') == 1
  assert message in err


@pytest.mark.parametrize(
  ('stdin', 'args', 'message'),
  [
    (io.StringIO('\n \n'), [], 'standard input holds no prompt'),
    (None, [], 'standard input is closed: give a prompt with --prompt'),
    (Terminal('the dog\n'), ['--json'], '--json needs --prompt'),
    (
      io.TextIOWrapper(io.BytesIO(b'\xff\n'), 'utf-8'),
      [],
      'standard input is not UTF-8 text',
    ),
  ],
)
def test_mistakes_on_standard_input(run, monkeypatch, stdin, args, message):
  monkeypatch.setattr(sys, 'stdin', stdin)
  status, out, err = run(*args)
  assert (status, out) == (1, '')
  assert message in err


def test_a_folder_without_a_tokenizer_is_a_mistake(capsys, save_hf):
  argv = ['generate', '--model', str(save_hf('gqa')), '--prompt', 'a']
  assert main(argv) == 1
  assert 'tokenizer.json (or tokenizer.model) is missing' in (
    capsys.readouterr().err
  )
