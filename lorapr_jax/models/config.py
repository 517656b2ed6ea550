"""Sizes of a LLaMA-family model, and LoRA's. Letters: axes.py."""

from collections.abc import Iterable, Mapping
import dataclasses
import itertools
import json
import math
from typing import Any, NamedTuple

from lorapr_jax.axes import LORA_TARGETS, PROJECTIONS, Axes, ProjectionLetters
from lorapr_jax.errors import UserError

# The value each of these keys of a config.json must have, or be absent.
_ONLY_SUPPORTED = {
  'attention_dropout': 0.0,
  'hidden_act': 'silu',
  'partial_rotary_factor': 1.0,
  'quantization_config': None,
  'sliding_window': None,
}
# What each of these keys is, where it is neither absent nor null.
_TYPES = {
  'attention_bias': (bool, 'true or false'),
  'bos_token_id': (int, 'an integer'),
  'eos_token_id': (int | list, 'an integer or a list of them'),
  'layer_types': (list, 'a list'),
  'mlp_bias': (bool, 'true or false'),
  'pad_token_id': (int, 'an integer'),
  'per_layer_config': (dict, 'an object'),
  'rope_parameters': (dict, 'an object'),
  'rope_scaling': (dict, 'an object'),
  'tie_word_embeddings': (bool, 'true or false'),
}
# By part of a block, the key that says whether its projections have biases.
BIAS_KEYS = {'self_attn': 'attention_bias', 'mlp': 'mlp_bias'}
_POSITIVE = (
  'head_dim',
  'max_position_embeddings',
  'num_key_value_heads',
  'rms_norm_eps',
  'rope_theta',
)


@dataclasses.dataclass(frozen=True)
class LayerShape:
  """The sizes of a block that pruning changes."""

  num_kv_heads: int
  queries_per_kv: int
  mlp_dim: int

  @property
  def num_heads(self) -> int:
    """Query heads."""
    return self.num_kv_heads * self.queries_per_kv


