"""A model is written, read back, and its logits are compared."""

from collections.abc import Callable
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lorapr_jax.exporting.cards import adapter_card, model_card
from lorapr_jax.exporting.model import Description, Weights, padded
from lorapr_jax.exporting.routes import Route
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.gguf.write import gguf_tensors, write_gguf
from lorapr_jax.hf.adapter import BASE_FOLDER, read_adapter, write_adapter
from lorapr_jax.hf.load import load_config, load_params
from lorapr_jax.hf.place import place_params
from lorapr_jax.hf.write import export_model, hf_tensors
from lorapr_jax.models import decoder
from lorapr_jax.models.compute import compiler_options
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.lora import merge_adapters
from lorapr_jax.pruning.shrink import shrunk_config
from lorapr_jax.runtime import processes
from lorapr_jax.runtime.paths import new_folder, remove
from lorapr_jax.settings.sections import ExportSettings

# The number of tokens whose logits are compared.
_CHECK_LENGTH = 32
# How far logits may differ: the root mean square of the differences over the
# largest logit. The weights are the same, and sums have another order; every
# weight was rounded once; blocks of 32 weights share a scale (q8_0). Another
# model differs by about a third.
_SUMMED, _ROUNDED, _BLOCKWISE = 1e-5, 0.05, 0.15


def export_run(
  export: ExportSettings, workdir: Path, model: Description, weights: Weights
) -> dict[str, dict[str, Any]]:
  """Writes every format of export.format: {kind: the result of `write`}.

  Raises:
    RuntimeError: if what was read back computes something else.
  """
  exports = {}
  for kind in export.routes:
    route = Route.of_run(kind, workdir, export, model)
    # This run left it when it was killed before it wrote its summary.
    if processes.is_first():
      remove(route.path.parent if kind == 'gguf' else route.path)
    processes.wait_for_others(f'make {kind}')
    exports[kind] = write(route, model, weights)
  return exports


def write(route: Route, model: Description, weights: Weights) -> dict[str, Any]:
  """Writes a model, reads it back and compares.

  The route peft needs the weights `base` and `lora`.

  Returns:
    {'path', 'layout' (None for a GGUF that is not padded), 'dtype',
    'max_logit_difference'}.

  Raises:
    UserError: as `Route.check`, or if a weight is NaN or infinite.
    RuntimeError: if what was read back is another model. It is removed.
  """
  route.check(model)
  layout = route.stored_layout(model)
  stored = padded(weights, model) if layout == 'padded' else weights
  processes.wait_for_others(f'write {route.kind}')
  if processes.is_first():
    _WRITERS[route.kind](route, model, stored)
  else:
    _give_to_first(route, model, stored)
  processes.wait_for_others(f'read {route.kind}')
  processes.check_shared(route.path)
  places = jax.tree.map(lambda x: x.sharding, stored.merged)
  try:
    difference = _check(route, model, weights, places)
  except BaseException:  # What is not known to be the model is not left.
    if processes.is_first():
      remove(route.path)
    raise
  return {
    'path': str(route.path),
    'layout': None if route.kind == 'gguf' and layout != 'padded' else layout,
    'dtype': route.stored_dtype(model),
    'max_logit_difference': difference,
  }


def _write_hf(route: Route, model: Description, stored: Weights) -> None:
  card = None
  if model.pruning:
    sizes = model.config
    if model.kept:
      sizes = shrunk_config(model.before, model.kept)
    card = model_card(
      model.pruning,
      sizes,
      route.stored_layout(model),
      padded=route.stored_config(model).layers != sizes.layers,
    )
  _write_folder(route.path, route, model, stored.merged, card)


def _write_gguf(route: Route, model: Description, stored: Weights) -> None:
  write_gguf(
    route.path,
    stored.merged,
    route.stored_config(model),
    base=model.base,
    dtype=route.stored_dtype(model),
    name=model.name,
  )


def _write_peft(route: Route, model: Description, stored: Weights) -> None:
  config = route.stored_config(model)
  with new_folder(route.path) as folder:
    _write_folder(folder / BASE_FOLDER, route, model, stored.base)
    write_adapter(
      folder, stored.lora, config, stored.lora_config, route.storage(model)
    )
    card = adapter_card(model.name, route.stored_layout(model))
    (folder / 'README.md').write_text(card, encoding='utf-8')


