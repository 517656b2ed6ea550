"""An exploration from its settings to its result. Read top to bottom."""

from collections.abc import Callable, Sequence
import contextlib
from pathlib import Path
from typing import Any

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.exploring.asked import Asked
from lorapr_jax.exploring.measure import Measurer
from lorapr_jax.exploring.page import render_exploration
from lorapr_jax.exploring.results import (
  PAGE_FILE,
  RESULT_FILE,
  Results,
  read_results,
  write_results,
)
from lorapr_jax.exploring.table import describe
from lorapr_jax.hf.load import check_tensors, load_or_draw
from lorapr_jax.hf.shards import Shards
from lorapr_jax.report import units
from lorapr_jax.runtime.files import write_json, write_text
from lorapr_jax.runtime.lock import holding
from lorapr_jax.runtime.workdir import check_workdir, claim_workdir
from lorapr_jax.training.base import Base, Places
from lorapr_jax.training.batches import (
  Batches,
  device_batches,
  load_held_out,
)
from lorapr_jax.training.inputs import Inputs, reading


def explore(
  asked: Asked,
  workdir: Path | None,
  command: Sequence[str],
  say: Callable[[str], None],
) -> dict[str, Any]:
  """Measures what has not been measured, and gives all of it.

  Nothing is written but to `workdir`, where an exploration that was cut short
  goes on: a line for each size, the result, and its page.

  Args:
    asked: what is explored.
    workdir: new, or of the same settings; None: nothing is kept.
    command: the words of a command that prunes, to which a size is added.
    say: shows a line of progress.

  Raises:
    UserError: for a mistake in data, model or workdir.
  """
  settings = asked.settings
  if settings.model.folder:
    check_tensors(Shards(settings.model.folder), asked.dense)
  identity = _identity(asked)
  if workdir:
    check_workdir(workdir, identity)
  with holding(workdir, say) if workdir else contextlib.nullcontext():
    if workdir:  # Until now, another process may have run in it.
      check_workdir(workdir, identity)
    results = _measured(asked, workdir, identity, say)
    result = describe(asked, results, command)
    if workdir:
      write_json(workdir / RESULT_FILE, result)
      write_text(workdir / PAGE_FILE, render_exploration(result, asked.config))
  return result


def _identity(asked: Asked) -> dict[str, Any]:
  """What must be the same where sizes are added: not which sizes these are."""
  resolved = asked.settings.resolved()
  return {
    'config': asked.config,
    'explore': {'latency': asked.latency},
    'resolved': {
      key: value for key, value in resolved.items() if key.endswith('dtype')
    },
  }


def _measured(
  asked: Asked,
  workdir: Path | None,
  identity: dict[str, Any],
  say: Callable[[str], None],
) -> Results:
  """All results, those that the workdir holds already among them."""
  settings, dense = asked.settings, asked.dense
  folder, data, train = settings.model.folder, settings.data, settings.train
  with reading(folder, dict.fromkeys([asked.text, data.eval])) as inputs_read:
    tokenizer = Tokenizer(folder) if folder else None
    batches = Batches.load(
      [asked.text], tokenizer, dense.vocab_size, data, train
    )
    held_out = load_held_out(
      tokenizer, dense.vocab_size, data, train.micro_batch_size
    )
    inputs = inputs_read()
  results: Results = {}
  if workdir:
    claim_workdir(workdir, identity, inputs.recorded())
    results = read_results(workdir)
  missing = [size for size in asked.sizes if size not in results]
  if not missing:
    return results
  places = Places.of(
    settings.mesh, dense, settings.base_dtype, train.micro_batch
  )
  stream = batches.streams[asked.text]
  with device_batches(
    stream, places.batch, batches.rows, asked.batches
  ) as read:
    measurer = Measurer(
      asked,
      _load(asked, inputs, places),
      held_out,
      tuple(read),
      inputs.sha256,
      max((line['gone'] for line in results.values()), key=len, default=()),
    )
  for size in missing:
    line = results[size] = measurer.measure(size)
    say(
      f'{size.name}: perplexity {line["perplexity"]["value"]:.2f}, '
      f'{units.duration(line["seconds"])}'
    )
    if workdir:
      write_results(workdir, results)
  return results


def _load(asked: Asked, inputs: Inputs, places: Places) -> Base:
  settings = asked.settings
  params = load_or_draw(
    settings.model.folder,
    asked.dense,
    places.base,
    settings.base_dtype,
    settings.train.seed,
  )
  inputs.check_base()
  return Base(params, settings.compute, places)
