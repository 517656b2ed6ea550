"""The demo: SmolLM2-135M-Instruct, pruned on news articles.

  make demo
or, once the model is there,
  python train.py --config=configs/smollm2_135m.py --workdir=runs/demo

It took 8 minutes and 3.6 GB on two idle cores of an AMD EPYC with
AVX512-BF16. Held-out news at 128 tokens, 80 windows: 37.3 dense, 44.7 at 80% of
the parameters, 54.0 pruned (94.3 of 134.5 million parameters). With
configs/paper.py:smollm2_135m, the paper's method alone, 99.4. JAX 0.10.2.
"""

from ml_collections import config_dict

from lorapr_jax.runtime.files import cache_dir
from lorapr_jax.settings.files import read_config


def get_config() -> config_dict.ConfigDict:
  """A third of the query heads and half of the channels go, on average."""
  config = read_config('default')
  config.model.path = str(cache_dir() / 'smollm2-135m-instruct')
  # The activations of 1,024 tokens are small beside this model's weights.
  config.model.remat = 'dots'
  config.data.train = 'demo:news:train'
  config.data.packing = 'concatenate'
  config.data.eval = 'demo:news:heldout'
  config.data.eval_windows = 80
  config.train.steps = 60
  config.train.batch_size = 8
  config.train.micro_batch_size = 8
  config.train.seq_len = 128
  config.train.learning_rate = 2e-3
  config.train.distill = 0.5
  config.train.log_every = 2
  config.train.checkpoint_every = 30
  # Whole KV heads are coarse here: there are three. Their query heads, three
  # under each, are finer and leave the KV cache's shape as it is.
  config.prune.heads = 'queries'
  config.prune.heads_target = 1 / 3
  config.prune.target = 0.5
  # 16,384 tokens to choose and repair on; the other steps train.
  config.prune.calibration_steps = 16
  # On the way a model is left that lost less.
  config.export.ladder = '0.8'
  return config
