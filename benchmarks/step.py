"""What a training step costs, by its settings: time, memory, share of the peak.

  PYTHONPATH=. python benchmarks/step.py [--sizes smollm2-135m] [--batch 8]
    [--seq_len 128] [--remat blocks,dots] [--attention auto] [--packed]
    [--double]
    [--config.model.base_dtype=bfloat16 ...]

One row for each --remat and --attention; with --double also one, of the last of
these, for each of tokens, sequences, rank, layers and vocabulary doubled. With
--packed two documents share each row, as data.packing=documents packs them.
Weights are random, half of the channels and heads are to go. Prints a table in
Markdown:

  step         seconds of the median of the steps, gradients to optimiser
  importance   its share of the step, from repeated calls of its own
  GFLOP/s      4 N operations a token for the weights, and the attention
  of the peak  of the fastest product of two matrices in this run
  temporaries  MB beside base, batch and state, as the compiler says
"""

import argparse
from collections.abc import Callable, Iterator
import itertools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from configs import models
from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.hf.load import load_or_draw
from lorapr_jax.models.cost import forward_flops_per_token
from lorapr_jax.settings.run import RunSettings, split_config
from lorapr_jax.training import steps
from lorapr_jax.training.base import Places
from lorapr_jax.training.state import init_state

# The keys of a config.json. Sources: the models' cards on the Hugging Face Hub.
_SMOLLM2 = {
  'model_type': 'llama',
  'vocab_size': 49152,
  'hidden_size': 576,
  'intermediate_size': 1536,
  'num_hidden_layers': 30,
  'num_attention_heads': 9,
  'num_key_value_heads': 9,
  'max_position_embeddings': 65536,
  'rms_norm_eps': 1e-5,
  'rope_theta': 100000.0,
  'tie_word_embeddings': True,
}
SIZES = {
  # With as many KV heads as heads, so that half of them can go.
  'smollm2-135m': _SMOLLM2,
  'llama-3.2-1b': _SMOLLM2
  | {
    'vocab_size': 128256,
    'hidden_size': 2048,
    'intermediate_size': 8192,
    'num_hidden_layers': 16,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'rope_theta': 500000.0,
  },
  'llama-7b': models.SIZES['llama-7b'],
}
# What --double doubles, by the names of the table.
DOUBLED = ('tokens', 'sequences', 'rank', 'layers', 'vocabulary')


class Row(NamedTuple):
  """What is measured of one setting."""

  step: float
  importance: float
  flops_per_second: float
  temporaries: int
  compiling: float


def matmul_peak(dtype: Any) -> float:
  """Operations a second of the fastest product, of operands in `dtype`.

  Products of square matrices, each of the one before: an accelerator's are so
  large that calling them is no part of the time.
  """
  size, count = (2048, 1) if jax.default_backend() == 'cpu' else (8192, 20)
  a = jnp.full((size, size), 1 / size, dtype)

  @jax.jit
  def products(a):
    def product(_, x):
      y = jnp.matmul(x, a, preferred_element_type=jnp.float32)
      return y.astype(dtype)

    return jax.lax.fori_loop(0, count, product, a)

  products(a).block_until_ready()
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    products(a).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * count * size**3 / min(seconds)


def configured(
  sizes: dict[str, Any],
  *,
  tokens: int,
  sequences: int,
  rank: int,
  flags: list[str],
) -> RunSettings:
  """A run's settings, for random weights."""
  # LoRAPrune's own step: it has all parts, the importance too.
  own = ['--config.prune.criterion=lora', '--config.prune.order=joint']
  config, _ = parse_flags(['--config=default', '--workdir=none', *own, *flags])
  config.model.sizes = config_dict.ConfigDict(sizes)
  config.data.train = 'synthetic:1'
  config.train.seq_len = tokens
  config.train.batch_size = config.train.micro_batch_size = sequences
  config.lora.rank = rank
  return split_config(config)


class Step(NamedTuple):
  """A step that is compiled, and what it runs on.

  Attributes:
    gradients: of (params, lora, masks, batch, key), compiled.
    arguments: of `gradients`, but the key.
    rank_groups: (state, results of gradients) -> state, ok.
    update: (state, grads, ok) -> state.
    state: the first; each step donates the one that it gets.
    compiling: seconds.
  """

  gradients: Callable[..., Any]
  arguments: Callable[[Any], tuple[Any, ...]]
  rank_groups: Callable[..., Any]
  update: Callable[..., Any]
  state: Any
  compiling: float


