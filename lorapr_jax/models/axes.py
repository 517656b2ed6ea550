"""Axis names and projections: the vocabulary of the whole package.

Sharding, importance, masks, the cut and the Hugging Face conversion all read
these names (docs/method.md).

Letters, used in every einsum and shape of the package:
  B batch          T query position   S key position   N tokens (B T flattened)
  D embed          V vocab            F mlp            r rank
  K kv_heads       G queries per KV head               H head_dim
  L layers in a stack                 U groups of one kind
  1 of size 1: a number that a whole axis shares
"""

from typing import NamedTuple

AXIS_NAMES = {
  '1': 'shared',
  'B': 'batch',
  'D': 'embed',
  'F': 'mlp',
  'G': 'queries_per_kv',
  'H': 'head_dim',
  'K': 'kv_heads',
  'L': 'layers',
  'T': 'length',
  'V': 'vocab',
  'r': 'rank',
}


# Each projection of a block: input, weight -> output.
PROJECTIONS = {
  'self_attn': {
    'q_proj': 'ND,DKGH->NKGH',
    'k_proj': 'ND,DKH->NKH',
    'v_proj': 'ND,DKH->NKH',
    'o_proj': 'NKGH,KGHD->ND',
  },
  'mlp': {
    'gate_proj': 'ND,DF->NF',
    'up_proj': 'ND,DF->NF',
    'down_proj': 'NF,FD->ND',
  },
}


LORA_TARGETS = tuple(n for part in PROJECTIONS.values() for n in part)


class Axes(tuple):
  """The axis names of one tensor; a leaf, not a node, of a pytree."""

  @classmethod
  def of(cls, letters: str) -> 'Axes':
    """`of('DF')` is Axes(('embed', 'mlp'))."""
    return cls(AXIS_NAMES[letter] for letter in letters)


class ProjectionLetters(NamedTuple):
  """A projection's einsum taken apart."""

  weight: str
  inputs: str  # the weight's axes that are contracted with x
  outputs: str  # the rest

  @classmethod
  def of(cls, spec: str) -> 'ProjectionLetters':
    """`of('ND,DKH->NKH')` is weight DKH, inputs D, outputs KH."""
    x, weight = spec.split('->')[0].split(',')
    inputs = ''.join(c for c in weight if c in x)
    return cls(weight, inputs, weight[len(inputs) :])
