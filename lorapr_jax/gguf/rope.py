"""How a GGUF says the way in which RoPE turns, and back.

llama.cpp knows two of its scalings by their keys. The others, and the turn of a
part of each head, it has from a table by which the frequencies are divided. No
table tells the numbers that it comes from: these are beside it, under keys of
our own, which llama.cpp skips.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.rope import (
  SCALINGS,
  Dynamic,
  Linear,
  Llama3,
  LongRope,
  Rope,
  Yarn,
)

FACTORS = 'rope_freqs.weight'
SHORT, LONG = 'rope_factors_short.weight', 'rope_factors_long.weight'
TABLES = FACTORS, SHORT, LONG
DIMENSIONS, THETA = 'rope.dimension_count', 'rope.freq_base'
SCALING_TYPE, FACTOR = 'rope.scaling.type', 'rope.scaling.factor'
ORIGINAL = 'rope.scaling.original_context_length'
ATTENTION = 'rope.scaling.attn_factor'
BETA_FAST = 'rope.scaling.yarn_beta_fast'
BETA_SLOW = 'rope.scaling.yarn_beta_slow'
TEMPERATURE = 'attention.temperature_scale'
# Keys of our own.
OWN_SCALING = 'lorapr_jax.rope_scaling.'
OWN_ROTARY_DIM = 'lorapr_jax.rotary_dim'
_ORIGINAL_FIELD = 'original_max_position_embeddings'
# What divides the frequency of a pair that does not turn.
_STILL = 1e30


class Says(NamedTuple):
  """What an architecture can say of RoPE.

  Attributes:
    tables: that frequencies are divided by the numbers of a table.
    parts: that a part of each head turns.
    betas: YaRN's `beta_fast` and `beta_slow`, and a scale of queries by their
      position.
  """

  tables: bool = False
  parts: bool = False
  betas: bool = False


def rope_lacks(config: ModelConfig, says: Says) -> str | None:
  """What of a model's RoPE cannot be said, in words."""
  scaling = config.ropes[0].scaling
  names = {kind: name for name, kind in SCALINGS.items()}
  in_table = _in_table(scaling, says)
  if isinstance(scaling, Dynamic) or (in_table and not says.tables):
    return f'RoPE scaling of this type ({names[type(scaling)]})'
  if _beta(scaling) is not None and not says.betas:
    return 'scale of queries by their position'
  if config.rotated == config.head_dim or says.parts:
    return None
  if not says.tables:
    return 'RoPE of a part of each head'
  # By a table all turn, some by nothing; and all grow.
  grows = not math.isclose(_magnitude(config), 1.0, rel_tol=1e-6)
  return 'RoPE by which a part of each head grows' if grows else None


def _beta(scaling: Any) -> float | None:
  return getattr(scaling, 'llama_4_scaling_beta', None)


def rope_keys(config: ModelConfig, says: Says) -> dict[str, Any]:
  """The keys of RoPE; those of llama.cpp follow the architecture's name."""
  rope, turned = config.ropes[0], config.rotated
  keys = {
    DIMENSIONS: turned if says.parts else config.head_dim,
    THETA: float(rope.theta),
  }
  if keys[DIMENSIONS] != turned:
    keys[OWN_ROTARY_DIM] = turned
  scaling = rope.scaling
  if scaling is None:
    return keys
  if isinstance(scaling, Linear):
    keys |= {SCALING_TYPE: 'linear', FACTOR: float(scaling.factor)}
  attention = _magnitude(config)
  if isinstance(scaling, Yarn) and not _in_table(scaling, says):
    keys |= {SCALING_TYPE: 'yarn', FACTOR: float(scaling.factor)}
    attention /= yarn_magnitude(scaling.factor)
    if says.betas:
      keys[BETA_FAST] = float(scaling.beta_fast)
      keys[BETA_SLOW] = float(scaling.beta_slow)
  if isinstance(scaling, LongRope):
    keys[SCALING_TYPE] = 'longrope'
  if (beta := _beta(scaling)) is not None:
    keys[TEMPERATURE] = float(beta)
  if hasattr(scaling, _ORIGINAL_FIELD) and keys.keys() & {
    SCALING_TYPE,
    TEMPERATURE,
  }:
    keys[ORIGINAL] = int(getattr(scaling, _ORIGINAL_FIELD))
  if not math.isclose(attention, 1.0, rel_tol=1e-6):
    keys[ATTENTION] = attention
  return keys | dict(_own_keys(scaling))


