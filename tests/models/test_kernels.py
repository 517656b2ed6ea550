"""Every kernel is causal_attention; each is taken where it can run."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax.models.attention import causal_attention
from lorapr_jax.models.kernels import (
  AUTO,
  CUDNN,
  SPLASH,
  XLA,
  choose_attention,
  cudnn_attention,
  on_each_device,
  splash_attention,
  unfit,
  with_each_window,
)
from lorapr_jax.runtime import sharding
from tests.families.cover import few

B, T, H = 2, 256, 64


def _inputs(kv_heads, queries_per_kv, dtype, batch=B):
  rng = np.random.default_rng(0)
  heads = ((kv_heads, queries_per_kv), (kv_heads,), (kv_heads,))
  return tuple(rng.normal(size=(batch, T, *n, H)).astype(dtype) for n in heads)


def _cotangent(shape):
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def _gradient(attend):
  """arrays, cotangent -> the gradients of each array, and the output."""

  def loss(arrays, cotangent):
    out = attend(*arrays)
    return jnp.sum(out * cotangent.astype(out.dtype)), out

  return jax.jit(jax.grad(loss, has_aux=True))


def _segments(batch=B):
  # Two documents, the second of another length in every row; then padding.
  rows = []
  for row in range(batch):
    first, second = 100 + 13 * row, 90
    rest = T - first - second
    rows.append([1] * first + [2] * second + [0] * rest)
  return np.array(rows, np.int32)


_interpreted = functools.partial(splash_attention, interpret=True)


# Numbers of heads as pruning leaves them: odd ones too.
@pytest.mark.parametrize(
  ('heads', 'packed_and_cap'),
  few(
    [(3, 1), (1, 3), (2, 2), (5, 1)],
    [(False, None), (True, None), (True, 2.0)],
  ),
)
def test_splash_is_causal_attention(heads, packed_and_cap):
  packed, cap = packed_and_cap
  arrays = _inputs(*heads, jnp.float32)
  segments = _segments() if packed else None
  results = (
    _gradient(functools.partial(attend, segments=segments, cap=cap))(
      arrays, _cotangent(arrays[0].shape)
    )
    for attend in (causal_attention, _interpreted)
  )
  for want, got in zip(*map(jax.tree.leaves, results), strict=True):
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_splash_is_causal_attention_in_bfloat16():
  arrays = _inputs(2, 3, jnp.bfloat16)
  got = jax.jit(_interpreted)(*arrays)
  assert got.dtype == jnp.bfloat16
  want = causal_attention(*(x.astype(np.float32) for x in arrays))
  np.testing.assert_allclose(
    np.asarray(got, np.float32), want, rtol=0, atol=1e-2
  )


@functools.cache
def _on_one_device(length, packed):
  """Arrays and segments in rows of this length; the gradients and output."""
  arrays, segments = _inputs(2, 3, jnp.float32, batch=4), _segments(4)
  # Twice as long: as half as many rows.
  *arrays, segments = (
    x.reshape(-1, length, *x.shape[2:]) for x in (*arrays, segments)
  )
  segments = segments if packed else None
  attend = functools.partial(causal_attention, segments=segments)
  expected = _gradient(attend)(tuple(arrays), _cotangent(arrays[0].shape))
  return tuple(arrays), segments, expected


@pytest.mark.mesh
@pytest.mark.parametrize(
  ('packed', 'kernel', 'sizes', 'length'),
  [
    pytest.param(packed, *case, marks=() if packed == now else pytest.mark.slow)
    for now, *case in (
      (True, _interpreted, {'data': 2, 'fsdp': 2, 'tensor': 2}, T),
      # At least 128 queries on each device.
      (False, _interpreted, {'fsdp': 2, 'sequence': 2, 'tensor': 2}, T),
      (True, _interpreted, {'tensor': 2, 'sequence': 4}, 2 * T),
      (True, causal_attention, {'fsdp': 2, 'sequence': 2, 'tensor': 2}, T),
      (False, causal_attention, {'sequence': 8}, T),
    )
    for packed in (False, True)
  ],
)
def test_attention_on_a_mesh_is_that_of_one_device(
  packed, kernel, sizes, length
):
  devices = jax.devices()[: math.prod(sizes.values())]
  mesh = sharding.make_mesh(sizes, devices)
  arrays, segments, (want, want_out) = _on_one_device(length, packed)
  rows = ('batch', 'length')
  axes = (*rows, 'kv_heads', 'queries_per_kv', 'head_dim')
  heads = sharding.sharding(mesh, (*rows, 'kv_heads', 'head_dim'))
  places = (sharding.sharding(mesh, axes), heads, heads)

  attend = functools.partial(kernel, segments=segments)
  on_mesh = functools.partial(
    on_each_device, kernel, mesh=mesh, segments=segments
  )
  grads, out = _gradient(on_mesh)(
    jax.device_put(arrays, places), _cotangent(arrays[0].shape)
  )
  alone = jax.jit(attend)(*arrays)
  np.testing.assert_allclose(out, alone, rtol=0, atol=1e-6)
  np.testing.assert_allclose(out, want_out, rtol=0, atol=1e-5)
  for mine, other in zip(grads, want, strict=True):
    np.testing.assert_allclose(mine, other, rtol=0, atol=2e-5)


def _device(platform, capability=None):
  return types.SimpleNamespace(platform=platform, compute_capability=capability)


CPU, TPU = _device('cpu'), _device('tpu')
GPU, OLD_GPU, ROCM = (_device('gpu', x) for x in ('9.0', '7.5', 'gfx942'))


@pytest.mark.parametrize(
  ('name', 'sizes', 'device', 'reason'),
  [
    (XLA, (7, 5, jnp.float32), TPU, None),
    (XLA, (7, 5, jnp.float32), CPU, None),
    (AUTO, (7, 5, jnp.float32), CPU, None),
    (SPLASH, (256, 64, jnp.float32), CPU, 'the backend is cpu'),
    (SPLASH, (256, 64, jnp.float32), TPU, None),
    (SPLASH, (250, 64, jnp.float32), TPU, 'multiple of 128'),
    (SPLASH, (256, 64, jnp.float32), GPU, 'runs on TPU'),
    (CUDNN, (250, 64, jnp.bfloat16), GPU, None),
    (CUDNN, (250, 64, jnp.bfloat16), _device('gpu', '12.0'), None),
    (CUDNN, (250, 64, jnp.bfloat16), OLD_GPU, 'is 7.5'),
    (CUDNN, (250, 64, jnp.bfloat16), ROCM, 'is gfx942'),
    (CUDNN, (251, 64, jnp.bfloat16), GPU, 'even number'),
    (CUDNN, (250, 64, jnp.float32), GPU, 'not in float32'),
    (CUDNN, (250, 68, jnp.bfloat16), GPU, '68 dimensions'),
    (CUDNN, (250, 64, jnp.bfloat16), CPU, 'runs on GPU'),
  ],
)
def test_what_a_kernel_cannot_do_is_said(name, sizes, device, reason):
  found = unfit(name, *sizes, device)
  assert found == reason if reason is None else reason in found


def test_what_a_kernel_cannot_do_with_a_part_of_a_sequence_is_said():
  sizes = (256, 64, jnp.bfloat16)
  assert unfit(XLA, *sizes, GPU, 4) is None
  assert unfit(SPLASH, *sizes, TPU, 2) is None
  assert 'no multiple of 512' in unfit(SPLASH, *sizes, TPU, 4)
  assert 'which mesh.sequence=2 cuts' in unfit(CUDNN, *sizes, GPU, 2)
  assert 'cap the scores' in unfit(CUDNN, *sizes, GPU, cap=50.0)
  assert unfit(SPLASH, *sizes, TPU, cap=50.0) is None


@pytest.mark.parametrize(
  ('device', 'seq_len', 'dtype', 'kernel'),
  [
    (CPU, 256, jnp.float32, causal_attention),
    (GPU, 256, jnp.bfloat16, cudnn_attention),
    (GPU, 256, jnp.float32, causal_attention),
    (OLD_GPU, 256, jnp.bfloat16, causal_attention),
    (TPU, 256, jnp.bfloat16, splash_attention),
    (TPU, 100, jnp.bfloat16, causal_attention),
  ],
)
def test_auto_is_the_kernel_of_the_devices(
  device, seq_len, dtype, kernel, monkeypatch
):
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  chosen = choose_attention(
    AUTO, seq_len=seq_len, head_dim=64, dtype=dtype, mesh=None
  )
  assert kernel in (chosen, getattr(chosen, 'args', (None,))[0])


@pytest.mark.parametrize('heads', [(3, 1), (2, 3)])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize(
  ('dtype', 'atol'), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)]
)
def test_causal_attention_is_jaxs_and_so_is_its_gradient(
  heads, packed, dtype, atol
):
  arrays = _inputs(*heads, dtype)
  segments = _segments() if packed else None
  mask = None
  if packed:
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]

  def jaxs(q, k, v):
    rows = q.reshape(B, T, -1, H)
    out = jax.nn.dot_product_attention(rows, k, v, mask=mask, is_causal=True)
    return out.reshape(q.shape)

  cotangent = _cotangent(arrays[0].shape)
  own = functools.partial(causal_attention, segments=segments)
  grads, got = _gradient(own)(arrays, cotangent)
  assert got.dtype == dtype
  exact = tuple(x.astype(np.float32) for x in arrays)
  expected = _gradient(jaxs)(exact, cotangent)
  pairs = zip(*map(jax.tree.leaves, ((grads, got), expected)), strict=True)
  for mine, jaxs_own in pairs:
    largest = np.abs(jaxs_own).max()
    np.testing.assert_allclose(
      np.asarray(mine, np.float32), jaxs_own, rtol=0, atol=atol * largest
    )


def test_capped_scores_and_their_gradient():
  q, k, v = arrays = _inputs(2, 3, jnp.float32)

  def plain(q, k, v):
    scores = jnp.einsum('BTKGH,BSKH->BKGTS', q, k) / math.sqrt(H)
    scores = 2.0 * jnp.tanh(scores / 2.0)
    scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
    return jnp.einsum('BKGTS,BSKH->BTKGH', jax.nn.softmax(scores), v)

  cotangent = _cotangent(q.shape)
  capped = functools.partial(causal_attention, cap=2.0)
  found, expected = (
    jax.tree.leaves(_gradient(attend)(arrays, cotangent))
    for attend in (capped, plain)
  )
  for mine, autodiffs in zip(found, expected, strict=True):
    largest = np.abs(autodiffs).max()
    np.testing.assert_allclose(mine, autodiffs, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize('kernel', [causal_attention, _interpreted])
@pytest.mark.parametrize('packed', [False, True])
def test_a_window_shows_the_last_tokens_alone(kernel, packed):
  arrays = _inputs(1, 2, jnp.float32)
  segments = _segments() if packed else None
  behind = np.arange(T)[:, None] - np.arange(T)
  seen = (behind < 100)[None]
  if packed:
    seen = seen & (segments[:, :, None] == segments[:, None, :])

  def jaxs(q, k, v):
    rows = q.reshape(B, T, -1, H)
    mask = seen[:, None]
    out = jax.nn.dot_product_attention(rows, k, v, mask=mask, is_causal=True)
    return out.reshape(q.shape)

  cotangent = _cotangent(arrays[0].shape)
  own = functools.partial(kernel, segments=segments, window=100)
  results = (_gradient(f)(arrays, cotangent) for f in (own, jaxs))
  for got, want in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@functools.partial(jax.jit, static_argnames=('attend', 'sizes'))
def _by_layer(arrays, windows, cotangent, attend, sizes):
  """The gradient of layers that see so many tokens, in a scan."""

  def layer(q, window):
    return attend(q, *arrays[1:], window=window), None

  def loss(q):
    out = jax.lax.scan(jax.checkpoint(layer), q, windows)[0]
    return jnp.sum(out * cotangent)

  return jax.grad(loss)(arrays[0])


@pytest.mark.parametrize('windows', [(100, T, 30), (100, 100)])
def test_a_kernel_is_there_for_each_window_of_the_layers(windows):
  arrays, windows = _inputs(1, 2, jnp.float32), np.array(windows)
  sizes = tuple(sorted(set(windows.tolist())))
  cotangent = _cotangent(arrays[0].shape)
  kernels = functools.partial(with_each_window, _interpreted, sizes)
  got, want = (
    _by_layer(arrays, windows, cotangent, attend, sizes)
    for attend in (kernels, causal_attention)
  )
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.mesh
@pytest.mark.parametrize('kernel', [causal_attention, _interpreted])
def test_a_window_reaches_over_the_parts_of_a_sequence(kernel):
  mesh = sharding.make_mesh({'tensor': 2, 'sequence': 2}, jax.devices()[:4])
  arrays, segments, _ = _on_one_device(T, True)
  if kernel is _interpreted:
    kernel = functools.partial(with_each_window, kernel, (100, T))
  on_mesh = functools.partial(on_each_device, kernel, mesh=mesh)
  places = [
    sharding.sharding(mesh, ('batch', 'length', 'kv_heads')) for _ in arrays
  ]
  for window in (100, T):
    got = jax.jit(on_mesh)(
      *jax.device_put(arrays, tuple(places)), segments, window=window
    )
    want = causal_attention(*arrays, segments, window=window)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
