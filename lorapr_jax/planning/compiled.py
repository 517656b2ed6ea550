"""What a compiled function takes on each device, by the compiler's word."""

import dataclasses
import re

import jax

from lorapr_jax.planning import collectives
from lorapr_jax.planning.hlo import Program
from lorapr_jax.planning.topology import Chip


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a program takes on each device, as the compiler says.

  Attributes:
    arguments: bytes.
    outputs: bytes, without those that take an argument's place.
    temporaries: bytes.
    flops: of all products, loops counted by their turns; None where the
      compiler's text does not say how often one turns, and so for
    collectives: {kind: {'count', 'bytes'}}, and
    overlapped: bytes of those that are on their way while products run.
    text: the program, as the compiler writes it.
  """

  arguments: int
  outputs: int
  temporaries: int
  flops: float | None
  collectives: dict[str, dict[str, int]] | None
  overlapped: int | None
  text: str = dataclasses.field(repr=False)

  @classmethod
  def of(cls, lowered: jax.stages.Lowered) -> 'Compiled':
    """Compiles.

    Raises:
      OutOfMemory: if the compiler finds no way to fit it.
    """
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      message = str(error)
      if 'RESOURCE_EXHAUSTED' not in message or 'hbm' not in message.lower():
        raise
      raise OutOfMemory(refused_bytes(message)) from None
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    program = Program.parse(text)
    try:
      flops, received = program.flops(), collectives.received(program)
      overlapped = collectives.overlapped(program)
    except ValueError:
      flops = received = overlapped = None
    return cls(
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      flops=flops,
      collectives=received,
      overlapped=overlapped,
      text=text,
    )

  def received(self) -> int | None:
    """Bytes of all collectives."""
    if self.collectives is None:
      return None
    return sum(x['bytes'] for x in self.collectives.values())

  def roofline(self, chip: Chip) -> dict[str, float] | None:
    """Seconds by each of three limits; nothing is timed.

    products: all at the peak of bfloat16. memory: arguments and outputs cross
    once, temporaries are written and read. interconnect: what is received, at
    the bandwidth of one direction. The longest is a floor where all overlap.
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
  """A program that does not fit.

  Attributes:
    bytes: that it would take, as the compiler says; 0 where it does not.
  """

  def __init__(self, refused: int):
    super().__init__(refused)
    self.bytes = refused


def refused_bytes(message: str) -> int:
  """The first figure with a unit: what would be needed."""
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  found = re.search(r'\b(\d+(?:\.\d+)?)([KMGT])\b', message)
  return round(float(found[1]) * units[found[2]]) if found else 0
