"""The smallest slice of TPUs that a run fits on; nothing is loaded or run."""

from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import config_dict

from lorapr_jax.errors import MeshError
from lorapr_jax.planning.functions import bytes_of
from lorapr_jax.planning.needs import Needs, plan_run
from lorapr_jax.planning.topology import SLICES, Topology
from lorapr_jax.runtime import sharding
from lorapr_jax.settings.run import split_config
from lorapr_jax.training.base import Places, weight_shapes


class Tried(NamedTuple):
  """A slice and a mesh that were tried.

  Attributes:
    topology: the slice.
    mesh: {axis: size}.
    base: bytes of the base on each chip; 0 if the mesh does not divide it.
    needs: those of the functions that were compiled, up to the first that does
      not fit; empty if none was compiled.
    reason: why none was compiled.
  """

  topology: Topology
  mesh: dict[str, int]
  base: int = 0
  needs: tuple[Needs, ...] = ()
  reason: str = ''

  @property
  def fits(self) -> bool:
    """Whether every function fits."""
    return bool(self.needs) and all(needs.fits for needs in self.needs)


def search(config: config_dict.ConfigDict, kind: str) -> Iterator[Tried]:
  """Tries slices from one chip up; the last one that comes fits, if any does.

  On each slice, the first mesh divides the base over all chips (fsdp); the next
  ones also divide its heads over 2, 4 and 8 chips (tensor). Nothing is compiled
  where the base alone does not fit. The config's section mesh is overwritten.

  Raises:
    UserError: for a mistake in the config that no mesh repairs.
  """
  for sizes in SLICES[kind]:
    topology = Topology.of(f'{kind}:{sizes}')
    count = len(topology.devices)
    for tensor in (1, 2, 4, 8):
      if count % tensor:
        break
      mesh = sharding.mesh_sizes(1, -1, tensor, devices=count)
      tried = try_mesh(config, topology, mesh)
      yield tried
      if tried.fits:
        return


def try_mesh(
  config: config_dict.ConfigDict, topology: Topology, mesh: dict[str, int]
) -> Tried:
  """Tries one slice and mesh, which overwrites the section of the config.

  Nothing is compiled if the base alone does not fit.

  Raises:
    UserError: for a mistake in the config that no mesh repairs.
  """
  config.mesh.update(mesh)
  try:
    settings = split_config(config, topology.devices)
    sizes, dtype = settings.compute.config, settings.base_dtype
    # Refuses a micro-batch that the mesh does not divide, too.
    places = Places.of(settings.mesh, sizes, dtype, settings.train.micro_batch)
    base = bytes_of(weight_shapes(places.mesh, sizes, dtype))
  except MeshError as error:
    return Tried(topology, mesh, reason=str(error))
  if base > topology.chip.hbm:
    reason = f'the base alone takes {base / 1e9:.1f} GB'
    return Tried(topology, mesh, base, reason=reason)
  found: tuple[Needs, ...] = ()
  for needs in plan_run(config, topology):
    found += (needs,)
    if not needs.fits:
      break
  return Tried(topology, mesh, base, found)
