"""A config.json's keys as the sizes of a model, and back."""

from collections.abc import Mapping
import math
import re
from typing import Any

from lorapr_jax.errors import UserError, check_size, short
from lorapr_jax.hf.keys import checked, shown
from lorapr_jax.hf.kinds import kinds_from_hf, kinds_to_hf
from lorapr_jax.hf.rope import is_positive
from lorapr_jax.models.config import (
  MOST,
  MOST_LAYERS,
  LayerShape,
  ModelConfig,
)
from lorapr_jax.models.families import PREFIX, family_of, name_of
from lorapr_jax.models.family import Family

# Of these a null does not mean what it means that they are absent: as many KV
# heads as heads, heads as wide as the hidden size allows, no window.
_NULL_IS_A_VALUE = {'head_dim', 'num_key_value_heads', 'sliding_window'}


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
  """The sizes that a config.json says.

  Args:
    hf: the file's contents. The keys `rope_theta` + `rope_scaling` and the
      newer `rope_parameters` are both understood.

  Raises:
    UserError: naming the key that asks for something unsupported.
  """
  hf, family = checked(hf)
  numbers = _numbers(hf, family)
  hf = _with_absent(hf, family)
  layers = layers_from_hf(hf)
  embed_dim = _required(hf, 'hidden_size')
  if 'head_dim' in hf:
    head_dim = _required(hf, 'head_dim')
  else:
    head_dim = embed_dim // _required(hf, 'num_attention_heads')
  if head_dim < 2 or head_dim % 2:
    raise UserError(
      f'config.json: heads of {head_dim} dimensions, which RoPE cannot pair'
    )
  scale = numbers.get('attention_scale')
  if scale is not None and math.isclose(scale, head_dim**-0.5):
    numbers['attention_scale'] = None
  positions = _required(hf, 'max_position_embeddings')
  eos = hf.get('eos_token_id')
  return ModelConfig(
    vocab_size=_required(hf, 'vocab_size'),
    embed_dim=embed_dim,
    head_dim=head_dim,
    layers=layers,
    norm_eps=hf['rms_norm_eps'],
    **kinds_from_hf(
      _grown(hf, family, head_dim), family, len(layers), head_dim
    ),
    tie_embeddings=hf['tie_word_embeddings'],
    biases=family.biases_by(key for key in family.bias_keys if hf.get(key)),
    **family.fixed,
    **numbers,
    max_positions=positions,
    bos_token_id=hf.get('bos_token_id'),
    eos_token_id=(tuple(eos) or None) if isinstance(eos, list) else eos,
    pad_token_id=hf.get('pad_token_id'),
    family=hf['model_type'].removeprefix(PREFIX),
  )


def _grown(
  hf: Mapping[str, Any], family: Family, head_dim: int
) -> Mapping[str, Any]:
  """A config.json with a plain RoPE, where a family's theta grows."""
  key = 'rope_parameters' if hf.get('rope_parameters') else 'rope_scaling'
  rope = hf.get(key) or {}
  alpha, theta = rope.get('alpha'), rope.get('rope_theta', hf.get('rope_theta'))
  kind = rope.get('rope_type', rope.get('type'))
  if not (family.theta_grows and kind == 'dynamic' and alpha):
    return hf
  theta = 10000.0 if theta is None else theta
  for name, value in (('alpha', alpha), ('rope_theta', theta)):
    if not is_positive(value):
      raise UserError(
        f'config.json: {name} is {shown(value)}, not a positive number'
      )
  theta *= alpha ** (head_dim / (head_dim - 2))
  return {**hf, 'rope_theta': theta, 'rope_parameters': None, key: None}


def _numbers(hf: Mapping[str, Any], family: Family) -> dict[str, float | None]:
  """The fields of ModelConfig that a family's `numbers` decide."""
  fields = {}
  for name, number in family.numbers.items():
    key = number.key
    value = hf.get(key)
    if value is None and not (key in hf and name.endswith('_cap')):
      value = family.absent.get(key)
    if value is not None and not is_positive(value):
      raise UserError(
        f'config.json: {key} is {shown(value)}, not a positive number'
      )
    fields[name] = None if value is None else number.read(value)
  return fields


