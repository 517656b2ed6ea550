"""LoRAPrune alone: another config without what this project adds to it.

  python train.py --config=configs/paper.py:smollm2_135m --workdir=runs/paper

What follows the colon is a config's name or file, and what that takes:
paper:llama:7b; nothing means default. The criterion is that of the reference
implementation; where the paper's text differs it is prune.score=square and
prune.norm=False (docs/method.md has every such place).
"""

from ml_collections import config_dict

from lorapr_jax.settings.files import read_config


def get_config(name: str = 'default') -> config_dict.ConfigDict:
  """The criterion of the reference's code, every layer alike, nothing added."""
  config = read_config(name)
  config.prune.criterion = 'lora'
  config.prune.lora_gradient = 'full'
  config.prune.order = 'joint'
  config.prune.compensate = 'none'
  config.prune.layer_profile = '1'
  config.train.distill = 0.0
  config.recover.steps = 0
  return config
