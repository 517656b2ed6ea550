"""What a run starts from: batches, held-out text, the base on the mesh."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lorapr_jax.data import pipeline
from lorapr_jax.data.ahead import in_order
from lorapr_jax.data.batches import batches
from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.eval.generation import check_prompt
from lorapr_jax.settings.run import RunSettings


def load_data(
  settings: RunSettings, specs: Iterable[str]
) -> tuple[dict[str, Callable[..., Any]], np.ndarray | None]:
  """The batches of each spec, and the held-out windows if there are any.

  Returns:
    {spec: the function of `batches`}, and (W, T) ids or None.
  """
  train, data = settings.train, settings.data
  path, vocab = settings.model_path, settings.compute.config.vocab_size
  tokenizer = Tokenizer(path) if path else None
  if tokenizer:
    for prompt in settings.report.prompts:
      check_prompt(tokenizer.encode(prompt), settings.compute.config)

  def batches_of(spec: str) -> Callable[..., Any]:
    parts = pipeline.training_windows(
      spec,
      tokenizer,
      train.seq_len,
      vocab,
      pack=data.packing,
      template=data.template,
      max_tokens=data.max_tokens,
    )
    return batches(
      parts,
      batch_size=train.batch_size,
      micro_batch_size=train.micro_batch_size,
      seed=train.seed,
      shuffle=data.shuffle,
    )

  streams = {spec: batches_of(spec) for spec in dict.fromkeys(specs)}
  if not data.eval:
    return streams, None
  held_out = pipeline.evaluation_windows(
    data.eval, tokenizer, data.eval_seq_len, vocab
  )
  return streams, held_out[: data.eval_windows or None]


@contextlib.contextmanager
def device_batches(
  batch_at: Callable[..., dict[str, np.ndarray]],
  place: NamedSharding,
  rows: int,
  steps: range,
) -> Iterator[Iterator[dict[str, jax.Array]]]:
  """The batches of these steps on their devices, made ahead in a thread.

  What goes wrong there is raised where the batch is taken. At the end of the
  `with` block the thread has ended.

  Args:
    batch_at: from `load_data`. Each process reads its devices' rows alone.
    place: of a batch.
    rows: B, the rows of a micro-batch.
    steps: whose batches come, in order.
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
