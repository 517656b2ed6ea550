"""The form in which a model is saved: layout, model_type, config.json."""

from typing import Any

from lorapr_jax.errors import UserError, choose
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.hf.remote import remote_code_keys
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.families import EXPORTED, PREFIX, REMOTE_CODE, row_of
from lorapr_jax.models.family import Family

AUTO = 'auto'
LAYOUTS = (AUTO, 'uniform', 'two_shape', 'padded')
MODEL_TYPES = (AUTO, *EXPORTED)


def resolve_layout(config: ModelConfig, layout: str) -> str:
  """'uniform', 'two_shape' or 'padded'.

  Args:
    config: the sizes of what is written: under padded, those before the cut.
    layout: one of LAYOUTS.

  Raises:
    UserError: if the layout cannot hold this model.
  """
  choose('export.layout', layout, LAYOUTS)
  if layout == AUTO:
    stock = config.is_uniform and any(
      EXPORTED[name].takes_heads(config) for name in _held(config)
    )
    return 'uniform' if stock else 'two_shape'
  if layout in ('uniform', 'padded') and not config.is_uniform:
    raise UserError(
      f'export.layout={layout} needs layers of one size: prune with '
      'prune.protect=none and prune.layer_profile=1, or '
      'export with layout two_shape'
    )
  return layout


def check_padded(before: ModelConfig, after: ModelConfig) -> None:
  """Refuses the layout padded where zeros would change the model.

  Raises:
    UserError: if a norm over all heads would count those that are gone.
  """
  heads = ({shape.num_heads for shape in x.layers} for x in (before, after))
  if before.qk_norm == 'heads' and set.difference(*reversed([*heads])):
    raise UserError(
      'export.layout=padded cannot hold this model without some of its heads: '
      'its norms of queries and keys would count their zeros. Use '
      'export.layout=uniform'
    )


def resolve_model_type(
  config: ModelConfig, layout: str, model_type: str
) -> str:
  """One of EXPORTED or, under layout two_shape, of REMOTE_CODE.

  Args:
    config: the sizes of what is written.
    layout: one of LAYOUTS.
    model_type: one of MODEL_TYPES. auto: the model's own family, or the first
      other, that every transformers loads. They are the same function of the
      same weights.

  Raises:
    UserError: if the layout or the type cannot hold this model.
  """
  choose('export.model_type', model_type, MODEL_TYPES)
  held = _held(config)
  if resolve_layout(config, layout) == 'two_shape':
    return f'{PREFIX}{held[0]}'
  if model_type in held:
    return model_type
  loaded = [x for x in held if EXPORTED[x].takes_heads(config)]
  if model_type == AUTO and loaded:
    pruned_as = row_of(config.family).pruned_as
    gone = pruned_as in loaded and not config.heads_fill_embed
    return pruned_as if gone else loaded[0]
  if model_type == AUTO:
    raise UserError(
      f'transformers refuses a {held[0]} of {config.layers[0].num_heads} heads '
      f'with a hidden size of {config.embed_dim}: use export.layout=two_shape, '
      'or keep a number of heads that divides it'
    )
  raise UserError(
    f'export.model_type={model_type} cannot hold the biases, norms or scales '
    f'that the model has: use export.model_type={(loaded or held)[0]}'
  )


def heads_must_divide(config: ModelConfig) -> bool:
  """Whether no type with layers of one size has just any number of heads.

  transformers refuses a Gemma whose hidden size is not a multiple of it.
  """
  return all(EXPORTED[name].heads_divide_embed for name in _held(config))


def stored_family(config: ModelConfig, layout: str, model_type: str) -> Family:
  """The family whose tensors an export has, by one of LAYOUTS, MODEL_TYPES."""
  model_type = resolve_model_type(config, layout, model_type)
  return row_of(model_type.removeprefix(PREFIX))


def _held(config: ModelConfig) -> list[str]:
  """The families that a model can be exported as; its own is the first."""
  own = row_of(config.family).exported_as or config.family
  names = sorted(EXPORTED, key=lambda name: name != own)
  held = [name for name in names if EXPORTED[name].holds(config)]
  if not held:
    raise UserError(
      f'no config.json can say which layers of this {own} have a window and '
      'which turn, once so many are gone: use a lower prune.layers_target'
    )
  return held


def hf_config(
  config: ModelConfig, dtype: str, layout: str, model_type: str
) -> dict[str, Any]:
  """The config.json of an export, by one of LAYOUTS and of MODEL_TYPES.

  `dtype` is that of the weights, as torch names it.
  """
  model_type = resolve_model_type(config, layout, model_type)
  family = EXPORTED[model_type.removeprefix(PREFIX)]
  hf = family.written | family.flags(config) | config_to_hf(config, family)
  if model_type in REMOTE_CODE:
    head = remote_code_keys(model_type)
    hf.setdefault('per_layer_config', {})
  else:
    head = {'architectures': [family.architecture], 'model_type': model_type}
    if family.names_version and config.vocab_size > 100_000:
      head['transformers_version'] = '5.0.0'
  return {**head, **hf, 'torch_dtype': dtype}
