"""The keys of a config.json that tell layers apart: windows and rotations."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorapr_jax.errors import UserError, short
from lorapr_jax.hf.rope import is_positive, rope_from_hf, rope_to_hf
from lorapr_jax.models.config import ModelConfig, kind_fields
from lorapr_jax.models.family import FULL, SLIDING, Family, layer_keys
from lorapr_jax.models.rope import Rope

_ORIGINAL = 'original_max_position_embeddings'
_PARTIAL = 'partial_rotary_factor'


def kinds_from_hf(
  hf: Mapping[str, Any], family: Family, num_layers: int, head_dim: int
) -> dict[str, Any]:
  """What config.json says of its layers' windows and of how they turn.

  Args:
    hf: the file's contents, without nulls, and with what is absent.
    family: its row.
    num_layers: of the model.
    head_dim: H.

  Returns:
    The fields `windows`, `ropes`, `rope_of_layer` and `rotary_dim` of a
    ModelConfig.

  Raises:
    UserError: naming the key that asks for something unsupported.
  """
  turned = hf.get('no_rope_layers')
  if turned is not None and len(turned) < num_layers:
    raise UserError(
      f'config.json: no_rope_layers has {len(turned)} entries for '
      f'{num_layers} layers'
    )
  slides = _slides(hf, family, num_layers)
  window = _window(hf)
  if window is None and hf.get('layer_types') and any(slides):
    raise UserError(
      f'config.json: layer_types has {SLIDING}, but there is no sliding_window'
    )
  windows = tuple(window if x else None for x in slides)
  rotary_dim = _rotary_dim(hf, family, head_dim)
  pairs = rotary_dim // 2
  base, ropes = _rope(hf, family, FULL, pairs), []
  for i, slide in enumerate(slides):
    rope = base
    if family.turns is not None and not family.turns(hf, i):
      rope = None
    elif slide and family.local_theta is not None:
      rope = _rope(hf, family, SLIDING, pairs)
    ropes.append(rope)
  return {
    **kind_fields(base, windows, ropes),
    'rotary_dim': None if rotary_dim == head_dim else rotary_dim,
  }


def kinds_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
  """The keys of a family's config.json from which `kinds_from_hf` reads."""
  keys, hf = layer_keys(config), {}
  window = keys['sliding_window']
  if family.slides is not None:
    hf['sliding_window'] = window
    if family.has_layer_types:
      hf['layer_types'] = keys['layer_types']
  if 'use_sliding_window' in family.absent:
    hf['use_sliding_window'] = window is not None
  if 'max_window_layers' in family.absent:
    hf['max_window_layers'] = [*keys['layer_types'], SLIDING].index(SLIDING)
  if 'no_rope_layer_interval' in family.absent:
    hf['no_rope_layers'] = keys['no_rope_layers']
  first, *others = filter(None, config.ropes)
  hf |= rope_to_hf(first)
  if 'rope_scaling' in family.absent and first.scaling is None:
    hf['rope_scaling'] = {'rope_type': 'default'}
  if _ORIGINAL in family.absent and _ORIGINAL in hf:
    # transformers 4 refuses a Phi-3 whose scaling has other keys.
    scaling = {'type': hf['rope_scaling'].pop('rope_type')}
    scaling |= hf['rope_scaling']
    hf['rope_scaling'] = {k: x for k, x in scaling.items() if k != _ORIGINAL}
  if _PARTIAL in family.absent:
    hf[_PARTIAL] = config.rotated / config.head_dim
  if family.local_theta is not None:
    hf[family.local_theta] = (others or [first])[0].theta
  return hf


def _rotary_dim(hf: Mapping[str, Any], family: Family, head_dim: int) -> int:
  """R, how many of a head's dimensions turn."""
  key, found = _PARTIAL, hf.get(_PARTIAL, 1.0)
  newer = hf.get('rope_parameters') or {}
  if _PARTIAL in newer:
    key, found = f'rope_parameters.{_PARTIAL}', newer[_PARTIAL]
  if found != 1.0 and _PARTIAL not in family.absent:
    raise UserError(
      f'config.json: {key} is {short(repr(found))}; only 1.0 is supported'
    )
  is_share = is_positive(found) and found <= 1
  # A share that was written as a quotient is not cut down to one less.
  size = int(head_dim * found + 1e-6) if is_share else 0
  if size < 2 or size % 2:
    raise UserError(
      f'config.json: {key} is {short(repr(found))}, which leaves no pairs of '
      f'{head_dim} dimensions to turn'
    )
  return size


def _slides(
  hf: Mapping[str, Any], family: Family, num_layers: int
) -> Sequence[bool]:
  """By layer, whether it is one of those with a window."""
  types = hf.get('layer_types') if family.has_layer_types else None
  if types is None:
    if family.slides is None or _window(hf) is None:
      return [False] * num_layers
    if isinstance(hf.get('sliding_window_pattern'), str):
      raise UserError(
        'config.json: sliding_window_pattern is a text, and there is no '
        'layer_types that says which layers have a window'
      )
    return [family.slides(hf, i) for i in range(num_layers)]
  known = {FULL} if family.slides is None else {FULL, SLIDING}
  if others := set(types) - known:
    raise UserError(
      f'config.json: layer_types has {short(repr(sorted(others)))}; only '
      f'{" and ".join(sorted(known))} {"are" if len(known) > 1 else "is"} '
      'supported'
    )
  if len(types) != num_layers:
    raise UserError(
      f'config.json: layer_types has {len(types)} entries for '
      f'{num_layers} layers'
    )
  return [x == SLIDING for x in types]


def _window(hf: Mapping[str, Any]) -> int | None:
  used = hf.get('use_sliding_window', True)
  return hf.get('sliding_window') if used else None


def _rope(
  hf: Mapping[str, Any], family: Family, layer_type: str, pairs: int
) -> Rope:
  """How layers of this type turn."""
  newer = hf.get('rope_parameters') or {}
  if layer_type in newer:
    hf = {**hf, 'rope_parameters': newer[layer_type]}
  elif layer_type == SLIDING:  # The older style: another theta, no scaling.
    return Rope(float(hf[family.local_theta]))
  return rope_from_hf(hf, pairs, family.absent.get('rope_theta', 10000.0))
