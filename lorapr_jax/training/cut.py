"""The cut: what is masked leaves a run's arrays, on the way or at the end."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lorapr_jax.axes import Axes, member_axes
from lorapr_jax.models.config import LoraConfig, ModelConfig
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.compensation import repaired_of, with_repaired
from lorapr_jax.pruning.masks import (
  by_stack,
  gated,
  select_masks,
  without_layers,
)
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.shrink import Kept, pad, shrink
from lorapr_jax.settings.phases import Pruning
from lorapr_jax.training.base import Base, kept_of
from lorapr_jax.training.state import TrainState


def finished(state: TrainState, base: Base) -> tuple[Any, Base]:
  """What a run's first phase leaves: (adapters, base) without masked groups.

  The base that is given has the size of the state; its weights are deleted.
  """
  left, compute = kept_of(state.masks), base.compute
  lora = cut_adapters(state.lora, left, compute.config, compute.lora)
  return lora, base.cut(left)


def as_saved(base: Base, state: TrainState) -> Base:
  """The base at the size of a state that was saved, with what was repaired.

  Arrays of the loaded base that are cut or repaired are deleted.
  """
  base = base.cut(kept_of(state.whole['masks']))
  if not state.repaired:
    return base
  loaded = repaired_of(base.params)
  places = jax.tree.map(lambda x: x.sharding, loaded)
  for array in jax.tree.leaves(loaded):
    array.delete()
  repaired = jax.device_put(state.repaired, places)
  return base._replace(params=with_repaired(base.params, repaired))


def check_counts(plan: PruningPlan | None, config: ModelConfig) -> None:
  """Checks that a finished run left what was planned.

  Raises:
    RuntimeError: if it did not.
  """
  if plan and config.layers != plan.pruned_config.layers:
    raise RuntimeError(f'masks leave {config}, which was not planned')


def cut_adapters(
  lora: Any, kept: Kept, config: ModelConfig, lora_config: LoraConfig
) -> Any:
  """Smaller adapters; the same where nothing is cut."""
  return _cut_adapters(lora, kept, config, lora_config) if kept else lora


@functools.partial(jax.jit, static_argnames=('config', 'lora_config'))
def _cut_adapters(
  lora: Any, kept: Kept, config: ModelConfig, lora_config: LoraConfig
) -> Any:
  axes = block_axes(config, lora_config)['lora']
  return shrink(lora, axes, kept, config)


def widened(state: TrainState, config: ModelConfig) -> dict[str, Any]:
  """{'masks', 'importance'} of all groups, those cut on the way included.

  `config` has the sizes before the first cut. Of a layer that is gone, all
  groups are masked.
  """
  kept, now = kept_of(state.whole['masks']), (state.masks, state.importance)
  return _widened(*now, state.whole, kept, config) if kept else state.whole


@functools.partial(jax.jit, static_argnames='config')
def _widened(
  masks: Any, importance: Any, whole: Any, kept: Kept, config: ModelConfig
) -> dict[str, Any]:
  axes = _axes_of_groups(masks)
  masks, importance = (
    pad(stacks, axes, kept, config)
    for stacks in (tuple(map(gated, masks)), importance)
  )
  importance = jax.tree.map(
    lambda there, now, before: jnp.where(there > 0, now, before),
    whole['masks'],
    importance,
    whole['importance'],
  )
  return {'masks': masks, 'importance': importance}


def cut_on_the_way(
  state: TrainState, base: Base, pruning: Pruning, step: int
) -> tuple[TrainState, Base]:
  """State and base without the groups that are masked before `step`.

  Where sizes are rounded up, the most important masked groups stay too. The
  larger weights are deleted.
  """
  config, axes = base.compute.config, _axes_of_groups(state.masks)
  counts = pruning.milestones.present(step)
  counts = pruning.plan.counts_in(counts, len(config.layers))
  present = _present(state.importance, state.masks, by_stack(counts, config))
  kept, kept_before = kept_of(present), kept_of(state.whole['masks'])
  lora_axes = block_axes(config, base.compute.lora)['lora']
  structure = jax.tree.structure(state.lora)

  def like_lora(tree: Any) -> bool:
    return jax.tree.structure(tree) == structure

  def smaller(state: TrainState) -> TrainState:
    def moments(tree: Any) -> Any:
      if like_lora(tree):
        return shrink(tree, lora_axes, kept, config)
      return tree

    return state.replace(
      lora=shrink(state.lora, lora_axes, kept, config),
      opt_state=jax.tree.map(moments, state.opt_state, is_leaf=like_lora),
      masks=shrink(state.masks, axes, kept, config),
      importance=shrink(state.importance, axes, kept, config),
    )

  before = pruning.plan.config
  there = _padded(present, kept_before, before)
  known = widened(state, before)['importance']
  state = jax.jit(smaller, out_shardings=base.places.state)(state)
  state = state.replace(whole={'masks': there, 'importance': known})
  state = jax.device_put(state, base.places.state)
  return state, base.cut(kept)


@jax.jit
def _present(importance: Any, masks: Any, counts: Any) -> Any:
  """Masks of `counts` groups: those that are alive, then the best of others.

  Layers that are masked as a whole all go.
  """

  def of_stack(importance: Any, masks: Any, counts: Any) -> Any:
    within = without_layers(masks)
    order = jax.tree.map(
      lambda scores, mask: jnp.where(mask > 0, jnp.inf, scores),
      without_layers(importance),
      within,
    )
    ones, counts = jax.tree.map(jnp.ones_like, within), without_layers(counts)
    return gated(masks | select_masks(order, ones, counts))

  return tuple(map(of_stack, importance, masks, counts))


@functools.partial(jax.jit, static_argnames='config')
def _padded(masks: Any, kept: Kept, config: ModelConfig) -> Any:
  return pad(masks, _axes_of_groups(masks), kept, config)


def _axes_of_groups(masks: Any) -> dict[str, Axes]:
  return {group: Axes(member_axes(group)) for group in masks[0]}
