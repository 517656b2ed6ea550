"""The sections of a config as frozen dataclasses that check their own keys."""

import dataclasses
import math

from lorapr_jax.data.sources import parse_mixture
from lorapr_jax.data.templates import Template
from lorapr_jax.errors import UserError, choose
from lorapr_jax.hf.write import DTYPES, GGUF_DTYPES, parse_size

LR_SCHEDULES = ('linear', 'cosine', 'constant')
ROUTES = ('hf', 'gguf', 'peft')


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """The `data.*` keys, with the defaults that depend on others filled in."""

  train: str
  shuffle: bool
  packing: str
  max_tokens: int
  template: Template
  eval: str
  eval_seq_len: int
  eval_windows: int
  eval_every: int

  def is_evaluation_step(self, step: int) -> bool:
    """Whether the perplexity is measured after this step."""
    return self.eval_every > 0 and (step + 1) % self.eval_every == 0


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """The `train.*` keys; see configs/default.py."""

  steps: int
  batch_size: int
  micro_batch_size: int
  seq_len: int
  learning_rate: float
  lr_schedule: str
  clip_norm: float
  seed: int
  loss_chunk: int
  distill: float
  distill_top_k: int
  compiler_options: str
  log_every: int
  checkpoint_every: int
  checkpoints_kept: int

  def __post_init__(self):
    free = ('seed', 'lr_schedule', 'loss_chunk', 'compiler_options')
    free += ('distill', 'distill_top_k')
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name not in free and not value > 0:
        raise UserError(f'train.{field.name} is {value}: it must be positive')
    if self.loss_chunk < 0:
      raise UserError(
        f'train.loss_chunk is {self.loss_chunk}: 0, or a number of tokens'
      )
    if not 0 <= self.distill <= 1:
      raise UserError(
        f'train.distill is {self.distill}: a share of the loss, from 0 to 1'
      )
    if self.distill_top_k < 0:
      raise UserError(
        f'train.distill_top_k is {self.distill_top_k}: it must be positive'
      )
    if self.distill and not self.distill_top_k:
      raise UserError(
        'train.distill_top_k=0 was removed: use train.distill_top_k=64'
      )
    if not math.isfinite(self.learning_rate):
      raise UserError('train.learning_rate is inf: it must be finite')
    if not 0 <= self.seed < 2**32:
      raise UserError(f'train.seed is {self.seed}: it must be in [0, 2^32)')
    if self.seq_len < 2:
      raise UserError('train.seq_len is 1: there is nothing to predict')
    if self.batch_size % self.micro_batch_size:
      raise UserError(
        f'train.batch_size {self.batch_size} is not a multiple of '
        f'train.micro_batch_size {self.micro_batch_size}'
      )
    choose('train.lr_schedule', self.lr_schedule, LR_SCHEDULES)

  @property
  def micro_batch(self) -> tuple[int, int]:
    """Sequences and tokens of what is on the devices at a time."""
    return self.micro_batch_size, self.seq_len


@dataclasses.dataclass(frozen=True)
class RecoverSettings:
  """The `recover.*` keys."""

  steps: int
  data: str
  learning_rate: float

  def __post_init__(self):
    if self.steps < 0:
      raise UserError(f'recover.steps is {self.steps}: 0 or a number of steps')
    if not 0 <= self.learning_rate < math.inf:
      raise UserError(
        f'recover.learning_rate is {self.learning_rate}: 0, for '
        'train.learning_rate, or a positive number'
      )
    if self.data:
      parse_mixture(self.data)
      if not self.steps:
        raise UserError(
          f'recover.data is {self.data!r}, but recover.steps is 0: give a '
          'number of steps, or leave it out'
        )


@dataclasses.dataclass(frozen=True)
class ExportSettings:
  """The `export.*` keys."""

  format: str
  layout: str
  model_type: str
  dtype: str
  gguf_dtype: str
  max_shard_size: str

  def __post_init__(self):
    choose('export.dtype', self.dtype, ('auto', *DTYPES))
    choose('export.gguf_dtype', self.gguf_dtype, ('auto', *GGUF_DTYPES))
    parse_size('export.max_shard_size', self.max_shard_size)
    unknown = sorted(set(self.routes) - set(ROUTES))
    if unknown or 'hf' not in self.routes:
      raise UserError(
        f'export.format is {self.format!r}: hf alone, or with gguf or peft '
        'or both after a comma'
      )

  @property
  def routes(self) -> tuple[str, ...]:
    """Those in `format`."""
    return tuple(name.strip() for name in self.format.split(','))


@dataclasses.dataclass(frozen=True)
class ReportSettings:
  """The `report.*` keys."""

  prompts: tuple[str, ...]
  max_new_tokens: int

  def __post_init__(self):
    # A string given for a tuple stays a string.
    if isinstance(self.prompts, str) or not all(
      isinstance(prompt, str) and prompt for prompt in self.prompts
    ):
      raise UserError(
        f'report.prompts is {self.prompts!r}: give a tuple of texts, such as '
        '\'("The weather", "Once upon a time")\', or () for none'
      )
    if self.max_new_tokens < 1:
      raise UserError(
        f'report.max_new_tokens is {self.max_new_tokens}: it must be at least '
        '1; for no samples use report.prompts=()'
      )


@dataclasses.dataclass(frozen=True)
class LogSettings:
  """The `log.*` keys."""

  tensorboard: bool
  wandb: str
