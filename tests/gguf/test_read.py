"""A GGUF written by gguf-py is read back: sizes, weights, tokenizer."""

import dataclasses
import json
import math
import subprocess
import sys

import gguf
import numpy as np
import pytest
from tokenizers import (
  AddedToken,
  Tokenizer,
  decoders,
  models,
  pre_tokenizers,
  trainers,
)

from lorapr_jax.axes import PROJECTIONS
from lorapr_jax.errors import UserError
from lorapr_jax.gguf.header import read_header
from lorapr_jax.gguf.read import open_gguf
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.rope import Llama3, Rope

CONFIG = ModelConfig(
  vocab_size=300,
  embed_dim=32,
  head_dim=16,  # not embed_dim / heads, which is 8
  layers=(LayerShape(num_kv_heads=2, queries_per_kv=2, mlp_dim=64),) * 2,
  norm_eps=1e-5,
  ropes=(Rope(500000.0),),
  max_positions=64,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)

# GGUF's name, Hugging Face's name, shape, how it is stored.
F16, F32, Q4_1, Q8_0 = (
  gguf.GGMLQuantizationType[name] for name in ('F16', 'F32', 'Q4_1', 'Q8_0')
)
LAYER = (
  ('attn_norm', 'input_layernorm', (32,), F32),
  ('attn_q', 'self_attn.q_proj', (64, 32), Q8_0),
  ('attn_k', 'self_attn.k_proj', (32, 32), Q4_1),
  ('attn_v', 'self_attn.v_proj', (32, 32), Q8_0),
  ('attn_output', 'self_attn.o_proj', (32, 64), Q4_1),
  ('ffn_norm', 'post_attention_layernorm', (32,), F32),
  ('ffn_gate', 'mlp.gate_proj', (64, 32), F16),
  ('ffn_up', 'mlp.up_proj', (64, 32), F32),
  ('ffn_down', 'mlp.down_proj', (32, 64), Q8_0),
)
TENSORS = (
  ('token_embd', 'model.embed_tokens', (300, 32), Q8_0),
  *(
    (f'blk.{i}.{name}', f'model.layers.{i}.{hf_name}', shape, kind)
    for i in range(2)
    for name, hf_name, shape, kind in LAYER
  ),
  ('output_norm', 'model.norm', (32,), F32),
  ('output', 'lm_head', (300, 32), F16),
)
METADATA = {
  'llama.attention.head_count': 4,
  'llama.attention.head_count_kv': 2,
  'llama.attention.key_length': 16,
  'llama.attention.value_length': 16,
  'llama.attention.layer_norm_rms_epsilon': 1e-5,
  'llama.block_count': 2,
  'llama.context_length': 64,
  'llama.embedding_length': 32,
  'llama.feed_forward_length': 64,
  'llama.rope.dimension_count': 16,
  'llama.rope.freq_base': 500000.0,
  'llama.vocab_size': 300,
  'tokenizer.ggml.bos_token_id': 1,
  'tokenizer.ggml.eos_token_id': 2,
  'tokenizer.ggml.padding_token_id': 0,
}
TEXT = (
  'In  1999 the mill-wheel turned 24 times; it\'s "half": ½ m², 10  000 ½\n\n'
  'The the   mill <|bos|>wheel <think>then</think> stopped. Größe 日本<|eos|>'
)


def interleave(weight, head_dim):
  """Rows of each head from x0 x1 .. y0 y1 .. to x0 y0 x1 y1 .."""
  half = head_dim // 2
  order = [
    first + pair + side
    for first in range(0, len(weight), head_dim)
    for pair in range(half)
    for side in (0, half)
  ]
  return weight[order]


def random_weights():
  """Hugging Face name -> (GGUF's name, float32 array, storage type)."""
  rng = np.random.default_rng(0)
  return {
    f'{hf_name}.weight': (
      f'{name}.weight',
      rng.standard_normal(shape, dtype=np.float32),
      kind,
    )
    for name, hf_name, shape, kind in TENSORS
  }


