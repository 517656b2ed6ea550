"""Devices to compile for, which need not exist here: TPU slices, or CPUs."""

import dataclasses
import re

import jax

from lorapr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip has.

  Attributes:
    flops: operations a second, in products of bfloat16 matrices.
    hbm: bytes of memory that the compiler lets a program use.
    hbm_bandwidth: bytes a second between the chip and its memory.
    interconnect: bytes a second to other chips, in one direction.
  """

  flops: float
  hbm: float
  hbm_bandwidth: float
  interconnect: float


_GIB = 2.0**30
# Peaks: the pages of v5e, v5p and v6e at docs.cloud.google.com/tpu (whose
# interconnect's bandwidth is of both directions together), and of v4 arXiv
# 2304.01433, table 4. Memory: the TPU compiler's messages, libtpu 0.0.42.
CHIPS = {
  'v4': Chip(275e12, 30.75 * _GIB, 1200e9, 300e9),
  'v5e': Chip(197e12, 15.75 * _GIB, 819e9, 200e9),
  'v5p': Chip(459e12, 95.74 * _GIB, 2765e9, 600e9),
  'v6e': Chip(918e12, 31.25 * _GIB, 1600e9, 400e9),
}
# Slices to search, by their number of chips.
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_DEEP = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8')
SLICES = {
  'v4': _DEEP,
  'v5e': _FLAT,
  'v5p': ('1x1x1', *_DEEP),
  'v6e': _FLAT,
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to compile for.

  Attributes:
    name: such as v5e:4x4.
    devices: all of them.
    chip: of a TPU; None: a CPU.
  """

  name: str
  devices: tuple[jax.Device, ...]
  chip: Chip | None

  @classmethod
  def of(cls, name: str) -> 'Topology':
    """By name: KIND:AxB or KIND:AxBxC of a TPU slice, or cpu:N.

    Raises:
      UserError: for a name that means nothing, a slice that the compiler does
        not know, or without it.
    """
    kind, _, sizes = name.partition(':')
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){0,2}', sizes) or (
      kind not in CHIPS and kind != 'cpu'
    ):
      raise UserError(
        f'--topology={name}: KIND:AxB or KIND:AxBxC with KIND of '
        f'{", ".join(CHIPS)}, such as v5e:4x4 or v5p:2x2x1, or cpu:8'
      )
    if kind == 'cpu':
      return cls(name, _cpu_devices(name, sizes), None)
    return cls(name, _tpu_devices(name), CHIPS[kind])


def _cpu_devices(name: str, sizes: str) -> tuple[jax.Device, ...]:
  count = int(sizes) if sizes.isdigit() else 0
  devices = jax.devices('cpu')
  if not 0 < count <= len(devices):
    raise UserError(
      f'--topology={name}: there are {len(devices)} CPU devices: choose a '
      f'number from 1, or set XLA_FLAGS='
      f'--xla_force_host_platform_device_count={count or "N"}'
    )
  return tuple(devices[:count])


def _tpu_devices(name: str) -> tuple[jax.Device, ...]:
  from jax.experimental import topologies

  kind, _, sizes = name.partition(':')
  # A host of four chips, or fewer where the slice is smaller.
  hosts = [2 if int(size) % 2 == 0 else 1 for size in sizes.split('x')[:2]]
  more = {'chips_per_host_bounds': (*hosts, *[1] * (3 - len(hosts)))}
  if kind == 'v4':  # Else each half of a chip is a device.
    more['chip_config_name'] = 'megacore'
  try:
    found = topologies.get_topology_desc(name, platform='tpu', **more)
  except RuntimeError as error:  # Of JAX, or of libtpu by way of it.
    reason = str(error).splitlines()[0]
    if 'not installed' in reason:
      reason = "the TPU's compiler is missing: pip install 'jax[tpu]'"
    raise UserError(f'--topology={name}: {reason}') from None
  return tuple(found.devices)
