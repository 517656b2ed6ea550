"""The keys of a config.json that say how RoPE turns, and back."""

from collections.abc import Callable, Mapping
import dataclasses
import json
from typing import Any

from lorapr_jax.errors import UserError, short
from lorapr_jax.models.config import MOST
from lorapr_jax.models.rope import SCALINGS, LongRope, Rope, Scaling

_ORIGINAL = 'original_max_position_embeddings'


def rope_from_hf(
  hf: Mapping[str, Any], pairs: int, theta: float = 10000.0
) -> Rope:
  """RoPE's theta and its scaling, from either spelling.

  Args:
    hf: with `rope_theta` and `rope_scaling`, or the newer `rope_parameters`;
      and with `max_position_embeddings`.
    pairs: R/2, how many numbers a list of factors must have.
    theta: where the file has none.

  Raises:
    UserError: naming the key that asks for something unsupported.
  """
  key = 'rope_parameters' if hf.get('rope_parameters') else 'rope_scaling'
  rope = hf.get(key) or {}
  older = hf.get('rope_scaling')
  if older and _rope_type(older) != _rope_type(rope):
    raise UserError(
      'config.json: rope_parameters and rope_scaling are of different types'
    )
  theta = rope.get('rope_theta', hf.get('rope_theta', theta))
  if hf.get('rope_theta', theta) != theta:
    raise UserError(
      f'config.json: rope_theta is {hf["rope_theta"]} but '
      f'{key}.rope_theta is {short(json.dumps(theta))}'
    )
  if not is_positive(theta):
    raise UserError(
      f'config.json: {key}.rope_theta is {short(json.dumps(theta))}, not a '
      'positive number'
    )
  return Rope(float(theta), _scaling(rope, key, theta, hf, pairs))


def is_positive(value: Any) -> bool:
  """Whether a value of a file is a positive number that float32 holds."""
  return type(value) in (int, float) and 0 < value < 2**128


def rope_to_hf(rope: Rope) -> dict[str, Any]:
  """RoPE's keys in the older spelling, which every transformers reads."""
  written = None
  if rope.scaling:
    names = {scaling: name for name, scaling in SCALINGS.items()}
    written = {'rope_type': names[type(rope.scaling)]}
    for field in dataclasses.fields(rope.scaling):
      value = getattr(rope.scaling, field.name)
      if value != field.default:
        written[field.name] = list(value) if _is_list(field) else value
  hf = {'rope_theta': rope.theta, 'rope_scaling': written}
  if isinstance(rope.scaling, LongRope):  # transformers 4 reads this alone.
    hf[_ORIGINAL] = rope.scaling.original_max_position_embeddings
  return hf


def _scaling(
  rope: Mapping[str, Any],
  key: str,
  theta: float,
  hf: Mapping[str, Any],
  pairs: int,
) -> Scaling | None:
  """The scaling of `rope`, which is what config.json has under `key`."""
  kind = _rope_type(rope)
  if kind == 'default':
    return None
  if kind not in list(SCALINGS):  # A list has no hash.
    raise UserError(
      f'config.json: {key}.rope_type is {short(repr(kind))}; only default, '
      f'{", ".join(SCALINGS)} are supported'
    )
  given = {name: x for name, x in rope.items() if x is not None}
  if kind in ('yarn', 'longrope'):
    given |= _original(given, key, kind, hf)
  found, wrong = {}, []
  for field in dataclasses.fields(SCALINGS[kind]):
    is_right, text = _checked(field, pairs)
    value = given.get(field.name, field.default)
    if field.name not in given and value is not dataclasses.MISSING:
      found[field.name] = value
    elif is_right(value):
      found[field.name] = tuple(value) if _is_list(field) else value
    else:
      wrong.append(f'{field.name} ({text})')
  if not wrong:
    wrong = _impossible(found, kind, theta, pairs)
  if wrong:
    raise UserError(
      f'config.json: {key} of type {kind} needs {", ".join(wrong)}'
    )
  return SCALINGS[kind](**found)


def _original(
  given: Mapping[str, Any], key: str, kind: str, hf: Mapping[str, Any]
) -> dict[str, Any]:
  """The positions that a model was first trained on, and what they decide."""
  positions = hf['max_position_embeddings']
  # Phi-3 has them outside, which transformers prefers.
  original = hf.get(_ORIGINAL, given.get(_ORIGINAL, positions))
  if not is_positive(original):
    return {_ORIGINAL: original}
  ratio = positions / original
  factor = given.get('factor', ratio)
  if kind == 'longrope' and factor != ratio and 'attention_factor' not in given:
    # transformers 4 takes the ratio, 5 the factor.
    raise UserError(
      f'config.json: {key}.factor is {short(json.dumps(factor))}, but '
      f'max_position_embeddings / {_ORIGINAL} is {ratio}: give an '
      'attention_factor'
    )
  return {_ORIGINAL: original, 'factor': factor}


def _checked(
  field: dataclasses.Field, pairs: int
) -> tuple[Callable[[Any], bool], str]:
  """Whether a value of a file is one of this field, and what that is."""
  if field.type is bool:
    return lambda x: isinstance(x, bool), 'true or false'
  if field.name == _ORIGINAL:
    return lambda x: is_positive(x) and x <= MOST, 'a number of positions'
  if not _is_list(field):
    return is_positive, 'a positive number'

  def is_right(value: Any) -> bool:
    right_length = isinstance(value, list) and len(value) == pairs
    return right_length and all(map(is_positive, value))

  return is_right, f'a list of {pairs} positive numbers'


def _impossible(
  found: Mapping[str, Any], kind: str, theta: float, pairs: int
) -> list[str]:
  """What numbers that are right by themselves lack together."""
  if kind == 'dynamic' and pairs < 2:
    return ['heads of more than 2 dimensions']
  if kind == 'yarn' and theta <= 1:
    return ['a rope_theta above 1']
  if kind == 'longrope' and found[_ORIGINAL] <= 1:
    return [f'an {_ORIGINAL} above 1']
  if kind == 'llama3' and found['high_freq_factor'] <= found['low_freq_factor']:
    return ['a high_freq_factor above its low_freq_factor']
  return []


def _is_list(field: dataclasses.Field) -> bool:
  return field.type == tuple[float, ...]


def _rope_type(rope: Mapping[str, Any]) -> str:
  kind = rope.get('rope_type', rope.get('type', 'default'))
  # Older names of Phi-3's.
  is_long = kind == 'su' or kind == 'yarn' and 'short_factor' in rope
  return 'longrope' if is_long else kind
