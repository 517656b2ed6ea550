"""When groups are masked, and how many: the cubic ramp, or all at once."""

import dataclasses
import math

from lorapr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PruneSchedule:
  """The pruning steps of a run.

  Steps divisible by `every` between the end of the warm-up and the end of the
  ramp, and the first step at or after the ramp's end (the run's last step if
  there is none), at which the target is reached exactly.
  """

  total_steps: int
  every: int
  warmup: float
  cooldown: float

  def __post_init__(self):
    if self.every < 1:
      raise UserError(f'prune.every is {self.every}: it must be at least 1')
    in_range = self.warmup >= 0 and self.cooldown >= 0
    if not (in_range and self.warmup + self.cooldown < 1):
      raise UserError(
        f'prune.warmup {self.warmup} and prune.cooldown {self.cooldown} are '
        'shares of the steps: neither negative, and less than 1 together'
      )

  @property
  def ramp_end(self) -> int:
    """The step at which the target is reached."""
    # Rounded first: 0.9 x 100 is a hair above 90 for some shares.
    end = math.ceil(round((1 - self.cooldown) * self.total_steps, 6))
    return min(end, self.total_steps - 1)

  def is_pruning_step(self, step: int) -> bool:
    """Whether groups are masked at this step."""
    if step == self.ramp_end:
      return True
    started = step >= self.warmup * self.total_steps
    return started and step < self.ramp_end and step % self.every == 0

  def progress(self, step: int) -> float:
    """The share of the target that is due, from 0 to exactly 1.

    1 - (1 - (t - t_w) / (T - t_w - t_c))^3 between the end t_w of the warm-up
    and the start T - t_c of the cool-down (Zhu and Gupta, arXiv 1710.01878,
    with the shares of arXiv 2305.18403).
    """
    if step >= self.ramp_end:
      return 1.0
    start = self.warmup * self.total_steps
    end = (1 - self.cooldown) * self.total_steps
    left = 1 - max(0.0, step - start) / (end - start)
    return 1.0 - left**3


@dataclasses.dataclass(frozen=True)
class AtOnce:
  """Pruning at given steps, at the last of which the whole target is reached.

  What is masked at the others, a ladder says (pruning/ladder.py).
  """

  total_steps: int
  events: tuple[int, ...]

  @property
  def ramp_end(self) -> int:
    """The step at which the target is reached."""
    return self.events[-1]

  def is_pruning_step(self, step: int) -> bool:
    """Whether groups are masked at this step."""
    return step in self.events

  def progress(self, step: int) -> float:
    """The share of the target that is due: 0, or 1."""
    return float(step >= self.ramp_end)


Schedule = PruneSchedule | AtOnce
