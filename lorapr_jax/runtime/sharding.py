"""Where tensors lie: mesh axes for axis names, and shardings from them."""

from collections.abc import Sequence
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from lorapr_jax.errors import MeshError, UserError
from lorapr_jax.runtime import compilation_cache

AXES = ('data', 'fsdp', 'sequence', 'tensor')
# Where each axis of a tensor lies on the mesh. A name that is not here is an
# error, so that a new tensor cannot be replicated by accident.
RULES: dict[str, str | tuple[str, ...] | None] = {
  'accumulation': None,
  'batch': ('data', 'fsdp'),
  'embed': ('fsdp', 'sequence'),
  'head_dim': None,
  'kv_heads': 'tensor',
  'layers': None,
  'length': 'sequence',
  'mlp': 'tensor',
  'queries_per_kv': None,
  'rank': None,
  'shared': None,
  'vocab': 'tensor',
}


def mesh_sizes(
  data: int,
  fsdp: int,
  tensor: int,
  sequence: int = 1,
  devices: int | None = None,
) -> dict[str, int]:
  """The size of each mesh axis. One may be -1: it gets the devices left over.

  Without `devices` they are all of this machine or pod.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  sizes = dict(zip(AXES, (data, fsdp, sequence, tensor), strict=True))
  asked = ', '.join(f'mesh.{axis}={size}' for axis, size in sizes.items())
  devices = devices or jax.device_count()
  given = math.prod(size for size in sizes.values() if size != -1)
  free = [axis for axis, size in sizes.items() if size == -1]
  if len(free) == 1 and given > 0:
    sizes[free[0]] = devices // given
  if min(sizes.values()) < 1 or math.prod(sizes.values()) != devices:
    raise UserError(
      f'{asked} do not multiply to the {devices} devices that there are: set '
      'one of them to -1 for the rest, the others to divisors'
    )
  return sizes


def divisors(size: int, most: int) -> str:
  """The divisors of a size, up to `most`, for a message: '1, 2 or 4'."""
  found = [str(n) for n in range(1, min(size, most) + 1) if size % n == 0]
  return ' or '.join(filter(None, (', '.join(found[:-1]), found[-1])))


def make_mesh(
  sizes: dict[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over some devices, or over all, with the sizes from `mesh_sizes`.

  An axis that `sizes` leaves out has size 1. If these are several CPU devices,
  JAX's compilation cache is turned off.
  """
  devices = jax.devices() if devices is None else devices
  compilation_cache.disable_on_cpu_meshes(devices)
  sizes = {axis: sizes.get(axis, 1) for axis in AXES}
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices,
  )


def platform(place: Sharding | None) -> str:
  """The kind of a sharding's devices, or of the default one: cpu, gpu, tpu."""
  if place is None:
    return jax.default_backend()
  return next(iter(place.device_set)).platform


def compute_capability(device: Any) -> tuple[int, int] | None:
  """The compute capability of an NVIDIA GPU, as (9, 0); of others None."""
  found = re.fullmatch(
    r'(\d+)\.(\d+)', str(getattr(device, 'compute_capability', None))
  )
  return (int(found[1]), int(found[2])) if found else None


def mesh_of(place: Sharding) -> Mesh | None:
  """The mesh of a sharding; None if it is a single device."""
  return place.mesh if isinstance(place, NamedSharding) else None


def sharding(
  mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...] | None = None
) -> NamedSharding:
  """The sharding of a tensor with these axis names.

  Where `shape` is given, its sizes are checked against the mesh.

  Raises:
    MeshError: naming the axis, its size and the mesh axis that does not
      divide it.
  """
  spec = P(*(RULES[name] for name in axes))
  for name, places, size in zip(axes, spec, shape or (), strict=False):
    cut = [place for place in _places(places) if mesh.shape[place] > 1]
    count = math.prod(mesh.shape[place] for place in cut)
    if size % count:
      raise MeshError(
        f'{name} has size {size}, which mesh.{"*".join(cut)}={count} does not '
        f'divide: {divisors(size, mesh.size)} would do'
      )
  return NamedSharding(mesh, spec)


def _places(rule: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (rule,) if isinstance(rule, str) else rule or ()


def shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
  """The sharding of every tensor of a tree, sizes checked.

  `shapes` has an array or a `jax.ShapeDtypeStruct` for each `Axes`.
  """
  return jax.tree.map(lambda a, x: sharding(mesh, a, x.shape), axes, shapes)


def beside(params: Any, axes: tuple[str, ...]) -> Sharding:
  """The sharding of a tensor with these axis names, on the weights' devices.

  Without axis names the tensor is whole on each device. Sizes are not checked;
  see `batch_parts`.
  """
  place = params['norm']['weight'].sharding
  mesh = mesh_of(place)
  return place if mesh is None else sharding(mesh, axes)


def parts(mesh: Mesh | None, name: str) -> int:
  """The number of parts into which an axis of this name is cut."""
  if mesh is None:
    return 1
  return math.prod(mesh.shape[place] for place in _places(RULES[name]))


def batch_parts(params: Any) -> int:
  """The number of parts into which a batch is cut, on the weights' devices."""
  return parts(mesh_of(params['norm']['weight'].sharding), 'batch')
