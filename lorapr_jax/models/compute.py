"""How a model is run: dtypes, XLA's options, one batch on a mesh."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from lorapr_jax.errors import choose
from lorapr_jax.models import decoder
from lorapr_jax.models.attention import segment_positions
from lorapr_jax.models.config import LoraConfig, ModelConfig
from lorapr_jax.models.head import Head
from lorapr_jax.models.kernels import AUTO, choose_attention
from lorapr_jax.models.kinds import windows_within
from lorapr_jax.models.loss import chunked_cross_entropy, in_rows, out_of_rows
from lorapr_jax.runtime.sharding import parts, platform

DTYPES = ('auto', 'float32', 'bfloat16')


def resolve_dtype(key: str, name: str, platform: str | None = None) -> Any:
  """A dtype by name; `auto` is float32 on CPU and bfloat16 elsewhere.

  Args:
    key: of the setting, for the error.
    name: its value.
    platform: of the devices; None: of the default ones.
  """
  choose(key, name, DTYPES)
  if name == 'auto':
    on_cpu = (platform or jax.default_backend()) == 'cpu'
    name = 'float32' if on_cpu else 'bfloat16'
  return jnp.dtype(name)


@dataclasses.dataclass(frozen=True)
class Compute:
  """What the compiled functions are specialised to.

  Attributes:
    config: the model's sizes.
    lora: the adapters'; None: there are none.
    dtype: of the activations (weights, LoRA and scores keep their own).
    matmul_dtype: of the operands of the products with weights in the step
      that trains; None, and elsewhere: `dtype`.
    attention: of models.kernels.ATTENTION.
    remat: a key of decoder.REMAT_POLICIES.
    scan_layers: whether the step that trains is a loop over the layers.
    loss_chunk: tokens whose logits exist at the same time.
    clip_norm: the gradients' largest global norm.
    distill: the share of the loss that is the divergence from a teacher.
    compiler_options: more of XLA's, of the step that trains.
  """

  config: ModelConfig
  lora: LoraConfig | None = None
  dtype: Any = jnp.float32
  matmul_dtype: Any = None
  attention: str = AUTO
  remat: str = 'blocks'
  scan_layers: bool = True
  loss_chunk: int = 128
  clip_norm: float = 1.0
  distill: float = 0.0
  compiler_options: tuple[tuple[str, str | bool], ...] = ()


def compiler_options(
  place: Sharding | None = None,
) -> dict[str, Any]:
  """XLA options for the functions that run the model at `place`.

  On CPU, XLA moves the conversion of a bf16 base to float32 out of the scan
  over layers, which makes a second, larger copy of the model.
  """
  if platform(place) == 'cpu':
    return {'xla_disable_hlo_passes': 'while-loop-invariant-code-motion'}
  return {}


def run_model(
  params: Any,
  tokens: Array,
  settings: Compute,
  *,
  mesh: Mesh | None = None,
  segments: Array | None = None,
  matmul_dtype: Any = None,
  run: Callable[..., Any] = decoder.hidden_states,
  **model: Any,
) -> Any:
  """Runs `decoder.hidden_states` on a batch.

  Args:
    params: the base.
    tokens: (B, T).
    settings: of the run.
    mesh: that the arrays lie on; None: one device.
    segments: (B, T): numbers of the documents that share a window, in runs.
      Attention and positions stay within one; None: a window is one text.
    matmul_dtype: of the products' operands; None: as settings.dtype.
    run: it, or `decoder.through_layers`.
    **model: what else it takes: lora, masks, dropout_key, scan_layers.
  """
  attend = choose_attention(
    settings.attention,
    seq_len=tokens.shape[1],
    head_dim=settings.config.head_dim,
    cap=settings.config.attention_cap,
    dtype=settings.dtype,
    mesh=mesh,
    windows=windows_within(settings.config, tokens.shape[1]),
  )
  if segments is not None:
    model['valid'] = segments > 0
    model['positions'] = segment_positions(segments)
    attend = functools.partial(attend, segments=segments)
  return run(
    params,
    tokens,
    settings.config,
    attend=attend,
    lora_config=settings.lora,
    remat=settings.remat,
    flat=parts(mesh, 'length') == 1,
    dtype=settings.dtype,
    matmul_dtype=matmul_dtype,
    **model,
  )


def token_losses(
  params: Any,
  tokens: Array,
  token_weights: Array,
  settings: Compute,
  *,
  mesh: Mesh | None = None,
  matmul_dtype: Any = None,
  teacher: Mapping[str, Array] | None = None,
  **model: Any,
) -> Array:
  """The weighted negative log-likelihood of each predicted token, (B, T).

  Position t predicts token t + 1; the last position has no target and loses
  nothing. With a teacher, settings.distill of it is the divergence from that.

  Args:
    params: the base.
    tokens: (B, T).
    token_weights: (B, T), the weight of each token as a target.
    settings: of the run.
    mesh: as of `run_model`.
    matmul_dtype: as of `run_model`.
    teacher: as of `chunked_cross_entropy`, (B, T, ...).
    **model: what else `run_model` takes.
  """
  hidden = run_model(
    params, tokens, settings, mesh=mesh, matmul_dtype=matmul_dtype, **model
  )
  targets = jnp.roll(tokens, -1, axis=1)
  weights = jnp.roll(token_weights, -1, axis=1).at[:, -1].set(0.0)
  losses = chunked_cross_entropy(
    in_rows(hidden, mesh),
    decoder.output_weight(params),
    in_rows(targets, mesh),
    in_rows(weights, mesh),
    settings.loss_chunk,
    dtype=matmul_dtype,
    mesh=mesh,
    head=Head.of(settings.config),
    teacher=jax.tree.map(lambda x: in_rows(x, mesh), teacher),
    distill=settings.distill,
  )
  return out_of_rows(losses, tokens.shape, mesh)
