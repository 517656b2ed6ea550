"""What the devices of a compiled program exchange."""

from collections.abc import Iterator
import dataclasses
import itertools
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
    kind: one of COLLECTIVES.
    bytes: what a device receives each time. In an all-gather, that is what it
      does not have yet; in a reduce-scatter, what it gives away; an all-reduce
      is both in turn, so twice its arrays.
    times: how often it runs.
    beside: operations of the products that run between its start and its end.
  """

  kind: str
  bytes: int
  times: int
  beside: float


def received(program: Program) -> dict[str, dict[str, int]]:
  """What a device receives: {kind: {'count', 'bytes'}}.

  Raises:
    ValueError: as `Program.executed`.
  """
  found = {kind: {'count': 0, 'bytes': 0} for kind in COLLECTIVES}
  for transfer in transfers(program):
    found[transfer.kind]['count'] += transfer.times
    found[transfer.kind]['bytes'] += transfer.times * transfer.bytes
  return {kind: counts for kind, counts in found.items() if counts['count']}


def overlapped(program: Program) -> int:
  """Bytes of the collectives between whose start and end products run.

  Raises:
    ValueError: as `Program.executed`.
  """
  return sum(x.times * x.bytes for x in transfers(program) if x.beside)


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
  schedules: dict[str, _Schedule] = {}
  for name, instruction, times in program.executed():
    if name in fused:
      continue
    for where, own in _collectives_of(program, name, instruction):
      if own is not instruction:
        if _marked(program, where, own, 'AsyncCollectiveStart'):
          in_parts.add(_channel(own))
        elif _channel(own) in in_parts:
          continue
      if name not in schedules:
        schedules[name] = _Schedule.of(program, name)
      yield Transfer(
        kind=own.opcode.removesuffix('-start'),
        bytes=_bytes_received(program, where, own),
        times=times,
        beside=schedules[name].beside(instruction, own),
      )


@dataclasses.dataclass(frozen=True)
class _Schedule:
  """The order in which a computation runs.

  Attributes:
    program: the program that the computation belongs to.
    order: its instructions.
    before: for each of them, the operations of the products before it.
  """

  program: Program
  order: list[Instruction]
  before: list[float]

  @classmethod
  def of(cls, program: Program, name: str) -> '_Schedule':
    order = list(program.computations[name].values())
    flops = (
      sum(t * program.flops_of(c, x) for c, x, t in program.runs(name, own, 1))
      for own in order
    )
    return cls(program, order, list(itertools.accumulate(flops, initial=0.0)))

  def beside(self, start: Instruction, collective: Instruction) -> float:
    """Operations of products between a collective's start and its end."""
    first = self.order.index(start) + 1
    for last in range(first, len(self.order)):
      if _ends(self.program, self.order[last], start, collective):
        return self.before[last] - self.before[first]
    return 0.0


def _ends(
  program: Program,
  instruction: Instruction,
  start: Instruction,
  collective: Instruction,
) -> bool:
  """Whether an instruction ends the collective that another starts."""
  if start is collective:
    done = start.opcode.removesuffix('-start') + '-done'
    return instruction.opcode == done and start.name in instruction.operands
  return instruction.opcode == 'fusion' and any(
    _channel(x) == _channel(collective)
    and _marked(program, where, x, 'AsyncCollectiveDone')
    for where, x in _collectives_of(program, '', instruction)
  )


def _collectives_of(
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


def _marked(
  program: Program, name: str, collective: Instruction, target: str
) -> bool:
  """Whether a custom call to `target` in its computation reads it."""
  return any(
    collective.name in x.operands and f'"{target}"' in x.text
    for x in program.computations[name].values()
  )


def _channel(instruction: Instruction) -> str:
  found = re.search(r'channel_id=(\d+)', instruction.text)
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