def write_gguf(path, *, metadata=None, weights=None, arch='llama'):
  """Writes these or the usual weights and metadata, `None` values left out."""
  writer = gguf.GGUFWriter(path, arch)
  for key, value in {**METADATA, **(metadata or {})}.items():
    match value:
      case None:
        pass
      case bool():
        writer.add_bool(key, value)
      case int():
        writer.add_uint32(key, value)
      case float():
        writer.add_float32(key, value)
      case str():
        writer.add_string(key, value)
      case list():
        writer.add_array(key, value)
  for name, weight, kind in (weights or random_weights()).values():
    if '.attn_q.' in name or '.attn_k.' in name:
      weight = interleave(weight, CONFIG.head_dim)
    if kind is not None:
      weight = gguf.quants.quantize(weight, kind)
    writer.add_tensor(name, weight, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize('config', [CONFIG, TIED], ids=['untied', 'tied'])
def test_reads_back_what_was_written(tmp_path, config):
  weights = random_weights()
  if config.tie_embeddings:
    del weights['lm_head.weight']
  model = open_gguf(write_gguf(tmp_path / 'a.gguf', weights=weights))

  assert model.config == config
  found = dict(model.tensors())
  assert list(found) == list(weights)
  for name, (_, weight, kind) in weights.items():
    stored = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert found[name].dtype == np.float32
    assert found[name].flags.c_contiguous
    np.testing.assert_array_equal(found[name], stored, err_msg=name)


def test_optional_keys_have_defaults(tmp_path):
  """No KV heads: as many as queries; no head_dim: embed / heads; no theta."""
  optional = {
    'llama.attention.head_count': 2,
    'llama.attention.head_count_kv': None,
    'llama.attention.key_length': None,
    'llama.attention.value_length': None,
    'llama.rope.dimension_count': None,
    'llama.rope.freq_base': None,
    'llama.vocab_size': None,
    'tokenizer.ggml.padding_token_id': None,
    'tokenizer.ggml.tokens': [f'token {i}' for i in range(300)],
  }
  square = np.ones((32, 32), np.float32)
  weights = random_weights()
  for name in weights:
    if name.endswith(('q_proj.weight', 'o_proj.weight')):
      weights[name] = (weights[name][0], square, F32)
  path = write_gguf(tmp_path / 'a.gguf', metadata=optional, weights=weights)
  assert open_gguf(path).config == dataclasses.replace(
    CONFIG,
    layers=(LayerShape(num_kv_heads=2, queries_per_kv=1, mlp_dim=64),) * 2,
    ropes=(Rope(10000.0),),
    pad_token_id=None,
  )


@pytest.mark.parametrize(
  'key, value',
  [
    ('llama.attention.head_count', 3),
    ('llama.attention.head_count_kv', [2, 1]),
    ('llama.attention.sliding_window', 4096),
    ('llama.attention.value_length', 8),
    ('llama.block_count', None),
    ('llama.expert_count', 8),
    ('llama.rope.dimension_count', 8),
    ('llama.rope.scale_linear', 2.0),
    ('llama.rope.scaling.type', 'yarn'),
  ],
)
def test_an_unsupported_key_is_named(tmp_path, key, value):
  path = write_gguf(tmp_path / 'a.gguf', metadata={key: value})
  with pytest.raises(UserError) as error:
    open_gguf(path)
  assert key in str(error.value) and str(path) in str(error.value)


def test_another_architecture_is_named(tmp_path):
  path = write_gguf(tmp_path / 'a.gguf', arch='falcon')
  with pytest.raises(UserError, match="general.architecture is 'falcon'"):
    open_gguf(path)


@pytest.mark.parametrize(
  'name, problem',
  [
    ('blk.0.attn_norm.bias', 'is not part of the models'),
    ('blk.9.attn_q.bias', 'is not part of the models'),
    ('rope_freqs.weight', 'holds a RoPE scaling'),
  ],
)
def test_an_unknown_tensor_is_named(tmp_path, name, problem):
  extra = {'extra': (name, np.ones(16, np.float32), F32)}
  path = write_gguf(tmp_path / 'a.gguf', weights={**random_weights(), **extra})
  with pytest.raises(UserError, match=f'{name} {problem}'):
    open_gguf(path)


def test_biases_that_a_file_leaves_out_are_zero(tmp_path):
  bias = np.random.default_rng(0).normal(size=32).astype(np.float32)
  extra = {'extra': ('blk.1.ffn_down.bias', bias, F32)}
  path = write_gguf(tmp_path / 'a.gguf', weights={**random_weights(), **extra})
  model = open_gguf(path)
  assert model.config == CONFIG.with_biases(PROJECTIONS['mlp'])
  found = {n: x for n, x in model.tensors() if n.endswith('.bias')}
  assert len(found) == 3 * len(CONFIG.layers)
  for name, x in found.items():
    expected = bias if name == 'model.layers.1.mlp.down_proj.bias' else 0 * x
    np.testing.assert_array_equal(x, expected)


def test_llama3_scaling_is_known_by_its_table(tmp_path):
  """As llama.cpp's converter writes it: factors alone, in float32."""
  factors = []
  for i in range(8):
    wavelength = 2 * math.pi * 500000.0 ** (2 * i / 16)
    if wavelength < 8192 / 4:
      factors.append(1.0)
    elif wavelength > 8192:
      factors.append(32.0)
    else:
      kept = (8192 / wavelength - 1) / (4 - 1)
      factors.append(1 / ((1 - kept) / 32 + kept))
  assert len(set(factors)) > 1 and 1.0 < min(set(factors) - {1.0}) < 32.0
  table = {'extra': ('rope_freqs.weight', np.array(factors, np.float32), F32)}
  path = write_gguf(tmp_path / 'a.gguf', weights={**random_weights(), **table})
  config = dataclasses.replace(
    CONFIG, ropes=(Rope(500000.0, Llama3(32.0, 1.0, 4.0, 8192)),)
  )
  assert open_gguf(path).config == config


@pytest.mark.parametrize(
  'key, sizes',
  [
    ('attention.head_count', [4, 4, 4]),
    ('attention.head_count_kv', [2, 0]),
    ('attention.head_count_kv', [2, 3]),
    ('feed_forward_length', [64, 0]),
  ],
)
def test_layers_that_a_deci_may_have_but_we_do_not(tmp_path, key, sizes):
  """Layers without attention or MLP, or with the wrong number of heads."""
  metadata = {
    f'deci{k[5:]}': v for k, v in METADATA.items() if k.startswith('llama.')
  }
  absent = dict.fromkeys(k for k in METADATA if k.startswith('llama.'))
  path = write_gguf(
    tmp_path / 'a.gguf',
    metadata={**absent, **metadata, f'deci.{key}': sizes},
    arch='deci',
  )
  with pytest.raises(UserError, match=f'deci.{key}'):
    open_gguf(path)


def test_an_absent_tensor_is_named(tmp_path):
  weights = random_weights()
  del weights['model.layers.1.mlp.up_proj.weight']
  path = write_gguf(tmp_path / 'a.gguf', weights=weights)
  with pytest.raises(UserError, match='blk.1.ffn_up.weight'):
    open_gguf(path)


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path):
  weights = random_weights()
  weights['model.norm.weight'] = (
    'output_norm.weight',
    np.ones(32, np.int8),
    None,
  )
  path = write_gguf(tmp_path / 'a.gguf', weights=weights)
  with pytest.raises(UserError, match='output_norm.weight has type I8'):
    open_gguf(path)


