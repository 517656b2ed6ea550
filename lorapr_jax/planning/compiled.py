"""What a compiled function takes on each device, as the compiler reports it."""

import dataclasses
import re

import jax

from lorapr_jax.planning import collectives
from lorapr_jax.planning.hlo import Program
from lorapr_jax.planning.topology import Chip


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a program takes on each device, as the compiler reports it.

  `flops` and `collectives` are None if the compiler's text does not say how
  often a loop turns.

  Attributes:
    arguments: bytes of the arguments.
    outputs: bytes of the results that do not reuse an argument's memory.
    temporaries: bytes of all else while the program runs.
    flops: operations of all products; a loop counts as often as it turns.
    collectives: {kind: {'count', 'bytes'}} of what the device receives.
    text: the program, as the compiler writes it.
  """

  arguments: int
  outputs: int
  temporaries: int
  flops: float | None
  collectives: dict[str, dict[str, int]] | None
  text: str = dataclasses.field(repr=False)

  @classmethod
  def of(cls, lowered: jax.stages.Lowered) -> 'Compiled':
    """Compiles a function that has been lowered.

    Raises:
      OutOfMemory: if the compiler says that it does not fit.
    """
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      message = str(error)
      if 'RESOURCE_EXHAUSTED' not in message or 'hbm' not in message.lower():
        raise
      raise OutOfMemory(message) from None
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    program = Program.parse(text)
    try:
      flops, received = program.flops(), collectives.received(program)
    except ValueError:
      flops = received = None
    return cls(
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      flops=flops,
      collectives=received,
      text=text,
    )

  def received(self) -> int | None:
    """Bytes that all collectives bring to the device."""
    if self.collectives is None:
      return None
    return sum(x['bytes'] for x in self.collectives.values())

  def roofline(self, chip: Chip) -> dict[str, float] | None:
    """The seconds that each of three limits allows at best; nothing is timed.

    The longest of them is the least time of the program, if all three overlap.

    Returns:
      {'products': all of them at the chip's peak for bfloat16,
      'memory': arguments and outputs are moved once, temporaries twice,
      'interconnect': what is received, at the bandwidth of one direction};
      None if the compiler's text does not say how often a loop turns.
    """
    crossing = self.arguments + self.outputs + 2 * self.temporaries
    if self.flops is None:
      return None
    return {
      'products': self.flops / chip.flops,
      'memory': crossing / chip.hbm_bandwidth,
      'interconnect': self.received() / chip.interconnect,
    }


class OutOfMemory(Exception):
  """The compiler's refusal of a program that does not fit in a chip's memory.

  Attributes:
    bytes: what it would take: the message's first figure; 0 if it has none.
  """

  def __init__(self, message: str):
    super().__init__(message)
    units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
    found = re.search(r'\b(\d+(?:\.\d+)?)([KMGT])\b', message)
    self.bytes = round(float(found[1]) * units[found[2]]) if found else 0
