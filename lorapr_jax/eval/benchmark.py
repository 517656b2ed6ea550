"""How fast folders read prompts and continue them, beside each other."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

from lorapr_jax.eval.latency import paired_generation
from lorapr_jax.hf.load import Model, load
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.cost import (
  forward_flops_per_token,
  kv_cache_bytes_per_token,
)

# What the command takes where nothing else is asked for.
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 32, 7


def benchmark(
  folders: Mapping[str, str],
  batch_sizes: Sequence[int],
  *,
  prompt_tokens: int,
  new_tokens: int,
  repeats: int,
  dtype: str = 'auto',
) -> dict[str, Any]:
  """What the command prints with --json: medians over `repeats` timed turns.

  `folders` is {'model': a folder}, with {'against': another} to compare it
  with. The batch sizes are tried one after the other.
  """
  loaded = {name: load(folder, dtype) for name, folder in folders.items()}
  models = {
    name: (model.params, Compute(model.config, dtype=model.dtype))
    for name, model in loaded.items()
  }
  # Of a prompt, the last token's logits alone are needed; a decoded token sees
  # the prompt and on average half of what is new.
  flops = {
    'prefill': _flops(loaded, prompt_tokens, 1 / prompt_tokens),
    'decode': _flops(loaded, 2 * prompt_tokens + new_tokens, 1.0),
  }
  rows = []
  for batch_size in batch_sizes:
    times = paired_generation(
      models,
      batch_size=batch_size,
      prompt_tokens=prompt_tokens,
      new_tokens=new_tokens,
      repeats=repeats,
    )
    tokens = {'prefill': batch_size * prompt_tokens, 'decode': batch_size}
    rows += [
      {'batch_size': batch_size, 'phase': phase}
      | compare(times, phase, tokens[phase], flops[phase])
      for phase in flops
    ]
  return {
    **{name: _describe(folders[name], loaded[name]) for name in folders},
    'prompt_tokens': prompt_tokens,
    'new_tokens': new_tokens,
    'repeats': repeats,
    'results': rows,
  }


def _flops(
  models: Mapping[str, Model], width: int, with_logits: float
) -> dict[str, float]:
  """Operations of a token by model; see `forward_flops_per_token`."""
  return {
    name: forward_flops_per_token(model.config, width, with_logits=with_logits)
    for name, model in models.items()
  }


def _describe(folder: str, model: Model) -> dict[str, Any]:
  """A model's size, in the dtype that it runs in."""
  each, config = model.dtype.itemsize, model.config
  return {
    'folder': folder,
    'dtype': model.dtype.name,
    'params': config.num_parameters,
    'weights_bytes': config.num_parameters * each,
    'kv_cache_bytes_per_token': kv_cache_bytes_per_token(config, each),
  }


def compare(
  times: Mapping[str, Mapping[str, Sequence[float]]],
  phase: str,
  tokens: int,
  flops: Mapping[str, float],
) -> dict[str, Any]:
  """Medians of a phase; the speed-up is the median of the turns' own.

  `times` are from `paired_generation`, and each is for `tokens` tokens; `flops`
  are the operations of a token, by model.
  """
  seconds = {name: phases[phase] for name, phases in times.items()}
  row: dict[str, Any] = {}
  for name, values in seconds.items():
    median = statistics.median(values)
    row[name] = {'seconds': median, 'tokens_per_second': tokens / median}
  if 'against' in seconds:
    row['speedup'] = speedup(times, phase)
    row['flops_ratio'] = flops['against'] / flops['model']
  return row


def speedup(
  times: Mapping[str, Mapping[str, Sequence[float]]], phase: str
) -> float:
  """How many times as fast as `against` the `model` is in a phase.

  It is the median over the turns, each with its own quotient.
  """
  pairs = zip(times['model'][phase], times['against'][phase], strict=True)
  return statistics.median(theirs / ours for ours, theirs in pairs)
