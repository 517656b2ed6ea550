"""What a run would need: its functions, compiled for devices ahead of time.

Nothing is loaded or run. The compiler says what each function takes on a
device; what else lies there meanwhile is added from shapes.
"""

from collections.abc import Iterator
import dataclasses

from ml_collections import config_dict

from lorapr_jax.planning.compiled import Compiled, OutOfMemory
from lorapr_jax.planning.functions import loop_functions
from lorapr_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a function of the loop takes on each device of a topology.

  Attributes:
    name: the name of the function.
    beside: bytes of the run that lie on the device beside its arguments.
    ideal_flops: this device's share of 4 N operations a token and of the
      attention.
    fits: whether all of it fits in the chip's memory; None on a CPU, whose
      memory is not known.
    refused: the bytes that the compiler named when it refused the function, or
      0 if it named none; None if it did not refuse.
    compiled: what the compiler reports; None if it refuses the function on the
      largest chips too.
    compiled_for: the topology that it was compiled for; another than the one
      asked for, if that is too small.
  """

  name: str
  beside: int
  ideal_flops: float
  fits: bool | None
  refused: int | None
  compiled: Compiled | None
  compiled_for: str

  @property
  def total(self) -> int | None:
    """Bytes on a device while the function runs."""
    if self.compiled is None:
      return None
    own = self.compiled
    return own.arguments + own.outputs + own.temporaries + self.beside


def plan_run(
  config: config_dict.ConfigDict, topology: Topology, *, elsewhere: bool = True
) -> Iterator[Needs]:
  """The needs of every function, each compiled when it is asked for.

  Args:
    config: of the run.
    topology: the devices that the run is for.
    elsewhere: whether what is too large is compiled for larger chips.

  Raises:
    UserError: for a mistake in the config, before anything is compiled.
  """
  chip, devices = topology.chip, len(topology.devices)
  for function in loop_functions(config, topology.devices):
    refused, compiled_for = None, topology
    try:
      compiled = Compiled.of(function.lowered)
    except OutOfMemory as refusal:
      refused, compiled = refusal.bytes, None
      if elsewhere:
        compiled_for = topology.larger()
        compiled = _compiled_on(compiled_for, config, function.name)
    needs = Needs(
      name=function.name,
      beside=function.beside,
      ideal_flops=function.ideal_flops / devices,
      fits=None if refused is None else False,
      refused=refused,
      compiled=compiled,
      compiled_for=compiled_for.name,
    )
    if chip and refused is None:
      needs = dataclasses.replace(needs, fits=needs.total <= chip.hbm)
    yield needs


def _compiled_on(
  topology: Topology, config: config_dict.ConfigDict, name: str
) -> Compiled | None:
  """Compiles the function for this topology; None if it does not fit there."""
  found = loop_functions(config, topology.devices)
  function = next(x for x in found if x.name == name)
  try:
    return Compiled.of(function.lowered)
  except OutOfMemory:
    return None
