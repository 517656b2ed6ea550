"""What was measured beside what is counted: the result of an exploration."""

from collections.abc import Mapping, Sequence
import functools
import operator
import shlex
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from lorapr_jax.eval.benchmark import NEW_TOKENS, PROMPT_TOKENS
from lorapr_jax.exploring.asked import QUANTIZED, Asked
from lorapr_jax.exploring.measure import quantized_base
from lorapr_jax.exploring.results import Results
from lorapr_jax.exploring.ways import WAYS, Settings, Size
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.cost import kv_cache_bytes
from lorapr_jax.models.trees import param_shapes
from lorapr_jax.report import units

# An untrained perplexity, over the dense one, that training makes up for.
_AFFORDABLE = 2.0


def describe(
  asked: Asked, results: Results, command: Sequence[str]
) -> dict[str, Any]:
  """All figures. `command` is the words of one that prunes, without a size."""
  rows = [row(asked, size, results[size]) for size in asked.sizes]
  dense, on = rows[0], rows[0]['perplexity']
  if asked.latency:
    dense['latency'] = _dense_times(rows)
  chosen = choose(rows)
  folder = asked.settings.model.folder
  return {
    'model': folder.name if folder else 'random weights',
    'dtype': asked.dtype.name,
    'context': asked.context,
    'measured_on': {key: on[key] for key in ('data', 'seq_len', 'windows')},
    'repaired_on': {'data': asked.text, 'tokens': asked.tokens},
    'timed_on': _timed_on() if asked.latency else None,
    'rows': rows,
    'left_out': list(asked.left_out),
    'verdict': verdict(rows),
    'chosen': chosen['name'],
    'command': shlex.join(pruning(command, chosen['settings'])),
    'seconds': sum(row['seconds'] for row in rows),
  }


def row(asked: Asked, size: Size, line: Mapping[str, Any]) -> dict[str, Any]:
  """What is known of one model."""
  config, plan = asked.left(size, line['gone']), asked.plans.get(size)
  return {
    'name': size.name,
    **size._asdict(),
    'settings': asked.asks.get(size),
    'kept_by_depth': plan.kept_by_depth if plan else None,
    'parameters': config.num_parameters,
    'bytes': stored_bytes(config, asked.dtype, QUANTIZED.get(size.way)),
    'kv_cache_bytes': kv_cache_bytes(
      config, 1, asked.context, asked.dtype.itemsize
    ),
    **{
      key: line[key]
      for key in ('gone', 'perplexity', 'repair', 'latency', 'seconds')
    },
  }


def stored_bytes(config: ModelConfig, dtype: Any, qtype: Any = None) -> int:
  """Of a model's weights, those of its projections in `qtype` where given."""
  shapes = param_shapes(config, dtype)
  if qtype is not None:
    shapes = jax.eval_shape(
      functools.partial(quantized_base, config=config, qtype=qtype), shapes
    )
  return sum(x.size * _bits(x.dtype) // 8 for x in jax.tree.leaves(shapes))


def _bits(dtype: Any) -> int:
  whole = jnp.issubdtype(dtype, jnp.integer)
  return (jnp.iinfo if whole else jnp.finfo)(dtype).bits


def choose(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """What is asked for, or the smallest size that training may make up for.

  Where fit or speedup is asked for, it is the best way to it. Else it is the
  smallest size whose perplexity is at most twice the dense model's, and of the
  ways to it the best. Where there is none, it is the one of the least
  perplexity.
  """
  sizes = [row for row in rows if row['way'] in WAYS]
  asked = [row for row in sizes if row['asked']]
  if asked:
    return min(asked, key=lambda row: row['perplexity']['value'])
  most = _AFFORDABLE * rows[0]['perplexity']['value']
  affordable = [row for row in sizes if row['perplexity']['value'] <= most]
  if affordable:
    return min(
      affordable, key=lambda row: (row['share'], row['perplexity']['value'])
    )
  return min(sizes, key=lambda row: row['perplexity']['value'])


def pruning(command: Sequence[str], settings: Settings) -> list[str]:
  """The words of a command with these `prune.*` settings.

  They take the place of those that the command has.
  """
  flags = {f'--config.prune.{key}': value for key, value in settings.items()}
  kept = [word for word in command if word.partition('=')[0] not in flags]
  return [*kept, *(f'{flag}={value}' for flag, value in flags.items())]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
  """One sentence: whether quantising alone is better than pruning."""

  def better(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    values = (x['perplexity']['value'] for x in (one, other))
    return one['bytes'] <= other['bytes'] and operator.le(*values)

  quantized = [row for row in rows if row['way'] in QUANTIZED]
  sizes = [row for row in rows if row['way'] in WAYS]
  beaten = [x for x in sizes if any(better(q, x) for q in quantized)]
  if not beaten:
    return (
      'No size is beaten by the dense model that is quantised to as many bytes '
      'or fewer.'
    )
  which = [q for q in quantized if any(better(q, x) for x in beaten)]
  found = ' and '.join(
    f'{q["name"]} takes {units.size(q["bytes"])} at a perplexity of '
    f'{q["perplexity"]["value"]:.2f}'
    for q in which
  )
  names = ', '.join(row['name'] for row in beaten)
  return f'Quantising alone is better than {names}: the dense model in {found}.'


def _dense_times(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The dense model's median times, beside all sizes."""
  timed = [row['latency'] for row in rows if row['latency']]
  return {
    phase: {'seconds': statistics.median(x[phase]['dense'] for x in timed)}
    for phase in timed[0]
  }


def _timed_on() -> dict[str, Any]:
  return {
    'device': jax.devices()[0].device_kind,
    'prompt_tokens': PROMPT_TOKENS,
    'new_tokens': NEW_TOKENS,
  }
