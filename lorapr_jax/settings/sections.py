"""The sections of a config as frozen dataclasses: default, choices, checks.

Each holds every key of its section under the key's own name. configs/default.py
shows the same keys and defaults to users, with a comment for each.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any, TypeVar

from ml_collections import config_dict

from lorapr_jax.data.packing import PACKINGS
from lorapr_jax.data.sources import parse_mixture, parse_spec
from lorapr_jax.data.templates import Template
from lorapr_jax.errors import UserError, choose
from lorapr_jax.hf.write import DTYPES as EXPORT_DTYPES
from lorapr_jax.hf.write import GGUF_DTYPES
from lorapr_jax.pruning.ladder import parse_ladder
from lorapr_jax.runtime.sizes import parse_size

LR_SCHEDULES = ('linear', 'cosine', 'constant')
ROUTES = ('hf', 'gguf', 'peft')
Section = TypeVar('Section')


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """The `data.*` keys."""

  train: str = ''
  template: str = ''
  response: str = ''
  loss: str = 'all'
  packing: str = 'documents'
  max_tokens: int = 0
  shuffle: bool = True
  eval: str = ''
  eval_seq_len: int = 0
  eval_windows: int = 0
  eval_every: int = 0

  def __post_init__(self):
    if self.eval:
      parse_spec(self.eval)
    if not self.train:
      raise UserError('data.train is empty: give a data spec such as file:PATH')
    parse_mixture(self.train)
    choose('data.packing', self.packing, PACKINGS)
    if self.eval_every < 0 or (self.eval_every and not self.eval):
      raise UserError(
        f'data.eval_every is {self.eval_every}: 0, or a number of steps, with '
        'data.eval'
      )
    if min(self.eval_seq_len, self.eval_windows) < 0 or self.eval_seq_len == 1:
      raise UserError(
        f'data.eval_seq_len {self.eval_seq_len} and data.eval_windows '
        f'{self.eval_windows}: 0, or a length above 1 and a number of windows'
      )
    self.records  # noqa: B018  It checks its keys.

  @functools.cached_property
  def records(self) -> Template:
    """What makes a text of a record."""
    return Template(self.template, self.response, self.loss)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """The `train.*` keys."""

  steps: int = 1000
  batch_size: int = 128
  micro_batch_size: int = 4
  seq_len: int = 512
  learning_rate: float = 1e-4
  lr_schedule: str = 'linear'
  clip_norm: float = 1.0
  seed: int = 0
  loss_chunk: int = 0
  distill: float = 0.0
  distill_top_k: int = 64
  compiler_options: str = ''
  log_every: int = 10
  checkpoint_every: int = 100
  checkpoints_kept: int = 2

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

  steps: int = 0
  data: str = ''
  learning_rate: float = 0.0

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
class MeshSettings:
  """The `mesh.*` keys."""

  data: int = 1
  fsdp: int = -1
  sequence: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class ExportSettings:
  """The `export.*` keys."""

  format: str = 'hf'
  layout: str = 'auto'
  model_type: str = 'auto'
  dtype: str = 'auto'
  gguf_dtype: str = 'auto'
  max_shard_size: str = '5GB'
  ladder: str = ''

  def __post_init__(self):
    choose('export.dtype', self.dtype, ('auto', *EXPORT_DTYPES))
    choose('export.gguf_dtype', self.gguf_dtype, ('auto', *GGUF_DTYPES))
    parse_size('export.max_shard_size', self.max_shard_size)
    self.shares  # noqa: B018  It checks `ladder`.
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

  @property
  def shares(self) -> tuple[float, ...]:
    """Those in `ladder`."""
    return parse_ladder(self.ladder)


@dataclasses.dataclass(frozen=True)
class LogSettings:
  """The `log.*` keys."""

  tensorboard: bool = False
  wandb: str = ''


@dataclasses.dataclass(frozen=True)
class ReportSettings:
  """The `report.*` keys."""

  prompts: tuple[str, ...] = ('The weather today', 'The president said')
  max_new_tokens: int = 48

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


def read_section(kind: type[Section], given: Mapping[str, Any]) -> Section:
  """A section of a config as its dataclass, checked.

  The section of a run that is older than a key does not have the key.

  Raises:
    UserError: naming the key whose value is impossible.
  """
  names = [field.name for field in dataclasses.fields(kind)]
  if isinstance(given, config_dict.ConfigDict):
    given = given.to_dict()  # What is nested, too.
  return kind(**{name: given[name] for name in names if name in given})
