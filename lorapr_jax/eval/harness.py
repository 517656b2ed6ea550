"""Our model for lm-evaluation-harness, in whose registry it is `lorapr`.

This module imports lm_eval, an optional extra; see eval/zero_shot.py.
"""

from collections.abc import Sequence
import contextlib
import time
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

# Registers lm_eval's own models, which it does not do once ours is there.
import lm_eval.models  # noqa: F401
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError
from lorapr_jax.eval import generation
from lorapr_jax.eval.continuations import score_continuations
from lorapr_jax.hf.load import Model, load
from lorapr_jax.runtime.time_left import TimeLeft

# The default and the names that lm_eval's own model `hf` has.
_MAX_GEN_TOKS = 256
_MAX_GEN_TOKS_NAMES = (
  'max_gen_toks',
  'max_new_tokens',
  'max_tokens',
  'max_completion_tokens',
)

# tqdm's own, but for its time left and its rate.
_BAR_FORMAT = '{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]'


class Progress(contextlib.AbstractContextManager):
  """A bar with the requests that are done, and the time that is left.

  The first batch includes compiling, so the time is shown once there is a
  second.
  """

  def __init__(self, title: str, total: int, hidden: bool):
    """A bar for `total` requests."""
    self._bar = tqdm(
      desc=title, total=total, disable=hidden, bar_format=_BAR_FORMAT
    )
    self._left = TimeLeft(total)
    self._done, self._time = 0, time.perf_counter()

  def __exit__(self, *_: Any) -> None:
    self._bar.close()

  def add(self, count: int) -> None:
    """Says that a batch of so many requests is done."""
    first, self._done = not self._done, self._done + count
    before, self._time = self._time, time.perf_counter()
    self._left.add(self._done, (self._time - before) / count, compiled=first)
    if (left := self._left.seconds()) is not None:
      text = f'{tqdm.format_interval(left)} left'
      self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(count)


