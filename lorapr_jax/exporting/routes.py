"""Routes: where an export goes, and in which form."""

import dataclasses
from pathlib import Path

from lorapr_jax.errors import UserError
from lorapr_jax.exporting.model import Description
from lorapr_jax.gguf.archs import architecture
from lorapr_jax.gguf.vocabulary import vocabulary
from lorapr_jax.hf.layout import (
  check_padded,
  resolve_layout,
  resolve_model_type,
  stored_family,
)
from lorapr_jax.hf.shards import MAX_SHARD_BYTES
from lorapr_jax.hf.stored import Storage
from lorapr_jax.hf.write import DTYPES, GGUF_DTYPES
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.runtime.sizes import parse_size
from lorapr_jax.settings.sections import ExportSettings

# A GGUF's names of the dtypes that NumPy has too.
_GGUF_NAMES = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16'}


@dataclasses.dataclass(frozen=True)
class Route:
  """Where an export goes, and in which form.

  Attributes:
    kind: hf, gguf or peft.
    path: a new folder; for gguf a new file.
    layout: one of hf.layout.LAYOUTS.
    model_type: one of hf.layout.MODEL_TYPES.
    dtype: auto, one of hf.write.DTYPES or, for gguf, GGUF_DTYPES.
    max_shard_bytes: the largest size of one weights file of a folder.
  """

  kind: str
  path: Path
  layout: str = 'auto'
  model_type: str = 'auto'
  dtype: str = 'auto'
  max_shard_bytes: int = MAX_SHARD_BYTES

  @classmethod
  def of_run(
    cls, kind: str, workdir: Path, export: ExportSettings, model: Description
  ) -> 'Route':
    """The route of one of the formats that a run writes."""
    path = workdir / ('export' if kind == 'hf' else f'export-{kind}')
    route = cls(
      kind=kind,
      path=path,
      layout=export.layout,
      model_type=export.model_type,
      dtype=export.dtype,
      max_shard_bytes=parse_size(
        'export.max_shard_size', export.max_shard_size
      ),
    )
    if kind != 'gguf':
      return route
    if export.gguf_dtype != 'auto':
      route = dataclasses.replace(route, dtype=export.gguf_dtype)
    name = model.name.rpartition('/')[2]  # Of ORG/NAME.
    file = f'{name}-{route.stored_dtype(model)}.gguf'
    return dataclasses.replace(route, path=path / file)

  def check_path(self) -> None:
    """Refuses a destination that exists already, or is of the wrong kind.

    Raises:
      UserError: naming it, and what to do.
    """
    if self.path.exists():
      raise UserError(
        f'{self.path} exists already, and nothing is written over it: choose '
        'another name'
      )
    if self.kind == 'gguf' and self.path.suffix != '.gguf':
      raise UserError(f'{self.path}: the name of a GGUF file ends in .gguf')
    if self.kind != 'gguf' and self.path.suffix == '.gguf':
      raise UserError(
        f'{self.path} is named like a GGUF file, but format {self.kind} is a '
        'folder: choose another name, or format gguf'
      )
    if self.kind != 'gguf' and self.dtype in GGUF_DTYPES:
      raise UserError(
        f'dtype {self.dtype} is one of format gguf; format {self.kind} has '
        + ', '.join(DTYPES)
      )

  def check(self, model: Description) -> None:
    """Refuses a form that cannot hold this model, before weights are read.

    Raises:
      UserError: naming what is wrong.
    """
    self.check_path()
    if self.layout == 'padded' and model.kept is None:
      raise UserError(
        'layout padded needs to know what was cut: the source has no '
        'pruning.json that says it with the sizes before'
      )
    if self.layout == 'padded':
      check_padded(model.before, model.config)
    config = self.stored_config(model)
    resolve_layout(config, self.layout)
    if self.kind != 'gguf':
      resolve_model_type(config, self.layout, self.model_type)
    if self.kind == 'gguf':
      architecture(config)
      vocabulary(model.base, model.config)

  def stored_config(self, model: Description) -> ModelConfig:
    """The sizes of what is written."""
    return model.before if self.layout == 'padded' else model.config

  def stored_layout(self, model: Description) -> str:
    """The layout of what is written: 'uniform', 'two_shape' or 'padded'."""
    return resolve_layout(self.stored_config(model), self.layout)

  def storage(self, model: Description) -> Storage:
    """How the folder holds the tensors."""
    config = self.stored_config(model)
    return stored_family(config, self.layout, self.model_type)

  def stored_dtype(self, model: Description) -> str:
    """The dtype of what is written, as the format names it."""
    name = self.numpy_dtype(model)
    return _GGUF_NAMES.get(name, name) if self.kind == 'gguf' else name

  def numpy_dtype(self, model: Description) -> str:
    """The same by NumPy's name; q8_0 stays, as NumPy has no such dtype."""
    name = model.dtype if self.dtype == 'auto' else self.dtype
    numpys = {theirs: name for name, theirs in _GGUF_NAMES.items()}
    return numpys.get(name, name)
