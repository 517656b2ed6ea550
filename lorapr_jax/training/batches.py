"""The text of a run as batches on its devices, and what is held out of it."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import itertools
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lorapr_jax.data import pipeline
from lorapr_jax.data.ahead import in_order
from lorapr_jax.data.batches import batches
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.eval.perplexity import HeldOut
from lorapr_jax.settings.phases import Phase
from lorapr_jax.settings.sections import DataSettings, TrainSettings


@dataclasses.dataclass(frozen=True)
class Batches:
  """The batches of all phases.

  Attributes:
    streams: {spec: the function of `data.batches.batches`}.
    rows: B, the rows of a micro-batch.
    teacher: (phase, step) -> the 'teacher' of its batch; None where nobody
      teaches.
  """

  streams: Mapping[str, Callable[..., dict[str, np.ndarray]]]
  rows: int
  teacher: Callable[[Phase, int], dict[str, jax.Array]] | None = None

  @classmethod
  def load(
    cls,
    specs: Iterable[str],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    data: DataSettings,
    train: TrainSettings,
  ) -> 'Batches':
    """Packs each text once. Random weights have no tokenizer."""

    def stream(spec: str) -> Callable[..., Any]:
      parts = pipeline.training_windows(
        spec,
        tokenizer,
        train.seq_len,
        vocab_size,
        pack=data.packing,
        template=data.records,
        max_tokens=data.max_tokens,
      )
      return batches(
        parts,
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size,
        seed=train.seed,
        shuffle=data.shuffle,
      )

    streams = {spec: stream(spec) for spec in dict.fromkeys(specs)}
    return cls(streams, train.micro_batch_size)

  def plain(
    self, phase: Phase, place: NamedSharding, first: int
  ) -> contextlib.AbstractContextManager[Iterator[dict[str, jax.Array]]]:
    """The batches of a phase from its step `first` on, without a teacher."""
    steps = range(phase.first_batch + first, phase.first_batch + phase.steps)
    return device_batches(self.streams[phase.data], place, self.rows, steps)

  @contextlib.contextmanager
  def of(
    self, phase: Phase, place: NamedSharding, first: int
  ) -> Iterator[Iterator[tuple[dict[str, Any], tuple[Any, ...]]]]:
    """(batch, what an event would read) of a phase from its step `first` on.

    An event reads batches of its own data, or the newest ones, this one
    included: as many as a run that was never cut short would have at this step.
    """
    pruning = phase.pruning
    own = pruning and pruning.data
    newest = collections.deque(
      maxlen=pruning.pass_batches if pruning and not own else 0
    )
    seen = min(first, newest.maxlen)

    def read(step: int) -> tuple[dict[str, jax.Array], ...]:
      if not own:
        return tuple(newest)
      steps = pruning.own_batches(step)
      if not steps:
        return ()
      args = self.streams[own], place, self.rows, steps
      with device_batches(*args) as stream:
        return tuple(stream)

    def taught(stream: Iterator[Any]) -> Iterator[Any]:
      newest.extend(itertools.islice(stream, seen))
      for step, batch in enumerate(stream, first):
        newest.append(batch)
        if self.teacher and phase.learns:
          batch = {**batch, 'teacher': self.teacher(phase, step)}
        yield batch, read(step)

    with self.plain(phase, place, first - seen) as stream:
      yield taught(stream)


def load_held_out(
  tokenizer: Tokenizer | None,
  vocab_size: int,
  data: DataSettings,
  batch_size: int,
) -> HeldOut | None:
  """The text of data.eval; None where there is none."""
  if not data.eval:
    return None
  windows = pipeline.evaluation_windows(
    data.eval, tokenizer, data.eval_seq_len, vocab_size
  )
  return HeldOut(windows[: data.eval_windows or None], data.eval, batch_size)


@contextlib.contextmanager
def device_batches(
  batch_at: Callable[..., dict[str, np.ndarray]],
  place: NamedSharding,
  rows: int,
  steps: range,
) -> Iterator[Iterator[dict[str, jax.Array]]]:
  """The batches of these steps on their devices, made ahead in a thread.

  What goes wrong there is raised where the batch is taken. At the end of the
  `with` block the thread has ended. Of the B rows of a micro-batch each process
  reads those of its own devices alone.
  """
  row_place = NamedSharding(place.mesh, P(place.spec[1]))
  devices = row_place.addressable_devices_indices_map((rows,)).values()
  bounds = [index[0].indices(rows)[:2] for index in devices]
  first, last = min(b for b, _ in bounds), max(e for _, e in bounds)

  def put(step: int) -> dict[str, jax.Array]:
    def array(read: np.ndarray) -> jax.Array:
      def of_device(index: tuple[slice, ...]) -> np.ndarray:
        begin, end, _ = index[1].indices(rows)
        return read[:, begin - first : end - first, index[2]]

      shape = (read.shape[0], rows, read.shape[2])
      return jax.make_array_from_callback(shape, place, of_device)

    return jax.tree.map(array, batch_at(step, slice(first, last)))

  with ThreadPoolExecutor(1) as pool:
    yield in_order(pool, put, steps, ahead=2)
