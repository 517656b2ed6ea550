"""The scores of SentencePiece's pieces (Llama 1 and 2), by which it merges.

From its own file (tokenizer.model), or from the list of merges that
Hugging Face makes of them.
"""

from collections.abc import Iterator, Sequence
import itertools
from pathlib import Path
import struct
from typing import NamedTuple

from lorapr_jax.errors import UserError

# The numbers of the fields of the protocol buffer.
_PIECES, _TRAINER = 1, 2
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _BPE = 3, 2
_NORMAL = 1


class Piece(NamedTuple):
  """A token; `kind` counts as gguf.TokenType does, which copied it."""

  text: str
  score: float
  kind: int


def read_pieces(path: Path) -> list[Piece]:
  """The pieces in the order of their ids.

  Raises:
    UserError: if the file is damaged, or is no BPE.
  """
  pieces, model_type = [], None
  try:
    for number, value in _fields(path.read_bytes()):
      if number == _PIECES:
        fields = dict(_fields(value))
        (score,) = struct.unpack('<f', fields.get(_SCORE, bytes(4)))
        kind = fields.get(_KIND, _NORMAL)
        pieces.append(Piece(fields[_TEXT].decode('utf-8'), score, kind))
      elif number == _TRAINER:
        model_type = dict(_fields(value)).get(_MODEL_TYPE)
  except (IndexError, KeyError, ValueError, struct.error) as error:
    raise UserError(f'{path} is no SentencePiece model: {error}') from None
  if not pieces or model_type != _BPE:
    raise UserError(f'{path} is no SentencePiece model of type BPE')
  return pieces


def merge_scores(
  file: Path, pieces: list[str], merges: list[Sequence[str]]
) -> dict[str, float]:
  """The scores of pieces that lead to these merges in their order.

  SentencePiece joins the neighbours whose union is the piece of the highest
  score, whichever two they are. It numbers its pieces so: 0, -1, -2 .. in the
  order of the merges, then those that no merge makes.

  Args:
    file: that has the merges, for errors.
    pieces: in the order of their ids; without bytes, control tokens and such.
    merges: pairs of pieces, first things first.

  Raises:
    UserError: if there is a union without a merge, or the merges into one
      piece do not follow each other: no scores stand for such merges.
  """
  pairs = [(left, right) for left, right in merges]
  unions = [union for union, _ in itertools.groupby(map(''.join, pairs))]
  known, made = set(pieces), set(unions)
  possible = {
    (piece[:cut], piece[cut:])
    for piece in pieces
    for cut in range(1, len(piece))
    if piece[:cut] in known and piece[cut:] in known
  }
  if len(made) < len(unions) or not possible <= set(pairs):
    raise UserError(
      f'{file}: its merges are not those of a SentencePiece model; put the '
      'tokenizer.model that it was made from beside it'
    )
  ranked = unions + [piece for piece in pieces if piece not in made]
  return {piece: -float(rank) for rank, piece in enumerate(ranked)}


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
  """The fields of a message: number, and an int or the bytes it holds."""
  at = 0
  while at < len(message):
    tag, at = _varint(message, at)
    number, wire_type = tag >> 3, tag & 7
    if wire_type == 0:
      value, at = _varint(message, at)
      yield number, value
      continue
    if wire_type == 2:
      size, at = _varint(message, at)
    elif wire_type in (1, 5):
      size = 8 if wire_type == 1 else 4
    else:
      raise ValueError(f'wire type {wire_type} at byte {at}')
    if at + size > len(message):
      raise ValueError('it ends too early')
    yield number, message[at : at + size]
    at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
  """A number in groups of seven bits, lowest first; and where it ends."""
  value = shift = 0
  while True:
    byte = message[at]
    value |= (byte & 0x7F) << shift
    at, shift = at + 1, shift + 7
    if byte < 0x80:
      return value, at
