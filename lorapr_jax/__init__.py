"""Structured pruning of LLaMA models, guided by LoRA: LoRAPrune in JAX.

    import lorapr_jax as lp

    run = lp.prune('default', 'runs/mine', model={'path': '/models/llama'}, ...)
    lp.evaluate(run.export, 'file:heldout.txt', seq_len=128).perplexity

`import lorapr_jax` loads nothing else; what is used is loaded then.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from lorapr_jax.api import (
    Model,
    PrunedRun,
    evaluate,
    evaluate_suite,
    evaluate_tasks,
    export,
    generate,
    load,
    prune,
  )
  from lorapr_jax.errors import UserError

__version__ = '0.1.0'
__all__ = [
  'Model',
  'PrunedRun',
  'UserError',
  'evaluate',
  'evaluate_suite',
  'evaluate_tasks',
  'export',
  'generate',
  'load',
  'prune',
]


def __getattr__(name: str) -> Any:
  """Loads the API when something of it is first used."""
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from lorapr_jax import api

  return getattr(api, name)


def __dir__() -> list[str]:
  """For completion."""
  return [*globals(), *__all__]
