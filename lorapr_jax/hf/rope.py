"""The keys of a config.json that say how RoPE turns, and back."""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from lorapr_jax.errors import UserError, short
from lorapr_jax.models.config import RopeScaling


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  """RoPE's theta and its scaling, from either spelling.

  Args:
    hf: with `rope_theta` and `rope_scaling`, or the newer `rope_parameters`.

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
  theta = rope.get('rope_theta', hf.get('rope_theta', 10000.0))
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
  if rope.get('partial_rotary_factor', 1.0) != 1.0:
    raise UserError(
      f'config.json: {key}.partial_rotary_factor is not supported'
    )
  kind = _rope_type(rope)
  if kind == 'default':
    return float(theta), None
  if kind != 'llama3':
    raise UserError(
      f'config.json: {key}.rope_type is {short(repr(kind))}; only default and '
      'llama3 are supported'
    )
  fields = [field.name for field in dataclasses.fields(RopeScaling)]
  missing = [f for f in fields if not is_positive(rope.get(f))]
  if missing:
    raise UserError(
      f'config.json: {key} of type llama3 needs the numbers '
      + ', '.join(missing)
    )
  scaling = RopeScaling(**{field: rope[field] for field in fields})
  if scaling.high_freq_factor <= scaling.low_freq_factor:
    raise UserError(
      f'config.json: {key} has a high_freq_factor that is not above its '
      'low_freq_factor'
    )
  return float(theta), scaling


def is_positive(value: Any) -> bool:
  """Whether a value of a file is a positive number that float32 holds."""
  return type(value) in (int, float) and 0 < value < 2**128


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
  """RoPE's keys in the older spelling, which every transformers reads."""
  written = None
  if scaling:
    written = {'rope_type': 'llama3', **dataclasses.asdict(scaling)}
  return {'rope_theta': theta, 'rope_scaling': written}


def _rope_type(rope: Mapping[str, Any]) -> str:
  return rope.get('rope_type', rope.get('type', 'default'))
