"""What reading and writing a GGUF share: names of tensors, rows, RoPE.

GGUF is llama.cpp's file format: metadata, which take the place of config.json
and of the tokenizer's files, and tensors, which are mostly quantised.
"""

from collections.abc import Collection
import dataclasses
import math
from typing import Any

import numpy as np

from lorapr_jax.axes import (
  LORA_TARGETS,
  PROJECTIONS,
  Axes,
  ProjectionLetters,
)
from lorapr_jax.errors import UserError, check_size, short
from lorapr_jax.hf.rope import is_positive
from lorapr_jax.models.config import (
  MOST,
  ModelConfig,
)
from lorapr_jax.models.families import FAMILIES
from lorapr_jax.models.rope import SCALINGS, Llama3

# The architectures with layers of one size, and the one where they differ.
UNIFORM = tuple({x.gguf: x for x in FAMILIES.values() if x.gguf})
PER_LAYER = 'deci'
ROPE_FACTORS = 'rope_freqs.weight'
# Keys of our own, which llama.cpp skips: the parameters behind the table of
# RoPE factors, and the end tokens where there are several.
SCALING_KEYS = {
  field.name: f'lorapr_jax.rope_scaling.{field.name}'
  for field in dataclasses.fields(Llama3)
}
EOS_IDS = 'lorapr_jax.eos_token_ids'

_LAYER_TENSORS = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}


class Metadata(dict[str, Any]):
  """The key-value part of a GGUF; errors name the file and the key."""

  def __init__(self, path: Any, values: Any):
    super().__init__(values)
    self._path = path

  def error(self, problem: str) -> UserError:
    return UserError(f'{self._path}: {problem}')

  def __missing__(self, key: str) -> Any:
    raise self.error(f'{key} is absent')

  def size(self, key: str, default: int | None = None, most: int = MOST) -> int:
    """Removes and returns an integer from 1 to `most`."""
    value = self.pop(key, self[key] if default is None else default)
    return check_size(f'{self._path}: {key}', value, most)

  def number(self, key: str, default: float | None = None) -> float:
    """Removes and returns a positive number."""
    value = self.pop(key, self[key] if default is None else default)
    if not (isinstance(value, float) and is_positive(value)):
      found = short(repr(value))
      raise self.error(f'{key} is {found}, not a positive number of type float')
    # It is stored in float32: 9.999999747378752e-06 stands for 1e-5.
    return float(str(np.float32(value)))

  def list_of(self, key: str, kind: type, default: Any = None) -> Any:
    """The list under a key, all of whose members are of this type."""
    value = self[key] if default is None else self.get(key, default)
    if not isinstance(value, list | tuple) or {*map(type, value)} - {kind}:
      found = short(repr(value))
      raise self.error(f'{key} is {found}, not a list of {kind.__name__}')
    return value

  def check_id(self, key: str, value: Any, vocab_size: int) -> int:
    """A value under a key, if it is the id of a token."""
    if type(value) is not int or not 0 <= value < vocab_size:
      raise self.error(
        f'{key} is {short(repr(value))}, but the ids of tokens are 0 to '
        f'{vocab_size - 1}'
      )
    return value

  def take_only(self, key: str, *values: Any) -> Any:
    """Removes and returns a value: one of these; if absent, the first."""
    found = self.pop(key, values[0])
    if found not in values:
      supported = ' and '.join(map(repr, values))
      raise self.error(
        f'{key} is {short(repr(found))}; only {supported} is supported'
      )
    return found


def architecture(config: ModelConfig) -> str:
  """The architecture that a model is written as.

  Raises:
    UserError: if no GGUF can hold the model.
  """
  found = [x.gguf for x in FAMILIES.values() if x.gguf and x.holds(config)]
  if not found:
    held = ' or '.join(n for n, x in FAMILIES.items() if x.holds(config))
    raise UserError(f'format gguf cannot hold a {held}: choose format hf')
  return found[0] if config.is_uniform else PER_LAYER


def check_held(config: ModelConfig) -> None:
  """Refuses a model that llama.cpp would compute in another way.

  Raises:
    UserError: naming what no GGUF of ours says.
  """
  architecture(config)
  scaling = config.ropes[0].scaling
  if scaling is not None and not isinstance(scaling, Llama3):
    names = {kind: name for name, kind in SCALINGS.items()}
    raise UserError(
      f'a GGUF cannot hold a RoPE scaling of type {names[type(scaling)]}: '
      'choose format hf'
    )


