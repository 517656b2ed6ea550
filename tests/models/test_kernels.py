"""Every kernel is causal_attention; each is taken where it can run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapr_jax import sharding
from lorapr_jax.errors import UserError
from lorapr_jax.models.attention import causal_attention
from lorapr_jax.models.kernels import (
  AUTO,
  CUDNN,
  SPLASH,
  XLA,
  check_attention,
  choose_attention,
  splash_attention,
  unfit,
)

B, T, H = 2, 256, 64


def _inputs(kv_heads, queries_per_kv, dtype, batch=B):
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (batch, T, kv_heads, queries_per_kv, H))
  k, v = (jax.random.normal(key, (batch, T, kv_heads, H)) for key in keys[1:])
  return tuple(x.astype(dtype) for x in (q, k, v))


def _segments(batch=B):
  # Two documents, the second of another length in every row; then padding.
  rows = []
  for row in range(batch):
    first, second = 100 + 13 * row, 90
    rest = T - first - second
    rows.append([1] * first + [2] * second + [0] * rest)
  return jnp.asarray(rows, jnp.int32)


_interpreted = functools.partial(splash_attention, interpret=True)


# Numbers of heads as pruning leaves them: odd ones too.
@pytest.mark.parametrize('heads', [(3, 1), (1, 3), (2, 2), (5, 1)])
@pytest.mark.parametrize('packed', [False, True])
def test_splash_is_causal_attention(heads, packed):
  arrays = _inputs(*heads, jnp.float32)
  segments = _segments() if packed else None
  cotangent = jax.random.normal(jax.random.key(1), arrays[0].shape)
  results = []
  for attend in (causal_attention, _interpreted):
    out, vjp = jax.vjp(functools.partial(attend, segments=segments), *arrays)
    results.append((out, *vjp(cotangent)))
  for want, got in zip(*results, strict=True):
    assert jnp.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_splash_is_causal_attention_in_bfloat16():
  arrays = _inputs(2, 3, jnp.bfloat16)
  got = _interpreted(*arrays)
  assert got.dtype == jnp.bfloat16
  want = causal_attention(*(x.astype(jnp.float32) for x in arrays))
  np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0, atol=1e-2)


def test_splash_on_a_mesh_is_splash_on_one_device():
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  q, k, v = _inputs(2, 3, jnp.float32, batch=4)
  axes = ('batch', 'length', 'kv_heads', 'queries_per_kv', 'head_dim')
  heads = sharding.sharding(mesh, ('batch', 'length', 'kv_heads', 'head_dim'))
  placed = jax.device_put(
    (q, k, v), (sharding.sharding(mesh, axes), heads, heads)
  )
  segments = _segments(4)
  on_mesh = jax.jit(functools.partial(_interpreted, mesh=mesh))
  want = _interpreted(q, k, v, segments)
  got = on_mesh(*placed, segments)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ('name', 'sizes', 'backend', 'reason'),
  [
    (XLA, (7, 5, jnp.float32), 'tpu', None),
    (SPLASH, (256, 64, jnp.float32), 'tpu', None),
    (SPLASH, (250, 64, jnp.float32), 'tpu', 'multiples of 128'),
    (SPLASH, (256, 64, jnp.float32), 'gpu', 'runs on TPU'),
    (CUDNN, (250, 64, jnp.bfloat16), 'gpu', None),
    (CUDNN, (251, 64, jnp.bfloat16), 'gpu', 'even number'),
    (CUDNN, (250, 64, jnp.float32), 'gpu', 'not in float32'),
    (CUDNN, (250, 68, jnp.bfloat16), 'gpu', '68 dimensions'),
    (CUDNN, (250, 64, jnp.bfloat16), 'cpu', 'runs on GPU'),
  ],
)
def test_what_a_kernel_cannot_do_is_said(name, sizes, backend, reason):
  found = unfit(name, *sizes, backend)
  assert found == reason if reason is None else reason in found


@pytest.mark.parametrize(
  ('backend', 'seq_len', 'dtype', 'kernel'),
  [
    ('cpu', 256, jnp.float32, (causal_attention, XLA)),
    ('gpu', 256, jnp.bfloat16, (causal_attention, CUDNN)),
    ('gpu', 256, jnp.float32, (causal_attention, XLA)),
    ('tpu', 256, jnp.bfloat16, (splash_attention, None)),
    ('tpu', 100, jnp.bfloat16, (causal_attention, XLA)),
  ],
)
def test_auto_is_the_kernel_of_the_devices(
  backend, seq_len, dtype, kernel, monkeypatch
):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  chosen = choose_attention(
    AUTO, seq_len=seq_len, head_dim=64, dtype=dtype, mesh=None
  )
  found = chosen.func, chosen.keywords.get('implementation')
  assert found == kernel


def test_a_kernel_that_cannot_run_here_is_an_error():
  with pytest.raises(UserError, match='it runs on TPU, and the backend is cpu'):
    check_attention(SPLASH, 256, 64, jnp.float32)
  with pytest.raises(UserError, match='choose from auto, xla, cudnn, splash'):
    check_attention('flash', 256, 64, jnp.float32)
  for name in (AUTO, XLA):
    check_attention(name, 7, 5, jnp.float32)


@pytest.mark.parametrize('heads', [(3, 1), (2, 3)])
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize(
  ('dtype', 'atol'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)]
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

  cotangent = jax.random.normal(jax.random.key(1), arrays[0].shape)
  exact = [x.astype(jnp.float32) for x in arrays]
  want, vjp = jax.vjp(jaxs, *exact)
  got, own_vjp = jax.vjp(
    functools.partial(causal_attention, segments=segments), *arrays
  )
  assert got.dtype == dtype
  pairs = zip(
    (got, *own_vjp(cotangent.astype(dtype))),
    (want, *vjp(cotangent)),
    strict=True,
  )
  for mine, jaxs_own in pairs:
    largest = jnp.abs(jaxs_own).max()
    np.testing.assert_allclose(
      mine.astype(jnp.float32), jaxs_own, rtol=0, atol=atol * largest
    )
