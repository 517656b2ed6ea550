"""What summary.json holds, and what people see at a run's start and end."""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
import math
import platform
import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from lorapr_jax.axes import LAYERS
from lorapr_jax.eval.perplexity import Perplexity
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.cost import (
  forward_flops_per_token,
  kv_cache_bytes_per_token,
)
from lorapr_jax.pruning.groups import group_size
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.schedule import AtOnce
from lorapr_jax.pruning.shrink import Kept
from lorapr_jax.runtime.terminal import PlainConsole, say
from lorapr_jax.settings.phases import Pruning

_PACKAGES = (
  'lorapr-jax',
  'jax',
  'flax',
  'optax',
  'orbax-checkpoint',
  'qwix',
  'transformers',
)


def versions() -> dict[str, str]:
  """The versions of Python and of packages that can change a run's numbers."""
  found = {'python': platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:  # Run from a checkout.
      continue
  return found


def peak_memory_bytes() -> int:
  """The peak of the first device, or of the process if the device has none."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else peak * 1024


def cost_report(
  *, dense: ModelConfig, pruned: ModelConfig, dtype: str, seq_len: int
) -> dict[str, Any]:
  """Parameters, bytes, operations and KV cache, before and after the cut.

  `dtype` is of the weights and the cache, as exported; operations are of a
  forward pass of `seq_len` tokens.
  """
  models = {'dense': dense, 'pruned': pruned}
  bytes_each = jnp.dtype(dtype).itemsize
  return {
    **{f'params_{k}': config.num_parameters for k, config in models.items()},
    'bytes': {k: c.num_parameters * bytes_each for k, c in models.items()},
    'flops_per_token': {
      **{k: forward_flops_per_token(c, seq_len) for k, c in models.items()},
      'seq_len': seq_len,
    },
    'kv_cache_bytes_per_token': {
      k: kv_cache_bytes_per_token(c, bytes_each) for k, c in models.items()
    },
  }


def sparsity_report(
  plan: PruningPlan | None, kept: Kept = ()
) -> dict[str, Any]:
  """{heads, channels, params: {target, achieved}}, as shares removed.

  `layers` is there too where whole layers go. If `kept` is empty, what the plan
  leaves counts.
  """
  if plan is None:
    none = {'target': 0.0, 'achieved': 0.0}
    return {'heads': none, 'channels': none, 'params': none}
  left = {
    group: tuple(layer[group].shape[-1] for layer in kept)
    for group in (kept[0] if kept else ())
  }
  achieved = plan.sparsity(left or plan.keep)
  return {
    kind: {'target': target, 'achieved': achieved[kind]}
    for kind, target in plan.targets_by_kind().items()
  }


def repair_report(
  pruning: Pruning | None, unrepaired: int, error_left: Sequence[float]
) -> dict[str, Any]:
  """What repairs came to, as the state says; {} where nothing is repaired.

  The error left of a text is NaN, here null, where it is not known.
  """
  if not pruning or not pruning.repairs:
    return {}
  shares = [None if math.isnan(share) else share for share in error_left]
  return {
    'unrepaired': unrepaired,
    'error_left': dict(zip(pruning.texts, shares, strict=True)),
  }


def sparsity_entry(
  plan: PruningPlan | None, alive: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
  """The sparsity fields of a line of metrics.jsonl."""
  gone = {'heads': 0.0, 'channels': 0.0, 'params': 0.0}
  if plan:
    gone = plan.sparsity(alive)
  return {
    'heads_sparsity': gone['heads'],
    'channels_sparsity': gone['channels'],
    **({'layers_sparsity': gone[LAYERS]} if LAYERS in gone else {}),
    'params_kept': 1 - gone['params'],
  }


def perplexity_report(**measured: Perplexity | None) -> dict[str, Any]:
  """The perplexities by name, with what each was measured on."""
  return {
    name: {
      'value': result.perplexity,
      'nll': result.nll,
      'data': result.data,
      'seq_len': result.seq_len,
      'windows': result.windows,
    }
    for name, result in measured.items()
    if result
  }


def print_plan(
  config: ModelConfig, pruning: Pruning | None, show: Callable[[str], None]
) -> None:
  """Shows, line by line, what a run will do to a base of these sizes."""
  show(f'{len(config.layers)} layers, {config.num_parameters:,} parameters')
  if pruning is None:
    show('nothing is pruned (prune.target=0)')
    return
  plan, criterion = pruning.plan, pruning.criterion
  prunable = len(plan.prunable_layers)
  protected = len(config.layers) - prunable
  if plan.going:
    show(
      f'layers: {prunable - len(plan.going)} of the {prunable} not protected '
      f'kept, chosen by prune.layers_criterion={criterion.layers}'
    )
  for group, kept in plan.kept_by_depth.items():
    size = group_size(config, config.layers[0], group)
    if len(kept) == 1:
      show(
        f'{group}: {kept[0][0]:,} of {size:,} kept in each layer not protected'
      )
    else:
      counts = ', '.join(f'{count:,} in {layers}' for count, layers in kept)
      show(
        f'{group}: kept of {size:,}, from the first layers not protected to '
        f'the last: {counts}'
      )
  if plan.targets.fit:
    taken = plan.targets.room.footprint(plan.pruned_config)
    show(f'what is left fits in {plan.targets.fit} (prune.fit): {taken}')
  if plan.targets.speedup is not None:
    show(
      f'what is left was measured to {plan.targets.speedup_of} at least '
      f'{plan.targets.speedup} times as fast (prune.speedup)'
    )
  if (loops := len(plan.pruned_config.stacks)) > 3:
    show(f'what is left has {loops} stacks of equal layers, each compiled')
  show(
    f'{protected} of {len(config.layers)} layers protected (prune.protect); '
    f'{plan.pruned_config.num_parameters:,} parameters will be left'
  )
  for rung in pruning.rungs:
    show(
      f'rung {rung.name} of export.ladder: '
      f'{rung.plan.pruned_config.num_parameters:,} parameters, exported before '
      f'step {pruning.first_step + rung.end}'
    )
  schedule = pruning.schedule
  if isinstance(schedule, AtOnce) and not pruning.rungs:
    show(f'groups are masked and cut out after step {schedule.total_steps}')
  else:
    steps = ', '.join(str(pruning.first_step + cut) for cut in pruning.cuts)
    before = f'before steps {steps}, and ' if steps else ''
    show(f'masked groups are cut out {before}after the last step')
  for kind, share in sparsity_report(plan).items():
    show(f'{kind} to remove: {_share(share)}')
  if pruning.averages and criterion.needs_base_grads:
    bytes_more = 4 * sum(config.layer_parameters(s) for s in config.layers)
    show(
      f'prune.criterion={criterion.name} keeps gradients of the base '
      f'in memory: {bytes_more / 1e9:.2f} GB more over all devices than lora'
    )


def _share(share: dict[str, float | None]) -> str:
  asked = share['target']
  goal = '' if asked is None else f' (target {asked:.2%})'
  return f'{share["achieved"]:.2%}{goal}'


def rung_line(rung: dict[str, Any]) -> str:
  """A rung, as its file has it, for people."""
  quality = ''
  if rung['perplexity']:
    quality = f', perplexity {rung["perplexity"]["pruned"]["value"]:.2f}'
  return (
    f'rung {rung["share"]}: {rung["params_pruned"]:,} parameters{quality}: '
    f'{rung["exports"]["hf"]["path"]}'
  )


def print_summary(summary: dict[str, Any]) -> None:
  """Prints the dense and the pruned model side by side, and what a run took.

  The rungs of a ladder are between them.
  """
  table, notes = Table(title=f'{summary["model"]}, pruned'), []
  rungs = summary['rungs']
  shares = [str(rung['share']) for rung in rungs]
  for column in ('', 'dense', *shares, 'pruned', 'change'):
    table.add_column(column, justify='right' if column else 'left')

  def row(name, dense, pruned, form, between=()):
    middle = map(form.format, between) if between else ['–'] * len(rungs)
    change = f'{pruned / dense - 1:+z.1%}'
    table.add_row(
      name, form.format(dense), *middle, form.format(pruned), change
    )

  sizes = [rung['params_pruned'] for rung in rungs]
  row(
    *('parameters', summary['params_dense'], summary['params_pruned']),
    *('{:,}', sizes),
  )
  if summary['perplexity']:
    dense, pruned = (summary['perplexity'][k] for k in ('dense', 'pruned'))
    values = [rung['perplexity']['pruned']['value'] for rung in rungs]
    row('perplexity', dense['value'], pruned['value'], '{:.2f}', values)
    if cut := summary['perplexity'].get('cut'):
      row('... right after the cut', dense['value'], cut['value'], '{:.2f}')
    notes.append(
      f'perplexity: {dense["data"]}, {dense["windows"]} windows of '
      f'{dense["seq_len"]} tokens'
    )
  latency = summary['latency']
  row('latency, ms', *(1e3 * latency[x] for x in ('dense', 'pruned')), '{:.1f}')
  notes.append(
    f'latency: prefill of {latency["seq_len"]} tokens, batch size '
    f'{latency["batch_size"]}'
  )
  PlainConsole().print(table)
  for note in notes:
    say(note)
  for kind, share in summary['sparsity'].items():
    say(f'{kind} removed: {_share(share)}')
  for text, share in summary['repair'].get('error_left', {}).items():
    left = 'not measured' if share is None else f'{share:.0%}'
    say(f'error left by repairs, on other tokens of {text}: {left}')
  seconds = ', '.join(f'{k} {v:.0f} s' for k, v in summary['seconds'].items())
  say(f'time: {seconds}')
  say(
    f'training {summary["tokens_per_second"]:,.0f} tokens/s, peak memory '
    f'{summary["peak_memory_bytes"] / 1e9:.2f} GB'
  )
  for rung in rungs:
    say(rung_line(rung))
  for export in summary['exports'].values():
    say(
      f'export: {export["path"]} ({export["dtype"]}), read back, logits differ '
      f'by at most {export["max_logit_difference"]:.1e}'
    )
