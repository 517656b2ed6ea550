"""What becomes of hidden states times the output matrix."""

from typing import NamedTuple

from jax import Array

from lorapr_jax.models.attention import soft_cap, soft_cap_slope
from lorapr_jax.models.config import ModelConfig


class Head(NamedTuple):
  """From the products l with the output matrix to logits.

  They are s l, or cap tanh(s l / cap).

  Attributes:
    scale: s.
    cap: None: there is none.
  """

  scale: float = 1.0
  cap: float | None = None

  @classmethod
  def of(cls, config: ModelConfig) -> 'Head':
    """That of a model."""
    return cls(config.logit_scale, config.logit_cap)

  def logits(self, products: Array) -> Array:
    """The logits."""
    if self.scale != 1.0:
      products = products * self.scale
    return products if self.cap is None else soft_cap(products, self.cap)

  def pulled_back(self, logits: Array, grad: Array) -> Array:
    """The gradient of the products, from the logits and their gradient."""
    if self.cap is not None:
      grad = grad * soft_cap_slope(logits, self.cap)
    return grad if self.scale == 1.0 else grad * self.scale
