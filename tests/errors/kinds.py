"""The kinds of files that are bent, each with what reads it.

A new kind needs no more than its entry here: see `Kind`.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lorapr_jax.cli.main import main
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.names import hf_shapes
from lorapr_jax.models.trees import param_shapes
from tests.errors import bent_tokenizers, workdirs
from tests.errors.bend import bent_json
from tests.errors.bend_gguf import bent_gguf, make_gguf
from tests.errors.conftest import SIZES
from tests.errors.survive import Kind

CONFIG = {
  **SIZES,
  'model_type': 'pruned_llama',
  'hidden_act': 'silu',
  'head_dim': 8,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'rope_scaling': {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 64,
  },
  'layer_types': ['full_attention', 'full_attention'],
  'per_layer_config': {'1': {'intermediate_size': 40}},
  'attention_bias': False,
  'quantization_config': None,
  'bos_token_id': 1,
  'eos_token_id': [2, 3],
  'pad_token_id': 0,
}


def _config(folder: Path) -> Path:
  path = folder / 'MODEL' / 'config.json'
  path.parent.mkdir()
  path.write_text(json.dumps(CONFIG))
  return path


def _gguf(folder: Path) -> Path:
  path = folder / 'MODEL.gguf'
  path.write_bytes(b''.join(make_gguf()))
  return path


def _index(folder: Path) -> Path:
  _config(folder).write_text(json.dumps(SIZES))
  config = config_from_hf(SIZES)
  shapes = hf_shapes(param_shapes(config, np.float32), config)
  weight_map = {}
  for i, some in enumerate((list(shapes)[:3], list(shapes)[3:])):
    tensors = {name: np.zeros(shapes[name], np.float32) for name in some}
    save_file(tensors, folder / 'MODEL' / f'{i}.safetensors')
    weight_map |= {some[0]: f'{i}.safetensors'}
  path = folder / 'MODEL' / 'model.safetensors.index.json'
  path.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  return path


KINDS = {
  **bent_tokenizers.KINDS,
  **workdirs.KINDS,
  'config.json': Kind(
    make=_config,
    bend=lambda good: bent_json(json.loads(good), 120),
    read=lambda folder: main(['inspect', '--model', 'MODEL']),
    accepts=(
      'attention_bias is true',
      'bos_token_id is null',
      'eos_token_id is -1',
      'eos_token_id.1 is -1',
      'pad_token_id is gone',
      'per_layer_config is {}',
      'per_layer_config.1 is gone',
      'per_layer_config.1 is {}',
      'rope_scaling is an object of lists',
      'rope_scaling is null',
      'rope_scaling.high_freq_factor is 2.5',
      'rope_theta is 2**31',
    ),
  ),
  'GGUF': Kind(
    make=_gguf,
    bend=lambda good: bent_gguf(),
    read=lambda folder: main(['convert', 'MODEL.gguf', 'OUT']),
    accepts=(
      'bit * turned',
      'general.architecture is gone',
      'llama.attention.*_length is gone',
      'llama.context_length is 3',
      'llama.rope.* is gone',
      'llama.vocab_size is gone',
      'lorapr_jax.* is gone',
      'tokenizer.chat_template is gone',
      'tokenizer.ggml.add_bos_token is gone',
      'tokenizer.ggml.eos_token_id is gone',
    ),
  ),
  'model.safetensors.index.json': Kind(
    make=_index,
    bend=lambda good: bent_json(json.loads(good), 60),
    read=lambda folder: main(['convert', 'MODEL', 'OUT']),
    accepts=('metadata is *',),
  ),
}
