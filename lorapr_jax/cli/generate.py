"""generate: text from a folder, streamed.

If the folder has a chat template, a prompt is a user's message. Without
--prompt, a terminal starts a conversation (Ctrl-C stops an answer, Ctrl-D ends
it); otherwise each line of standard input is a prompt. Control characters in
an answer are written out, such as \\x1b; --json has them as they are.
"""

from collections.abc import Callable, Iterable, Iterator
import sys
import time
from typing import Any

import numpy as np

from lorapr_jax.cli.arguments import Parser, print_json
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError
from lorapr_jax.eval import generation
from lorapr_jax.hf.load import folder_and_config, load
from lorapr_jax.runtime.terminal import say, say_piece


def main(argv: list[str]) -> None:
  """Answers one prompt, each line of a file, or a person."""
  args = parse(argv)
  sampling = generation.Sampling(
    args.max_new_tokens, args.temperature, args.top_p, args.seed
  )
  if args.prompt is None and sys.stdin is None:
    raise UserError('standard input is closed: give a prompt with --prompt')
  interactive = args.prompt is None and sys.stdin.isatty()
  if interactive and args.json:
    raise UserError('--json needs --prompt, or prompts on standard input')
  folder, config = folder_and_config(args.model)
  tokenizer = Tokenizer(folder)
  prompts = [] if args.prompt is None else [checked(args.prompt)]

  def encode(messages):
    return generation.encode_prompt(tokenizer, config, messages, raw=args.raw)

  for prompt in prompts:
    encode([message('user', prompt)])
  model = load(args.model, args.dtype)
  stop = generation.stop_ids(folder)

  def answer(messages):
    ids = encode(messages)
    tokens = generation.stream_tokens(
      model.params, config, ids, sampling, stop=stop, dtype=model.dtype
    )
    return Answer(tokenizer, ids, tokens)

  if interactive:
    converse(answer)
    return
  for prompt in prompts or lines():
    reply = answer([message('user', prompt)])
    if args.json:
      for _ in reply:
        pass
      print_json({'prompt': prompt, **reply.report()})
    else:
      show(reply)


def parse(argv: list[str]) -> Any:
  """The arguments."""
  parser = Parser('generate', __doc__)
  parser.add_argument('--model', required=True, help='a Hugging Face folder')
  parser.add_argument('--prompt', help='default: from standard input')
  parser.add_argument(
    '--raw',
    action='store_true',
    help='give the prompt to the model as it is, without chat template',
  )
  defaults = generation.Sampling()
  for name, text in (
    ('max_new_tokens', 'the most tokens of an answer'),
    ('temperature', '0 takes the likeliest token'),
    ('top_p', 'draw from the likeliest tokens of this probability'),
    ('seed', 'of the draws'),
  ):
    default = getattr(defaults, name)
    parser.add_argument(
      f'--{name}',
      type=type(default),
      default=default,
      help=f'{text}; default: {default:g}',
    )
  parser.add_dtype()
  parser.add_json()
  return parser.parse_args(argv)


def checked(prompt: str) -> str:
  """The prompt, if it can be one.

  Raises:
    UserError: if there is nothing in it, or it is not UTF-8.
  """
  if not prompt.strip():
    raise UserError('the prompt is empty')
  try:
    prompt.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'the prompt is not UTF-8 text: {error}') from None
  return prompt


def lines() -> Iterator[str]:
  """The prompts on standard input, one a line, without blank lines."""
  empty = True
  try:
    for line in sys.stdin:
      if line.strip():
        empty = False
        yield checked(line.rstrip('\r\n'))
  except UnicodeDecodeError as error:
    raise UserError(f'standard input is not UTF-8 text: {error}') from None
  if empty:
    raise UserError('standard input holds no prompt: give one with --prompt')


def message(role: str, content: str) -> dict[str, str]:
  """A message of a conversation."""
  return {'role': role, 'content': content}


def show(answer: Iterable[str]) -> None:
  """Prints the pieces as they come."""
  for piece in answer:
    say_piece(piece)
  say()


def converse(answer: Callable[[list[dict[str, str]]], 'Answer']) -> None:
  """Holds a conversation on a terminal; an answer sees all that came before."""
  say('Ctrl-C stops an answer, Ctrl-D ends.', error=True)
  messages = []
  while True:
    reply = None
    try:
      prompt = input('> ')
      if not prompt.strip():
        continue
      question = message('user', checked(prompt))
      reply = answer([*messages, question])
      show(reply)
    except EOFError:
      say()
      return
    except KeyboardInterrupt:
      say()
    except UserError as error:
      say(f'error: {error}', error=True)
    # Of an answer that was stopped, what was shown is part of it.
    if reply and reply.text:
      messages += [question, message('assistant', reply.text)]


class Answer:
  """An answer while it is generated; iterating gives the pieces of its text.

  Attributes:
    text: what has come so far.
  """

  def __init__(
    self, tokenizer: Tokenizer, prompt_ids: np.ndarray, tokens: Iterator[int]
  ):
    self.text = ''
    self._start, self._times = time.perf_counter(), []
    self._pieces = generation.detokenize(
      tokenizer, prompt_ids, self._timed(tokens)
    )

  def _timed(self, tokens: Iterator[int]) -> Iterator[int]:
    for token in tokens:
      self._times.append(time.perf_counter())
      yield token

  def __iter__(self) -> Iterator[str]:
    for piece in self._pieces:
      self.text += piece
      yield piece

  def report(self) -> dict[str, Any]:
    """The text, its tokens and their speed.

    `seconds` has everything, compilation too; `tokens_per_second` is from the
    first token to the last, null where there are fewer than two.
    """
    times = self._times
    timed = len(times) > 1
    return {
      'text': self.text,
      'tokens': len(times),
      'seconds': time.perf_counter() - self._start,
      'tokens_per_second': (len(times) - 1) / (times[-1] - times[0])
      if timed
      else None,
    }
