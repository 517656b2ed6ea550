"""How RoPE turns queries and keys, in numbers. The mathematics: rotation.py.

The fields of a scaling have the names that config.json gives them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Linear:
  """Positions are divided by `factor`."""

  factor: float


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """Theta grows with a text's length, from the model's positions on."""

  factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Low frequencies are divided by `factor`, high ones are kept."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Yarn:
  """As Llama3, by the number of a pair; queries and keys grow too.

  Attributes:
    original_max_position_embeddings: what the model was first trained on.
    factor: the model's positions over the original ones.
    attention_factor: by which cosine and sine grow; None: what follows from
      `factor`, `mscale` and `mscale_all_dim`.
    beta_fast: a pair that turns more often in the original positions is kept.
    beta_slow: one that turns less often is divided by `factor`.
    mscale: the numerator's share of `attention_factor`.
    mscale_all_dim: the denominator's.
    truncate: whether the bounds are whole pairs.
    llama_4_scaling_beta: queries grow by 1 + beta log(1 + floor(t / original))
      at position t; None: they do not.
  """

  original_max_position_embeddings: int
  factor: float
  attention_factor: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True
  llama_4_scaling_beta: float | None = None


@dataclasses.dataclass(frozen=True)
class LongRope:
  """Each frequency is divided by a number of its own.

  Attributes:
    short_factor: (R/2,) numbers, R the dimensions that turn.
    long_factor: those of texts longer than the original positions.
    original_max_position_embeddings: what the model was first trained on.
    attention_factor: by which cosine and sine grow; None: what follows from
      the model's positions over the original ones.
  """

  short_factor: tuple[float, ...]
  long_factor: tuple[float, ...]
  original_max_position_embeddings: int
  attention_factor: float | None = None


Scaling = Linear | Dynamic | Llama3 | Yarn | LongRope
# By config.json's `rope_type`.
SCALINGS = {
  'linear': Linear,
  'dynamic': Dynamic,
  'llama3': Llama3,
  'yarn': Yarn,
  'longrope': LongRope,
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Pair i of R/2 turns by theta^(-2i/R) radians a position, or as scaled."""

  theta: float = 10000.0
  scaling: Scaling | None = None