def test_a_header_is_what_gguf_py_reads(tmp_path):
  _, metadata = byte_level_bpe('smollm')
  metadata |= {'x.numbers': [1.5, -2.0], 'x.flags': [True, False], 'x.none': ''}
  path = write_gguf(tmp_path / 'a.gguf', metadata=metadata)
  values, tensors = read_header(path)
  theirs = gguf.GGUFReader(path)
  assert values == {
    key: field.contents()
    for key, field in theirs.fields.items()
    if not key.startswith('GGUF.')
  }
  assert list(tensors) == [tensor.name for tensor in theirs.tensors]
  for tensor in theirs.tensors:
    ours = tensors[tensor.name]
    assert ours.kind == tensor.tensor_type
    assert ours.shape == tuple(reversed(tensor.shape.tolist()))
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(ours[:], values)


@pytest.mark.parametrize('damage', ['absent', 'empty', 'foreign', 'truncated'])
def test_a_file_that_is_no_gguf(tmp_path, damage):
  path = tmp_path / 'a.gguf'
  content = write_gguf(path).read_bytes()
  path.unlink()
  if damage == 'empty':
    path.touch()
  elif damage == 'foreign':
    path.write_bytes(b'PK' + content)
  elif damage == 'truncated':
    path.write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match='a.gguf: cannot be read as GGUF'):
    open_gguf(path)


def byte_level_bpe(pre):
  """A small tokenizer, and what a GGUF says of it."""
  tokenizer = Tokenizer(models.BPE())
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
  digits = pre_tokenizers.Digits(individual_digits=True)
  # Trained without splitting digits apart, so that the splitting shows.
  tokenizer.pre_tokenizer = byte_level
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=298,
    special_tokens=['<|pad|>', '<|bos|>', '<|eos|>'],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator([TEXT] * 3 + [' 1999 000 24'] * 3, trainer)
  if pre == 'smollm':
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
  tokenizer.add_tokens(
    [AddedToken(t, normalized=False) for t in ('<think>', '</think>')]
  )
  assert tokenizer.get_vocab_size() == CONFIG.vocab_size

  control, normal, user = (
    gguf.TokenType[name] for name in ('CONTROL', 'NORMAL', 'USER_DEFINED')
  )
  merges = json.loads(tokenizer.to_str())['model']['merges']
  return tokenizer, {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': [tokenizer.id_to_token(i) for i in range(300)],
    'tokenizer.ggml.token_type': [
      int(kind) for kind in [control] * 3 + [normal] * 295 + [user] * 2
    ],
    'tokenizer.ggml.merges': [' '.join(pair) for pair in merges],
    'tokenizer.chat_template': '<|bos|>{{ messages[0]["content"] }} – ok',
  }


