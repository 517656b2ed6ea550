"""The pruning event: groups are chosen and masked, the rest is repaired."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from lorapr_jax.axes import LAYERS
from lorapr_jax.models.compute import Compute, compiler_options
from lorapr_jax.models.kinds import kinds
from lorapr_jax.pruning.compensation import (
  repaired_of,
  with_repaired,
  without_repaired,
)
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.pruning.masks import (
  by_stack,
  select_masks,
  staying,
  without_layers,
)
from lorapr_jax.settings.phases import Pruning
from lorapr_jax.training.base import Base, Places
from lorapr_jax.training.layer_choice import make_choose_layers
from lorapr_jax.training.layer_pass import Carry, LayerPass, embedded
from lorapr_jax.training.prune_part import Layer, PartPruning
from lorapr_jax.training.state import TrainState


class Pruned(NamedTuple):
  """What a pruning event changes.

  Attributes:
    repaired: `repaired_of` the base.
    masks: as of the state.
    importance: as of the state.
    errors: of the outputs of repaired projections on the tokens that are kept
      out, before and after the repair, by projection and text, (P, 2, S); 0
      where nothing is repaired.
  """

  repaired: Any
  masks: Any
  importance: Any
  errors: Array


class PruningEvent(NamedTuple):
  """A pruning step's masks and repair, compiled for one size of the arrays.

  Attributes:
    pruning: what is masked when, and how.
    choose_layers: from `make_choose_layers`; None: no layer goes as a whole.
    select: (importance, masks, counts) -> masks, where that is all.
    prune_layers: from `make_prune_layers`, where tokens are needed.
  """

  pruning: Pruning
  choose_layers: Callable[..., Any] | None
  select: Callable[..., Any]
  prune_layers: Callable[..., Pruned]

  @classmethod
  def of(cls, pruning: Pruning, base: Base) -> 'PruningEvent':
    """For the size of `base`."""
    compute, criterion, places = base.compute, pruning.criterion, base.places
    select = jax.jit(select_within_layers, out_shardings=places.state)
    choose_layers = None
    if LAYERS in pruning.plan.keep:
      protected = pruning.plan.protected_in(len(compute.config.layers))
      choose_layers = make_choose_layers(
        compute, criterion.layers, protected, places
      )
    how = compute, criterion, pruning.repairs, places
    prune_layers = make_prune_layers(*how, len(pruning.texts))
    return cls(pruning, choose_layers, select, prune_layers)

  def __call__(
    self, state: TrainState, base: Base, step: int, batches: Sequence[Any]
  ) -> tuple[TrainState, Base]:
    """State and base after the event, which measures and repairs on `batches`.

    `state` has the importance of this step. The layers that go as a whole are
    chosen first; then groups, of those that stay. The repaired weights are
    donated.
    """
    pruning, config = self.pruning, base.compute.config
    keep = pruning.milestones.alive(step)
    keep = pruning.plan.counts_in(keep, len(config.layers))
    counts = by_stack(keep, config)
    if step in pruning.layer_events:
      masks, importance = self.choose_layers(
        *(base.params, state.lora, state.masks, state.importance),
        *(np.int32(sum(keep[LAYERS])), tuple(batches)),
      )
      state = state.replace(masks=masks, importance=importance)
    if not pruning.goes_through_layers or step not in pruning.passes:
      masks = self.select(state.importance, state.masks, counts)
      return state.replace(masks=masks), base
    pruned = self.prune_layers(
      *(repaired_of(base.params), without_repaired(base.params), state.lora),
      *(state.masks, state.importance, counts, tuple(batches)),
    )
    params = with_repaired(base.params, pruned.repaired)
    state = state.replace(
      masks=pruned.masks,
      importance=pruned.importance,
      **repair_of(pruned.errors, state.unrepaired),
    )
    return state, base._replace(params=params)


def select_within_layers(importance: Any, masks: Any, counts: Any) -> Any:
  """`select_masks` by stack, in which layers that are gone stay as they are."""
  return tuple(
    mask | select_masks(without_layers(scores), without_layers(mask), keep)
    for scores, mask, keep in zip(
      importance, masks, map(staying, masks, counts), strict=True
    )
  )


@jax.jit
def repair_of(errors: Array, unrepaired: Array) -> dict[str, Array]:
  """What a state with so many `unrepaired` keeps of `Pruned.errors`."""
  before, after = errors[:, 0], errors[:, 1]
  lost, left = jnp.sum(before, axis=-1), jnp.sum(after, axis=-1)
  count = jnp.sum((lost != 0) & ~(left < lost))  # NaN is not repaired.
  return {
    'unrepaired': unrepaired + count.astype(jnp.int32),
    # NaN where a text has no token among those that are kept out.
    'error_left': jnp.nanmean(after / before, axis=0),
  }


def make_prune_layers(
  compute: Compute,
  criterion: Criterion,
  repairs: bool,
  places: Places,
  texts: int = 1,
) -> Callable[..., Pruned]:
  """The jitted pass of a pruning event:

    (repaired, rest, lora, masks, importance, counts, batches) -> Pruned

  The batches' tokens go through the layers in order. Each part of a layer runs
  with the masks from before the event, up to the inputs X of its last
  projection. Its groups are scored on them, unless the scores are averages over
  steps, and chosen. `best_update` repairs the weight W of that projection,
  where W + s A B is what the rows that go contributed. The next part sees the
  output with the new masks. So each choice and each repair knows of all before
  it, and one projection's X^T X exists at a time. Padding does not count in X.

  `repaired` and `importance` are donated.

  `compute` and `places` are for the size of the arrays. `texts` is S; if it is
  not 1, a batch's 'sources', (M, B, T), says of which text a token is.
  """
  place = places.state

  def prune_layers(repaired, rest, lora, masks, importance, counts, batches):
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    embeddings = rest['embed_tokens']['weight']
    x, rotation = embedded(compute, place, embeddings, batch)
    weights, chosen = [], []
    about = batch.get('segments'), texts, batch.get('sources')
    parts = PartPruning(compute, criterion, repairs, place, *about)
    config, T = compute.config, batch['tokens'].shape[-1]
    for i, stack in enumerate(config.stacks):
      layers = LayerPass(parts, stack.shape, rotation)
      index = jnp.arange(stack.size)
      trees = {'params': rest['stacks'][i], 'lora': lora[i]}
      (x, new), found = jax.lax.scan(
        layers.prune_layer,
        Carry(x, repaired[i]),
        Layer(
          *(index, stack.start + index, kinds(config, stack, T), trees),
          *(masks[i], importance[i], staying(masks[i], counts[i])),
        ),
      )
      weights.append(new)
      chosen.append(found)
    masks, importance, errors = zip(*chosen, strict=True)
    errors = jnp.concatenate(jax.tree.leaves(errors))
    return Pruned(tuple(weights), masks, importance, errors)

  return jax.jit(
    prune_layers,
    donate_argnums=(0, 4),
    out_shardings=Pruned(repaired_of(places.base), place, place, place),
    compiler_options=compiler_options(place),
  )
