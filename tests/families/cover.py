"""Which kinds a test meets in `make test`: few, with every trait in one.

The rest of the matrix is marked `families`, for `make test-families`.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Set
import dataclasses
import itertools
from typing import Any

import pytest

from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.models.families import FAMILIES
from tests.kinds import KINDS

# Fields of a family that say how its files are laid out.
FILES = 'interleaved', 'stored'
# What says nothing of the mathematics.
_PLAIN = {
  *('max_positions', 'norm_eps', 'family', 'rope_theta'),
  *('bos_token_id', 'eos_token_id', 'pad_token_id'),
}


def traits(kind: str) -> set[str]:
  """What a kind has that LLaMA has not.

  They are its features, fields of its config, and how its files are laid out.
  """
  keys = KINDS[kind].keys
  config, row = config_from_hf(keys), FAMILIES[keys['model_type']]
  found = set(KINDS[kind].features)
  found |= {x for x in FILES if getattr(row, x)}
  return found | {
    _named(field.name, getattr(config, field.name))
    for field in dataclasses.fields(config)
    if field.name not in _PLAIN
    and field.default is not dataclasses.MISSING
    and getattr(config, field.name) != field.default
  }


def _named(name: str, value: Any) -> str:
  words = value if isinstance(value, tuple) else (value,)
  if all(isinstance(word, str) for word in words):
    return f'{name}={",".join(words)}'
  return name


def cover(cases: Mapping[Hashable, Set]) -> list[Hashable]:
  """Few of the cases that together have what all have, by greedy choice."""
  left, chosen = set().union(*cases.values()), []
  while left:
    best = max(cases, key=lambda case: len(cases[case] & left))
    chosen.append(best)
    left -= cases[best]
  return chosen


def each(cases: Mapping[Hashable, Set]) -> list:
  """Every case as a parameter of a test; those not needed are marked."""
  few = cover(cases)
  return [_param(case, case in few) for case in cases]


def _param(case: Hashable, needed: bool):
  values = case if isinstance(case, tuple) else (case,)
  marks = () if needed else pytest.mark.families
  return pytest.param(*values, id='-'.join(values), marks=marks)


def few(*sides: Iterable[Any]) -> Iterator[Any]:
  """All combinations as parameters; those with nothing new are marked slow."""
  met: set[tuple[int, Any]] = set()
  for values in itertools.product(*sides):
    new = set(enumerate(values)) - met
    met |= new
    yield pytest.param(*values, marks=() if new else pytest.mark.slow)


def pairs(*items: Iterable[str]) -> set[frozenset[str]]:
  """All pairs of one from each of two of the sets."""
  sets = [set(x) for x in items]
  return {
    frozenset((one, other))
    for i, left in enumerate(sets)
    for right in sets[i + 1 :]
    for one in left
    for other in right
  }


TRAITS = {kind: traits(kind) for kind in KINDS}
# Those of which heads of either kind may go.
GROUPED = {
  kind: found
  for kind, found in TRAITS.items()
  if KINDS[kind].keys['num_key_value_heads'] == 2
}