class Stack(NamedTuple):
  """A run of `size` equal layers, the first of which is layer `start`."""

  start: int
  size: int
  shape: LayerShape


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's frequency scaling (rope_type `llama3`)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which projections get a low-rank update W + (alpha / rank) A B."""

  rank: int = 8
  alpha: float = 16.0
  dropout: float = 0.0
  targets: tuple[str, ...] = LORA_TARGETS

  def __post_init__(self):
    if self.rank < 1:
      raise UserError(f'lora.rank is {self.rank}: it must be at least 1')
    if not self.alpha > 0:
      raise UserError(f'lora.alpha is {self.alpha}: it must be positive')
    if not 0.0 <= self.dropout < 1.0:
      raise UserError(f'lora.dropout is {self.dropout}: it must be in [0, 1)')
    unknown = sorted(set(self.targets) - set(LORA_TARGETS))
    if unknown or not self.targets:
      raise UserError(
        f'lora.targets has {unknown or "no projection"}: choose from '
        + ', '.join(LORA_TARGETS)
      )

  @property
  def scale(self) -> float:
    """s = alpha / r."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """A LLaMA-family model. Layers may differ in size once they are pruned."""

  vocab_size: int
  embed_dim: int
  head_dim: int
  layers: tuple[LayerShape, ...]
  norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  tie_embeddings: bool = False
  attention_bias: bool = False
  mlp_bias: bool = False
  max_positions: int = 2048
  bos_token_id: int | None = None
  eos_token_id: int | tuple[int, ...] | None = None
  pad_token_id: int | None = None
  # The projections that are int8 in memory (models/quantization.py). No file
  # has them so, and no config.json says it.
  quantized: tuple[str, ...] = ()

  @property
  def dequantized(self) -> 'LlamaConfig':
    """The same model with no projection quantised."""
    return dataclasses.replace(self, quantized=())

  @property
  def stacks(self) -> tuple[Stack, ...]:
    """Runs of equal layers, in order; each is one scan in the forward pass."""
    stacks, start = [], 0
    for shape, run in itertools.groupby(self.layers):
      size = len(list(run))
      stacks.append(Stack(start, size, shape))
      start += size
    return tuple(stacks)

  @property
  def is_uniform(self) -> bool:
    """Whether every layer has the same size."""
    return len(set(self.layers)) == 1

  @property
  def biased(self) -> tuple[str, ...]:
    """The parts of a block all of whose projections have biases."""
    return tuple(part for part, key in BIAS_KEYS.items() if getattr(self, key))

  def with_biases(self, parts: Iterable[str]) -> 'LlamaConfig':
    """The sizes where these parts have biases too."""
    return dataclasses.replace(self, **{BIAS_KEYS[p]: True for p in parts})

  def sizes(self, shape: LayerShape) -> dict[str, int]:
    """Axis name -> size, for the tensors of a layer of this shape."""
    return {
      'embed': self.embed_dim,
      'head_dim': self.head_dim,
      'kv_heads': shape.num_kv_heads,
      'queries_per_kv': shape.queries_per_kv,
      'mlp': shape.mlp_dim,
      'vocab': self.vocab_size,
    }

  def layer_parameters(self, shape: LayerShape) -> int:
    """The number of weights in a block of this shape, biases and norms too."""
    sizes = self.sizes(shape)
    projections = [
      math.prod(sizes[a] for a in Axes.of(ProjectionLetters.of(spec).weight))
      for part in PROJECTIONS.values()
      for spec in part.values()
    ]
    return sum(projections) + self.layer_biases(shape) + 2 * self.embed_dim

  def layer_biases(self, shape: LayerShape) -> int:
    """Of `layer_parameters`, those in biases."""
    sizes = self.sizes(shape)
    return sum(
      math.prod(sizes[a] for a in Axes.of(ProjectionLetters.of(spec).outputs))
      for part in self.biased
      for spec in PROJECTIONS[part].values()
    )

  @property
  def num_parameters(self) -> int:
    """The number of weights of the model; tied embeddings count once."""
    embeddings = self.vocab_size * self.embed_dim
    embeddings *= 1 if self.tie_embeddings else 2
    blocks = sum(self.layer_parameters(shape) for shape in self.layers)
    return embeddings + blocks + self.embed_dim

  @classmethod
  def from_hf(cls, hf: Mapping[str, Any]) -> 'LlamaConfig':
    """Reads a config.json of `llama`, `mistral` or our own `pruned_llama`.

    Args:
      hf: the file's contents. The keys `rope_theta` + `rope_scaling` and the
        newer `rope_parameters` are both understood.

    Raises:
      UserError: naming the key that asks for something unsupported.
    """
    _check_supported(hf)
    hf = {key: value for key, value in hf.items() if value is not None}
    layers = _read_layers(hf)
    embed_dim = _required(hf, 'hidden_size')
    head_dim = hf.get('head_dim') or (
      embed_dim // _required(hf, 'num_attention_heads')
    )
    if head_dim < 2 or head_dim % 2:
      raise UserError(
        f'config.json: heads of {head_dim} dimensions, which RoPE cannot pair'
      )
    theta, scaling = _read_rope(hf)
    eos = hf.get('eos_token_id')
    # Hugging Face's defaults, for the keys that old files leave out.
    return cls(
      vocab_size=_required(hf, 'vocab_size'),
      embed_dim=embed_dim,
      head_dim=head_dim,
      layers=layers,
      norm_eps=hf.get('rms_norm_eps', 1e-6),
      rope_theta=theta,
      rope_scaling=scaling,
      tie_embeddings=hf.get('tie_word_embeddings', False),
      **{key: hf.get(key, False) for key in BIAS_KEYS.values()},
      max_positions=hf.get(
        'max_position_embeddings',
        131072 if hf['model_type'] == 'mistral' else 2048,
      ),
      bos_token_id=hf.get('bos_token_id'),
      eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
      pad_token_id=hf.get('pad_token_id'),
    )

  def to_hf(self) -> dict[str, Any]:
    """The keys of a config.json that this model's sizes decide.

    The sizes at the top are those of the largest layer; layers that differ
    are listed in `per_layer_config`. `architectures`, `model_type` and the
    like belong to the export's layout (hf/write.py).
    """
    top = max(self.layers, key=self.layer_parameters)
    eos = self.eos_token_id
    hf = {
      'vocab_size': self.vocab_size,
      'hidden_size': self.embed_dim,
      'head_dim': self.head_dim,
      'num_hidden_layers': len(self.layers),
      **_layer_to_hf(top),
      'hidden_act': 'silu',
      'max_position_embeddings': self.max_positions,
      'rms_norm_eps': self.norm_eps,
      'rope_theta': self.rope_theta,
      'rope_scaling': None,
      'tie_word_embeddings': self.tie_embeddings,
      'bos_token_id': self.bos_token_id,
      'eos_token_id': list(eos) if isinstance(eos, tuple) else eos,
      'pad_token_id': self.pad_token_id,
      'use_cache': True,
    }
    # Where there are none the keys are left out, as a mistral has neither.
    hf |= {BIAS_KEYS[part]: True for part in self.biased}
    if self.rope_scaling:
      scaling = dataclasses.asdict(self.rope_scaling)
      hf['rope_scaling'] = {'rope_type': 'llama3', **scaling}
    if not self.is_uniform:
      hf['per_layer_config'] = {
        str(i): _layer_to_hf(shape)
        for i, shape in enumerate(self.layers)
        if shape != top
      }
    return hf


def _required(hf: Mapping[str, Any], key: str) -> int:
  if not isinstance(hf.get(key), int) or hf[key] < 1:
    raise UserError(
      f'config.json: {key} is {json.dumps(hf.get(key))}, not a positive integer'
    )
  return hf[key]


def _check_types(hf: Mapping[str, Any]) -> None:
  for key, (kind, text) in _TYPES.items():
    value = hf.get(key)
    if value is not None and not isinstance(value, kind):
      raise UserError(f'config.json: {key} is {json.dumps(value)}, not {text}')
  for key in _POSITIVE:
    value = hf.get(key)
    if value is not None and not (isinstance(value, int | float) and value > 0):
      raise UserError(
        f'config.json: {key} is {json.dumps(value)}, not a positive number'
      )


def _check_supported(hf: Mapping[str, Any]) -> None:
  model_type = hf.get('model_type')
  if model_type not in ('llama', 'mistral', 'pruned_llama'):
    raise UserError(
      f'config.json: model_type is {model_type!r}; only llama, mistral and '
      'pruned_llama (our own export) are supported'
    )
  if model_type == 'mistral' and 'sliding_window' not in hf:
    raise UserError(
      'config.json: sliding_window is absent, which means 4096 for mistral; '
      'only "sliding_window": null is supported'
    )
  for key, value in _ONLY_SUPPORTED.items():
    if hf.get(key, value) != value:
      raise UserError(
        f'config.json: {key} is {json.dumps(hf[key])}; only '
        f'{json.dumps(value)} is supported'
      )
  _check_types(hf)
  for key in BIAS_KEYS.values():
    if hf.get(key) and model_type == 'mistral':
      raise UserError(
        f'config.json: {key} is true, and a mistral has no biases; only a '
        'llama with them is supported'
      )
  if set(hf.get('layer_types') or ()) - {'full_attention'}:
    raise UserError(
      f'config.json: layer_types has {sorted(set(hf["layer_types"]))}; only '
      'full_attention is supported'
    )


def _read_layers(hf: Mapping[str, Any]) -> tuple[LayerShape, ...]:
  per_layer = hf.get('per_layer_config') or {}
  if per_layer and hf['model_type'] != 'pruned_llama':
    raise UserError(
      'config.json: per_layer_config is only understood for model_type '
      'pruned_llama'
    )
  # We write the keys as '3'; transformers 5, saving, as '03'.
  num_layers = _required(hf, 'num_hidden_layers')
  for index in per_layer:
    if not index.isdigit() or int(index) >= num_layers:
      raise UserError(
        f'config.json: per_layer_config has {index!r}, but the layers are 0 '
        f'to {num_layers - 1}'
      )
    if not isinstance(per_layer[index], dict):
      raise UserError(
        f'config.json: per_layer_config has no sizes for layer {index}'
      )
  by_index = {int(index): sizes for index, sizes in per_layer.items()}
  return tuple(
    _read_layer({**hf, **by_index.get(i, {})}) for i in range(num_layers)
  )


def _read_layer(hf: Mapping[str, Any]) -> LayerShape:
  heads = _required(hf, 'num_attention_heads')
  absent = 8 if hf['model_type'] == 'mistral' else heads
  key = 'num_key_value_heads'
  kv_heads = _required({key: absent, **hf}, key)
  if heads % kv_heads:
    raise UserError(
      f'config.json: num_attention_heads {heads} is not a multiple of '
      f'num_key_value_heads {kv_heads}'
    )
  return LayerShape(
    num_kv_heads=kv_heads,
    queries_per_kv=heads // kv_heads,
    mlp_dim=_required(hf, 'intermediate_size'),
  )


def _layer_to_hf(shape: LayerShape) -> dict[str, int]:
  return {
    'num_attention_heads': shape.num_heads,
    'num_key_value_heads': shape.num_kv_heads,
    'intermediate_size': shape.mlp_dim,
  }


def _rope_type(rope: Mapping[str, Any]) -> str:
  return rope.get('rope_type', rope.get('type', 'default'))


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
  key = 'rope_parameters' if hf.get('rope_parameters') else 'rope_scaling'
  rope = hf.get(key) or {}
  if (
    rope
    and hf.get('rope_scaling')
    and _rope_type(hf['rope_scaling']) != (_rope_type(rope))
  ):
    raise UserError(
      'config.json: rope_parameters and rope_scaling are of different types'
    )
  theta = rope.get('rope_theta', hf.get('rope_theta', 10000.0))
  if hf.get('rope_theta', theta) != theta:
    raise UserError(
      f'config.json: rope_theta is {hf["rope_theta"]} but '
      f'{key}.rope_theta is {theta}'
    )
  if not isinstance(theta, int | float) or theta <= 0:
    raise UserError(
      f'config.json: {key}.rope_theta is {json.dumps(theta)}, not a positive '
      'number'
    )
  if rope.get('partial_rotary_factor', 1.0) != 1.0:
    raise UserError(
      f'config.json: {key}.partial_rotary_factor is not supported'
    )
  kind = _rope_type(rope)
  if kind == 'default':
    return float(theta), None
  if kind != 'llama3':
    raise UserError(
      f'config.json: {key}.rope_type is {kind!r}; only default and llama3 '
      'are supported'
    )
  fields = [field.name for field in dataclasses.fields(RopeScaling)]
  missing = [f for f in fields if not isinstance(rope.get(f), int | float)]
  if missing:
    raise UserError(
      f'config.json: {key} of type llama3 needs the numbers '
      + ', '.join(missing)
    )
  return float(theta), RopeScaling(**{field: rope[field] for field in fields})
