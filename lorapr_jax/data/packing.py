"""Documents to windows of tokens on disk: streamed in, memory-mapped out.

A folder of windows holds `counts.json` and, of W windows of T tokens:
  tokens.bin    (W, T) int32; what follows the last whole window is left out
  segments.bin  (W, T) int32: 1, 2, ... for the documents that share a window,
                0 for padding; with packing=documents alone
  weights.bin   (W, T) uint8: whether a token is a target; where not all are
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
import contextlib
import dataclasses
import functools
import multiprocessing
from pathlib import Path
import signal
from typing import NamedTuple

import numpy as np

from lorapr_jax.data.ahead import in_order
from lorapr_jax.data.templates import Document
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.errors import UserError

PACKINGS = ('documents', 'concatenate')
_DTYPES = {'tokens': '<i4', 'segments': '<i4', 'weights': 'u1'}

# Documents and characters that are tokenised at a time.
_BATCH, _CHARACTERS = 256, 2**22
# Windows that are filled at a time.
_OPEN = 64

Windows = dict[str, np.ndarray]  # name -> (W, T)


class Packed(NamedTuple):
  """A part of a mixture, packed: its share of the windows drawn, and its own.

  `windows` are what a folder of windows holds.
  """

  weight: float
  windows: Windows


class Tokens(NamedTuple):
  """A document's ids (N,), and which of them are targets (N,), 0 or 1."""

  ids: np.ndarray
  targets: np.ndarray


@dataclasses.dataclass
class Counts:
  """What came out of packing.

  Attributes:
    documents: how many.
    tokens: of all documents.
    largest_id: among them; -1 without any.
    cut: documents that are longer than a window.
    padding: positions that are filled with nothing.
  """

  documents: int = 0
  tokens: int = 0
  largest_id: int = -1
  cut: int = 0
  padding: int = 0


def tokenise(
  documents: Iterable[Document], tokenizer: Tokenizer, *, whole: bool
) -> Iterator[Tokens]:
  """The tokens of each document, in order, computed in batches ahead.

  The tokenizers library has threads of its own; a tokenizer in Python runs in
  worker processes.

  Args:
    documents: read as they are needed.
    tokenizer: the model's.
    whole: whether the texts have their special tokens already; otherwise each
      gets the tokenizer's BOS habit, and EOS at its end.
  """
  pool: Executor
  if tokenizer.is_fast:
    pool, ahead = ThreadPoolExecutor(1), 1
    work = functools.partial(_tokenise, tokenizer, whole)
  else:
    context = multiprocessing.get_context('spawn')
    pool, ahead = (
      ProcessPoolExecutor(
        mp_context=context,
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
      ),
      2 * multiprocessing.cpu_count(),
    )
    work = functools.partial(_tokenise_in_worker, tokenizer.folder, whole)
  with pool:
    try:
      for tokens in in_order(pool, work, _batches(documents), ahead):
        yield from tokens
    except BrokenProcessPool as error:
      raise UserError(
        f'the processes that tokenise with {tokenizer.folder} have ended: in a '
        "script of yours, put the work under if __name__ == '__main__'"
      ) from error


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


@functools.cache
def _load(folder: Path) -> Tokenizer:
  return Tokenizer(folder)


def _tokenise_in_worker(
  folder: Path, whole: bool, documents: list[Document]
) -> list[Tokens]:
  return _tokenise(_load(folder), whole, documents)


def _tokenise(
  tokenizer: Tokenizer, whole: bool, documents: list[Document]
) -> list[Tokens]:
  encode = functools.partial(tokenizer.encode_batch, special=not whole)
  # A span's edge is where the tokens of the text up to it stop being those of
  # the whole text.
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
  eos = (
    [] if whole or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
  )
  result = []
  for document, ids in zip(
    documents, encode([d.text for d in documents]), strict=True
  ):
    ids = np.append(ids, eos).astype(np.int32)
    targets = np.ones(len(ids), np.uint8)
    if document.responses is not None:
      targets[:] = 0
      for _, end in document.responses:
        first = _common(next(heads), ids)
        last = _common(next(heads), ids)
        # EOS ends the answer that ends the text.
        targets[first : None if end == len(document.text) else last] = 1
    result.append(Tokens(ids, targets))
  return result


def _common(head: np.ndarray, ids: np.ndarray) -> int:
  """How many tokens two texts begin with alike."""
  count = min(len(head), len(ids))
  differ = np.flatnonzero(head[:count] != ids[:count])
  return int(differ[0]) if len(differ) else count


def concatenate(documents: Iterable[Tokens]) -> Iterator[Windows]:
  """End to end: what is cut into windows crosses documents."""
  for document in documents:
    yield {'tokens': document.ids, 'weights': document.targets}


def fill(
  documents: Iterable[Tokens], seq_len: int, counts: Counts
) -> Iterator[Windows]:
  """Windows of whole documents, the longer ones in pieces of a window.

  Each piece goes to the open window that it fills best (best fit, with a
  bounded number of open windows, so that memory is bounded too). A document's
  first token is no target: it must not be learnt from the one before.
  """
  opened: list[tuple[int, list[Tokens]]] = []  # (room left, its pieces)
  for document in documents:
    counts.cut += len(document.ids) > seq_len
    for start in range(0, len(document.ids), seq_len):
      piece = Tokens(*(x[start : start + seq_len] for x in document))
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


def _window(pieces: list[Tokens], seq_len: int, counts: Counts) -> Windows:
  window = {name: np.zeros(seq_len, dtype) for name, dtype in _DTYPES.items()}
  at = 0
  for number, (ids, targets) in enumerate(pieces, 1):
    here = slice(at, at + len(ids))
    window['tokens'][here] = ids
    window['segments'][here] = number
    window['weights'][here] = targets
    window['weights'][at] = 0
    at += len(ids)
  counts.padding += seq_len - at
  return window


def write(folder: Path, parts: Iterable[Windows], names: Iterable[str]) -> None:
  """Appends the arrays of these names to their files.

  Raises:
    OSError: where the disk does not hold them.
  """
  with contextlib.ExitStack() as stack:
    files = {
      name: stack.enter_context((folder / f'{name}.bin').open('wb'))
      for name in names
    }
    for part in parts:
      for name, file in files.items():
        file.write(part[name].astype(_DTYPES[name]).tobytes())


def read(folder: Path, seq_len: int) -> Windows:
  """The windows of a folder, memory-mapped."""
  windows = {}
  for name, dtype in _DTYPES.items():
    path = folder / f'{name}.bin'
    if path.exists():
      flat = np.memmap(path, dtype, mode='r')
      whole = len(flat) - len(flat) % seq_len
      windows[name] = flat[:whole].reshape(-1, seq_len)
  return windows
