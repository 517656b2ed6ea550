"""LoRAPrune alone: another config, without what this project adds.

  python train.py --config=configs/paper.py:smollm2_135m --workdir=runs/paper

After the colon comes the other config's name or file, and what that config
takes: paper:models:llama-7b. Without a name it is default. The criterion is
that of the reference implementation. The paper's text says prune.score=square
and prune.norm=False instead (docs/method.md has every such difference).
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
  config.prune.rung_steps = ''
  config.export.ladder = ''
  config.train.distill = 0.0
  config.recover.steps = 0
  return config
