"""Tokenises a long text piece by piece, to the ids that the whole has.

Tokenising takes more than 100 bytes of memory for each character, all at once.
So a text is cut beside a space or a line end, at places where two things hold:

- No token of the vocabulary has the two characters side by side that the cut
  separates. So no merge and no token reaches over it.
- What stands around the cut gives the same ids in one and in two. So nothing
  that comes before the vocabulary reaches over it: no normalizer,
  pre-tokenizer or added token.

A piece is tokenised behind the one character that stands before it, since many
tokenizers put a space in front of every text; the ids of that character are
left out.
"""

from collections.abc import Iterable, Iterator
import functools
import itertools
import logging
import re
from typing import Any

import numpy as np

from lorapr_jax.runtime.rust import rust_errors

_log = logging.getLogger(__name__)

# The least characters of a piece, how many pieces go to the library at a time,
# and the characters around a cut that are compared.
_SIZE, _GROUP, _AROUND = 2**16, 16, 256
# So many places are tried; then the text must have doubled.
_TRIES = 50
# What tokenising takes for each character, measured; and from how many
# characters on that is worth a warning.
_BYTES, _MANY = 130, 2**24
_PLACES = re.compile(r'(?<=\S)[ \n](?=\S)')


def ids_of(fast: Any, texts: list[str]) -> list[list[int]]:
  """The ids of each text, without special tokens, by the tokenizers library.

  Raises:
    RustError: if the library gives up, as on a pattern that takes too long.
  """
  with rust_errors():
    found = fast.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in found]


class Pieces:
  """Cuts texts for one tokenizer."""

  def __init__(self, fast: Any):
    """Takes a tokenizer of the tokenizers library."""
    self._fast = fast

  def encode(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yields the ids of one text, without special tokens around it.

    Its parts are read as they are needed.
    """
    pieces = self._cut(parts)
    while group := list(itertools.islice(pieces, _GROUP)):
      found = self._ids([before + text for before, text in group])
      skip = map(len, self._ids([before for before, _ in group]))
      yield np.concatenate(
        [
          np.asarray(ids[first:], np.int32)
          for ids, first in zip(found, skip, strict=True)
        ]
      )

  def _ids(self, texts: list[str]) -> list[list[int]]:
    return ids_of(self._fast, texts)

  def _cut(self, parts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (the character before a piece, the piece)."""
    before, text, start = '', '', _SIZE
    for part in parts:
      for i in range(0, len(part), _SIZE):
        text += part[i : i + _SIZE]
        while len(text) >= start + 16 * _AROUND:
          place = self._place(text, start)
          if place is None:
            start = 2 * len(text)
            if start > _MANY:
              _log.warning(
                'no place was found at which a text of %d characters and more '
                'can be cut without changing its tokens: to tokenise so many '
                'takes %.0f GB of memory',
                *(len(text), len(text) * _BYTES / 1e9),
              )
            break
          yield before, text[:place]
          before, text, start = text[place - 1], text[place:], _SIZE
    yield before, text

  def _place(self, text: str, start: int) -> int | None:
    """Where a text can be cut, behind `start`."""
    found = _PLACES.finditer(text, start, len(text) - _AROUND)
    for match in itertools.islice(found, _TRIES):
      for place in match.span():
        around = slice(place - _AROUND, place), slice(place, place + _AROUND)
        if self._fits(*(text[part] for part in around)):
          return place
    return None

  def _fits(self, before: str, after: str) -> bool:
    """Whether a text can be cut between what is before and what is after."""
    last = before[-1]
    whole, left, skip, right = self._ids(
      [before + after, before, last, last + after]
    )
    skip, right = right[: len(skip)] == skip, right[len(skip) :]
    if not (skip and left and right and left + right == whole):
      return False
    sides = (self._fast.id_to_token(ids) for ids in (left[-1], right[0]))
    return tuple(x[i] for x, i in zip(sides, (-1, 0), strict=True)) not in (
      self._neighbours
    )

  @functools.cached_property
  def _neighbours(self) -> set[tuple[str, str]]:
    """The pairs of characters that are side by side in a token."""
    return {
      pair
      for token in self._fast.get_vocab(with_added_tokens=True)
      for pair in itertools.pairwise(token)
    }
