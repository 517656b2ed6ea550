"""How important each group is: criteria, reduction to groups, average.

Everything here is for one layer; callers map it over a stack, so that the
dense scores of at most one layer exist at a time.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from lorapr_jax.axes import (
  LAYERS,
  PROJECTIONS,
  along_first,
  apply_masks,
  carries,
  group_axes,
)
from lorapr_jax.errors import UserError, choose
from lorapr_jax.models.lora import (
  FULL,
  OWN,
  lora_guided_gradient,
  lora_product,
  terms_of,
)
from lorapr_jax.pruning.compensation import REPAIRED
from lorapr_jax.pruning.masks import gated, without_layers

# Of each input of a projection: the sum of squares over tokens; the variance.
SQUARES, VARIANCES = 'squares', 'variances'
# How whole layers are scored: the loss without one more; 1 - cos of input and
# output; the sum of its elements' scores.
LOSS, COSINE, SUM = 'loss', 'cosine', 'sum'


class Signals(NamedTuple):
  """What a criterion may look at: one layer's trees, by part and projection.

  Attributes:
    params: {part: {projection: {'weight': W}}}.
    lora: {part: {projection: {'a': A, 'b': B}}}, for the targets.
    lora_grads: the gradients of `lora`.
    layer: the layer's index in the model.
    base_grads: of the projections of `params`, for a criterion that needs
      them.
    statistics: {part: {projection: array}}, of the tokens that the projection
      reads, for a criterion that needs them: see `Criterion.statistic`.
  """

  params: Any
  lora: Any
  lora_grads: Any
  layer: Array
  base_grads: Any = None
  statistics: Any = None


@dataclasses.dataclass(frozen=True)
class Criterion:
  """How scores are made, and what becomes of them.

  Attributes:
    name: a key of CRITERIA.
    score: 'abs' or 'square' of the first-order term (eq. 3 squares it).
    lora_gradient: the terms of the guided gradient: OWN, or FULL (eq. 10);
      see models/lora.py.
    norm: whether each projection's group vector is divided by its L2 norm
      before projections are added.
    decay: of the moving average over steps (eq. 11).
    layers: of whole layers: LOSS, COSINE or SUM.
  """

  name: str
  score: str = 'abs'
  lora_gradient: str = OWN
  norm: bool = True
  decay: float = 0.9
  layers: str = LOSS

  def __post_init__(self):
    choose('prune.criterion', self.name, CRITERIA)
    choose('prune.layers_criterion', self.layers, (LOSS, COSINE, SUM))
    if self.layers == SUM and not self.averaged:
      raise UserError(
        'prune.layers_criterion=sum adds up what prune.criterion=lora or '
        f'gradient averages over steps, and {self.name} does not: use loss or '
        'cosine'
      )
    choose('prune.score', self.score, ('abs', 'square'))
    choose(
      'prune.lora_gradient',
      self.lora_gradient,
      (OWN, FULL),
      removed={'first_order': 'prune.lora_gradient=full'},
    )
    if not 0.0 <= self.decay < 1.0:
      raise UserError(f'prune.decay is {self.decay}: it must be in [0, 1)')

  @property
  def squared(self) -> bool:
    """Whether the terms of `TERMS` are squared; else their size counts."""
    return self.score == 'square' or self.name == 'fluctuation'

  @property
  def averaged(self) -> bool:
    """Whether scores come from gradients, and are averaged over the steps.

    All others are scored at a pruning event, from what is there then.
    """
    return self.name in ('lora', 'gradient')

  @property
  def needs_base_grads(self) -> bool:
    """Whether each step must give the gradients of the base."""
    return self.name == 'gradient'

  @property
  def statistic(self) -> str | None:
    """What of a projection's inputs it reads: SQUARES, VARIANCES or nothing."""
    return {'activation': SQUARES, 'fluctuation': VARIANCES}.get(self.name)


class Options(NamedTuple):
  """How element scores are computed.

  Attributes:
    criterion: which, and its variants.
    scale: s = alpha / r.
    fused: whether low-rank products are sums of outer products, for backends
      that fuse them into one pass; see `lora_product`.
  """

  criterion: Criterion
  scale: float
  fused: bool = False


def _effective_weight(
  signals: Signals, part: str, name: str, options: Options
) -> Array:
  """W + s A B, or W for a projection without an adapter; in float32."""
  weight = signals.params[part][name]['weight'].astype(jnp.float32)
  adapter = signals.lora.get(part, {}).get(name)
  if adapter is None:
    return weight
  product = lora_product(adapter['a'], adapter['b'], fused=options.fused)
  return weight + options.scale * product


def _lora(signals, part, name, options):
  adapter = signals.lora.get(part, {}).get(name)
  if adapter is None:  # Nothing is known of this projection's gradient.
    return None
  grads = signals.lora_grads[part][name]
  gradient = lora_guided_gradient(
    adapter['a'],
    adapter['b'],
    grads['a'],
    grads['b'],
    terms=terms_of(options.criterion.lora_gradient, part, name),
    fused=options.fused,
  )
  return gradient * _effective_weight(signals, part, name, options)


