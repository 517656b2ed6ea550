"""The rungs of a ladder: each is a finished export of a run that goes on."""

from collections.abc import Callable
import dataclasses
from pathlib import Path
from typing import Any

import jax

from lorapr_jax.eval.perplexity import HeldOut
from lorapr_jax.exporting.model import Description, merge
from lorapr_jax.exporting.write import export_run
from lorapr_jax.models.compute import Compute
from lorapr_jax.pruning.ladder import Rung
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.shrink import Kept
from lorapr_jax.report import summary
from lorapr_jax.report.display import Display
from lorapr_jax.report.side_by_side import Models
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.files import read_json, write_json
from lorapr_jax.runtime.paths import make_folder
from lorapr_jax.settings.phases import Pruning
from lorapr_jax.settings.sections import ExportSettings
from lorapr_jax.training.base import Base, kept_of
from lorapr_jax.training.cut import check_counts, finished, widened
from lorapr_jax.training.state import TrainState

FOLDER = 'rungs'


@dataclasses.dataclass(frozen=True)
class Ladder:
  """Leaves the rungs of a run in its workdir.

  Each is in rungs/SHARE. What is known of it is in rungs/SHARE.json, which is
  there once it is finished.

  Attributes:
    workdir: of the run.
    compute: what the run's first functions are specialised to: the dense size.
    pruning: of the phase that leaves the rungs; None: there are none.
    export: the formats of each.
    seq_len: of the forward pass whose operations are counted.
    describe: what the exports say, from what is kept and its plan.
    load: the base as the run began with it.
    go_on: how models continue the report's prompts.
    held_out: the text that sizes are measured on, if there is any.
    display: what people see.
    check_lock: checks that no other process writes to the workdir.
  """

  workdir: Path
  compute: Compute
  pruning: Pruning | None
  export: ExportSettings
  seq_len: int
  describe: Callable[[Kept, PruningPlan], Description]
  load: Callable[[], Base]
  go_on: Callable[[Models], list[dict[str, str]]]
  held_out: HeldOut | None
  display: Display
  check_lock: Callable[[], None]

  def leave(self, rung: Rung, state: TrainState, base: Base) -> Base | None:
    """Exports a rung as the end of a run does, and gives the base as loaded.

    The weights of the base that is given are deleted, so that no second copy of
    them is there meanwhile; a checkpoint has what training changed of them.
    None: the rung was exported before the run was cut short, and all stays.
    """
    if processes.from_first(self._file(rung).exists):
      return None
    self.display.start('cut')
    kept = kept_of(widened(state, self.compute.config)['masks'])
    model = self.describe(kept, rung.plan)
    check_counts(rung.plan, model.config)
    self._export(rung, model, *finished(state, base))
    self.display.start('load')
    loaded = self.load()
    self.display.start('compile')
    return loaded

  def _export(
    self, rung: Rung, model: Description, lora: Any, base: Base
  ) -> None:
    compute = self.compute
    self.display.start('evaluate')
    unmerged = 'peft' in self.export.routes
    weights = merge(base.params, lora, compute.lora, unmerged=unmerged)
    if not unmerged:
      _delete(base.params['stacks'])
    pruned = dataclasses.replace(compute, config=model.config)
    measured = {}
    if self.held_out:
      measured['pruned'] = self.held_out.perplexity(weights.merged, pruned)
    texts = self.go_on({'pruned': (weights.merged, pruned)})
    self.display.start('export')
    self.check_lock()
    folder = self.workdir / FOLDER / rung.name
    make_folder(folder)
    exports = export_run(self.export, folder, model, weights)
    _delete(base.params)
    if not processes.is_first():
      return
    found = {
      'share': rung.plan.share,
      'steps': self.pruning.first_step + rung.end,
      **summary.cost_report(
        dense=compute.config,
        pruned=model.config,
        dtype=exports['hf']['dtype'],
        seq_len=self.seq_len,
      ),
      'sparsity': summary.sparsity_report(rung.plan),
      'perplexity': summary.perplexity_report(**measured),
      'generations': texts,
      'exports': exports,
    }
    write_json(self._file(rung), found)
    self.display.print(summary.rung_line(found))

  def report(self) -> list[dict[str, Any]]:
    """What became of each rung, from its file."""
    rungs = self.pruning.rungs if self.pruning else ()
    return [read_json(self._file(rung)) for rung in rungs]

  def _file(self, rung: Rung) -> Path:
    return self.workdir / FOLDER / f'{rung.name}.json'


def _delete(tree: Any) -> None:
  """Makes room on the devices."""
  for array in jax.tree.leaves(tree):
    array.delete()