def _with_absent(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
  """A config.json's keys, without nulls, and with what is absent."""
  given = {key: value for key, value in hf.items() if value is not None}
  absent = dict(family.absent)
  for key in _NULL_IS_A_VALUE & hf.keys():
    absent.pop(key, None)
  if given.get('rope_parameters'):
    absent = {k: x for k, x in absent.items() if k[:5] != 'rope_'}
  return {**absent, **given}


def config_to_hf(
  config: ModelConfig, family: Family | None = None
) -> dict[str, Any]:
  """The keys of a config.json that a model's sizes decide.

  The sizes at the top are those of the largest layer; layers that differ are
  listed in `per_layer_config`. `architectures`, `model_type` and the like
  follow from the layout (hf/layout.py).

  Args:
    config: the sizes.
    family: one that holds the model; None: the first that does.
  """
  top = max(config.layers, key=config.layer_parameters)
  eos = config.eos_token_id
  hf = {
    'vocab_size': config.vocab_size,
    'hidden_size': config.embed_dim,
    'head_dim': config.head_dim,
    'num_hidden_layers': len(config.layers),
    **_layer_to_hf(top),
    'max_position_embeddings': config.max_positions,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tie_embeddings,
    'bos_token_id': config.bos_token_id,
    'eos_token_id': list(eos) if isinstance(eos, tuple) else eos,
    'pad_token_id': config.pad_token_id,
    'use_cache': True,
  }
  family = family or family_of(config)
  flags = family.flags(config)
  hf |= {key: True for key, value in flags.items() if value}
  hf |= family.values(config) | kinds_to_hf(config, family)
  hf[family.activation_key] = family.activations[0]
  if not config.is_uniform:
    hf['per_layer_config'] = {
      str(i): _layer_to_hf(shape)
      for i, shape in enumerate(config.layers)
      if shape != top
    }
  return hf


def model_to_hf(config: ModelConfig) -> dict[str, Any]:
  """What `config_from_hf` reads as a model of these sizes."""
  return {'model_type': name_of(config), **config_to_hf(config)}


def layers_from_hf(hf: Mapping[str, Any]) -> tuple[LayerShape, ...]:
  """The sizes of each layer.

  Args:
    hf: at least the keys that `config_to_hf` writes.

  Raises:
    UserError: naming the key that is no size.
  """
  per_layer = hf.get('per_layer_config')
  per_layer = {} if per_layer is None else per_layer
  if not isinstance(per_layer, dict):
    raise UserError(
      f'config.json: per_layer_config is {shown(per_layer)}, not an object'
    )
  num_layers = _required(hf, 'num_hidden_layers', MOST_LAYERS)
  for index, sizes in per_layer.items():
    # We write the keys as '3'; transformers 5, saving, as '03'.
    if not re.fullmatch('[0-9]{1,9}', index) or int(index) >= num_layers:
      raise UserError(
        f'config.json: per_layer_config has {short(repr(index))}, but the '
        f'layers are 0 to {num_layers - 1}'
      )
    if not isinstance(sizes, dict):
      raise UserError(
        f'config.json: per_layer_config has no sizes for layer {index}'
      )
  by_index = {int(index): sizes for index, sizes in per_layer.items()}
  return tuple(
    _layer_from_hf({**hf, **by_index.get(i, {})}) for i in range(num_layers)
  )


def _layer_from_hf(hf: Mapping[str, Any]) -> LayerShape:
  heads, key = _required(hf, 'num_attention_heads'), 'num_key_value_heads'
  kv_heads = _required({key: heads, **hf}, key)
  if heads % kv_heads:
    raise UserError(
      f'config.json: num_attention_heads {heads} is not a multiple of '
      f'num_key_value_heads {kv_heads}'
    )
  return LayerShape(
    num_kv_heads=kv_heads,
    queries_per_kv=heads // kv_heads,
    mlp_dim=_required(hf, 'intermediate_size'),
  )


def _layer_to_hf(shape: LayerShape) -> dict[str, int]:
  return {
    'num_attention_heads': shape.num_heads,
    'num_key_value_heads': shape.num_kv_heads,
    'intermediate_size': shape.mlp_dim,
  }


def _required(hf: Mapping[str, Any], key: str, most: int = MOST) -> int:
  return check_size(f'config.json: {key}', hf.get(key), most)
