"""The dense and the pruned model beside each other: times and texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
import statistics
from typing import Any

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.eval.generation import Sampling, stream_text
from lorapr_jax.eval.latency import paired_generation
from lorapr_jax.models.compute import Compute

# Name -> (params, what runs them).
Models = Mapping[str, tuple[Any, Compute]]


def latencies(models: Models) -> dict[str, Any]:
  """Median seconds of a prefill by model, and of which batch and length."""
  batch_size, seq_len = 1, 128
  times = paired_generation(
    models,
    batch_size=batch_size,
    prompt_tokens=seq_len,
    new_tokens=1,
    repeats=7,
  )
  return {
    **{name: statistics.median(x['prefill']) for name, x in times.items()},
    'batch_size': batch_size,
    'seq_len': seq_len,
  }


def generations(
  models: Models,
  folder: Path | None,
  prompts: Sequence[str],
  max_new_tokens: int,
) -> list[dict[str, str]]:
  """How each model continues the prompts: [{'prompt', NAME: text}].

  Greedily, so that nothing but the model makes the difference. Empty for
  random weights, which have no tokenizer.
  """
  if folder is None or not prompts:
    return []
  tokenizer = Tokenizer(folder)
  sampling = Sampling(max_new_tokens)

  def go_on(prompt: str, params: Any, compute: Compute) -> str:
    ids, config = tokenizer.encode(prompt), compute.config
    pieces = stream_text(
      params, config, tokenizer, ids, sampling, dtype=compute.dtype
    )
    return ''.join(pieces)

  return [
    {'prompt': prompt}
    | {name: go_on(prompt, *model) for name, model in models.items()}
    for prompt in prompts
  ]
