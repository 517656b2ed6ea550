"""Turns text into windows of tokens, once, and keeps them in the cache."""

from collections.abc import Iterator
import hashlib
import logging
from pathlib import Path

import numpy as np

from lorapr_jax.data import packing, window_files
from lorapr_jax.data.packing import Packed, Tokens
from lorapr_jax.data.sources import (
  Spec,
  evaluation_text,
  identity,
  parse_mixture,
  parse_spec,
)
from lorapr_jax.data.templates import PLAIN, Template, template_documents
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.data.window_files import Counts, Windows
from lorapr_jax.errors import UserError
from lorapr_jax.runtime.files import cache_dir, new_in_cache

# Part of the cache's key. Raise it when a change of code changes the windows.
_FORMAT = 7

_log = logging.getLogger(__name__)


def training_windows(
  mixture: str,
  tokenizer: Tokenizer | None,
  seq_len: int,
  vocab_size: int,
  *,
  pack: str,
  template: Template = PLAIN,
  max_tokens: int = 0,
) -> tuple[Packed, ...]:
  """The documents of each spec of a mixture, packed into windows of tokens.

  A document ends with EOS, except where the chat template writes its end. The
  windows are packed once, and then mapped into memory from the cache, under a
  hash of data, tokenizer and settings. A warning says what was cut, padded or
  left out.

  Args:
    mixture: a data spec, or several with weights (docs/data.md).
    tokenizer: the model's; None for synthetic data.
    seq_len: T, the tokens of a window.
    vocab_size: the model's.
    pack: `documents`: whole documents share a window, with a segment each;
      `concatenate`: all documents are one text.
    template: makes texts of records.
    max_tokens: the most tokens to read of each spec, which can end within a
      document; 0: all.

  Raises:
    UserError: if there is less than one window, or a token that the model
      does not know.
  """

  def part(spec: Spec) -> Windows:
    applied = template if template.applies_to(spec) else PLAIN
    return _windows(
      spec, tokenizer, seq_len, vocab_size, applied, pack, max_tokens
    )

  return tuple(
    Packed(weight, part(spec)) for weight, spec in parse_mixture(mixture)
  )


def evaluation_windows(
  spec: str, tokenizer: Tokenizer | None, seq_len: int, vocab_size: int
) -> np.ndarray:
  """All documents as one text, tokenised and cut into windows (W, T).

  The documents are joined by a blank line (docs/method.md, evaluation). Tokens
  that fill no window are dropped. The arguments and errors are those of
  `training_windows`.
  """
  return _windows(parse_spec(spec), tokenizer, seq_len, vocab_size)['tokens']


def _windows(
  spec: Spec,
  tokenizer: Tokenizer | None,
  seq_len: int,
  vocab_size: int,
  template: Template | None = None,
  pack: str = 'concatenate',
  max_tokens: int = 0,
) -> Windows:
  """The windows of a spec, from the cache or packed into it.

  Without a template they are those of an evaluation.
  """
  if tokenizer is None:
    return {'tokens': _synthetic(spec, seq_len, vocab_size)}
  kind = ('train', template) if template else ('eval',)
  key = (_FORMAT, *kind, pack, max_tokens, seq_len, spec.column)
  digest = hashlib.sha256(repr(key).encode())
  content = identity(spec)
  digest.update(content + tokenizer.fingerprint)
  folder = cache_dir() / 'windows' / digest.hexdigest()[:32]
  exists, found = folder.exists(), None
  if exists:
    try:
      found = window_files.read(folder, seq_len)
    except UserError as error:
      _log.warning('%s: the text is packed again', error)
  if found is None:
    counts = Counts()
    documents = _documents(spec, tokenizer, template)
    stream = _counted(documents, counts, tokenizer, vocab_size, max_tokens)
    picks = template is not None and template.loss != 'all'
    with new_in_cache(folder, 'the packed text', again=exists) as partial:
      partial.mkdir()
      written = _write(partial, stream, counts, seq_len, pack, picks)
      if identity(spec) != content:
        raise UserError(f'{spec.text} changed while it was read: start again')
      if not written:
        raise _too_little(spec, counts, seq_len)
    found = window_files.read(folder, seq_len)
  counts, windows = found
  check_vocabulary(counts.largest_id, tokenizer, vocab_size)
  _warn(spec, pack, max_tokens, windows['tokens'], counts)
  return windows


