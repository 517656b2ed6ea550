"""What settings come to on the devices of a run, or why they cannot."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lorapr_jax.errors import UserError, first_line
from lorapr_jax.runtime.processor import cpuinfo
from lorapr_jax.settings.sections import TrainSettings


def resolve_matmul_dtype(name: str, activations: Any, platform: str) -> Any:
  """Of the training step's products; `auto` is the fastest that loses little.

  That is the activations' dtype, but bfloat16 for float32 activations on a CPU
  with instructions for it: AVX512-BF16 multiplies twice as fast, AMX three
  times and more.
  """
  if name != 'auto':
    return jnp.dtype(name)
  if platform == 'cpu' and _cpu_flags() & {'amx_bf16', 'avx512_bf16'}:
    return jnp.dtype('bfloat16')
  return activations


def _cpu_flags() -> frozenset[str]:
  """What Linux says that the processor can do; empty elsewhere."""
  return frozenset(cpuinfo('flags').split())


def resolve_loss_chunk(
  train: TrainSettings, mesh: dict[str, int], platform: str
) -> int:
  """Tokens: by default as many as keep the matrix units busy, on each device.

  A chunk's tokens are cut over data and sequence, its vocabulary over fsdp and
  tensor.
  """
  if train.loss_chunk:
    return train.loss_chunk
  each = 128 if platform == 'cpu' else 512
  return each * mesh['data'] * mesh['fsdp'] * mesh['sequence']


def resolve_compiler_options(
  text: str, devices: Sequence[jax.Device]
) -> tuple[tuple[str, str | bool], ...]:
  """NAME=VALUE,... as the compiler of these devices takes them.

  Raises:
    UserError: for one that it does not know, or a value that it does not take.
  """
  options: dict[str, str | bool] = {}
  for part in filter(None, text.split(',')):
    name, equals, value = (x.strip() for x in part.partition('='))
    if not (name and equals and value):
      raise UserError(f'train.compiler_options is {text!r}: NAME=VALUE,...')
    # Some of XLA's parsers know one spelling alone.
    options[name] = {'true': True, 'false': False}.get(value.lower(), value)
  if options:
    own = (x for x in devices if x.process_index == jax.process_index())
    place = SingleDeviceSharding(next(own, devices[0]))
    nothing = jax.jit(lambda: jnp.int32(0), out_shardings=place)
    try:
      nothing.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      raise UserError(
        f'train.compiler_options is {text!r}: {first_line(error)}'
      ) from None
  return tuple(options.items())
