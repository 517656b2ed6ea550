"""LLaMA and Llama 3 of all sizes, with random weights: to plan what they need.

  python -m lorapr_jax plan --config=configs/llama.py:7b --topology=v5e:2x4

Sizes: 7b, 13b, 30b, 65b, llama3-8b and llama3-70b, as published in the models'
config.json. To prune one, use --config=default, give its folder in
--config.model.path and a text in --config.data.train, and set what is set
below.
"""

from ml_collections import config_dict

from lorapr_jax.settings.files import read_config

# Embedding, layers, heads, KV heads, channels, vocabulary.
SIZES = {
  '7b': (4096, 32, 32, 32, 11008, 32000),
  '13b': (5120, 40, 40, 40, 13824, 32000),
  '30b': (6656, 60, 52, 52, 17920, 32000),
  '65b': (8192, 80, 64, 64, 22016, 32000),
  'llama3-8b': (4096, 32, 32, 8, 14336, 128256),
  'llama3-70b': (8192, 80, 64, 8, 28672, 128256),
}


def get_config(size: str = '') -> config_dict.ConfigDict:
  """The paper's batches: 128 sequences of 512 tokens a step."""
  if size not in SIZES:
    raise ValueError(f'--config=llama:SIZE with SIZE of {", ".join(SIZES)}')
  embed, layers, heads, kv_heads, channels, vocabulary = SIZES[size]
  config = read_config('default')
  config.model.sizes = config_dict.ConfigDict(
    {
      'model_type': 'llama',
      'hidden_size': embed,
      'num_hidden_layers': layers,
      'num_attention_heads': heads,
      'num_key_value_heads': kv_heads,
      'intermediate_size': channels,
      'vocab_size': vocabulary,
      'max_position_embeddings': 2048,
      'tie_word_embeddings': False,
    }
  )
  config.data.train = config.data.eval = 'synthetic:1'
  config.data.packing = 'concatenate'
  config.data.eval_windows = 16
  config.train.batch_size = 128
  config.train.micro_batch_size = 16
  config.train.seq_len = 512
  return config
