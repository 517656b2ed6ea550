"""The ways out: a model is written, read back, and its logits are compared."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorapr_jax.errors import UserError
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.gguf.vocabulary import vocabulary
from lorapr_jax.gguf.write import write_gguf, zero_biases
from lorapr_jax.hf.adapter import BASE_FOLDER, read_adapter, write_adapter
from lorapr_jax.hf.layout import resolve_layout, resolve_model_type
from lorapr_jax.hf.load import load_config, load_params
from lorapr_jax.hf.place import place_params
from lorapr_jax.hf.shards import MAX_SHARD_BYTES
from lorapr_jax.hf.write import (
  DTYPES,
  GGUF_DTYPES,
  export_model,
  hf_tensors,
)
from lorapr_jax.models import decoder
from lorapr_jax.models.compute import compiler_options
from lorapr_jax.models.config import LlamaConfig, LoraConfig
from lorapr_jax.models.lora import merge_adapters
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.shrink import Kept, pad, shrunk_config
from lorapr_jax.report.summary import adapter_card, model_card
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.paths import new_folder

_GGUF_NAMES = {'float32': 'f32', 'bfloat16': 'bf16', 'float16': 'f16'}
# Tokens on which what was read back is compared.
_CHECK_LENGTH = 32
# By how much logits may differ, root mean square over the largest: summed in
# another order; every weight rounded once; q8_0's blocks of 32 with one scale.
# What is another model is off by about a third of the largest.
_SUMMED, _ROUNDED, _BLOCKWISE = 1e-5, 0.05, 0.15


@dataclasses.dataclass(frozen=True)
class Model:
  """What is known of a model to be exported, besides its weights.

  Attributes:
    name: of what was pruned.
    config: the sizes.
    dtype: of the weights, by name.
    base: the folder whose tokenizer and licence go along, or None.
    before: the sizes before the cut; None if not known.
    kept: what the cut left of them; None if not known.
    pruning: the contents of pruning.json, or None.
  """

  name: str
  config: LlamaConfig
  dtype: str
  base: Path | None
  before: LlamaConfig | None = None
  kept: Kept | None = None
  pruning: dict[str, Any] | None = None


class Weights(NamedTuple):
  """A model's weights.

  Attributes:
    merged: `params` with LoRA merged.
    base: the same without LoRA, or None where nobody needs it or it is gone.
    lora: the adapters, where `base` is.
    lora_config: theirs.
  """

  merged: Any
  base: Any = None
  lora: Any = None
  lora_config: LoraConfig | None = None


@dataclasses.dataclass(frozen=True)
class Route:
  """Where to, and in which form.

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

  def check_path(self) -> None:
    """Refuses a destination that is there already or of the wrong kind.

    Raises:
      UserError: saying so.
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

  def check(self, model: Model) -> None:
    """Refuses what cannot hold this model, before any weights are read.

    Raises:
      UserError: naming what is wrong.
    """
    self.check_path()
    if self.layout == 'padded' and model.kept is None:
      raise UserError(
        'layout padded needs to know what was cut: the source has no '
        'pruning.json that says it with the sizes before'
      )
    config = self.stored_config(model)
    resolve_layout(config, self.layout)
    if self.kind != 'gguf':
      resolve_model_type(config, self.layout, self.model_type)
    if self.kind == 'gguf':
      vocabulary(model.base, model.config)

  def stored_config(self, model: Model) -> LlamaConfig:
    """The sizes of what is written."""
    return model.before if self.layout == 'padded' else model.config

  def stored_dtype(self, model: Model) -> str:
    """The dtype of what is written, as the format names it."""
    name = model.dtype if self.dtype == 'auto' else self.dtype
    return _GGUF_NAMES.get(name, name) if self.kind == 'gguf' else name


def write(route: Route, model: Model, weights: Weights) -> dict[str, Any]:
  """Writes a model, reads it back and compares.

  Args:
    route: where to and how.
    model: what it is.
    weights: its weights; peft needs `base` and `lora`.

  Returns:
    {'path', 'layout' (None for a GGUF that is not padded), 'dtype',
    'max_logit_difference'}.

  Raises:
    UserError: as `Route.check`.
    RuntimeError: if what was read back is another model.
  """
  route.check(model)
  config = route.stored_config(model)
  layout = resolve_layout(config, route.layout)
  stored = _padded(weights, model) if layout == 'padded' else weights
  dtype = route.stored_dtype(model)
  processes.wait_for_others(f'write {route.kind}')
  if processes.is_first():
    _WRITERS[route.kind](route, model, stored, config, layout)
  else:  # What is gathered for the first process is gathered from all.
    params = stored.base if route.kind == 'peft' else stored.merged
    as_written = np.float32 if route.kind == 'gguf' else jnp.dtype(dtype)
    if route.kind == 'gguf':
      zero_biases(params, config)
    for _ in hf_tensors(params, config, as_written):
      pass
  processes.wait_for_others(f'read {route.kind}')
  processes.check_shared(route.path)
  read, read_config = _read_back(route, model, stored)

  expected = _logits(weights.merged, model.config)
  apart = _logits(read, read_config) - expected
  difference = float(abs(apart).max())
  # Not the largest: in a model that was cut hard, rounding alone can throw a
  # few tokens far off.
  typical = float(jnp.sqrt(jnp.mean(apart**2)))
  tolerance = _tolerance(model.dtype, dtype) * float(abs(expected).max())
  # A GGUF has its ids of BOS and EOS from the tokenizer.
  same = read_config == config
  if route.kind == 'gguf':
    same = read_config.layers == config.layers
  if not same or not typical <= tolerance:
    raise RuntimeError(
      f'{route.path} was written, but read back its logits differ by '
      f'{typical} on average, at most by {difference}'
    )
  return {
    'path': str(route.path),
    'layout': None if route.kind == 'gguf' and layout != 'padded' else layout,
    'dtype': dtype,
    'max_logit_difference': difference,
  }


def _write_hf(
  route: Route, model: Model, stored: Weights, config: LlamaConfig, layout: str
) -> None:
  card = None
  if model.pruning:
    sizes = model.config
    if model.kept:
      sizes = shrunk_config(model.before, model.kept)
    card = model_card(
      model.pruning, sizes, layout, padded=config.layers != sizes.layers
    )
  _export(route.path, route, model, stored.merged, config, layout, card)


def _write_gguf(
  route: Route, model: Model, stored: Weights, config: LlamaConfig, _: str
) -> None:
  write_gguf(
    route.path,
    stored.merged,
    config,
    base=model.base,
    dtype=route.stored_dtype(model),
    name=model.name,
  )


def _write_peft(
  route: Route, model: Model, stored: Weights, config: LlamaConfig, layout: str
) -> None:
  with new_folder(route.path) as folder:
    _export(
      folder / BASE_FOLDER, route, model, stored.base, config, layout, None
    )
    write_adapter(folder, stored.lora, config, stored.lora_config)
    card = adapter_card(model.name, layout)
    (folder / 'README.md').write_text(card, encoding='utf-8')


_WRITERS = {'hf': _write_hf, 'gguf': _write_gguf, 'peft': _write_peft}


def _export(
  folder: Path,
  route: Route,
  model: Model,
  params: Any,
  config: LlamaConfig,
  layout: str,
  card: str | None,
) -> None:
  export_model(
    folder,
    params,
    config,
    layout=layout,
    model_type=route.model_type,
    dtype=route.stored_dtype(model),
    base=model.base,
    pruning=model.pruning,
    card=card,
    max_shard_bytes=route.max_shard_bytes,
  )


def _padded(weights: Weights, model: Model) -> Weights:
  """The weights at the sizes before the cut, with zeros in what was cut."""
  if model.config == model.before:  # Nothing was cut, or it is padded.
    return weights
  axes = block_axes(model.config, weights.lora_config)

  def widen(stacks: Any, kind: str) -> Any:
    return jax.jit(
      lambda stacks: pad(stacks, axes[kind], model.kept, model.before)
    )(stacks)

  def widen_params(params: Any) -> Any:
    return {**params, 'stacks': widen(params['stacks'], 'params')}

  if weights.lora is None:
    return Weights(widen_params(weights.merged))
  return weights._replace(
    merged=widen_params(weights.merged),
    base=widen_params(weights.base),
    lora=widen(weights.lora, 'lora'),
  )


def _read_back(
  route: Route, model: Model, stored: Weights
) -> tuple[Any, LlamaConfig]:
  """What was written, merged, as (params, sizes), where `stored` lies."""
  places = jax.tree.map(lambda x: x.sharding, stored.merged)
  dtype = jnp.dtype(model.dtype)
  if route.kind == 'gguf':
    file = open_gguf(route.path)
    tensors = {name: x.astype(dtype) for name, x in file.tensors()}
    return (
      place_params(tensors.__getitem__, file.config, places, dtype),
      file.config,
    )
  folder = route.path / BASE_FOLDER if route.kind == 'peft' else route.path
  config = load_config(folder)
  params = load_params(folder, config, places, dtype)
  if route.kind == 'peft':
    lora, lora_config = read_adapter(route.path, config)
    params = merge_adapters(params, lora, lora_config.scale)
  return params, config


def _logits(params: Any, config: LlamaConfig) -> jax.Array:
  """Of the same random tokens for every model; float32 throughout."""
  tokens = jax.random.randint(
    jax.random.key(0), (1, _CHECK_LENGTH), 0, config.vocab_size
  )

  @functools.partial(jax.jit, compiler_options=compiler_options())
  def logits(params):
    hidden = decoder.hidden_states(params, tokens, config, dtype=jnp.float32)
    return decoder.logits(params, hidden)

  with jax.default_matmul_precision('highest'):
    return logits(params)


def _tolerance(dtype: str, stored: str) -> float:
  """A share of the largest logit: for weights of `dtype` stored as `stored`."""
  if stored == 'q8_0':
    return _BLOCKWISE
  numpys = {theirs: name for name, theirs in _GGUF_NAMES.items()}
  stored = numpys.get(stored, stored)
  exact = jnp.promote_types(dtype, stored) == stored
  return _SUMMED if exact else _ROUNDED
