"""From targets to a plan: the counts that come to them (docs/method.md)."""

from collections.abc import Sequence
import dataclasses

from lorapr_jax.axes import LAYERS
from lorapr_jax.errors import UserError
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.pruning.counts import (
  Choice,
  layers_left,
  round_share,
  solve_parameters,
)
from lorapr_jax.pruning.fit import solve_fit
from lorapr_jax.pruning.plan import PruningPlan
from lorapr_jax.pruning.targets import Targets, choice_of


def plan_pruning(config: ModelConfig, targets: Targets) -> PruningPlan:
  """Turns targets into counts (design of the rule: docs/method.md).

  unit=groups: of each kind, the share `target` is removed from every layer
  that is not protected; what is kept is rounded to the nearest multiple, a tie
  prunes fewer, at least one is kept. unit=params: heads get the share at which
  heads and channels, pruned alike, would meet the target; channels, which are
  finer, then make up the difference. Where they cannot, the counts of heads
  that come nearest. fit: in the same way by bytes, never more than there are. A
  profile moves counts between layers; of each group as many go in all. What
  `speedup` comes to is measured: eval/speedup.py.

  Raises:
    UserError: if a target that is not zero prunes nothing, or a share of the
      parameters or of a layer is beyond what can be pruned, or the model fits
      as it is, or cannot, or its layers are not all of the same size.
  """
  if targets.speedup is not None:
    raise ValueError('what a speed-up comes to is measured')
  plan, choices = layers_plan(config, targets)
  if targets.fit:
    return _fitting(plan, choices)
  if targets.unit == 'groups':
    kept = {c.group: round_share(c, targets.of(c.group)) for c in choices}
  else:
    gone = len(plan.going)
    layers = len(plan.prunable_layers) - gone
    args = layers, choices, targets.share, gone
    kept = solve_parameters(config, *args)
  return plan.keeping(choices, kept)


def layers_plan(
  config: ModelConfig, targets: Targets
) -> tuple[PruningPlan, list[Choice]]:
  """A plan of the layers that go in any case, and the counts to choose from.

  Raises:
    UserError: for a model of which nothing can be pruned, or no such share of
      the layers.
  """
  if not config.is_uniform:
    raise UserError(
      'this model has layers of different sizes (it is pruned already): '
      'pruning starts from a model whose layers are equal'
    )
  plan = PruningPlan(config, targets, {})
  if not plan.prunable_layers:
    raise UserError(
      f'all {len(config.layers)} layers are protected: use prune.protect=none'
    )
  shares, layers = len(targets.profile), len(plan.prunable_layers)
  if shares > layers:
    raise UserError(
      f'prune.layer_profile has {shares} shares for the {layers} layers that '
      'are pruned: give at most one for each'
    )
  if targets.layers_target:
    left = layers_left(layers, targets.layers_target)
    plan = dataclasses.replace(plan, keep={LAYERS: plan.staying(left)})
  elif LAYERS in targets.groups:
    if layers < 2:
      raise UserError(
        'the one layer that is not protected stays, and neither heads nor '
        'channels are pruned: set prune.heads or prune.channels'
      )
    return plan, [Choice(LAYERS, layers, 1)]
  groups = [group for group in targets.groups if group != LAYERS]
  return plan, [choice_of(config, targets, group) for group in groups]


def _fitting(plan: PruningPlan, choices: Sequence[Choice]) -> PruningPlan:
  """The plan of the largest model that fits."""
  room = plan.targets.room
  most = room.bytes
  while True:
    kept = solve_fit(plan.config, choices, plan.alike, room, most)
    found = plan.keeping(choices, kept)
    # A profile may leave heads in layers without a window, which cache more.
    over = room.footprint(found.pruned_config).total - room.bytes
    if over <= 0:
      return found
    most -= over