def _write(
  folder: Path,
  stream: Iterator[Tokens],
  counts: Counts,
  seq_len: int,
  pack: str,
  picks: bool,
) -> bool:
  """Packs a stream of tokens into a folder. Whether there is a window."""
  names = ['tokens']
  if pack == 'documents':
    parts = packing.fill(stream, seq_len, counts)
    names += ['segments', 'weights']
  else:
    parts = packing.concatenate(stream, seq_len)
    names += ['weights'] if picks else []
  if picks:
    parts = packing.taught(parts, counts)
  window_files.write(folder, parts, names, counts)
  return (folder / 'tokens.bin').stat().st_size > 0


def _too_little(spec: Spec, counts: Counts, seq_len: int) -> UserError:
  if counts.untaught:
    return UserError(
      f'{spec.text}: none of {counts.untaught} windows of {seq_len} tokens has '
      'a response to learn, since the prompts fill them: raise train.seq_len'
    )
  return UserError(
    f'{spec.text} has {counts.tokens} tokens: fewer than one window of '
    f'{seq_len}'
  )


def _documents(
  spec: Spec, tokenizer: Tokenizer, template: Template | None
) -> Iterator[Tokens]:
  if template:
    documents = template_documents(spec, template, tokenizer)
    yield from packing.tokenise(documents, tokenizer, whole=template.is_chat)
  else:
    for ids in tokenizer.encode_parts(evaluation_text(spec)):
      yield Tokens(ids, np.ones(len(ids), np.uint8), goes_on=True)


def _counted(
  documents: Iterator[Tokens],
  counts: Counts,
  tokenizer: Tokenizer,
  vocab_size: int,
  max_tokens: int,
) -> Iterator[Tokens]:
  begins = True
  for document in documents:
    left = max_tokens - counts.tokens
    ends = max_tokens > 0 and left <= len(document.ids)
    if ends:
      document = Tokens(document.ids[:left], document.targets[:left])
    counts.documents += begins
    begins = not document.goes_on
    counts.tokens += len(document.ids)
    counts.largest_id = max(
      counts.largest_id, int(document.ids.max(initial=-1))
    )
    check_vocabulary(counts.largest_id, tokenizer, vocab_size)
    yield document
    if ends:
      return


def check_vocabulary(
  largest_id: int, tokenizer: Tokenizer, vocab_size: int
) -> None:
  """Raises a UserError for an id that the model does not know; not for -1."""
  if largest_id >= vocab_size:
    raise UserError(
      f'the tokenizer of {tokenizer.folder} gives id {largest_id}, but the '
      f'model has a vocabulary of {vocab_size}'
    )


def _warn(
  spec: Spec, pack: str, max_tokens: int, windows: np.ndarray, counts: Counts
) -> None:
  """Warns of what was left out, cut or padded."""
  if max_tokens and counts.tokens == max_tokens:
    _log.warning(
      '%s: reading ended after %d tokens (data.max_tokens)',
      *(spec.text, max_tokens),
    )
  seq_len = windows.shape[1]
  rest = counts.tokens % seq_len
  if pack == 'concatenate' and rest:
    _log.warning(
      '%s: the last %d of %d tokens fill no window of %d and are left out',
      *(spec.text, rest, counts.tokens, seq_len),
    )
  if counts.cut:
    _log.warning(
      '%s: %d of %d documents are longer than a window of %d tokens and go on '
      'in another, without what came before',
      *(spec.text, counts.cut, counts.documents, seq_len),
    )
  if counts.untaught:
    _log.warning(
      '%s: %d of %d windows of %d tokens have no response to learn and are '
      'left out',
      spec.text,
      counts.untaught,
      counts.untaught + len(windows),
      seq_len,
    )
  # The last windows are never quite full; a tenth of all is worth a warning.
  if counts.padding * 10 > windows.size:
    _log.warning(
      '%s: %d of %d positions are padding, since documents stay whole; '
      'data.packing=concatenate has none',
      *(spec.text, counts.padding, windows.size),
    )


def _synthetic(spec: Spec, seq_len: int, vocab_size: int) -> np.ndarray:
  """A made-up language: nine times of ten the last token decides the next."""
  if spec.scheme != 'synthetic':
    raise UserError(
      f'{spec.text} is text, but the model has no tokenizer: set model.path to '
      'a Hugging Face folder, or use synthetic:SEED'
    )
  count = int(spec.options.get('windows', 256))
  successor = np.random.default_rng(0).permutation(vocab_size)
  rng = np.random.default_rng((1, int(spec.path)))
  tokens = rng.integers(vocab_size, size=(count, seq_len), dtype=np.int32)
  follows = rng.random((count, seq_len)) < 0.9
  for t in range(1, seq_len):
    tokens[:, t] = np.where(
      follows[:, t], successor[tokens[:, t - 1]], tokens[:, t]
    )
  return tokens
