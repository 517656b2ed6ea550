"""Tiny models with random weights and real tokenizers, and a text."""

import dataclasses
from pathlib import Path
import random
from typing import Any

import jax
import numpy as np
from tokenizers import (
  Tokenizer,
  decoders,
  models,
  pre_tokenizers,
  processors,
  trainers,
)

from lorapr_jax.axes import LORA_TARGETS
from lorapr_jax.hf.config import config_to_hf
from lorapr_jax.hf.write import export_model
from lorapr_jax.models.config import LayerShape, ModelConfig
from lorapr_jax.models.rope import Llama3, Rope
from lorapr_jax.models.trees import init_params
from lorapr_jax.runtime.files import write_json

VOCAB_SIZE = 320
EOS, BOS = '<|end|>', '<|begin|>'
_SUBJECTS = ('The old cook', 'A brown dog', 'My sister', 'Nobody', 'The café')
_VERBS = ('sold', 'found', 'painted', 'lost', 'never wanted', 'carried')
_OBJECTS = ('loaves of bread', 'small boats', 'letters', 'green doors', 'eggs')
_PLACES = ('by the river', "in Anna's garden", 'at night', 'near Málaga')

CONFIG = ModelConfig(
  vocab_size=VOCAB_SIZE,
  embed_dim=128,
  head_dim=32,
  layers=(LayerShape(num_kv_heads=4, queries_per_kv=2, mlp_dim=256),) * 4,
  norm_eps=1e-5,
  tie_embeddings=True,
  max_positions=128,
  eos_token_id=0,
)
# What the first lacks: a head of its own, a BOS token in front of every text,
# scaled RoPE, and, as in many models, more embeddings than tokens.
SECOND_CONFIG = dataclasses.replace(
  CONFIG,
  vocab_size=VOCAB_SIZE + 32,
  tie_embeddings=False,
  bos_token_id=1,
  ropes=(
    Rope(
      500.0,
      Llama3(
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
      ),
    ),
  ),
)
BIASED_CONFIG = SECOND_CONFIG.with_biases(LORA_TARGETS)


def write_sentences(path: Path, seed: int, count: int) -> None:
  """Writes made-up sentences with digits, accents and punctuation."""
  draw = random.Random(seed)
  sentences = (
    f'{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} {draw.randint(2, 2000)} '
    f'{draw.choice(_OBJECTS)} {draw.choice(_PLACES)}.\n'
    for _ in range(count)
  )
  path.write_text(''.join(sentences), encoding='utf-8')


def make_base(folder: Path, config: ModelConfig, text: Path) -> None:
  """Writes a Hugging Face folder with random weights.

  Args:
    folder: to be made.
    config: the sizes.
    text: what its tokenizer is trained on.
  """
  companions = folder.with_name(f'{folder.name}-tokenizer')
  companions.mkdir()
  _write_tokenizer(companions, config, text)

  def draw(path, x):
    name = jax.tree_util.keystr(path)
    if 'bias' in name:
      return 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    # Five times as wide as usual, so that the logits of a model that has hardly
    # been trained differ by more than rounding.
    return x if 'norm' in name else 5 * x

  params = jax.tree_util.tree_map_with_path(
    draw, init_params(jax.random.key(0), config, np.float32)
  )
  export_model(folder, params, config, base=companions)


def _write_tokenizer(folder: Path, config: ModelConfig, text: Path) -> None:
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train(
    [str(text)],
    trainers.BpeTrainer(
      vocab_size=VOCAB_SIZE,
      special_tokens=[EOS, BOS],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  settings: dict[str, Any] = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'eos_token': EOS,
    'clean_up_tokenization_spaces': False,
    'model_max_length': config.max_positions,
  }
  if config.bos_token_id is not None:
    settings['bos_token'] = BOS
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{BOS} $A',
      pair=f'{BOS} $A {BOS} $B',
      special_tokens=[(BOS, config.bos_token_id)],
    )
  tokenizer.save(str(folder / 'tokenizer.json'))
  write_json(folder / 'tokenizer_config.json', settings)
  ids = config_to_hf(config).items()
  write_json(
    folder / 'generation_config.json',
    {k: v for k, v in ids if k.endswith('_token_id') and v is not None},
  )