def compiled_step(settings: RunSettings, packed: bool = False) -> Step:
  """Of a run's settings, with random weights and tokens."""
  train, size = settings.train, settings.compute
  places = Places.of(
    settings.mesh, size.config, settings.base_dtype, train.micro_batch
  )
  params = load_or_draw(
    None, size.config, places.base, settings.base_dtype, train.seed
  )
  adamw = steps.make_optimizer(settings.phases[0].learning_rate)
  state = init_state(jax.random.key(0), size, tuple(settings.plan.keep), adamw)
  state = jax.device_put(state, places.state)
  shape = (1, train.micro_batch_size, train.seq_len)
  batch = {
    'tokens': jax.random.randint(
      jax.random.key(1), shape, 0, size.config.vocab_size
    ),
    'weights': jnp.ones(shape, jnp.float32),
  }
  if packed:
    first = jnp.arange(train.seq_len) < train.seq_len // 3
    batch['segments'] = jnp.broadcast_to(jnp.where(first, 1, 2), shape)
  batch = jax.device_put(batch, places.batch)
  update_importance = steps.make_update_importance(
    size, settings.pruning.criterion, places.state
  )

  def arguments(state):
    return params, state.lora, state.masks, batch

  def rank_groups(state, results):
    metrics, grads, more = results
    importance, ok = update_importance(
      state.importance,
      params,
      state.lora,
      grads,
      more,
      state.masks,
      metrics['grad_norm'],
    )
    return state.replace(importance=importance), ok

  start = time.perf_counter()
  base_grads = settings.pruning.criterion.needs_base_grads
  gradients = steps.make_lora_gradients(
    size, places.state, base_sharding=places.base if base_grads else None
  )
  gradients = gradients.lower(*arguments(state), jax.random.key(2)).compile()
  return Step(
    gradients,
    arguments,
    rank_groups,
    steps.make_apply_update(adamw, places.state),
    state,
    time.perf_counter() - start,
  )


def measure(settings: RunSettings, repeats: int, packed: bool) -> Row:
  """Compiles the step, and runs it."""
  step = compiled_step(settings, packed)
  state, results = step.state, None
  seconds, ranking = [], []
  for i in range(repeats + 1):
    start = time.perf_counter()
    results = step.gradients(*step.arguments(state), jax.random.key(i))
    state, ok = step.rank_groups(state, results)
    state = step.update(state, results[1], ok)
    jax.block_until_ready(state)
    seconds.append(time.perf_counter() - start)
  for _ in range(repeats + 1):
    start = time.perf_counter()
    state, _ = step.rank_groups(state, results)
    jax.block_until_ready(state)
    ranking.append(time.perf_counter() - start)
  each, importance = (statistics.median(x[1:]) for x in (seconds, ranking))
  train, config = settings.train, settings.compute.config
  tokens = train.micro_batch_size * train.seq_len
  forward = forward_flops_per_token(config, train.seq_len)
  return Row(
    step=each,
    importance=importance / each,
    flops_per_second=2 * tokens * forward / each,
    temporaries=step.gradients.memory_analysis().temp_size_in_bytes,
    compiling=step.compiling,
  )


def cases(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
  """The name of each row, and the arguments of `configured`."""
  plain = {
    'sizes': SIZES[args.sizes],
    'tokens': args.seq_len,
    'sequences': args.batch,
    'rank': args.rank,
  }
  for remat, attention in itertools.product(args.remat, args.attention):
    flags = [f'--config.model.remat={remat}']
    plain['flags'] = [f'--config.model.attention={attention}', *flags]
    plain['flags'] += args.flags
    yield f'{remat}, {attention}', dict(plain)
  if not args.double:
    return
  keys = {'layers': 'num_hidden_layers', 'vocabulary': 'vocab_size'}
  for name in DOUBLED:
    if key := keys.get(name):
      sizes = {**plain['sizes'], key: 2 * plain['sizes'][key]}
      yield f'{name} x 2', {**plain, 'sizes': sizes}
    else:
      yield f'{name} x 2', {**plain, name: 2 * plain[name]}


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--sizes', choices=SIZES, default='smollm2-135m')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--seq_len', type=int, default=128)
  parser.add_argument('--rank', type=int, default=8)
  parser.add_argument('--remat', type=_names, default=['blocks'])
  parser.add_argument('--attention', type=_names, default=['auto'])
  parser.add_argument('--packed', action='store_true')
  parser.add_argument('--double', action='store_true')
  parser.add_argument('--repeats', type=int, default=5)
  args, args.flags = parser.parse_known_args()
  device = jax.devices()[0]
  print(f'{device.device_kind}, jax {jax.__version__}', flush=True)
  first, peak = None, 0.0
  for name, arguments in cases(args):
    settings = configured(**arguments)
    try:
      row = measure(settings, args.repeats, args.packed)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      print(f'| {name} | out of memory |', flush=True)
      continue
    if first is None:
      first = row
      operands = settings.compute.matmul_dtype
      peak = max(matmul_peak(operands), matmul_peak(jnp.float32))
      print(
        f'peak: {peak / 1e9:.0f} GFLOP/s, {operands.name} operands\n\n'
        '| | step, s | over the first | importance | GFLOP/s | of the peak | '
        'temporaries, MB | over the first | compiling, s |\n'
        '|---|---|---|---|---|---|---|---|---|'
      )
    print(
      f'| {name} | {row.step:.3f} | {row.step / first.step:.2f} | '
      f'{row.importance:.1%} | {row.flops_per_second / 1e9:.0f} | '
      f'{row.flops_per_second / peak:.0%} | {row.temporaries / 1e6:.0f} | '
      f'{row.temporaries / first.temporaries:.2f} | {row.compiling:.0f} |',
      flush=True,
    )


def _names(text: str) -> list[str]:
  return text.split(',')


if __name__ == '__main__':
  main()
