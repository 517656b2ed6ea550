"""The papers' perplexities: named texts at several lengths.

The protocol is in docs/method.md, evaluation: the rows of a text are joined by
blank lines and tokenised once. For each length the tokens are cut into windows,
and each window is scored by itself.
"""

from collections.abc import Iterator
import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorapr_jax.data.hub import parse_hub
from lorapr_jax.data.pipeline import check_vocabulary
from lorapr_jax.data.sources import Spec, evaluation_text, parse_spec
from lorapr_jax.data.text_files import find_files, kind
from lorapr_jax.data.tfds import parse_tfds
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError, check_least
from lorapr_jax.eval.perplexity import Perplexity, evaluate_perplexity
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
    split: the split of the data set; `file` for a file.
    made_of: `rows`, `lines` or `texts` if these were joined by blank lines;
      `one text` if the text is as it was.
    left_out: the number of tokens that are in no measured window.
    measured: the perplexity.
  """

  name: str
  split: str
  made_of: str
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
  limit = config.max_positions
  if min(lengths) > limit:
    raise UserError(
      f'seq_len is {min(lengths)}, but the model has {limit} positions '
      '(max_position_embeddings)'
    )
  read = [
    _Text(name, spec, _tokens(spec, tokenizer, config.vocab_size))
    for name, spec in specs.items()
  ]
  plan = [
    (text, length, _obstacle(text, length, limit))
    for text in read
    for length in lengths
  ]
  reasons = [reason for *_, reason in plan]
  if all(reasons) or (seq_len is not None and any(reasons)):
    text, length, reason = next(entry for entry in plan if entry[-1])
    raise UserError(f'{text.name}: {reason}, fewer than one window of {length}')
  loaded = in_memory(model, dtype)
  return (
    Skipped(text.name, length, reason)
    if reason
    else _measure(text, length, loaded, max_windows, batch_size)
    for text, length, reason in plan
  )


class _Text(NamedTuple):
  name: str
  spec: Spec
  ids: np.ndarray


def _tokens(spec: Spec, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
  tokens = tokenizer.encode(evaluation_text(spec))
  check_vocabulary(tokens.max(initial=-1), tokenizer, vocab_size)
  return tokens


def _obstacle(text: _Text, length: int, limit: int) -> str | None:
  """Why there is no window of this length to measure; None if there is one."""
  if length > limit:
    return f'the model has {limit} positions (max_position_embeddings)'
  if length > len(text.ids):
    return f'{text.spec.text} has {len(text.ids)} tokens'
  return None


def _measure(
  text: _Text,
  length: int,
  model: Model,
  max_windows: int | None,
  batch_size: int,
) -> TextPerplexity:
  windows = text.ids[: len(text.ids) // length * length].reshape(-1, length)
  measured = evaluate_perplexity(
    model.params,
    windows[:max_windows],
    Compute(model.config, dtype=model.dtype),
    data=text.spec.text,
    batch_size=batch_size,
  )
  left_out = len(text.ids) - measured.windows * length
  return TextPerplexity(text.name, *origin(text.spec), left_out, measured)


def origin(spec: Spec) -> tuple[str, str]:
  """The split of a spec, and what its text is made of; see TextPerplexity."""
  match spec.scheme:
    case 'hf':
      return parse_hub(spec.path).split or 'train', 'rows'
    case 'tfds':
      return parse_tfds(spec.path).split, 'rows'
    case 'file':
      if 'lines' in spec.options:
        return 'file', 'lines'
      files = find_files(spec.path)
      if kind(files[0]) != '.txt':
        return 'file', 'rows'
      return 'file', 'one text' if len(files) == 1 else 'texts'
  return spec.path.rpartition(':')[2], 'rows'