_WRITERS = {'hf': _write_hf, 'gguf': _write_gguf, 'peft': _write_peft}


def _write_folder(
  folder: Path,
  route: Route,
  model: Description,
  params: Any,
  card: str | None = None,
) -> None:
  export_model(
    folder,
    params,
    route.stored_config(model),
    layout=route.stored_layout(model),
    model_type=route.model_type,
    dtype=route.stored_dtype(model),
    base=model.base,
    pruning=model.pruning,
    card=card,
    max_shard_bytes=route.max_shard_bytes,
  )


def _give_to_first(route: Route, model: Description, stored: Weights) -> None:
  """Takes part in gathering what the first process writes."""
  config = route.stored_config(model)
  if route.kind == 'gguf':
    tensors = gguf_tensors(stored.merged, config)
  else:
    params = stored.base if route.kind == 'peft' else stored.merged
    dtype, storage = jnp.dtype(route.stored_dtype(model)), route.storage(model)
    tensors = hf_tensors(params, config, dtype, storage)
  for _ in tensors:
    pass


def _check(
  route: Route, model: Description, weights: Weights, places: Any
) -> float:
  """Reads back what was written: its logits must be those of the weights.

  `places` has a sharding for every tensor of what was written.

  Returns:
    The largest difference between two logits.

  Raises:
    RuntimeError: if it is another model.
  """
  read, config = _read_back(route, places, jnp.dtype(model.dtype))
  # A GGUF takes its ids of BOS and EOS from the tokenizer.
  same = config == route.stored_config(model)
  if route.kind == 'gguf':
    same = config.layers == route.stored_config(model).layers

  with jax.default_matmul_precision('highest'):
    expected = _logits_of(model.config)(weights.merged)
    found = _logits_of(config)(read)
  difference, typical, largest = map(float, _compared(found, expected))
  # The mean decides, not the largest: if much of a model was cut, rounding
  # alone can move a few tokens far.
  tolerance = _tolerance(model.dtype, route.numpy_dtype(model))
  if not same or not typical <= tolerance * largest:
    raise RuntimeError(
      f'{route.path} is removed, since read back its logits differ by '
      f'{typical} on average, at most by {difference}'
    )
  return difference


def _read_back(
  route: Route, places: Any, dtype: Any
) -> tuple[Any, ModelConfig]:
  """What was written, with LoRA merged, as (params, sizes)."""
  if route.kind == 'gguf':
    file = open_gguf(route.path)
    tensors = {name: x.astype(dtype) for name, x in file.tensors()}
    params = place_params(tensors.__getitem__, file.config, places, dtype)
    return params, file.config
  folder = route.path / BASE_FOLDER if route.kind == 'peft' else route.path
  config = load_config(folder)
  params = load_params(folder, config, places, dtype)
  if route.kind == 'peft':
    lora, lora_config = read_adapter(route.path, config)
    params = merge_adapters(params, lora, lora_config.scale)
  return params, config


@functools.lru_cache(2)
def _logits_of(config: ModelConfig) -> Callable[[Any], jax.Array]:
  """params -> the logits of the same random tokens for every model."""
  tokens = jax.random.randint(
    jax.random.key(0), (1, _CHECK_LENGTH), 0, config.vocab_size
  )

  @functools.partial(jax.jit, compiler_options=compiler_options())
  def logits(params):
    hidden = decoder.hidden_states(params, tokens, config, dtype=jnp.float32)
    return decoder.logits(params, hidden, config)

  return logits


@jax.jit
def _compared(found: jax.Array, expected: jax.Array) -> tuple[jax.Array, ...]:
  """The largest and the mean difference, and the largest that is expected."""
  apart = found - expected
  typical = jnp.sqrt(jnp.mean(apart**2))
  return abs(apart).max(), typical, abs(expected).max()


def _tolerance(dtype: str, stored: str) -> float:
  """How far logits may differ, as a share of the largest.

  `dtype` is that of the weights in memory, `stored` that of those written.
  """
  if stored == 'q8_0':
    return _BLOCKWISE
  exact = jnp.promote_types(dtype, stored) == stored
  return _SUMMED if exact else _ROUNDED
