"""Windows of tokens on the disk: written once, checked, mapped into memory.

A folder of windows holds, for W windows of T tokens:
  tokens.bin    (W, T) int32
  segments.bin  (W, T) int32: 1, 2, ... for the documents that share a window,
                0 for padding; only with packing=documents
  weights.bin   (W, T) uint8: 1 where a token counts in the loss, else 0; not
                there if all tokens count
  counts.json   what packing counted, and the SHA-256 of each of these files
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.runtime.content import sha256_of
from lorapr_jax.runtime.files import check_file, read_sealed, write_sealed

DTYPES = {'tokens': '<i4', 'segments': '<i4', 'weights': 'u1'}

Windows = dict[str, np.ndarray]  # name -> (W, T)


@dataclasses.dataclass
class Counts:
  """What packing counts.

  Attributes:
    documents: the number of documents.
    tokens: the number of their tokens.
    largest_id: the largest id among the tokens; -1 if there are none.
    cut: the number of documents that are longer than a window.
    padding: the number of positions that hold no token.
    untaught: the number of windows that were left out: none of their tokens
      counts in the loss.
  """

  documents: int = 0
  tokens: int = 0
  largest_id: int = -1
  cut: int = 0
  padding: int = 0
  untaught: int = 0


def write(
  folder: Path, parts: Iterable[Windows], names: Iterable[str], counts: Counts
) -> None:
  """Writes the arrays with these names, part after part, each to its own file.

  The counts are complete when the last part has come.

  Raises:
    OSError: if the disk cannot hold them.
  """
  with contextlib.ExitStack() as stack:
    files = {
      name: stack.enter_context((folder / f'{name}.bin').open('wb'))
      for name in names
    }
    hashes = {name: hashlib.sha256() for name in files}
    for part in parts:
      for name, file in files.items():
        content = part[name].astype(DTYPES[name]).tobytes()
        file.write(content)
        hashes[name].update(content)
  sums = {name: digest.hexdigest() for name, digest in hashes.items()}
  written = {'counts': dataclasses.asdict(counts), 'sha256_of': sums}
  write_sealed(folder / 'counts.json', written)


def read(folder: Path, seq_len: int) -> tuple[Counts, Windows]:
  """What packing counted, and the windows, mapped into memory.

  Raises:
    UserError: if a file is not as it was written.
  """
  written = read_sealed(folder / 'counts.json')
  windows = {}
  for name, sha256 in written['sha256_of'].items():
    path = folder / f'{name}.bin'
    check_file(path)
    if sha256_of(path) != sha256:
      raise UserError(f'{path} is not as it was written')
    array = np.memmap(path, DTYPES[name], mode='r')
    windows[name] = array.reshape(-1, seq_len)
  return Counts(**written['counts']), windows
