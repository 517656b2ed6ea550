"""How much faster batches come than a step takes them.

  PYTHONPATH=. python benchmarks/input.py [--config=NAME] \\
    [--packing=documents] [--step_tokens_per_second=N]

Prints tokens per second of the input, taken as the loop takes it: each batch on
its devices; of the step's gradient, with random weights of the model's sizes,
unless a figure is given; and their ratio. Below 20 the exit status is 1: at 20,
batches that are made ahead never keep a step waiting.
"""

import argparse
import sys
import time

import jax
import numpy as np

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.hf.load import load_or_draw
from lorapr_jax.settings.files import read_config
from lorapr_jax.settings.run import RunSettings, split_config
from lorapr_jax.training import steps
from lorapr_jax.training.base import Places
from lorapr_jax.training.batches import Batches, device_batches
from lorapr_jax.training.state import init_state
from lorapr_jax.training.steps import make_optimizer

GOAL = 20
BATCHES, STEPS = 200, 3


def batches_of(settings: RunSettings) -> Batches:
  """Those of the training text."""
  folder = settings.model.folder
  return Batches.load(
    [settings.data.train],
    Tokenizer(folder) if folder else None,
    settings.compute.config.vocab_size,
    settings.data,
    settings.train,
  )


def input_speed(settings: RunSettings, places: Places) -> float:
  """Tokens per second of the batches, without packing and the first one."""
  (batch_at,) = (loaded := batches_of(settings)).streams.values()
  steps = range(BATCHES)
  with device_batches(batch_at, places.batch, loaded.rows, steps) as batches:
    jax.block_until_ready(next(batches))
    start = time.perf_counter()
    tokens = 0
    for batch in batches:
      tokens += jax.block_until_ready(batch)['tokens'].size
  return tokens / (time.perf_counter() - start)


def step_speed(settings: RunSettings, places: Places) -> float:
  """Tokens per second of the gradient: the median of some, once compiled."""
  step, seed = settings.compute, settings.train.seed
  params = load_or_draw(
    None, step.config, places.base, settings.base_dtype, seed
  )
  key = jax.random.key(seed)
  state = init_state(key, step, (), make_optimizer(1e-4))
  state = jax.device_put(state, places.state)
  gradients = steps.make_lora_gradients(step, places.state)
  (batch_at,) = batches_of(settings).streams.values()
  batch = jax.device_put(batch_at(0), places.batch)
  seconds = []
  for _ in range(1 + STEPS):
    start = time.perf_counter()
    jax.block_until_ready(
      gradients(params, state.lora, state.masks, batch, key)
    )
    seconds.append(time.perf_counter() - start)
  return batch['tokens'].size / float(np.median(seconds[1:]))


def main() -> int:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--config', default='paper:smollm2_135m')
  parser.add_argument('--packing', default='', help="default: the config's")
  parser.add_argument('--step_tokens_per_second', type=float)
  arguments = parser.parse_args()
  config = read_config(arguments.config)
  config.data.packing = arguments.packing or config.data.packing
  settings = split_config(config)
  places = Places.of(
    settings.mesh,
    settings.compute.config,
    settings.base_dtype,
    settings.train.micro_batch,
  )
  source = input_speed(settings, places)
  step = arguments.step_tokens_per_second or step_speed(settings, places)
  print(f'input  {source:12,.0f} tokens/s')
  print(f'step   {step:12,.0f} tokens/s')
  print(f'ratio  {source / step:12,.0f} (goal: at least {GOAL})')
  return int(source < GOAL * step)


if __name__ == '__main__':
  sys.exit(main())
