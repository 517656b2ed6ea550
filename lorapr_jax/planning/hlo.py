"""The products of a compiled program, read from XLA's text of it.

A loop's body counts as often as the loop turns. XLA's own cost analysis counts
it once.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import math
import re

import numpy as np

# How many products of (T, T) or (T, H) matrices a kernel of JAX's splash
# attention computes, each over half of the pairs of positions. XLA's text does
# not show what a kernel does.
_KERNEL_PRODUCTS = {
  'splash_mha_fwd': 2,
  'splash_mha_dq': 3,
  'splash_mha_dkv': 4,
}

_HEAD = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*)$')
SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
# The name of one computation, or several names in braces.
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|branch_computations|called_computations|'
  r'true_computation|false_computation)='
  r'(?:\{([^}]*)\}|%?([\w.-]+))'
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  Attributes:
    name: its name.
    opcode: what it does, such as convolution.
    shape: the text of its result's shape, which may be a tuple.
    operands: the names of its arguments.
    text: what follows the opcode.
    is_root: whether its result is the result of the computation.
  """

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  text: str
  is_root: bool


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program of one device.

  Attributes:
    computations: {name: {name of an instruction: the instruction}}.
    entry: the name of the computation that runs first.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str

  @classmethod
  def parse(cls, text: str) -> 'Program':
    """Reads what `compiled.as_text()` returns."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, inside = '', None
    for line in text.splitlines():
      if head := _HEAD.match(line):
        inside = computations.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
      elif inside is not None and (found := _LINE.match(line)):
        instruction = _parse_instruction(found[2], found[3], bool(found[1]))
        inside[instruction.name] = instruction
    return cls(computations, entry)

  def executed(self) -> Iterator[tuple[str, Instruction, int]]:
    """Gives (computation, instruction, how often) of all that may run.

    All branches of a condition count.

    Raises:
      ValueError: if the text does not say how often a loop turns.
    """
    for instruction in self.computations[self.entry].values():
      yield from self.runs(self.entry, instruction, 1)

  def runs(
    self, name: str, instruction: Instruction, times: int
  ) -> Iterator[tuple[str, Instruction, int]]:
    """As `executed`, for an instruction of the computation `name`."""
    yield name, instruction, times
    if instruction.opcode == 'while':
      times *= self._turns(instruction)
    # These call a computation for every element; it has no products.
    if instruction.opcode in ('reduce', 'sort', 'scatter', 'all-reduce'):
      return
    for called in self.called(instruction):
      for inner in self.computations[called].values():
        yield from self.runs(called, inner, times)

  def called(self, instruction: Instruction) -> list[str]:
    """The computations that an instruction calls."""
    return [
      called
      for several, one in _CALLED.findall(instruction.text)
      for called in (several or one).replace('%', '').split(', ')
      if called in self.computations
    ]

  def _turns(self, loop: Instruction) -> int:
    """How often a loop turns that counts from 0 up to a constant.

    The start is not read: XLA's loops over a scan and over the parts of a
    product begin at 0.

    Raises:
      ValueError: if it is another kind of loop.
    """
    if known := re.search(r'known_trip_count.*?"n":"(\d+)"', loop.text):
      return int(known[1])
    condition, body = (
      self.computations[re.search(rf'{x}=%?([\w.-]+)', loop.text)[1]]
      for x in ('condition', 'body')
    )
    test, state = _root(condition), _root(body)
    index = [
      int(found[1])
      for operand in test.operands
      if (found := re.search(r'index=(\d+)', condition[operand].text))
    ]
    bound = _constants(condition, test.operands)
    # A turn may be two steps of a product whose parts arrive one by one.
    step = []
    if len(index) == 1 and index[0] < len(state.operands):
      advance = body.get(state.operands[index[0]])
      step = _constants(body, advance.operands) if advance else []
    lengths = len(bound), len(step)
    if 'direction=LT' not in test.text or lengths != (1, 1) or step[0] < 1:
      raise ValueError(f'how often {loop.name} turns is not in the text')
    return -(-bound[0] // step[0])

  def flops(self) -> float:
    """Floating-point operations of all products on a device.

    A multiplication of a dot or of a convolution, without padding, counts as
    two. An attention kernel counts with half of the pairs of positions.
    """
    return sum(
      times * self.flops_of(computation, instruction)
      for computation, instruction, times in self.executed()
    )

  def flops_of(self, computation: str, instruction: Instruction) -> float:
    """Operations of one instruction, without what it calls."""
    if instruction.opcode not in ('dot', 'convolution', 'custom-call'):
      return 0.0
    operands = [
      self.computations[computation][operand].shape
      for operand in instruction.operands
    ]
    shapes = list(map(_dimensions, operands))
    out = _dimensions(instruction.shape)
    if instruction.opcode == 'dot':
      contracted = re.search(
        r'lhs_contracting_dims=\{([\d,]*)\}', instruction.text
      )
      axes = map(int, filter(None, contracted[1].split(',')))
      return 2.0 * math.prod(out) * math.prod(shapes[0][i] for i in axes)
    if instruction.opcode == 'convolution':
      return _convolution_flops(instruction.text, *shapes[:2], out)
    for name, products in _KERNEL_PRODUCTS.items():
      if instruction.name.startswith(name):
        # (heads, T, H), or with a batch in front. The integers before them
        # say which positions the mask lets through.
        queries, keys, *_ = (
          _dimensions(x) for x in operands if not x.startswith('s')
        )
        return products * math.prod(queries) * (keys[-2] + 1.0)
    return 0.0


def _root(computation: dict[str, Instruction]) -> Instruction:
  return next(x for x in computation.values() if x.is_root)


def _constants(
  computation: dict[str, Instruction], names: tuple[str, ...]
) -> list[int]:
  """The values of those operands that are constants."""
  found = (computation[name] for name in names if name in computation)
  return [
    int(number[1])
    for x in found
    if x.opcode == 'constant' and (number := re.match(r'\((-?\d+)\)', x.text))
  ]


def _parse_instruction(name: str, rest: str, is_root: bool) -> Instruction:
  end = rest.index(' ')
  if rest.startswith('('):  # A tuple's shape, which has spaces.
    depths = itertools.accumulate((x == '(') - (x == ')') for x in rest)
    end = next(i for i, depth in enumerate(depths) if depth == 0) + 1
  shape, rest = rest[:end], rest[end + 1 :]
  opcode, _, text = rest.partition('(')
  inside = text.partition(')')[0]
  operands = tuple(re.findall(r'%([\w.-]+)', inside))
  return Instruction(name, opcode, shape, operands, '(' + text, is_root)


def _dimensions(shape: str) -> tuple[int, ...]:
  """The sizes of the first array in the text."""
  found = SHAPE.search(shape)
  return tuple(map(int, filter(None, found[2].split(',')))) if found else ()


def _convolution_flops(text, lhs, rhs, out) -> float:
  """Two operations for each multiplication whose operands are no padding."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', text)
  left, right, result = labels.groups()
  inside = re.search(r'window=\{([^}]*)\}', text)
  window = dict(re.findall(r'(\w+)=([-\dx_]+)', inside[1] if inside else ''))
  spatial = sorted(x for x in result if x.isdigit())
  taps = 1.0
  for i, axis in enumerate(spatial):

    def of(key, default, i=i):
      values = window.get(key)
      return values.split('x')[i] if values else default

    low = int(of('pad', '0_0').split('_')[0])
    places = np.arange(out[result.index(axis)])[:, None] * int(of('stride', 1))
    steps = np.arange(rhs[right.index(axis)])[None] * int(of('rhs_dilate', 1))
    dilated = int(of('lhs_dilate', 1))
    position = places + steps - low
    size = (lhs[left.index(axis)] - 1) * dilated
    taps *= np.sum(
      (position >= 0) & (position <= size) & (position % dilated == 0)
    )
  outer = math.prod(out[result.index(x)] for x in 'bf')
  inner = rhs[right.index('i')]
  return float(2.0 * outer * inner * taps)
