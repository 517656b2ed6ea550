"""What a pruning event does to one part of a layer: choose and repair."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Sharding

from lorapr_jax.axes import along_first
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.kinds import Kind
from lorapr_jax.models.lora import lora_product
from lorapr_jax.models.trees import block_axes
from lorapr_jax.pruning.compensation import REPAIRED, best_update
from lorapr_jax.pruning.importance import (
  OBS,
  SQUARES,
  Criterion,
  Options,
  Signals,
  element_scores,
  group_scores,
)
from lorapr_jax.pruning.masks import select_mask
from lorapr_jax.pruning.solve import solve, solve_in_blocks, spread
from lorapr_jax.pruning.surgeon import choose_by_loss
from lorapr_jax.runtime.sharding import mesh_of, parts, platform


class Layer(NamedTuple):
  """What the pass reads of one layer, or of a stack of them.

  Attributes:
    index: in its stack.
    number: in the model.
    kind: its window and rotation.
    trees: {'params', 'lora'}, without what is repaired.
    masks: before the event.
    importance: averages, or the scores of the event before.
    keep: how many stay of each kind of group.
  """

  index: Array
  number: Array
  kind: Kind
  trees: Any
  masks: dict[str, Array]
  importance: dict[str, Array]
  keep: dict[str, Array]


class Chosen(NamedTuple):
  """What becomes of the groups of a part.

  Attributes:
    mask: after the event.
    importance: by which they were chosen.
    weight: of the projection that reads them, repaired.
    errors: of its output on the tokens that are kept out, before and after the
      repair, by text, (2, S); 0 where nothing is repaired.
  """

  mask: Array
  importance: Array
  weight: Array
  errors: Array


@dataclasses.dataclass(frozen=True, eq=False)
class PartPruning:
  """How the parts of a layer are pruned.

  Tokens are (M, N): M micro-batches of N tokens. On a mesh that cuts T, B and T
  are two axes in the place of N. The last eighth of the micro-batches is kept
  out of H, and decides how much is repaired.

  Attributes:
    settings: of the run.
    criterion: that ranks; where it is averaged over steps, `Layer.importance`
      is given.
    repairs: whether what survives is repaired.
    place: of small arrays; it has the mesh.
    segments: (M, B, T), as of `run_model`; None: a window is one text.
    texts: S, how many texts the windows are of.
    sources: (M, B, T), the text of each token, from 0; None if S is 1.
  """

  settings: Compute
  criterion: Criterion
  repairs: bool
  place: Sharding
  segments: Array | None
  texts: int
  sources: Array | None

  def prune(
    self,
    part: str,
    group: str,
    trees: Any,
    inputs: Mapping[str, Array],
    scale: Array,
    layer: Layer,
  ) -> Chosen:
    """Chooses the groups of a part that stay, and repairs what reads them.

    `trees` are the layer's, with the weights that are repaired; `inputs` is
    what the projections read, {name: (M, N, ...)}; `scale` is from
    `token_scale`.
    """
    own = projection_of(trees, part, REPAIRED[part])
    weight, before = own['params']['weight'], layer.masks[group]
    keep, old = layer.keep[group], layer.importance[group]
    no_errors = jnp.zeros((2, self.texts))

    def pruned() -> Chosen:
      matrix = self.effective(own)
      fitted, held_out = self.tokens(inputs[REPAIRED[part]], scale)
      gram = spread(self.gram(fitted), mesh_of(self.place), 0)
      if self.criterion.name == OBS:
        mask, found = choose_by_loss(matrix, gram, before, keep, self.solver)
      else:
        found = old
        if not self.criterion.averaged:
          found = self.scores(part, group, trees, inputs, layer)
        mask = select_mask(found, before, keep)
      importance = jnp.where(before > 0, found, old)
      if not self.repairs:
        return Chosen(mask, importance, weight, no_errors)
      size = len(matrix) // mask.size
      rows = (jnp.repeat(x.ravel(), size) for x in (before - mask, mask))
      error = functools.partial(self.squared_error, held_out)
      update, errors = best_update(matrix, gram, *rows, error, self.solver)
      new = weight.astype(jnp.float32) + update.reshape(weight.shape)
      return Chosen(mask, importance, new.astype(weight.dtype), errors)

    return jax.lax.cond(
      jnp.any(keep < jnp.sum(before, axis=-1)),
      pruned,
      lambda: Chosen(before, old, weight, no_errors),
    )

  def scores(
    self,
    part: str,
    group: str,
    trees: Any,
    inputs: Mapping[str, Array],
    layer: Layer,
  ) -> Array:
    """The scores of a part's groups, from what its projections read."""
    options = Options(self.criterion, self.settings.lora.scale)
    axes = block_axes(self.settings.config.dequantized, self.settings.lora)
    signals = Signals(
      {part: trees['params'][part]},
      {part: trees['lora'].get(part, {})},
      None,
      layer.number,
      statistics={part: {n: self.statistic(y) for n, y in inputs.items()}},
    )
    return group_scores(
      element_scores(signals, options),
      {group: layer.masks[group]},
      axes['params'],
      norm=self.criterion.norm,
    )[group]

  def statistic(self, inputs: Array) -> Array:
    """The criterion's, over all tokens but padding, in float32."""
    axes, x = self.token_axes, inputs.astype(jnp.float32)
    if self.criterion.statistic == SQUARES:
      return jnp.sum(x * x, axis=axes)
    there = jnp.ones(x.shape[: len(axes)])
    if self.segments is not None:
      there = (self.segments > 0).reshape(there.shape).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(there), 1.0)
    mean = jnp.sum(x, axis=axes) / count  # Padding is zero.
    return jnp.sum(jnp.square((x - mean) * along_first(there, x)), axes) / count

  def effective(self, own: Any) -> Array:
    """W + s A B of a projection as a matrix, (I, O), in float32."""
    weight = own['params']['weight']
    matrix = weight.reshape(-1, weight.shape[-1]).astype(jnp.float32)
    if not own['lora']:
      return matrix
    product = lora_product(own['lora']['a'], own['lora']['b'])
    return matrix + self.settings.lora.scale * product.reshape(matrix.shape)

  def tokens(self, seen: Array, scale: Array) -> tuple[Array, Array]:
    """What a projection reads as rows, (M, N, I): for H, and kept out of it."""
    x = seen.reshape(*scale.shape, -1) * scale[..., None]
    x = x.astype(self.settings.matmul_dtype or x.dtype)
    kept_out = max(1, len(x) // 8)
    return x[:-kept_out], x[-kept_out:]

  def gram(self, x: Array) -> Array:
    """X^T X over tokens, in float32."""
    # Micro-batches stay apart: their tokens lie on all devices.
    return jax.lax.dot_general(
      x,
      x,
      ((self.token_axes, self.token_axes), ((), ())),
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=jnp.float32,
    )

  def squared_error(self, x: Array, missing: Array) -> Array:
    """The error of a projection's output by text, (S,).

    Args:
      x: what the projection reads of the last micro-batches, (K, N, I).
      missing: what goes missing in its weight, (I, O).
    """
    left = jnp.matmul(
      x, missing.astype(x.dtype), preferred_element_type=jnp.float32
    )
    of_tokens = jnp.sum(left * left, axis=-1)
    if self.sources is None:
      return jnp.sum(of_tokens)[None]
    sources = self.sources[-len(x) :].reshape(of_tokens.shape)
    texts = range(self.texts)
    return jnp.stack([jnp.sum(of_tokens, where=sources == i) for i in texts])

  @property
  def token_axes(self) -> tuple[int, ...]:
    """Those of tokens: M and N, or M, B and T."""
    cut = parts(mesh_of(self.place), 'length') > 1
    return tuple(range(3 if cut else 2))

  @property
  def solver(self) -> Callable[[Array, Array], Array]:
    """X of A X = R, as the devices do it best."""
    if platform(self.place) == 'tpu':
      return functools.partial(solve_in_blocks, mesh=mesh_of(self.place))
    return solve


def token_scale(x: Array, eps: float) -> Array:
  """1 / rms of each token, (M, N), of its residual stream x (M, N, D).

  The error of a token's output counts relative to the stream that it is added
  to, as the next norm sees it. In some layers the first token of a text is a
  thousand times as large as all others (massive activations, arXiv 2402.17762):
  unscaled, it alone would decide what is repaired.
  """
  squares = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1)
  return jax.lax.rsqrt(squares + eps)


def projection_of(trees: Any, part: str, name: str) -> dict[str, Any]:
  """One projection of a block's {'params', 'lora'}: {} without an adapter."""
  return {key: tree.get(part, {}).get(name, {}) for key, tree in trees.items()}
