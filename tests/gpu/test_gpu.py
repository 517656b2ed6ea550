"""What only an NVIDIA GPU can show; run by `make test-gpu`, and not by CI."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.step import SIZES, compiled_step, configured
from configs import tiny
from lorapr_jax import train
from lorapr_jax.models.attention import causal_attention
from lorapr_jax.models.kernels import cudnn_attention
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.training import steps

pytestmark = pytest.mark.gpu

B, T = 2, 256


def _inputs(kv_heads, queries_per_kv, head_dim):
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (B, T, kv_heads, queries_per_kv, head_dim)
  q, cotangent = (jax.random.normal(key, shape) for key in keys[:2])
  k, v = (
    jax.random.normal(key, (B, T, kv_heads, head_dim)) for key in keys[2:]
  )
  return q, k, v, cotangent


def _segments():
  # Two documents, the second of another length in every row; then padding.
  position = jnp.arange(T)
  first = jnp.asarray([[100], [113]])
  second = first + 90
  return jnp.where(position < first, 1, jnp.where(position < second, 2, 0))


# Numbers of heads as pruning leaves them: odd ones too.
@pytest.mark.parametrize(
  'heads, head_dim', [((5, 1), 64), ((1, 3), 64), ((2, 3), 64), ((3, 1), 128)]
)
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('window', [None, 100])
def test_cudnns_attention_is_that_in_float32(heads, head_dim, packed, window):
  *arrays, cotangent = _inputs(*heads, head_dim)
  segments = _segments() if packed else None
  with jax.default_matmul_precision('highest'):
    want, vjp = jax.vjp(
      functools.partial(causal_attention, segments=segments, window=window),
      *arrays,
    )
    wants = (want, *vjp(cotangent))
  halves = [x.astype(jnp.bfloat16) for x in (*arrays, cotangent)]
  attend = functools.partial(cudnn_attention, segments=segments, window=window)
  got, vjp = jax.vjp(jax.jit(attend), *halves[:3])
  for mine, exact in zip((got, *vjp(halves[3])), wants, strict=True):
    assert mine.dtype == jnp.bfloat16
    largest = jnp.abs(exact).max()
    assert largest > 0.1
    np.testing.assert_allclose(
      mine.astype(jnp.float32), exact, rtol=0, atol=1e-2 * largest
    )


def test_attention_in_float32_is_that_of_exact_products():
  *arrays, cotangent = _inputs(2, 3, 64)
  results = []
  for precision in ('highest', 'float32'):
    with jax.default_matmul_precision(precision):
      out, vjp = jax.vjp(jax.jit(causal_attention), *arrays)
      results.append((out, *vjp(cotangent)))
  for exact, mine in zip(*results, strict=True):
    largest = jnp.abs(exact).max()
    np.testing.assert_allclose(mine, exact, rtol=0, atol=1e-5 * largest)


def _settings(tokens, sequences, *flags):
  sizes = SIZES['llama-3.2-1b'] | {'num_hidden_layers': 2}
  return configured(
    sizes, tokens=tokens, sequences=sequences, rank=8, flags=list(flags)
  )


def test_the_step_runs_cudnns_attention_and_holds_no_scores():
  tokens = 5120  # No other size of the model.
  text = compiled_step(_settings(tokens, 1)).gradients.as_text()
  assert '__cudnn$fmha' in text
  assert f'{tokens}]' in text or f'{tokens},' in text
  assert not re.search(rf'\[(\d+,)*{tokens},{tokens}\]', text)


@pytest.mark.parametrize(
  'criterion', [Criterion('lora'), Criterion('lora', score='square')]
)
def test_the_importance_holds_nothing_dense_and_is_xlas(criterion, monkeypatch):
  settings = _settings(512, 2)
  step = compiled_step(settings)
  params, lora, masks, _ = step.arguments(step.state)
  # As of weights that are trained: at the start every B is zero.
  keys = iter(jax.random.split(jax.random.key(1), 100))
  lora, grads = (
    jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), lora)
    for _ in range(2)
  )
  results, temporaries = [], []
  for kernel in (True, False):
    monkeypatch.setattr(steps, 'runs_on', lambda _, kernel=kernel: kernel)
    update = steps.make_update_importance(
      settings.compute, criterion, jax.tree.leaves(masks)[0].sharding
    )
    old = jax.tree.map(jnp.zeros_like, masks)
    arguments = (old, params, lora, grads, {}, masks, jnp.float32(1))
    compiled = update.lower(*arguments).compile()
    temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    importance, ok = compiled(*arguments)
    assert ok
    results.append(jax.tree.leaves(importance))
  largest = 2048 * 8192 * 4  # Of the projections, in float32.
  assert temporaries[0] < 0.2 * largest
  assert temporaries[1] < 1.1 * largest
  for kernel, xla in zip(*results, strict=True):
    assert xla.min() > 0
    np.testing.assert_allclose(kernel, xla, rtol=1e-5)


def _run(workdir, count, shrink='end'):
  config = tiny.get_config()
  config.train.steps, config.train.log_every = count, 1000
  config.prune.shrink = shrink
  config.train.checkpoint_every = 1000
  config.prune.every = 2
  config.data.eval = ''
  config.mesh.data, config.mesh.fsdp = -1, 1
  return train.run(config, workdir)


def test_no_step_waits_for_the_host(tmp_path, capfd):
  """Runs of any length read as much from the device."""
  counts = []
  for count in (20, 40):
    with jax.transfer_guard_device_to_host('log'):
      _run(tmp_path / str(count), count)
    counts.append(capfd.readouterr().err.count('device-to-host transfer'))
  assert counts[0] == counts[1] > 0


def test_a_run_that_cuts_on_the_way_is_what_it_exports(tmp_path):
  summary = _run(tmp_path / 'run', 20, shrink='0.5')
  assert summary['cuts_on_the_way']
  for group in ('heads', 'channels'):
    assert summary['sparsity'][group] == {'target': 0.5, 'achieved': 0.5}
  # Merging adds in float32 what the step adds in bfloat16.
  assert summary['exports']['hf']['max_logit_difference'] < 0.05