@pytest.mark.parametrize('pre', ['smollm', 'gpt-2', 'default'])
def test_tokenizer_gives_the_same_ids(tmp_path, pre):
  original, metadata = byte_level_bpe(pre)
  path = write_gguf(tmp_path / 'a.gguf', metadata=metadata)
  open_gguf(path).write_tokenizer(tmp_path)

  tokenizer = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  ids = original.encode(TEXT).ids
  assert tokenizer.encode(TEXT).ids == ids
  assert tokenizer.get_vocab() == original.get_vocab()
  for skip in (False, True):
    assert tokenizer.decode(ids, skip_special_tokens=skip) == original.decode(
      ids, skip_special_tokens=skip
    )
  # The text tells the ways to split it apart.
  other, _ = byte_level_bpe('gpt-2' if pre == 'smollm' else 'smollm')
  original.pre_tokenizer = other.pre_tokenizer
  assert original.encode(TEXT).ids != ids


def test_llama3s_tokenizer_puts_bos_first_by_default(tmp_path):
  _, metadata = byte_level_bpe('gpt-2')
  metadata['tokenizer.ggml.pre'] = 'llama-bpe'
  path = write_gguf(tmp_path / 'a.gguf', metadata=metadata)
  open_gguf(path).write_tokenizer(tmp_path)
  tokenizer = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  tokens = tokenizer.encode('the mill').tokens
  assert tokens[0] == '<|bos|>' and tokens.count('<|bos|>') == 1
  settings = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert settings['add_bos_token'] is True


@pytest.mark.parametrize('add_bos', [None, False, True])
def test_tokenizer_files_load_in_transformers(tmp_path, add_bos):
  transformers = pytest.importorskip('transformers')
  original, metadata = byte_level_bpe('smollm')
  metadata['tokenizer.ggml.add_bos_token'] = add_bos
  path = write_gguf(tmp_path / 'a.gguf', metadata=metadata)
  model = open_gguf(path)
  model.write_tokenizer(tmp_path)
  (tmp_path / 'config.json').write_text(
    json.dumps({'model_type': 'llama', **config_to_hf(model.config)})
  )

  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
  bos = [1] if add_bos else []
  assert tokenizer(TEXT)['input_ids'] == bos + original.encode(TEXT).ids
  ids = Tokenizer.from_file(str(tmp_path / 'tokenizer.json')).encode(TEXT).ids
  assert ids == bos + original.encode(TEXT).ids
  assert tokenizer.bos_token == '<|bos|>'
  assert tokenizer.eos_token == '<|eos|>'
  assert tokenizer.pad_token == '<|pad|>'
  assert tokenizer.model_max_length == 64
  chat = [{'role': 'user', 'content': 'hi'}]
  assert tokenizer.apply_chat_template(chat, tokenize=False) == (
    '<|bos|>hi – ok'
  )
  generation = transformers.GenerationConfig.from_pretrained(tmp_path)
  assert generation.bos_token_id == 1
  assert generation.eos_token_id == 2
  assert generation.pad_token_id == 0


@pytest.mark.parametrize(
  'key, value',
  [
    ('tokenizer.ggml.model', 'llama'),
    ('tokenizer.ggml.pre', 'gpt-4o'),
    ('tokenizer.ggml.pre', None),
    ('tokenizer.ggml.add_eos_token', True),
    ('tokenizer.ggml.add_space_prefix', True),
  ],
)
def test_another_tokenizer_is_named(tmp_path, key, value):
  _, metadata = byte_level_bpe('smollm')
  path = write_gguf(tmp_path / 'a.gguf', metadata={**metadata, key: value})
  with pytest.raises(UserError) as error:
    open_gguf(path).write_tokenizer(tmp_path)
  message = str(error.value)
  assert f'{key} is {value!r}' in message
  assert 'original Hugging Face folder' in message
  assert list(tmp_path.iterdir()) == [path]


def test_an_absent_tokenizer_key_is_named(tmp_path):
  _, metadata = byte_level_bpe('smollm')
  metadata['tokenizer.ggml.merges'] = None
  model = open_gguf(write_gguf(tmp_path / 'a.gguf', metadata=metadata))
  with pytest.raises(UserError, match='tokenizer.ggml.merges is absent'):
    model.write_tokenizer(tmp_path)


def test_torch_and_transformers_are_not_needed():
  code = (
    'import sys, lorapr_jax.gguf.read; '
    'print({"torch", "transformers", "jax"} & set(sys.modules))'
  )
  run = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert run.stdout.strip() == 'set()'
