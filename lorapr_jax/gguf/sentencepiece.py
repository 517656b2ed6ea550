"""The scores of SentencePiece's pieces (Llama 1 and 2), by which it merges.

They come from its own file (tokenizer.model), or from the list of merges that
Hugging Face makes of them.
"""

from collections.abc import Sequence
import itertools
from pathlib import Path
from typing import Any

from lorapr_jax.errors import UserError


def read_pieces(path: Path) -> Sequence[Any]:
  """The pieces in the order of their ids: each its `piece`, `score` and `type`.

  The types have the values of gguf.TokenType.

  Raises:
    UserError: if the file is damaged, or is no BPE.
  """
  # Imported here, because few tokenizers come with this file.
  from google.protobuf.message import DecodeError
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto()
  try:
    model.ParseFromString(path.read_bytes())
  except DecodeError as error:
    raise UserError(f'{path} is no SentencePiece model: {error}') from None
  bpe = sentencepiece_model_pb2.TrainerSpec.BPE
  if not model.pieces or model.trainer_spec.model_type != bpe:
    raise UserError(f'{path} is no SentencePiece model of type BPE')
  return model.pieces


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
  pairs = [tuple(pair) for pair in merges]
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
