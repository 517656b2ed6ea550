"""The runs of compare.py, and what they came to."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any

NEWS = 'held-out news'
PAPER, OURS = "the paper's method", 'lorapr_jax'
ALONE = 'LoRA alone, nothing pruned'
SEQ_LEN, WINDOWS = 128, 80
# Of a run, in all; and of the few that show what more of them change.
STEPS, MORE_STEPS = 100, 1000
# What may be added to the paper's method, one at a time, and its settings.
ADDITIONS: dict[str, dict[str, Any]] = {
  'own': {'prune.lora_gradient': 'own'},
  'distillation': {'train.distill': 0.5, 'train.distill_top_k': 64},
  'recovery': {'train.steps': 60, 'recover.steps': 40},
}
# The demo's config, which has what is best together, and what differs from it:
# first of all the share of its steps that only measure.
EVERYTHING = 'everything'
TOGETHER: dict[str, dict[str, Any]] = {
  EVERYTHING: {'prune.calibration_steps': 24},
  'everything, not distilled': {
    'prune.calibration_steps': 24,
    'train.distill': 0.0,
  },
  'everything, no layer protected': {
    'prune.calibration_steps': 24,
    'prune.protect': 'none',
  },
  'everything, untrained': {
    'prune.calibration_steps': 32,
    'train.distill': 0.0,
  },
  # Under joint: four events by step 32, not eight by step 90.
  'everything, short ramp': {
    'prune.warmup': 0.16,
    'prune.cooldown': 0.68,
    'prune.every': 4,
  },
}


@dataclasses.dataclass(frozen=True)
class Row:
  """Runs that differ by their seed alone.

  Attributes:
    percent: of the groups, a key of TARGETS; with a way, of all parameters.
    order: prune.order.
    criterion: prune.criterion.
    seeds: train.seed of each run.
    added: a key of ADDITIONS or TOGETHER; nothing is the paper's method.
    way: as of exploring.ways: what goes; nothing is heads and channels, equal
      shares of the groups.
    steps: in all, those that only measure included.
  """

  percent: int
  order: str
  criterion: str
  seeds: tuple[int, ...] = (0,)
  added: str = ''
  way: str = ''
  steps: int = STEPS

  @property
  def method(self) -> str:
    """The criterion, and what is added."""
    return ' + '.join(filter(None, (self.criterion, self.added)))

  @property
  def is_plain(self) -> bool:
    """Whether it is what the others are compared with: LoRAPrune."""
    plain = (self.order, self.method) == ('joint', 'lora')
    return plain and self.percent > 0 and self.steps == STEPS

  @property
  def is_best(self) -> bool:
    """Whether it is the demo's config as it is."""
    is_demo = (self.criterion, self.added) == ('obs', EVERYTHING)
    return is_demo and not self.way and self.steps == STEPS

  @property
  def leader(self) -> str:
    """Its name, if it is compared in tasks too."""
    if self.percent == 0:
      return ALONE
    return PAPER if self.is_plain else OURS if self.is_best else ''

  def name(self, seed: int) -> str:
    """Of a run's workdir."""
    method = self.method.replace(' + ', '+').replace(', ', '-')
    method = method.replace(' ', '-')
    more = f'{self.steps}steps' if self.steps != STEPS else ''
    parts = self.order, method, self.way, str(self.percent), more
    return '-'.join([*filter(None, parts), f'seed{seed}'])


Results = dict[Row, list[dict[str, Any]]]


def collect(
  record: Mapping[str, Any], rows: Iterable[Row]
) -> tuple[dict[str, float], Results, list[str]]:
  """Of a record: the dense model, each row's runs, and which are missing.

  Runs that were not measured on all of its texts are missing too.
  """
  results: Results = {}
  missing = []
  for row in rows:
    for name in map(row.name, row.seeds):
      run = record.get(name, {'perplexity': {}})
      if record['texts'].keys() <= run['perplexity'].keys():
        results.setdefault(row, []).append(run)
      else:
        missing.append(name)
  return record['dense'], results, missing


def markdown(lines: Iterable[Sequence[str]]) -> str:
  """A table, whose first two lines are its head."""
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
