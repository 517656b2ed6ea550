"""The models of configs/models.py have the sizes that their names say."""

import pytest
import torch
import transformers

from configs import models
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.models.families import FAMILIES
from lorapr_jax.settings.run import split_config


@pytest.mark.parametrize('name', models.SIZES)
def test_parameters_are_counted_as_transformers_counts_them(name):
  keys = models.SIZES[name]
  with torch.device('meta'):
    model = transformers.AutoModelForCausalLM.from_config(
      transformers.AutoConfig.for_model(**keys)
    )
  model.tie_weights()
  theirs = sum({id(p): p.numel() for p in model.parameters()}.values())
  assert config_from_hf(keys).num_parameters == theirs
  # As a run reads them.
  settings = split_config(models.get_config(name))
  assert settings.compute.config.num_parameters == theirs
  # The name ends with the billions that its publisher speaks of.
  billions = float(name.rpartition('-')[2].removesuffix('b'))
  assert theirs / 1e9 == pytest.approx(billions, rel=0.12)


def test_the_models_are_of_families_that_are_there():
  assert {keys['model_type'] for keys in models.SIZES.values()} <= {*FAMILIES}


@pytest.mark.parametrize(
  'name, target, heads',
  [
    # 2,560 is a multiple of 4, not of 6; 3,840 of 12, not of 14.
    ('gemma3-4b', 0.3, 4),
    ('gemma3-12b', 0.15, 12),
    ('qwen3-8b', 0.15, 28),
  ],
)
def test_heads_of_a_uniform_folder_are_as_many_as_its_type_takes(
  name, target, heads
):
  config = models.get_config(name)
  config.prune.update(target=target, protect='none')
  config.export.layout = 'uniform'
  shape = split_config(config).exported[0].layers[0]
  assert shape.num_heads == heads
