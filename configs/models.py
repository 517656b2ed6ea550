"""Models that many people use, by name, with random weights: to plan with.

  python -m lorapr_jax plan --config=models:llama-7b --topology=v5e:2x4
  python -m lorapr_jax inspect --config=models:qwen3-8b --target=0.5

SIZES has their names; the sizes are those of the published config.json files.
To prune one, use --config=default, give its folder in --config.model.path and a
text in --config.data.train, and set what is set below.
"""

from ml_collections import config_dict

from lorapr_jax.settings.files import read_config

_KEYS = (
  *('hidden_size', 'num_hidden_layers', 'num_attention_heads'),
  *('num_key_value_heads', 'intermediate_size', 'vocab_size'),
)


def _sizes(model_type: str, *sizes: int, **more) -> dict:
  """Keys of a config.json."""
  return {
    'model_type': model_type,
    **dict(zip(_KEYS, sizes, strict=True)),
    'max_position_embeddings': 2048,
    'tie_word_embeddings': False,
    **more,
  }


def _llama3(*sizes: int) -> dict:
  return _sizes(
    'llama', *sizes, 128256, max_position_embeddings=8192, rope_theta=5e5
  )


def _qwen3(*sizes: int, **more) -> dict:
  return _sizes(
    'qwen3',
    *sizes,
    151936,
    head_dim=128,
    max_position_embeddings=40960,
    rope_theta=1e6,
    **more,
  )


def _gemma3(*sizes: int) -> dict:
  return _sizes(
    'gemma3_text',
    *sizes,
    262208,
    head_dim=256,
    max_position_embeddings=131072,
    query_pre_attn_scalar=256,
    rope_local_base_freq=1e4,
    rope_scaling={'rope_type': 'linear', 'factor': 8.0},
    rope_theta=1e6,
    sliding_window=1024,
    sliding_window_pattern=6,
    tie_word_embeddings=True,
  )


# Embedding, layers, heads, KV heads, channels, vocabulary.
SIZES = {
  'llama-7b': _sizes('llama', 4096, 32, 32, 32, 11008, 32000),
  'llama-13b': _sizes('llama', 5120, 40, 40, 40, 13824, 32000),
  'llama-30b': _sizes('llama', 6656, 60, 52, 52, 17920, 32000),
  'llama-65b': _sizes('llama', 8192, 80, 64, 64, 22016, 32000),
  'llama3-8b': _llama3(4096, 32, 32, 8, 14336),
  'llama3-70b': _llama3(8192, 80, 64, 8, 28672),
  'mistral-7b': _sizes(
    'mistral',
    *(4096, 32, 32, 8, 14336, 32768),
    max_position_embeddings=32768,
    rope_theta=1e6,
    sliding_window=None,
  ),
  'qwen2.5-7b': _sizes(
    'qwen2',
    *(3584, 28, 28, 4, 18944, 152064),
    max_position_embeddings=131072,
    rope_theta=1e6,
  ),
  'qwen3-0.6b': _qwen3(1024, 28, 16, 8, 3072, tie_word_embeddings=True),
  'qwen3-1.7b': _qwen3(2048, 28, 16, 8, 6144, tie_word_embeddings=True),
  'qwen3-4b': _qwen3(2560, 36, 32, 8, 9728, tie_word_embeddings=True),
  'qwen3-8b': _qwen3(4096, 36, 32, 8, 12288),
  'qwen3-14b': _qwen3(5120, 40, 40, 8, 17408),
  'qwen3-32b': _qwen3(5120, 64, 64, 8, 25600),
  'gemma3-4b': _gemma3(2560, 34, 8, 4, 10240),
  'gemma3-12b': _gemma3(3840, 48, 16, 8, 15360),
  'glm4-9b': _sizes(
    'glm4',
    *(4096, 40, 32, 2, 13696, 151552),
    attention_bias=True,
    head_dim=128,
    max_position_embeddings=32768,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-5,
  ),
  'olmo2-7b': _sizes(
    'olmo2',
    *(4096, 32, 32, 32, 11008, 100352),
    max_position_embeddings=4096,
    rope_theta=500000.0,
  ),
  'phi4-14b': _sizes(
    'phi3',
    *(5120, 40, 40, 10, 17920, 100352),
    max_position_embeddings=16384,
    rope_theta=250000.0,
    sliding_window=None,
  ),
  'smollm3-3b': _sizes(
    'smollm3',
    *(2048, 36, 16, 4, 11008, 128256),
    max_position_embeddings=65536,
    rope_theta=5e6,
    tie_word_embeddings=True,
  ),
  'granite-8b': _sizes(
    'granite',
    *(4096, 40, 32, 8, 12800, 49159),
    max_position_embeddings=131072,
    rope_theta=1e7,
    attention_multiplier=0.0078125,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    logits_scaling=16.0,
    tie_word_embeddings=True,
  ),
}


def get_config(model: str = '') -> config_dict.ConfigDict:
  """The paper's batches: 128 sequences of 512 tokens a step."""
  if model not in SIZES:
    raise ValueError(f'--config=models:NAME with NAME of {", ".join(SIZES)}')
  config = read_config('default')
  config.model.sizes = config_dict.ConfigDict(SIZES[model])
  config.data.train = config.data.eval = 'synthetic:1'
  config.data.packing = 'concatenate'
  config.data.eval_windows = 16
  config.train.batch_size = 128
  config.train.micro_batch_size = 16
  config.train.seq_len = 512
  return config
