"""What a compiled program does, read from XLA's text of it.

Loops count as often as they run: XLA's own cost analysis counts their bodies
once.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import math
import re

import numpy as np

# Products of (T, T) or (T, H) matrices that a kernel of JAX's splash attention
# takes, each over half of the pairs of positions. They are no HLO.
_KERNEL_PRODUCTS = {
  'splash_mha_fwd': 2,
  'splash_mha_dq': 3,
  'splash_mha_dkv': 4,
}

_HEAD = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*)$')
SHAPE = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\]')
# One computation, or some in braces.
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|branch_computations|called_computations|'
  r'true_computation|false_computation)='
  r'(?:\{([^}]*)\}|%?([\w.-]+))'
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  Attributes:
    name: its own.
    opcode: such as convolution.
    shape: the text of its result's shape, of a tuple maybe.
    operands: the names in its parentheses.
    text: what comes after the opcode.
    is_root: whether its result is the computation's.
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
    computations: {name: its instructions, by name}.
    entry: the name of the first one.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str

  @classmethod
  def parse(cls, text: str) -> 'Program':
    """Of `compiled.as_text()`."""
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
    """(computation, instruction, how often) of all that may run.

    Of a condition, all branches.

    Raises:
      ValueError: for a loop whose number of turns is not in the text.
    """
    yield from self._executed(self.entry, 1)

  def _executed(self, name, times):
    for instruction in self.computations[name].values():
      yield from self.runs(name, instruction, times)

  def runs(
    self, name: str, instruction: Instruction, times: int
  ) -> Iterator[tuple[str, Instruction, int]]:
    """As `executed`: an instruction of this computation and all it calls."""
    yield name, instruction, times
    if instruction.opcode == 'while':
      times *= self._turns(instruction)
    # What reduces or sorts is called for every element: no products there.
    if instruction.opcode in ('reduce', 'sort', 'scatter', 'all-reduce'):
      return
    for called in self.called(instruction):
      yield from self._executed(called, times)

  def called(self, instruction: Instruction) -> list[str]:
    """The computations that an instruction calls."""
    return [
      called
      for several, one in _CALLED.findall(instruction.text)
      for called in (several or one).replace('%', '').split(', ')
      if called in self.computations
    ]

  def _turns(self, loop: Instruction) -> int:
    """Of a loop that counts up from 0 while it is less than a constant.

    XLA's loops over a scan and over the parts of a product begin at 0; where
    one begins is not read.

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
    # Some turns are two steps of a product whose parts come one by one.
    step = []
    if len(index) == 1 and index[0] < len(state.operands):
      advance = body.get(state.operands[index[0]])
      step = _constants(body, advance.operands) if advance else []
    lengths = len(bound), len(step)
    if 'direction=LT' not in test.text or lengths != (1, 1) or step[0] < 1:
      raise ValueError(f'how often {loop.name} turns is not in the text')
    return -(-bound[0] // step[0])

  def flops(self) -> float:
    """Floating-point operations of all products of a device.

    Two for each multiplication of a dot or a convolution, padding left out;
    of attention kernels, half of the pairs of positions.
    """
    return sum(
      times * self.flops_of(computation, instruction)
      for computation, instruction, times in self.executed()
    )

  def flops_of(self, computation: str, instruction: Instruction) -> float:
    """Of an instruction itself, without what it calls."""
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
        # (heads, T, H), or with a batch in front. Before them come integers
        # that say what the mask lets through.
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
  """Those of the operands that are numbers."""
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
  """Of the first array in the text."""
  found = SHAPE.search(shape)
  return tuple(map(int, filter(None, found[2].split(',')))) if found else ()


def _convolution_flops(text, lhs, rhs, out) -> float:
  """Two for each multiplication of elements that are no padding."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', text)
  left, right, result = labels.groups()
  window = dict(re.findall(r'(\w+)=([-\dx_]+)', _window(text)))
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


def _window(text: str) -> str:
  found = re.search(r'window=\{([^}]*)\}', text)
  return found[1] if found else ''