@register_model('lorapr')
class HarnessModel(TemplateLM):
  """A model of ours, on all devices, as lm_eval calls one.

  Attributes:
    model: the model.
    tokenizer: transformers' tokenizer object.
    max_length: the most tokens of a request.
  """

  def __init__(
    self,
    pretrained: Model | str,
    dtype: str = 'auto',
    batch_size: int | str = 8,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    """Reads the model, or takes one that is in memory.

    The arguments are those that lm_eval gives. A batch size of `auto` is 8. The
    last two are not used: the device is `cuda:0` on any machine.

    Raises:
      UserError: for a mistake in the arguments or in the folder.
    """
    super().__init__()
    size = str(batch_size).replace('auto', '8')
    if not size.isdigit() or int(size) < 1:
      raise UserError(f'batch_size is {batch_size}: it must be at least 1')
    self._batch_size = int(size)
    is_model = isinstance(pretrained, Model)
    self._tokenizer = Tokenizer(pretrained.folder if is_model else pretrained)
    self.tokenizer = self._tokenizer.wrapped
    if self.prefix_token_id is None:
      raise UserError(
        f'the tokenizer of {self._tokenizer.folder} has neither a BOS nor an '
        'EOS token: a text has nothing to begin with'
      )
    self.model = pretrained if is_model else load(pretrained, dtype)
    self.max_length = self.model.config.longest

  @property
  def eot_token_id(self) -> int:
    """The id that ends a text."""
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self) -> int:
    """The id that stands for an empty context: BOS, else EOS."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  @property
  def tokenizer_name(self) -> str:
    """A name for the tokenizer, for lm_eval's cache of requests."""
    return str(self._tokenizer.folder.absolute()).replace('/', '__')

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **_: Any
  ) -> list[int]:
    """The ids of a text, with one BOS in front if the tokenizer adds it."""
    if add_special_tokens is None:
      # What a chat template wrote begins with BOS already.
      prefix = self.tokenizer.decode(self.prefix_token_id)
      add_special_tokens = not string.startswith(prefix)
    [ids] = self._tokenizer.encode_batch([string], special=add_special_tokens)
    return ids.tolist()

  def apply_chat_template(
    self,
    chat_history: list[dict[str, str]],
    add_generation_prompt: bool = True,
  ) -> str:
    """A conversation as one text.

    Raises:
      UserError: if there is no template, or it does not take these messages.
    """
    return self._tokenizer.chat_text(
      chat_history,
      answer_next=add_generation_prompt,
      last_goes_on=not add_generation_prompt,
    )

  def _loglikelihood_tokens(
    self,
    requests: Sequence[tuple[Any, list[int], list[int]]],
    disable_tqdm: bool = False,
    **_: Any,
  ) -> list[tuple[float, bool]]:
    scores = score_continuations(
      self.model.params,
      self.model.config,
      [pair for _, *pair in requests],
      dtype=self.model.dtype,
      batch_size=self._batch_size,
    )
    results: list[Any] = [None] * len(requests)
    with Progress('log-likelihoods', len(requests), disable_tqdm) as progress:
      for batch in scores:
        for i, score in batch.items():
          results[i] = tuple(score)
          # A rolling window has no text of its own to remember it by.
          if (text := requests[i][0]) is not None:
            self.cache_hook.add_partial('loglikelihood', text, results[i])
        progress.add(len(batch))
    return results

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """The log-likelihoods of whole texts, in windows of the model's length."""
    windows, owners = [], []
    for owner, request in enumerate(requests):
      rolling = get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      for window in map(make_disjoint_window, rolling):
        windows.append((None, *window))
        owners.append(owner)
    totals = [0.0] * len(requests)
    scores = self._loglikelihood_tokens(windows, disable_tqdm)
    for owner, (log_likelihood, _) in zip(owners, scores, strict=True):
      totals[owner] += log_likelihood
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def generate_until(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[str]:
    """The text that follows each context, up to a stop sequence or EOS."""
    texts = []
    with Progress('generations', len(requests), disable_tqdm) as progress:
      for i, request in enumerate(requests):
        context, settings = request.args
        # Another seed for each: draws from the same context must differ.
        texts.append(self._generate(context, settings, seed=i))
        self.cache_hook.add_partial('generate_until', request.args, texts[-1])
        progress.add(1)
    return texts

  def _generate(self, context: str, settings: dict[str, Any], seed: int) -> str:
    sampling, until = read_generation_kwargs(settings, seed)
    room = self.max_length - sampling.max_new_tokens
    if room < 1:
      raise UserError(
        f'max_gen_toks is {sampling.max_new_tokens}, but the model has '
        f'{self.max_length} positions (max_position_embeddings): give fewer '
        'in the task (generation_kwargs)'
      )
    ids = self.tok_encode(context)[-room:]
    tokens = generation.stream_tokens(
      self.model.params,
      self.model.config,
      ids,
      sampling,
      stop=generation.stop_ids(self._tokenizer.folder) | {self.eot_token_id},
      dtype=self.model.dtype,
    )
    text = ''
    for piece in generation.detokenize(self._tokenizer, ids, tokens):
      text += piece
      if any(stop in text for stop in until):
        break
    for stop in until:
      text = text.partition(stop)[0]
    return text


def read_generation_kwargs(
  settings: dict[str, Any], seed: int
) -> tuple[generation.Sampling, list[str]]:
  """Reads a task's generation_kwargs.

  Returns:
    How tokens are drawn, and the texts that end a generation.

  Raises:
    UserError: for a key that is not supported.
  """
  rest = dict(settings)
  until = rest.pop('until', None) or []
  until = [until] if isinstance(until, str) else [s for s in until if s]
  lengths = [rest.pop(name, None) for name in _MAX_GEN_TOKS_NAMES]
  length = next((n for n in lengths if n is not None), _MAX_GEN_TOKS)
  temperature = float(rest.pop('temperature', 0.0))
  if not rest.pop('do_sample', temperature > 0.0):
    temperature = 0.0
  top_p = float(rest.pop('top_p', 1.0))
  # A search with one beam is no search.
  if rest and rest != {'num_beams': 1}:
    raise UserError(
      f'generation_kwargs {", ".join(sorted(rest))}: only until, do_sample, '
      f'temperature, top_p and {_MAX_GEN_TOKS_NAMES[0]} are supported'
    )
  return generation.Sampling(int(length), temperature, top_p, seed), until
