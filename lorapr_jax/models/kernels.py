"""Which attention runs: XLA's own, or a kernel that never holds (T, S) scores.

The kernels are cuDNN's flash attention on GPU, and JAX's splash attention on
TPU. Where documents share a row, cuDNN reads a (B, T, S) mask, splash segment
numbers. Where the mesh cuts sequences, each device has its own queries and the
keys of all: splash and XLA's can do that. A kernel is compiled for a window:
where layers have several, it is there for each. Letters: axes.py.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lorapr_jax.models.attention import (
  ACTIVATION,
  causal_attention,
  queries_of,
  same_segment,
)
from lorapr_jax.models.kinds import with_window
from lorapr_jax.runtime.sharding import RULES, compute_capability, parts

AUTO, XLA, CUDNN, SPLASH = ATTENTION = ('auto', 'xla', 'cudnn', 'splash')
# The splash kernel's tiles are as wide as a TPU's vector registers, or wider.
_LANES, _LARGEST_TILE = 128, 512
_TILES = ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv')
_TILES += ('block_q_dq', 'block_kv_dq')


def unfit(
  name: str,
  seq_len: int,
  head_dim: int,
  dtype: Any,
  device: Any,
  shares: int = 1,
  cap: float | None = None,
) -> str | None:
  """Why a kernel cannot run; None where it can.

  Args:
    name: of ATTENTION; AUTO can always run.
    seq_len: T.
    head_dim: H.
    dtype: of the activations.
    device: a `jax.Device`.
    shares: into how many the mesh cuts a sequence.
    cap: of the scores.
  """
  backend = device.platform
  if name == CUDNN:
    if backend != 'gpu':
      return f'it runs on GPU, and the backend is {backend}'
    if (compute_capability(device) or (0, 0)) < (8, 0):
      capability = getattr(device, 'compute_capability', 'unknown')
      return (
        'it runs on NVIDIA GPUs of compute capability 8.0 or above, and this '
        f"one's is {capability}"
      )
    if jnp.dtype(dtype) != jnp.bfloat16:
      return f'it computes in bfloat16, not in {jnp.dtype(dtype).name}'
    if head_dim % 8 or head_dim > 128:
      return f'a head has {head_dim} dimensions: it takes 8, 16, ..., 128'
    if shares > 1:
      return f'it takes whole sequences, which mesh.sequence={shares} cuts'
    if cap is not None:
      return 'it cannot cap the scores, which the model does'
    if seq_len % 2:
      return f'{seq_len} tokens are odd: it takes an even number'
  if name == SPLASH:
    if backend != 'tpu':
      return f'it runs on TPU, and the backend is {backend}'
    if seq_len % (shares * _LANES):
      return f'{seq_len} tokens are no multiple of {shares * _LANES}'
  return None


def choose_attention(
  name: str,
  *,
  seq_len: int,
  head_dim: int,
  dtype: Any,
  mesh: Mesh | None,
  cap: float | None = None,
  windows: tuple[int, ...] = (),
) -> Callable[..., Array]:
  """Chooses a function of (q, k, v, segments=None, cap=None, window=None).

  It computes what `causal_attention` does.

  Args:
    name: of ATTENTION; AUTO: the backend's kernel where it fits, else XLA.
    seq_len: T = S.
    head_dim: H.
    dtype: of the activations.
    mesh: that the arrays lie on; None: the default device.
    cap: of the scores.
    windows: of the layers, from `kinds.windows_within`.
  """
  shares = parts(mesh, 'length')
  if name == AUTO:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    own = {'gpu': CUDNN, 'tpu': SPLASH}.get(device.platform, XLA)
    fits = unfit(own, seq_len, head_dim, dtype, device, shares, cap) is None
    name = own if fits else XLA
  if name == XLA and shares == 1:
    return causal_attention
  kernel = {
    XLA: causal_attention,
    CUDNN: cudnn_attention,
    SPLASH: splash_attention,
  }[name]
  if windows and name != XLA:
    sizes = tuple(sorted(set(windows)))
    kernel = functools.partial(with_each_window, kernel, sizes)
  return functools.partial(on_each_device, kernel, mesh=mesh)


def on_each_device(
  kernel: Callable[..., Array],
  q: Array,
  k: Array,
  v: Array,
  segments: Array | None = None,
  *,
  mesh: Mesh | None,
  cap: float | None = None,
  window: Array | None = None,
) -> Array:
  """Runs `kernel(q, k, v, segments)` on each device's queries and heads."""
  if cap is not None:
    kernel = functools.partial(kernel, cap=cap)
  arrays = (q, k, v) if segments is None else (q, k, v, segments)
  if mesh is None:
    return with_window(kernel, window)(*arrays)
  if parts(mesh, 'length') > 1:
    kernel = functools.partial(_with_all_keys, kernel)
  rows, length, heads = (RULES[x] for x in ('batch', 'length', 'kv_heads'))
  places = P(rows, length, heads)

  def run(window: Array | None, *arrays: Array) -> Array:
    return with_window(kernel, window)(*arrays)

  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(P(), places, places, places, P(rows, length))[: 1 + len(arrays)],
    out_specs=places,
    # The kernels do not say along which mesh axes their results vary.
    check_vma=False,
  )(window, *arrays)


