"""What the checks share: exports to load, what to expect, where to report.

They run in environments that have neither JAX nor this package.
"""

from collections.abc import Iterator
from importlib import metadata
import json
from pathlib import Path
import sys
from typing import Any, NamedTuple

import numpy as np

MANIFEST, RESULTS = 'manifest.json', 'results.jsonl'
# Logits of the same float32 weights differ by rounding alone.
TOLERANCE = 1e-4


class Truth(NamedTuple):
  """What a model computes, by our own code in float32.

  Attributes:
    tokens: (W, T) ids, the windows of a text.
    logits: (W, T, V).
    prompt: (T,) ids.
    greedy: the ids that follow the prompt.
    perplexity: of `tokens`, each window alone.
    text: a text.
    ids: its ids, by the tokenizer of the folder.
    continuations: {'context', 'continuation', 'log_likelihood'}, in nats.
  """

  tokens: np.ndarray
  logits: np.ndarray
  prompt: np.ndarray
  greedy: np.ndarray
  perplexity: float
  text: str
  ids: list[int]
  continuations: list[dict[str, Any]]

  def save(self, folder: Path) -> None:
    """Writes the arrays, and the rest as JSON."""
    fields = self._asdict()
    arrays = {k: fields.pop(k) for k in self._fields[:4]}
    np.savez(folder / 'truth.npz', **arrays)
    (folder / 'truth.json').write_text(json.dumps(fields))

  @classmethod
  def load(cls, folder: Path) -> 'Truth':
    """Reads what `save` wrote."""
    fields = json.loads((folder / 'truth.json').read_text())
    return cls(**np.load(folder / 'truth.npz'), **fields)


class Export(NamedTuple):
  """An export to try.

  Attributes:
    name: for the table.
    kind: hf, family (a folder that transformers alone reads), peft or gguf.
    path: the folder or file.
    truth: the folder of its `Truth`.
    remote_code: whether it needs trust_remote_code.
    dtype: of the weights.
  """

  name: str
  kind: str
  path: str
  truth: str
  remote_code: bool = False
  dtype: str = 'float32'


def exports(folder: Path, kind: str) -> Iterator[tuple[Export, Truth]]:
  """The exports of this kind that `folder` holds, with what they compute."""
  for fields in json.loads((folder / MANIFEST).read_text()):
    export = Export(**fields)
    if export.kind == kind:
      yield export, Truth.load(Path(export.truth))


class Results:
  """Appends one JSON object for every figure to a file of the folder."""

  def __init__(self, folder: Path, *packages: str):
    """Names the packages, with their versions, in all that follows."""
    self._path = folder / RESULTS
    self._tool = ', '.join(f'{p} {metadata.version(p)}' for p in packages)

  def add(self, export: Export, check: str, value: float, limit: float) -> None:
    """Writes a figure; the check fails where it is above the limit."""
    result = {
      'tool': self._tool,
      'export': export.name,
      'check': check,
      'value': float(value),
      'limit': limit,
    }
    with open(self._path, 'a') as file:
      file.write(json.dumps(result) + '\n')


def folder_argument() -> Path:
  """The one argument of every check: where make_exports.py has written."""
  return Path(sys.argv[1])


def differing(ours: Any, theirs: Any) -> int:
  """In how many places two sequences of ids differ."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  if ours.shape != theirs.shape:
    return max(ours.size, theirs.size)
  return int((ours != theirs).sum())


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
  """The largest difference of two arrays of one shape."""
  if ours.shape != theirs.shape:
    raise ValueError(f'shapes {ours.shape} and {theirs.shape}')
  return float(np.abs(ours - theirs).max())
