"""What the devices of a compiled program exchange."""

from collections.abc import Iterator
import dataclasses
import math
import re

from lorapr_jax.planning.hlo import SHAPE, Instruction, Program

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_BYTES = {
  **dict.fromkeys(('pred', 's8', 'u8', 'f8e4m3fn', 'f8e5m2'), 1),
  **dict.fromkeys(('bf16', 'f16', 's16', 'u16'), 2),
  **dict.fromkeys(('f32', 's32', 'u32'), 4),
  **dict.fromkeys(('f64', 's64', 'u64', 'c64'), 8),
}


@dataclasses.dataclass(frozen=True)
class Transfer:
  """A collective of a program.

  Attributes:
    computation: the name of the one that starts it.
    start: the instruction there: the collective, or a fusion that holds it.
    collective: the instruction whose result is received.
    bytes: what a device receives each time. In an all-gather, that is what it
      does not have yet; in a reduce-scatter, what it gives away; an all-reduce
      is both in turn, so twice its arrays.
    times: how often it runs.
  """

  computation: str
  start: Instruction
  collective: Instruction
  bytes: int
  times: int

  @property
  def kind(self) -> str:
    """One of COLLECTIVES."""
    return self.collective.opcode.removesuffix('-start')


def received(program: Program) -> dict[str, dict[str, int]]:
  """What a device receives: {kind: {'count', 'bytes'}}.

  Raises:
    ValueError: as `Program.executed`.
  """
  found: dict[str, dict[str, int]] = {}
  for transfer in transfers(program):
    counts = found.setdefault(transfer.kind, {'count': 0, 'bytes': 0})
    counts['count'] += transfer.times
    counts['bytes'] += transfer.times * transfer.bytes
  return found


def transfers(program: Program) -> Iterator[Transfer]:
  """The collectives; one that is done in parts beside products comes once.

  Raises:
    ValueError: as `Program.executed`.
  """
  fused = {
    called
    for computation in program.computations.values()
    for instruction in computation.values()
    if instruction.opcode == 'fusion'
    for called in program.called(instruction)
  }
  in_parts: set[str] = set()
  for name, instruction, times in program.executed():
    if name in fused:
      continue
    for where, own in collectives_of(program, name, instruction):
      if own is not instruction:
        if is_marked(program, where, own, 'AsyncCollectiveStart'):
          in_parts.add(channel(own))
        elif channel(own) in in_parts:
          continue
      size = _bytes_received(program, where, own)
      yield Transfer(name, instruction, own, size, times)


def collectives_of(
  program: Program, name: str, instruction: Instruction
) -> list[tuple[str, Instruction]]:
  """(computation, collective): the instruction itself, or those fused in it."""
  found = [(name, instruction)]
  if instruction.opcode == 'fusion':
    found = [
      (called, x)
      for called in program.called(instruction)
      for x in program.computations[called].values()
    ]
  return [
    (where, x)
    for where, x in found
    if x.opcode.removesuffix('-start') in COLLECTIVES
  ]


def is_marked(
  program: Program, name: str, collective: Instruction, target: str
) -> bool:
  """Whether a custom call to `target` in its computation reads it."""
  return any(
    collective.name in x.operands and f'"{target}"' in x.text
    for x in program.computations[name].values()
  )


def channel(collective: Instruction) -> str:
  """The number that all parts of one transfer share."""
  found = re.search(r'channel_id=(\d+)', collective.text)
  return found[1] if found else ''


def _bytes_received(
  program: Program, name: str, collective: Instruction
) -> int:
  here = program.computations[name]
  given = sum(_bytes(here[x].shape) for x in collective.operands if x in here)
  kind = collective.opcode.removesuffix('-start')
  result = _bytes(collective.shape)
  # The result of a start holds its operands too.
  if collective.opcode != kind and kind != 'all-reduce':
    result -= given
  return {
    'all-gather': result - given,
    'reduce-scatter': given - result,
    'all-reduce': 2 * result,
  }.get(kind, result)


def _bytes(shape: str) -> int:
  """Bytes of all arrays in the text, without single numbers such as flags."""
  return sum(
    _BYTES.get(dtype, 0) * math.prod(map(int, sizes.split(',')))
    for dtype, sizes in SHAPE.findall(shape)
    if sizes
  )
