"""Measures sizes of a model: choose, mask, repair, evaluate; nothing trains."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorapr_jax.axes import LAYERS, LORA_TARGETS
from lorapr_jax.eval.benchmark import (
  NEW_TOKENS,
  PROMPT_TOKENS,
  REPEATS,
  speedup,
)
from lorapr_jax.eval.latency import paired_generation
from lorapr_jax.eval.perplexity import HeldOut, Perplexity
from lorapr_jax.eval.remembered import remembered_perplexity
from lorapr_jax.exploring.asked import DENSE, QUANTIZED, Asked
from lorapr_jax.exploring.ways import Size
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import ModelConfig
from lorapr_jax.models.quantization import quantized_like
from lorapr_jax.models.trees import logical_axes
from lorapr_jax.pruning.compensation import (
  repaired_of,
  with_repaired,
  without_repaired,
)
from lorapr_jax.pruning.importance import LOSS
from lorapr_jax.pruning.masks import (
  by_stack,
  initial_masks,
  of_layers,
  with_layers,
)
from lorapr_jax.report.summary import perplexity_report, repair_report
from lorapr_jax.training.base import Base, cut_params, kept_of
from lorapr_jax.training.event import Pruned, make_prune_layers, repair_of
from lorapr_jax.training.layer_choice import make_choose_layers

# What is known of a model of which nothing is pruned.
_NOTHING: Mapping[str, Any] = {'repair': {}, 'latency': None, 'gone': []}


def quantized_base(params: Any, config: ModelConfig, qtype: Any) -> Any:
  """The weights, or their shapes, with every projection quantised."""
  config = dataclasses.replace(config, quantized=LORA_TARGETS)
  like = logical_axes(config)['params']
  return quantized_like(params, like, qtype)


class Measurer:
  """Measures sizes, each from the dense model anew.

  The weights that repairs change are kept aside in the host's memory; all
  others are never changed, and there is no second copy of them.
  """

  def __init__(
    self,
    asked: Asked,
    base: Base,
    held_out: HeldOut,
    batches: Sequence[Any],
    sha256: str | None,
    gone: Sequence[int] = (),
  ):
    """All that sizes are measured with.

    Args:
      asked: what is explored.
      base: the dense model.
      held_out: what perplexities are of.
      batches: what is chosen, measured and repaired on.
      sha256: of the base.
      gone: the first layers to go, in order, as far as they are known.
    """
    self._asked, self._held_out, self._batches = asked, held_out, batches
    self._sha256 = sha256
    # Untrained adapters add nothing.
    self._compute = dataclasses.replace(base.compute, lora=None)
    self._places = base.places
    self._rest = without_repaired(base.params)
    self._aside = jax.tree.map(np.array, repaired_of(base.params))
    self._gone = list(gone)

  @functools.cached_property
  def _prune_layers(self) -> Callable[..., Pruned]:
    """The pass, compiled once: sizes differ in counts alone."""
    pruning = self._asked.settings.pruning
    how = self._compute, pruning.criterion, pruning.repairs, self._places
    return make_prune_layers(*how, len(pruning.texts))

  @functools.cached_property
  def _choose_layers(self) -> Callable[..., Any]:
    """The choice of whole layers, as a run makes it."""
    plan, how = self._asked.settings.plan, self._layers_criterion
    protected = plan.protected_in(len(plan.config.layers))
    return make_choose_layers(self._compute, how, protected, self._places)

  @property
  def _layers_criterion(self) -> str:
    return self._asked.settings.pruning.criterion.layers

  def measure(self, size: Size) -> dict[str, Any]:
    """What becomes of a size, as a line of explored.jsonl holds it."""
    begin = time.perf_counter()
    if size.way == DENSE:
      found = self._dense()
    elif size.way in QUANTIZED:
      found = self._quantized(QUANTIZED[size.way])
    else:
      found = self._pruned(size)
    return {
      **size._asdict(),
      **found,
      'seconds': time.perf_counter() - begin,
    }

  def _whole(self) -> Any:
    """The dense model's weights."""
    aside = jax.device_put(self._aside, repaired_of(self._places.base))
    return with_repaired(self._rest, aside)

  def _dense(self) -> dict[str, Any]:
    params = self._whole()
    measured = remembered_perplexity(
      self._held_out, self._sha256, params, self._compute
    )
    # Its times are those that it takes in turns with the sizes.
    return {**_quality(measured), **_NOTHING}

  def _quantized(self, qtype: Any) -> dict[str, Any]:
    quantize = jax.jit(
      functools.partial(
        quantized_base, config=self._compute.config, qtype=qtype
      )
    )
    params = quantize(self._whole())
    measured = self._held_out.perplexity(params, self._compute)
    # How fast it is depends on the kernels of what serves it.
    return {**_quality(measured), **_NOTHING}

  def _pruned(self, size: Size) -> dict[str, Any]:
    gone = self.layers_gone(len(self._asked.plans[size].going))
    params, masks, repair = self.prune(size, gone)
    measured = self._held_out.perplexity(params, self._compute, masks=masks)
    times = None
    if self._asked.latency:
      config, kept = self._compute.config, kept_of(masks)
      small = self._asked.left(size, gone)
      times = latencies(
        (
          cut_params(params, kept, config),
          dataclasses.replace(self._compute, config=small),
        ),
        (self._whole(), self._compute),
      )
    found = {'repair': repair, 'latency': times, 'gone': gone}
    return {**_quality(measured), **found}

  def layers_gone(self, count: int) -> list[int]:
    """The layers that go where `count` do; by LOSS in their order.

    By LOSS one goes after the other, so that all that are chosen for one size
    go for every smaller one too. They are chosen once.
    """
    if self._layers_criterion != LOSS:
      return self._next_gone([], count) if count else []
    while len(self._gone) < count:
      self._gone += self._next_gone(self._gone, 1)
    return self._gone[:count]

  def _next_gone(self, gone: Sequence[int], count: int) -> list[int]:
    """So many layers that go next, once these have gone."""
    before = self._without(gone)
    masks, _ = self._choose_layers(
      *(self._whole(), self._no_lora, before, self._unknown(before)),
      *(np.int32(np.sum(of_layers(before)) - count), self._batches),
    )
    changed = np.asarray(of_layers(before)) != np.asarray(of_layers(masks))
    return np.flatnonzero(changed).tolist()

  @property
  def _no_lora(self) -> Any:
    return tuple({} for _ in self._compute.config.stacks)

  def _without(self, gone: Sequence[int]) -> Any:
    """Masks by which these layers are gone, and nothing else."""
    config = self._compute.config
    masks = initial_masks(
      self._asked.groups,
      tuple((s.size, config.sizes(s.shape)) for s in config.stacks),
    )
    if LAYERS in self._asked.groups:
      layers = np.arange(len(config.layers))
      there = jnp.asarray(~np.isin(layers, gone), jnp.float32)
      masks = with_layers(masks, there)
    return jax.device_put(masks, self._places.state)

  def _unknown(self, masks: Any) -> Any:
    """The importance of what nothing is known of."""
    zeros = jax.tree.map(jnp.zeros_like, masks)
    return jax.device_put(zeros, self._places.state)

  def prune(
    self, size: Size, gone: Sequence[int]
  ) -> tuple[Any, Any, dict[str, Any]]:
    """A size's repaired weights and masks, and what its repair came to.

    `gone` are the layers that go as a whole.
    """
    config, pruning = self._compute.config, self._asked.settings.pruning
    masks = self._without(gone)
    if not self._asked.plans[size].within_layers:
      return self._whole(), masks, {}
    pruned = self._prune_layers(
      *(repaired_of(self._whole()), self._rest, self._no_lora),
      *(masks, self._unknown(masks)),
      *(by_stack(self._asked.counts(size), config), self._batches),
    )
    found = repair_of(pruned.errors, jnp.int32(0))
    repair = repair_report(
      pruning, int(found['unrepaired']), found['error_left'].tolist()
    )
    return with_repaired(self._rest, pruned.repaired), pruned.masks, repair


def _quality(measured: Perplexity) -> dict[str, Any]:
  return {'perplexity': perplexity_report(measured=measured)['measured']}


def latencies(
  pruned: tuple[Any, Compute], dense: tuple[Any, Compute]
) -> dict[str, dict[str, float]]:
  """Times of a size, in turns with the dense model.

  Returns:
    {'prefill', 'decode': {'seconds', 'dense', 'speedup'}}, of a prompt and of
    each later token: medians of either, and that of the turns' own speed-ups.
  """
  times = paired_generation(
    {'model': pruned, 'against': dense},
    batch_size=1,
    prompt_tokens=PROMPT_TOKENS,
    new_tokens=NEW_TOKENS,
    repeats=REPEATS,
  )
  return {
    phase: {
      'seconds': statistics.median(own),
      'dense': statistics.median(times['against'][phase]),
      'speedup': speedup(times, phase),
    }
    for phase, own in times['model'].items()
  }