def hf_names(config: ModelConfig) -> dict[str, str]:
  """GGUF's name of every weight -> Hugging Face's, in the model's order.

  Biases are among them; in a file those that are zero may be absent.
  """
  names = {'token_embd.weight': 'model.embed_tokens.weight'}
  for i in range(len(config.layers)):
    for name, hf_name in _LAYER_TENSORS.items():
      biased = hf_name.split('.')[-1] in config.biases
      for leaf in ('weight', 'bias') if biased else ('weight',):
        names[f'blk.{i}.{name}.{leaf}'] = f'model.layers.{i}.{hf_name}.{leaf}'
  names['output_norm.weight'] = 'model.norm.weight'
  if not config.tie_embeddings:
    names['output.weight'] = 'lm_head.weight'
  return names


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor by GGUF's name, in Hugging Face's layout."""
  return {name: _shape(hf, config) for name, hf in hf_names(config).items()}


def _shape(hf_name: str, config: ModelConfig) -> tuple[int, ...]:
  names = hf_name.split('.')
  if len(names) < 6:
    width = (config.embed_dim,)
    return width if names[-2].endswith('norm') else (config.vocab_size, *width)
  _, _, layer, part, name, leaf = names
  letters = ProjectionLetters.of(PROJECTIONS[part][name])
  sizes = config.sizes(config.layers[int(layer)])
  rows, columns = (
    math.prod(sizes[axis] for axis in Axes.of(side))
    for side in (letters.outputs, letters.inputs)
  )
  return (rows, columns) if leaf == 'weight' else (rows,)


def biases(names: Collection[str]) -> tuple[str, ...]:
  """The projections that have biases, by the tensors of a GGUF.

  These are the fewest that a family has, with those that the file has among
  them: a file may lack those that are zero.
  """
  found = {name.split('.')[2] for name in names if is_bias(name)}
  hf_names = [_LAYER_TENSORS[x] for x in found & _LAYER_TENSORS.keys()]
  biased = {name.split('.')[-1] for name in hf_names} & {*LORA_TARGETS}
  possible = (
    names
    for family in FAMILIES.values()
    if family.gguf
    for names in family.possible_biases()
  )
  return min((x for x in possible if biased <= {*x}), key=len)


def is_bias(name: str) -> bool:
  """Whether GGUF's tensor of this name is a bias in a block."""
  return name.endswith('.bias') and name.count('.') > 2


def is_rotated(name: str) -> bool:
  """Whether GGUF's tensor of this name makes queries or keys."""
  return name.rpartition('.')[0].endswith(('attn_q', 'attn_k'))


def interleaved_to_halves(weight: np.ndarray, head_dim: int) -> np.ndarray:
  """Reorders each head's rows from x0 y0 x1 y1 .. to x0 x1 .. y0 y1 ..

  RoPE rotates the pairs (x, y). GGUF keeps a pair together, Hugging Face keeps
  the first of all pairs, then the second of all.

  Args:
    weight: (heads * head_dim, embed), of query or of KV heads; or a bias,
      (heads * head_dim,).
    head_dim: rows of a head.
  """
  pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
  return pairs.swapaxes(1, 2).reshape(weight.shape)


def halves_to_interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
  """The inverse of `interleaved_to_halves`."""
  halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
  return halves.swapaxes(1, 2).reshape(weight.shape)


def rope_factors(config: ModelConfig) -> np.ndarray:
  """The factors by which llama.cpp divides the frequencies, (H/2,) float32.

  1 / (k + (1 - k) / factor), where k is the share of a frequency that Llama
  3's scaling keeps: models/layers.rope_frequencies. Ones without scaling.
  """
  theta, scaling = config.ropes[0].theta, config.ropes[0].scaling
  if scaling is None:
    return np.ones(config.head_dim // 2, np.float32)
  exponents = np.arange(0, config.head_dim, 2) / config.head_dim
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_max_position_embeddings / (2 * math.pi)
  turns = turns / theta**exponents
  keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return (1.0 / (keep + (1.0 - keep) / scaling.factor)).astype(np.float32)
