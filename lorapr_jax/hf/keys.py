"""What a config.json may say; what it may not is refused by name."""

from collections.abc import Mapping
import json
from typing import Any

from lorapr_jax.errors import UserError, short
from lorapr_jax.hf.refused import why_refused
from lorapr_jax.hf.rope import is_positive
from lorapr_jax.models.config import MOST
from lorapr_jax.models.families import (
  BIAS_KEYS,
  FAMILIES,
  PREFIX,
  REMOTE_CODE,
  TEXT_OF,
)
from lorapr_jax.models.family import Family

# The value each of these keys must have, or be absent.
_ONLY_SUPPORTED = {
  'attention_chunk_size': None,
  'attention_dropout': 0.0,
  'clip_qkv': None,
  'embd_pdrop': 0.0,
  'quantization_config': None,
  'resid_pdrop': 0.0,
  'transformers_weights': None,
  'use_bidirectional_attention': False,
}
# Of a model that sees too these are beside the text model's keys.
_OUTSIDE = (
  *('bos_token_id', 'eos_token_id', 'pad_token_id'),
  *('quantization_config', 'tie_word_embeddings'),
)


def _is_id(value: Any) -> bool:
  return type(value) is int and abs(value) <= MOST


def _is_bool(value: Any) -> bool:
  return isinstance(value, bool)


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 <= value <= MOST


def _is_size(value: Any) -> bool:
  return _is_count(value) and value > 0


def _is_object(value: Any) -> bool:
  return isinstance(value, dict)


# What each of these keys is, where it is neither absent nor null.
_KINDS = {
  **dict.fromkeys(
    (*BIAS_KEYS, 'use_sliding_window'), (_is_bool, 'true or false')
  ),
  'bos_token_id': (_is_id, 'the id of a token'),
  'eos_token_id': (
    lambda x: all(map(_is_id, x if isinstance(x, list) else [x])),
    'the id of a token or a list of them',
  ),
  'layer_types': (
    lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x),
    'a list of names',
  ),
  'max_window_layers': (_is_count, 'a number of layers'),
  'no_rope_layer_interval': (_is_size, 'a positive number of layers'),
  'no_rope_layers': (
    lambda x: isinstance(x, list) and all(y in (0, 1) for y in x),
    'a list of 0 and 1',
  ),
  'pad_token_id': (_is_id, 'the id of a token'),
  'rms_norm_eps': (is_positive, 'a positive number'),
  'rope_parameters': (_is_object, 'an object'),
  'rope_scaling': (_is_object, 'an object'),
  'rope_theta': (is_positive, 'a positive number'),
  'sliding_window': (_is_size, 'a positive number of tokens'),
  'sliding_window_pattern': (
    lambda x: _is_count(x) or isinstance(x, str),
    'a number of layers or a text',
  ),
  'tie_word_embeddings': (_is_bool, 'true or false'),
}


def checked(hf: Mapping[str, Any]) -> tuple[Mapping[str, Any], Family]:
  """The keys of a config.json and their row, once nothing is refused.

  Of a model that sees too the keys are the text model's.

  Raises:
    UserError: naming the key that asks for something unsupported.
  """
  hf = _of_text(hf)
  family = _family(hf)
  _check_supported(hf, family)
  return hf, family


def shown(value: Any) -> str:
  """A value of the file, as it is there."""
  return short(json.dumps(value))


def _of_text(hf: Mapping[str, Any]) -> Mapping[str, Any]:
  """The keys of the text model, where config.json is of one that sees too."""
  seeing = hf.get('model_type')
  if seeing not in list(TEXT_OF):  # A list has no hash.
    return hf
  text = hf.get('text_config')
  if not isinstance(text, dict):
    raise UserError(f'config.json: text_config is {shown(text)}, not an object')
  outside = {key: hf[key] for key in _OUTSIDE if hf.get(key) is not None}
  return {**text, **outside, 'model_type': TEXT_OF[seeing]}


def _family(hf: Mapping[str, Any]) -> Family:
  """The row of a config.json's model_type."""
  model_type = hf.get('model_type')
  types = {**FAMILIES, **REMOTE_CODE}
  if model_type not in list(types):  # A list has no hash.
    found = f'config.json: model_type is {short(repr(model_type))}'
    if why := why_refused(str(model_type)):
      raise UserError(f'{found}, which is not supported: {why}')
    raise UserError(
      f'{found}; only {", ".join(FAMILIES)} are supported, and our own '
      f'exports, with {PREFIX} in front'
    )
  return types[model_type]


def _check_supported(hf: Mapping[str, Any], family: Family) -> None:
  model_type = hf['model_type']
  for key, value in (_ONLY_SUPPORTED | family.only).items():
    if key not in family.ignored and hf.get(key) not in (value, None):
      raise UserError(
        f'config.json: {key} is {shown(hf[key])}; only {json.dumps(value)} is '
        'supported'
      )
  _check_kinds(hf)
  key, names = family.activation_key, family.activations
  if hf.get(key, names[0]) not in names:
    raise UserError(
      f'config.json: {key} is {shown(hf[key])}; only "{names[0]}" is supported'
    )
  for key in BIAS_KEYS:
    if hf.get(key) and key not in family.bias_keys:
      having = [name for name, x in FAMILIES.items() if key in x.bias_keys]
      raise UserError(
        f'config.json: {key} is true, which means nothing for {model_type}; '
        f'only a {" or ".join(having)} has it'
      )
  if hf.get('sliding_window') is not None and family.slides is None:
    raise UserError(
      f'config.json: sliding_window is {shown(hf["sliding_window"])}, and a '
      f'{model_type} has no windows; only null is supported'
    )
  if hf.get('per_layer_config') and model_type not in REMOTE_CODE:
    raise UserError(
      'config.json: per_layer_config is only understood for a model_type that '
      f'begins with {PREFIX}'
    )


def _check_kinds(hf: Mapping[str, Any]) -> None:
  for key, (is_kind, text) in _KINDS.items():
    value = hf.get(key)
    if value is not None and not is_kind(value):
      raise UserError(f'config.json: {key} is {shown(value)}, not {text}')
