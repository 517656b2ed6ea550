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
from lorapr_jax.training.base import weight_shapes


class Tried(NamedTuple):
  """A slice and a mesh that were looked at.

  Attributes:
    topology: the slice.
    mesh: the sizes of its axes.
    base: bytes of the base on each chip; 0 where the mesh cannot cut it.
    needs: of the functions that were compiled: all, or up to one that does not
      fit; empty where none was.
    reason: why none was.
  """

  topology: Topology
  mesh: dict[str, int]
  base: int = 0
  needs: tuple[Needs, ...] = ()
  reason: str = ''

  @property
  def fits(self) -> bool:
    """Whether every function does."""
    return bool(self.needs) and all(needs.fits for needs in self.needs)

  @property
  def bytes(self) -> int:
    """Of a chip: what the function that takes most does, or the base alone."""
    return max((n.refused or n.total for n in self.needs), default=self.base)


def search(config: config_dict.ConfigDict, kind: str) -> Iterator[Tried]:
  """From one chip up, until all functions fit: the last one that comes does.

  On a slice the base lies over all chips (fsdp) first, then its heads over two
  and more (tensor). What cannot fit for the base alone is not compiled.

  Args:
    config: of the run; its section mesh is written.
    kind: of chips.

  Raises:
    UserError: for a mistake in the config that no mesh makes good.
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
  """One slice and mesh. What cannot fit for the base alone is not compiled.

  Args:
    config: of the run; its section mesh is written.
    topology: the slice.
    mesh: the sizes of its axes.

  Raises:
    UserError: for a mistake in the config that no mesh makes good.
  """
  config.mesh.update(mesh)
  try:
    settings = split_config(config, topology.devices)
    base = bytes_of(
      weight_shapes(settings.mesh, settings.compute.config, settings.base_dtype)
    )
  except MeshError as error:
    return Tried(topology, mesh, reason=str(error))
  if base > topology.chip.hbm:
    reason = f'the base alone takes {base / 1e9:.1f} GB'
    return Tried(topology, mesh, base, reason=reason)
  found: tuple[Needs, ...] = ()
  for needs in plan_run(config, topology, elsewhere=False):
    found += (needs,)
    if not needs.fits:
      break
  return Tried(topology, mesh, base, found)
