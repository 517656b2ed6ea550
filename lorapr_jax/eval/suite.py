"""The papers' perplexities: named texts at several lengths.

The protocol is that of docs/method.md, evaluation: rows joined by a blank line,
tokenised once, cut at each length into windows that are scored alone.
"""

from collections.abc import Iterator
import dataclasses
from pathlib import Path

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
from lorapr_jax.models.compute import (
  Compute,
)

# The papers' texts. PTB's own repository is a script, which is never run: the
# Hub's conversion of it to Parquet is read.
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
    name: of the text.
    split: of the data set; `file` for a file.
    made_of: what the text is: rows, lines or texts joined by a blank line, or
      one text as it is.
    left_out: the tokens that are in no window that was measured.
    measured: the perplexity.
  """

  name: str
  split: str
  made_of: str
  left_out: int
  measured: Perplexity


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A text at a length at which there is nothing to measure, and why."""

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
  """The perplexity of each text at 128, 512 and 2048 tokens, as they come.

  Texts are read before the weights. Lengths that the model or a text does not
  reach are skipped.

  Args:
    model: a model, or the Hugging Face folder of one.
    texts: name -> data spec; PAPER_TEXTS are fetched when they are read.
    seq_len: this length alone, which then must be reached.
    max_windows: at most so many of each text; None: all.
    batch_size: windows at a time.
    dtype: of weights and computation; a model in memory keeps its own.

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
  tokens, plan = {}, []
  for name, spec in specs.items():
    tokens[name] = _tokens(spec, tokenizer, config.vocab_size)
    for length in lengths:
      reason = None
      if length > limit:
        reason = f'the model has {limit} positions (max_position_embeddings)'
      elif length > len(tokens[name]):
        reason = f'{spec.text} has {len(tokens[name])} tokens'
      plan.append((name, length, reason))
  reasons = [reason for *_, reason in plan]
  if all(reasons) or (seq_len is not None and any(reasons)):
    name, length, reason = next(entry for entry in plan if entry[-1])
    raise UserError(f'{name}: {reason}, fewer than one window of {length}')
  loaded = in_memory(model, dtype)
  settings = Compute(loaded.config, dtype=loaded.dtype)

  def measure() -> Iterator[TextPerplexity | Skipped]:
    for name, length, reason in plan:
      if reason:
        yield Skipped(name, length, reason)
        continue
      spec, ids = specs[name], tokens[name]
      windows = ids[: len(ids) // length * length].reshape(-1, length)
      measured = evaluate_perplexity(
        loaded.params,
        windows[:max_windows],
        settings,
        data=spec.text,
        batch_size=batch_size,
      )
      left_out = len(ids) - measured.windows * length
      yield TextPerplexity(name, *origin(spec), left_out, measured)

  return measure()


def _tokens(spec: Spec, tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
  tokens = tokenizer.encode(evaluation_text(spec))
  check_vocabulary(tokens.max(initial=-1), tokenizer, vocab_size)
  return tokens


def origin(spec: Spec) -> tuple[str, str]:
  """The split, and what the text is made of."""
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
