"""The papers' perplexities: named texts at several lengths.

The protocol is in docs/method.md, evaluation: the rows of a text are joined by
blank lines and tokenised once. For each length the tokens are cut into windows,
and each window is scored by itself.
"""

from collections.abc import Iterator
import dataclasses
import itertools
from pathlib import Path

import numpy as np

from lorapr_jax.data.pipeline import check_vocabulary
from lorapr_jax.data.sources import Spec, evaluation_text, parse_spec
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError, check_least
from lorapr_jax.eval.perplexity import HeldOut, Perplexity
from lorapr_jax.hf.load import Model, folder_and_config, in_memory
from lorapr_jax.models.compute import Compute

# The papers' texts. PTB's repository holds a script, and no code of a data set
# is ever run: the Hub's conversion of it to Parquet is read instead.
PAPER_TEXTS = {
  'wikitext2': 'hf:Salesforce/wikitext/wikitext-2-raw-v1:test',
  'ptb': 'hf:ptb-text-only/ptb_text_only@refs/convert/parquet:validation'
  '?column=sentence',
}
PAPER_LENGTHS = (128, 512, 2048)


@dataclasses.dataclass(frozen=True)
class TextPerplexity:
  """The perplexity of a text of the suite at one length.

  Attributes:
    name: the text's name.
    left_out: the number of tokens that are in no measured window.
    measured: the perplexity.
  """

  name: str
  left_out: int
  measured: Perplexity


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A text and a length at which it cannot be measured, and the reason."""

  name: str
  seq_len: int
  reason: str


def evaluate_suite(
  model: Model | str | Path,
  texts: dict[str, str] = PAPER_TEXTS,
  *,
  seq_len: int | None = None,
  max_windows: int | None = None,
  batch_size: int = 8,
  dtype: str = 'auto',
) -> Iterator[TextPerplexity | Skipped]:
  """Measures the perplexity of each text at 128, 512 and 2048 tokens.

  All texts are read before the weights. A length is skipped if the model has
  fewer positions or the text fewer tokens.

  Args:
    model: a model, or the Hugging Face folder of one.
    texts: {name: data spec}; PAPER_TEXTS are fetched when they are read.
    seq_len: the only length to measure, which is then not skipped; None: the
      papers' three.
    max_windows: the most windows of each text; None: all.
    batch_size: windows at a time.
    dtype: of weights and computation; a model in memory keeps its own.

  Returns:
    An iterator over the results, which measures as it goes on.

  Raises:
    UserError: for a mistake in the arguments, the folder or a text.
  """
  check_least(
    seq_len=(seq_len, 2),
    max_windows=(max_windows, 1),
    batch_size=(batch_size, 1),
  )
  folder, config = folder_and_config(model)
  specs = {name: parse_spec(text) for name, text in texts.items()}
  tokenizer = Tokenizer(folder)
  lengths = PAPER_LENGTHS if seq_len is None else (seq_len,)
  limit = config.longest
  if min(lengths) > limit:
    raise UserError(
      f'seq_len is {min(lengths)}, but the model has {limit} positions '
      '(max_position_embeddings)'
    )
  ids = {
    name: _tokens(spec, tokenizer, config.vocab_size)
    for name, spec in specs.items()
  }
  plan = list(itertools.product(texts, lengths))
  skipped = {
    (name, length): Skipped(name, length, reason)
    for name, length in plan
    if (reason := _obstacle(texts[name], len(ids[name]), length, limit))
  }
  if len(skipped) == len(plan) or (seq_len and skipped):
    first = next(iter(skipped.values()))
    raise UserError(
      f'{first.name}: {first.reason}, fewer than one window of {first.seq_len}'
    )
  loaded = in_memory(model, dtype)
  compute = Compute(config, dtype=loaded.dtype)

  def measure(name: str, length: int) -> TextPerplexity:
    tokens = ids[name]
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    text = HeldOut(windows[:max_windows], texts[name], batch_size)
    measured = text.perplexity(loaded.params, compute)
    left_out = len(tokens) - measured.windows * length
    return TextPerplexity(name, left_out, measured)

  return (skipped.get(key) or measure(*key) for key in plan)


def _obstacle(text: str, tokens: int, length: int, limit: int) -> str | None:
  """Why there is no window of this length to measure; None if there is one."""
  if length > limit:
    return f'the model has {limit} positions (max_position_embeddings)'
  if length > tokens:
    return f'{text} has {tokens} tokens'
  return None


def _tokens(spec: Spec, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
  parts = tokenizer.encode_parts(evaluation_text(spec))
  tokens = np.concatenate(list(parts))
  check_vocabulary(tokens.max(initial=-1), tokenizer, vocab_size)
  return tokens
