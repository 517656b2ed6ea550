"""Reading from a GGUF how layers turn and how far they see.

A file may say the same in two ways, by keys and by tables: what is read is
compared with what we would write.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from lorapr_jax.errors import UserError, short
from lorapr_jax.gguf.archs import ARCHS
from lorapr_jax.gguf.format import OWN, Metadata, shortest
from lorapr_jax.gguf.header import Tensor
from lorapr_jax.gguf.kinds import SLIDING, TURNING, WINDOW, read_kinds
from lorapr_jax.gguf.rope import (
  DIMENSIONS,
  OWN_ROTARY_DIM,
  OWN_SCALING,
  SCALING_TYPE,
  TEMPERATURE,
  THETA,
  given_scaling,
  rope_keys,
  rope_tables,
)
from lorapr_jax.hf.rope import rope_from_hf
from lorapr_jax.models.config import ModelConfig


def with_rope(
  config: ModelConfig,
  metadata: Metadata,
  arch: str,
  tensors: dict[str, Tensor],
) -> ModelConfig:
  """The config with the RoPE that the keys say and tables come from.

  Args:
    config: the other sizes.
    metadata: of the file, from which the keys are removed.
    arch: the name of its architecture.
    tensors: its tables.

  Raises:
    UserError: naming a key or a table that says what is not supported, or
      contradicts another.
  """
  keys = _take_rope_keys(metadata, arch)
  for name, tensor in tensors.items():
    if tensor.shape != (config.head_dim // 2,) or not tensor.is_readable:
      raise metadata.error(_strange_table(name))
  tables = {name: tensor[:] for name, tensor in tensors.items()}
  turned = keys.get(OWN_ROTARY_DIM, config.head_dim)
  if ARCHS[arch].rope.parts:
    turned = keys.get(DIMENSIONS, config.head_dim)
  if type(turned) is not int or turned % 2 or not 0 < turned <= config.head_dim:
    raise metadata.error(
      f'RoPE turns {short(repr(turned))} of {config.head_dim} dimensions'
    )
  given = given_scaling(keys, tables)
  hf = {
    'rope_theta': keys.get(THETA, 10000.0),
    'rope_scaling': given,
    'max_position_embeddings': config.max_positions,
  }
  try:
    rope = rope_from_hf(hf, turned // 2, hf['rope_theta'])
  except UserError as error:
    problem = str(error).removeprefix('config.json: ')
    raise metadata.error(f'{arch}.{SCALING_TYPE}: {problem}') from None
  try:
    kinds = read_kinds(keys, ARCHS[arch].kinds, rope, len(config.layers))
  except ValueError as error:
    raise metadata.error(f'{arch}.{error}') from None
  config = dataclasses.replace(
    config,
    **kinds,
    rotary_dim=None if turned == config.head_dim else turned,
  )
  _check_rope(metadata, arch, config, keys, tables)
  return config


def _take_rope_keys(metadata: Metadata, arch: str) -> dict[str, Any]:
  """Removes the keys of RoPE; those of llama.cpp without the architecture."""
  keys, others = {}, {TEMPERATURE}
  if ARCHS[arch].kinds.period is not None:
    others |= {WINDOW, SLIDING, TURNING}
  for key in list(metadata):
    name = key.removeprefix(f'{arch}.')
    if key == OWN_ROTARY_DIM or key.startswith(OWN_SCALING):
      name = key
    elif name == key or not (name.startswith('rope.') or name in others):
      continue
    value = metadata.pop(key)
    if isinstance(value, list):
      value = [shortest(x) if isinstance(x, float) else x for x in value]
    keys[name] = shortest(value) if isinstance(value, float) else value
  return keys


def _check_rope(
  metadata: Metadata,
  arch: str,
  config: ModelConfig,
  keys: dict[str, Any],
  tables: dict[str, np.ndarray],
) -> None:
  """Compares what a file says of RoPE with what we would write."""
  says = ARCHS[arch].rope
  expected = rope_keys(config, says)
  for key, value in keys.items():
    shown = key if key.startswith(OWN) else f'{arch}.{key}'
    if (key, value) == (SCALING_TYPE, 'none'):
      continue
    if key not in expected or type(value) is not type(expected[key]):
      raise metadata.error(
        f'{shown} is {short(repr(value))}, which is not supported'
      )
    same = value == expected[key]
    if isinstance(value, float):
      same = math.isclose(value, expected[key], rel_tol=1e-5)
    if not same:
      raise metadata.error(
        f'{shown} is {short(repr(value))}, but its other keys mean '
        f'{expected[key]!r}'
      )
  ours = rope_tables(config, says)
  for name in tables.keys() | ours.keys():
    # Other programs compute their tables in float32.
    if not (
      name in tables
      and name in ours
      and np.allclose(tables[name], ours[name], rtol=1e-4)
    ):
      raise metadata.error(_strange_table(name))


def _strange_table(name: str) -> str:
  return (
    f'tensor {name} holds a RoPE scaling as a table, which is not that of '
    'Llama 3 or of the keys; start from the original Hugging Face folder'
  )
