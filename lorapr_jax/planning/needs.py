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
    compiled: what the compiler reports; None if it refuses the function.
    total: bytes on a device while the function runs. Of a function that is
      refused it is what the compiler names, or 0 if it names nothing.
    fits: whether that fits in the chip's memory; None on a CPU, whose memory
      is not known.
  """

  name: str
  beside: int
  compiled: Compiled | None
  total: int
  fits: bool | None


def plan_run(
  config: config_dict.ConfigDict, topology: Topology
) -> Iterator[Needs]:
  """The needs of every function, each compiled when it is asked for.

  Raises:
    UserError: for a mistake in the config, before anything is compiled.
  """
  chip = topology.chip
  for function in loop_functions(config, topology.devices):
    name, beside = function.name, function.beside
    try:
      own = Compiled.of(function.lowered)
    except OutOfMemory as refusal:
      yield Needs(name, beside, None, total=refusal.bytes, fits=False)
      continue
    total = own.arguments + own.outputs + own.temporaries + beside
    fits = total <= chip.hbm if chip else None
    yield Needs(name, beside, own, total, fits)
