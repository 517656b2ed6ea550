"""The dense and the pruned model beside each other: times and texts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapr_jax.data.tokenizer import Tokenizer
from lorapr_jax.eval.generation import Sampling, stream_text
from lorapr_jax.eval.latency import paired_latency
from lorapr_jax.models.compute import Compute

_LATENCY = {'batch_size': 1, 'seq_len': 128}

# Name -> (params, what runs them).
Models = Mapping[str, tuple[Any, Compute]]


def latencies(models: Models) -> dict[str, Any]:
  """Seconds of a prefill by model, and of which batch and length."""
  return {**paired_latency(dict(models), **_LATENCY), **_LATENCY}


def generations(
  models: Models,
  folder: Path | None,
  prompts: Sequence[str],
  max_new_tokens: int,
) -> list[dict[str, str]]:
  """How each model continues the prompts: [{'prompt', NAME: text}].

  Greedily, so that nothing but the model makes the difference. Empty for
  random weights, which have no tokenizer.

  Args:
    models: by name.
    folder: of their tokenizer; None: random weights.
    prompts: texts to continue.
    max_new_tokens: of each.
  """
  if folder is None or not prompts:
    return []
  tokenizer = Tokenizer(folder)
  sampling = Sampling(max_new_tokens)

  def go_on(prompt: str, params: Any, compute: Compute) -> str:
    pieces = stream_text(
      params, compute.config, tokenizer, prompt, sampling, dtype=compute.dtype
    )
    return ''.join(pieces)

  return [
    {'prompt': prompt}
    | {name: go_on(prompt, *model) for name, model in models.items()}
    for prompt in prompts
  ]