def _gradient(signals, part, name, options):
  # LLM-Pruner's first-order term (arXiv 2305.11627, eq. 4), from the true
  # gradient of the frozen weight.
  gradient = signals.base_grads[part][name]['weight']
  return gradient * _effective_weight(signals, part, name, options)


def _activation(signals, part, name, options):
  # Wanda's score (arXiv 2306.11695, eq. 1), which Wanda-sp (arXiv 2312.11983)
  # sums over groups: |W_ij| times the L2 norm of input feature i over tokens.
  roots = jnp.sqrt(signals.statistics[part][name])
  weight = _effective_weight(signals, part, name, options)
  return along_first(roots, weight) * weight


def _fluctuation(signals, part, name, options):
  # FLAP's score (arXiv 2312.11983, eq. 6), squared in `element_scores`: the
  # variance of input i over tokens times the squared norm of its row. That is
  # the error of the output once its mean is made up for.
  if name not in REPAIRED.values():
    return None
  return _activation(signals, part, name, options)


def _magnitude(signals, part, name, options):
  return _effective_weight(signals, part, name, options)


def _random(signals, part, name, options):
  # One number for each input of the two projections that leave the groups;
  # the same at every step, so that the average is constant.
  if name not in REPAIRED.values():
    return None
  key = jax.random.fold_in(jax.random.key(0), signals.layer)
  shape = signals.params[part][name]['weight'].shape
  return jax.random.uniform(key, (*shape[:-1], 1))


# Each gives the first-order term of every element of a projection, before
# the absolute value or the square, or None where it has nothing to say.
TERMS: dict[str, Callable[..., Array | None]] = {
  'lora': _lora,
  'gradient': _gradient,
  'activation': _activation,
  'fluctuation': _fluctuation,
  'magnitude': _magnitude,
  'random': _random,
}


# The loss after repair (pruning/surgeon.py), which has no terms.
OBS = 'obs'
CRITERIA = (*TERMS, OBS)


def element_scores(
  signals: Signals, options: Options
) -> dict[str, dict[str, dict[str, Array]]]:
  """|G (W + s A B)| of every element, or its square (eqs. 3 and 6).

  The other criteria put their own term in its place. The gradient term has no
  s, as in the reference. Returns the tree of `signals.params`, without what is
  not a projection or has no score.
  """
  criterion = options.criterion
  scores: dict[str, dict[str, dict[str, Array]]] = {}
  for part, projections in signals.params.items():
    # Norms are no projections.
    for name in filter(projections.__contains__, PROJECTIONS.get(part, ())):
      term = TERMS[criterion.name](signals, part, name, options)
      if term is not None:
        shape = jnp.square if criterion.squared else jnp.abs
        scores.setdefault(part, {})[name] = {'weight': shape(term)}
  return scores


def group_scores(
  scores: Any, masks: Mapping[str, Array], axes: Any, *, norm: bool
) -> dict[str, Array]:
  """Sums element scores over every axis but the group's (eq. 4).

  Masked groups count nothing, not even in the norm, so that a run that has
  cut them away computes the same. A whole layer's score is the plain sum over
  all elements, as layers are ranked against each other.

  Args:
    scores: from `element_scores`, or a layer's `block_sums`.
    masks: {group: array}.
    axes: the axis names of the layer's parameters.
    norm: divide each projection's vector v by ||v||_2 + 1e-8 before adding.
  """
  totals = {group: jnp.zeros_like(mask) for group, mask in masks.items()}
  for part, projections in scores.items():
    for name, leaf in projections.items():
      names = axes[part][name]['weight']
      for group, mask in masks.items():
        if group == LAYERS:
          # What carries other groups is masked with them.
          elements = apply_masks(leaf['weight'], masks, names)
          totals[group] += mask * jnp.sum(elements)
        if not carries(names, group):
          continue
        others = tuple(
          i for i, axis in enumerate(names) if axis not in group_axes(group)
        )
        vector = mask * jnp.sum(leaf['weight'], axis=others)
        if norm:
          vector = vector / (jnp.linalg.norm(vector) + 1e-8)
        totals[group] += vector
  return totals


def update_importance(
  old: Mapping[str, Array],
  scores: Any,
  masks: Mapping[str, Array],
  axes: Any,
  criterion: Criterion,
) -> dict[str, Array]:
  """G_t = decay G_{t-1} + (1 - decay) Ghat_t, for each group (eq. 11).

  A masked group keeps the average that it had when it was masked: it is never
  ranked again (`masks.select_masks`), and a report can show why it went. So do
  those of a layer that is gone, and layers that have no average.
  """
  masks = gated(masks)
  if criterion.layers != SUM:
    masks = without_layers(masks)
  new = group_scores(scores, masks, axes, norm=criterion.norm)
  decay = criterion.decay
  averages = {
    g: jnp.where(masks[g] > 0, decay * old[g] + (1 - decay) * new[g], old[g])
    for g in masks
  }
  return {**old, **averages}