def rope_tables(config: ModelConfig, says: Says) -> dict[str, np.ndarray]:
  """The tables by which llama.cpp divides the frequencies, float32, by name.

  Each is (H/2,): llama.cpp's own theta^(-2i/H) over the frequency of pair i.
  """
  scaling = config.ropes[0].scaling
  if isinstance(scaling, LongRope):
    original = scaling.original_max_position_embeddings
    return {SHORT: _table(config, original), LONG: _table(config, original + 1)}
  is_part = config.rotated != config.head_dim and not says.parts
  if _in_table(scaling, says) or is_part:
    return {FACTORS: _table(config, 1)}
  return {}


def yarn_magnitude(factor: float) -> float:
  """By how much cosine and sine grow in llama.cpp's own YaRN."""
  return 1.0 + 0.1 * math.log(factor)


def _in_table(scaling: Any, says: Says) -> bool:
  """Whether no key says this scaling."""
  if isinstance(scaling, Yarn):
    # llama.cpp has these numbers' usual values, whatever the file says.
    plain = Yarn(scaling.original_max_position_embeddings, scaling.factor)
    usual = ['truncate'] + ['beta_fast', 'beta_slow'] * (not says.betas)
    return scaling.factor <= 1 or any(
      getattr(scaling, name) != getattr(plain, name) for name in usual
    )
  return isinstance(scaling, Llama3 | LongRope)


def _own_keys(scaling: Any) -> Iterator[tuple[str, Any]]:
  names = {kind: name for name, kind in SCALINGS.items()}
  yield f'{OWN_SCALING}rope_type', names[type(scaling)]
  for field in dataclasses.fields(scaling):
    match getattr(scaling, field.name):
      case None:
        continue
      case bool() as value:
        pass
      case tuple() as numbers:
        value = [float(x) for x in numbers]
      case number:
        is_count = field.name == _ORIGINAL_FIELD
        value = int(number) if is_count else float(number)
    yield OWN_SCALING + field.name, value


def _magnitude(config: ModelConfig) -> float:
  # What only reads sizes and names starts without JAX.
  from lorapr_jax.models.rotation import magnitude

  return magnitude(config.ropes[0].scaling, config.max_positions)


def _table(config: ModelConfig, length: int) -> np.ndarray:
  """The table for texts of this length."""
  from lorapr_jax.models.rotation import rope_frequencies

  rope, turned = config.ropes[0], config.rotated // 2
  plain, ours = (
    np.asarray(rope_frequencies(size, x, length, config.max_positions))
    for size, x in (
      (config.head_dim, Rope(rope.theta)),
      (config.rotated, rope),
    )
  )
  table = np.full(config.head_dim // 2, _STILL, np.float32)
  table[:turned] = plain[:turned] / ours
  return table


def given_scaling(
  keys: Mapping[str, Any], tables: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """What a file says of its scaling, as a config.json's `rope_scaling` does.

  Args:
    keys: of the file, those of llama.cpp without the architecture's name.
    tables: of the file.
  """
  own = {
    key.removeprefix(OWN_SCALING): value
    for key, value in keys.items()
    if key.startswith(OWN_SCALING)
  }
  if own:  # Files of earlier versions have no type, and Llama 3's numbers.
    return {'rope_type': 'llama3', **own}
  kind = keys.get(SCALING_TYPE, 'none' if FACTOR not in keys else 'linear')
  is_part = OWN_ROTARY_DIM in keys  # Of which the table is.
  if FACTORS in tables and kind == 'none' and not is_part:
    # As llama.cpp's converter writes it. Of Llama 3's numbers, only the factor
    # varies from model to model.
    llama3 = Llama3(float(tables[FACTORS].max()), 1.0, 4.0, 8192)
    return {'rope_type': 'llama3', **dataclasses.asdict(llama3)}
  if kind == 'none':
    return {}
  given = {'rope_type': kind, 'factor': keys.get(FACTOR)}
  attention = keys.get(ATTENTION, 1.0)
  if kind == 'yarn' and isinstance(given['factor'], float):
    attention *= yarn_magnitude(max(given['factor'], 1.0))
  if kind != 'linear':
    given |= {_ORIGINAL_FIELD: keys.get(ORIGINAL)}
    given['attention_factor'] = attention
  if kind == 'yarn':
    given |= {
      'beta_fast': keys.get(BETA_FAST, Yarn.beta_fast),
      'beta_slow': keys.get(BETA_SLOW, Yarn.beta_slow),
      'llama_4_scaling_beta': keys.get(TEMPERATURE),
    }
  if kind == 'longrope':
    lists = {'short_factor': SHORT, 'long_factor': LONG}
    given |= {k: tables[x].tolist() for k, x in lists.items() if x in tables}
  return given