def _with_all_keys(
  kernel: Callable[..., Array], q: Array, *keys: Array, **window: Array
) -> Array:
  """Runs `kernel(q, k, v, segments)` on some of the queries and all keys."""
  axis = RULES['length']
  start = jax.lax.axis_index(axis) * q.shape[1]
  keys = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in keys)
  return kernel(q, *keys, start=start, **window)


def with_each_window(
  kernel: Callable[..., Array],
  sizes: tuple[int, ...],
  *arrays: Array,
  window: Array,
  **options: Any,
) -> Array:
  """Runs the one of a kernel's programs that is for this window.

  Args:
    kernel: which takes a window that is known when it is compiled.
    sizes: of the windows, in rising order; S where all are seen.
    *arrays: q, k, v and what else it takes.
    window: one of `sizes`.
    **options: of the kernel.
  """
  S = arrays[1].shape[1]
  runs = [
    functools.partial(kernel, window=None if n == S else n, **options)
    for n in sizes
  ]
  if len(runs) == 1:
    return runs[0](*arrays)
  index = jnp.searchsorted(jnp.asarray(sizes), window)
  return jax.lax.switch(index, runs, *arrays)


def cudnn_attention(
  q: Array,
  k: Array,
  v: Array,
  segments: Array | None = None,
  *,
  window: int | None = None,
) -> Array:
  """`causal_attention` by cuDNN's flash attention, on one device."""
  mask, left = None, None if window is None else (window - 1, 0)
  if segments is not None:
    mask = same_segment(segments)[:, None]
    if window is not None:  # It is in the mask, where there is one.
      index, left = jnp.arange(q.shape[1]), None
      mask &= index > index[:, None] - window
  out = jax.nn.dot_product_attention(
    q.reshape(*q.shape[:2], -1, q.shape[-1]),
    k,
    v,
    mask=mask,
    is_causal=True,
    local_window_size=left,
    implementation='cudnn',
  )
  return out.reshape(q.shape)


def splash_attention(
  q: Array,
  k: Array,
  v: Array,
  segments: Array | None = None,
  *,
  start: Array | None = None,
  cap: float | None = None,
  window: int | None = None,
  interpret: bool = False,
) -> Array:
  """`causal_attention` by JAX's TPU kernel, on one device.

  Args:
    q: (B, T, K, G, H).
    k: (B, S, K, H).
    v: (B, S, K, H).
    segments: (B, S): positions attend within their own segment alone.
    start: the key position of the first query, a multiple of T; None where
      S = T.
    cap: as of `attention.attend_where`.
    window: how many tokens each sees, with itself; None: all before it.
    interpret: whether the kernel is interpreted, which any backend can.
  """
  # Imported where it is used: it needs Pallas's TPU part.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  B, T, K, G, H = q.shape
  S = k.shape[1]
  tile = next(n for n in (_LARGEST_TILE, 256, _LANES) if T % n == 0)
  mask = splash.CausalMask((S, S))
  if window is not None:
    mask = splash.LocalMask((S, S), (window - 1, 0), 0)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * (K * G)),
    block_sizes=splash.BlockSizes(**dict.fromkeys(_TILES, tile)),
    head_shards=1,
    q_seq_shards=S // T,
    attn_logits_soft_cap=cap,
    residual_checkpoint_name=ACTIVATION,
    interpret=interpret,
  )
  if start is not None:
    kernel = jax.tree.map(functools.partial(_of_queries, start, T, S), kernel)
  if segments is not None:
    segments = splash.SegmentIds(queries_of(segments, start, T), segments)
  queries = (q * H**-0.5).astype(q.dtype).reshape(B, T, K * G, H)
  arrays = (x.swapaxes(1, 2) for x in (queries, k, v))
  out = jax.vmap(kernel)(*arrays, segments)
  return out.swapaxes(1, 2).reshape(q.shape).astype(q.dtype)


def _of_queries(start: Array, T: int, S: int, x: Array) -> Array:
  """The part of a splash kernel's data on the mask that T of S queries need.

  The data are (heads, tiles of queries, tiles of keys) or (S,).
  """
  axis = x.ndim // 2
  size = x.shape[axis]
  return jax.lax.dynamic_slice_in_dim(x, start * size // S, size * T // S, axis)
