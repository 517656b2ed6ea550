"""Which transfers of a compiled program are on their way beside products."""

from lorapr_jax.planning.collectives import (
  Transfer,
  channel,
  collectives_of,
  is_marked,
  transfers,
)
from lorapr_jax.planning.hlo import Instruction, Program


def overlapped(program: Program) -> int:
  """Bytes of the transfers between whose start and end products run."""
  return sum(
    x.times * x.bytes for x in transfers(program) if beside(program, x)
  )


def beside(program: Program, transfer: Transfer) -> float:
  """Operations of the products that run between a transfer's start and end."""
  order = list(program.computations[transfer.computation].values())
  operations = 0.0
  for instruction in order[order.index(transfer.start) + 1 :]:
    if _ends(program, instruction, transfer):
      return operations
    operations += sum(
      times * program.flops_of(name, own)
      for name, own, times in program.runs(transfer.computation, instruction, 1)
    )
  return 0.0


def _ends(
  program: Program, instruction: Instruction, transfer: Transfer
) -> bool:
  start, collective = transfer.start, transfer.collective
  if start is collective:
    done = f'{transfer.kind}-done'
    return instruction.opcode == done and start.name in instruction.operands
  return instruction.opcode == 'fusion' and any(
    channel(x) == channel(collective)
    and is_marked(program, where, x, 'AsyncCollectiveDone')
    for where, x in collectives_of(program, '', instruction)
  )
