"""What the cases start from: a good model, and a run that is finished."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from lorapr_jax.cli.main import main
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.hf.write import export_model
from lorapr_jax.models.trees import init_params
from tests.errors import runs
from tests.errors.case import train_tiny

SIZES = {
  'model_type': 'llama',
  'vocab_size': 64,
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 48,
  'max_position_embeddings': 64,
  'tie_word_embeddings': False,
}


def make_model(folder):
  """A good model with a tokenizer."""
  config = config_from_hf(SIZES)
  params = init_params(jax.random.key(0), config, jnp.float32)
  export_model(folder, params, config)
  vocab = {'<eos>': 0, '<unk>': 1, 'word': 2}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    json.dumps(
      {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<eos>'}
    )
  )


def make_run(folder):
  """A finished run."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder.parent)
    assert main(train_tiny(*runs.RUN)) == 0
  # ml_collections would take this config's functions for those of the next.
  sys.modules.pop('config_config', None)


@pytest.fixture(scope='session')
def good(tmp_path_factory):
  """Makes the good MODEL or RUN when it is first asked for; its folder."""
  folder = tmp_path_factory.mktemp('good')

  @functools.cache
  def make(name):
    {'MODEL': make_model, 'RUN': make_run}[name](folder / name)
    return folder / name

  return make
