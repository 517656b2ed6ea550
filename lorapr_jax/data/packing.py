"""Packs documents into windows of tokens."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import functools
import itertools
from typing import NamedTuple

import numpy as np

from lorapr_jax.data.ahead import in_order
from lorapr_jax.data.templates import Document
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.data.window_files import DTYPES, Counts, Windows

PACKINGS = ('documents', 'concatenate')

# At most so many documents, and about so many characters, are tokenised in one
# call.
_BATCH, _CHARACTERS = 256, 2**20
# At most so many windows are filled at the same time.
_OPEN = 64


class Packed(NamedTuple):
  """A part of a mixture, packed into windows.

  Attributes:
    weight: its share of the windows that are drawn.
    windows: {name: array (W, T)}, as a folder of windows holds them.
  """

  weight: float
  windows: Windows


class Tokens(NamedTuple):
  """The tokens of a document, or of a part of one.

  Attributes:
    ids: (N,).
    targets: (N,), 1 for each that counts in the loss, else 0.
    goes_on: whether the document goes on in the next ones.
  """

  ids: np.ndarray
  targets: np.ndarray
  goes_on: bool = False


def tokenise(
  documents: Iterable[Document], tokenizer: Tokenizer, *, whole: bool
) -> Iterator[Tokens]:
  """Yields the tokens of each document, in order, computed in batches ahead.

  Those of a long document come in parts. The tokenizers library runs threads of
  its own. Texts that are not `whole` get their special tokens: BOS if the
  tokenizer puts it there, and EOS at the end.
  """
  work = functools.partial(_tokenise, tokenizer, whole)
  with ThreadPoolExecutor(1) as pool:
    for long, some in itertools.groupby(
      documents, lambda d: d.rest is not None
    ):
      if long:
        for document in some:
          yield from _tokenise_long(tokenizer, whole, document)
        continue
      for tokens in in_order(pool, work, _batches(some), ahead=1):
        yield from tokens


def _tokenise_long(
  tokenizer: Tokenizer, whole: bool, document: Document
) -> Iterator[Tokens]:
  text = itertools.chain([document.text], document.rest)
  parts = tokenizer.encode_parts(text, special=not whole)
  ids = next(parts)
  for following in parts:
    yield Tokens(ids, np.ones(len(ids), np.uint8), goes_on=True)
    ids = following
  ids = _ended(ids, None if whole else tokenizer.eos_token_id)
  yield Tokens(ids, np.ones(len(ids), np.uint8))


def _ended(ids: np.ndarray, eos: int | None) -> np.ndarray:
  """The ids of a document, with EOS at the end if there is one."""
  if eos is None or eos in ids[-1:]:
    return ids
  return np.append(ids, eos).astype(np.int32)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
  batch: list[Document] = []
  size = 0
  for document in documents:
    batch.append(document)
    size += len(document.text)
    if len(batch) == _BATCH or size > _CHARACTERS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _tokenise(
  tokenizer: Tokenizer, whole: bool, documents: list[Document]
) -> list[Tokens]:
  encode = functools.partial(tokenizer.encode_batch, special=not whole)
  # To find the token at which a span begins or ends, tokenise the text up to
  # there, and count how many tokens it shares with the whole text.
  heads = iter(
    encode(
      [
        document.text[:edge]
        for document in documents
        for span in document.responses or ()
        for edge in span
      ]
    )
  )
  eos = None if whole else tokenizer.eos_token_id
  result = []
  for document, ids in zip(
    documents, encode([d.text for d in documents]), strict=True
  ):
    ids = _ended(ids, eos)
    targets = np.ones(len(ids), np.uint8)
    if document.responses is not None:
      targets[:] = 0
      for _, end in document.responses:
        first = _common(next(heads), ids)
        last = _common(next(heads), ids)
        # An answer at the end of the text includes EOS.
        targets[first : None if end == len(document.text) else last] = 1
    result.append(Tokens(ids, targets))
  return result


def _common(head: np.ndarray, ids: np.ndarray) -> int:
  """How many tokens at their beginning two texts share."""
  count = min(len(head), len(ids))
  differ = np.flatnonzero(head[:count] != ids[:count])
  return int(differ[0]) if len(differ) else count


_NOTHING = np.empty(0, np.int32), np.empty(0, np.uint8)


def _joined(before: Sequence[np.ndarray], tokens: Tokens) -> list[np.ndarray]:
  """Ids and targets that lie before others, and those."""
  return [np.concatenate(both) for both in zip(before, tokens[:2], strict=True)]


def concatenate(documents: Iterable[Tokens], seq_len: int) -> Iterator[Windows]:
  """Yields windows of the documents as they are, one behind the other.

  Each part that is yielded has whole windows, (W, T). What follows the last one
  is left out.
  """
  rest = _NOTHING
  for document in documents:
    ids, targets = _joined(rest, document)
    whole = len(ids) - len(ids) % seq_len
    rest = ids[whole:], targets[whole:]
    yield {
      'tokens': ids[:whole].reshape(-1, seq_len),
      'weights': targets[:whole].reshape(-1, seq_len),
    }


def taught(parts: Iterable[Windows], counts: Counts) -> Iterator[Windows]:
  """Leaves out the windows of which no token counts in the loss.

  A window's first token is not predicted, so it counts in none.
  """
  for part in parts:
    kept = np.atleast_2d(part['weights'])[:, 1:].any(axis=1)
    counts.untaught += len(kept) - int(kept.sum())
    yield {name: np.atleast_2d(array)[kept] for name, array in part.items()}


def fill(
  documents: Iterable[Tokens], seq_len: int, counts: Counts
) -> Iterator[Windows]:
  """Yields windows of whole documents; long documents are cut into pieces.

  A piece is as long as a window at most. It goes into the open window that it
  fills best (best fit). Only a bounded number of windows is open at a time, so
  memory is bounded too. The first token of a piece does not count in the loss:
  it must not be predicted from the document before it.
  """
  opened: list[tuple[int, list[Tokens]]] = []  # (room left, its pieces)
  for piece in _pieces(documents, seq_len, counts):
    size = len(piece.ids)
    best = min(
      (i for i, (room, _) in enumerate(opened) if room >= size),
      key=lambda i: opened[i][0],
      default=None,
    )
    room, pieces = opened.pop(best) if best is not None else (seq_len, [])
    opened.append((room - size, [*pieces, piece]))
    if room == size:
      yield _window(opened.pop()[1], seq_len, counts)
    elif len(opened) > _OPEN:
      fullest = min(range(len(opened)), key=lambda i: opened[i][0])
      yield _window(opened.pop(fullest)[1], seq_len, counts)
  for _, pieces in opened:
    yield _window(pieces, seq_len, counts)


def _pieces(
  documents: Iterable[Tokens], seq_len: int, counts: Counts
) -> Iterator[Tokens]:
  """Cuts each document every `seq_len` tokens."""
  rest, size = _NOTHING, 0
  for document in documents:
    ids, targets = _joined(rest, document)
    size += len(document.ids)
    whole = len(ids)
    if document.goes_on:
      whole -= whole % seq_len
    for start in range(0, whole, seq_len):
      here = slice(start, min(start + seq_len, whole))
      yield Tokens(ids[here], targets[here])
    rest = ids[whole:], targets[whole:]
    if not document.goes_on:
      counts.cut += size > seq_len
      size = 0


def _window(pieces: list[Tokens], seq_len: int, counts: Counts) -> Windows:
  window = {name: np.zeros(seq_len, dtype) for name, dtype in DTYPES.items()}
  at = 0
  for number, (ids, targets, _) in enumerate(pieces, 1):
    here = slice(at, at + len(ids))
    window['tokens'][here] = ids
    window['segments'][here] = number
    window['weights'][here] = targets
    window['weights'][at] = 0
    at += len(ids)
  counts.padding += seq_len - at
  return window
