"""The step's gradients, and what it may hold in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np
import optax
import pytest

from lorapr_jax import steps
from lorapr_jax.models import llama
from lorapr_jax.models.config import LayerShape, LlamaConfig, LoraConfig
from lorapr_jax.optimizer import make_optimizer
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.pruning.masks import alive_counts, initial_masks

GROUPS = ('kv_heads', 'mlp')
CONFIG = LlamaConfig(
  vocab_size=40,
  embed_dim=16,
  head_dim=8,
  layers=(LayerShape(2, 2, 24), LayerShape(2, 2, 24), LayerShape(2, 1, 20)),
)
SETTINGS = steps.StepSettings(
  CONFIG, LoraConfig(rank=2, alpha=3.0), loss_chunk=10, clip_norm=1e9
)
SMOLLM2 = LlamaConfig(
  vocab_size=49152,
  embed_dim=576,
  head_dim=64,
  layers=(LayerShape(3, 3, 1536),) * 30,
  norm_eps=1e-5,
  rope_theta=100000.0,
  tie_embeddings=True,
)


def _device():
  return SingleDeviceSharding(jax.devices()[0])


def _masks():
  """With one KV head and some channels masked in some layers."""
  sizes = tuple((s.size, CONFIG.sizes(s.shape)) for s in CONFIG.stacks)
  first, last = initial_masks(GROUPS, sizes)
  first['kv_heads'] = first['kv_heads'].at[0, 1].set(0.0)
  first['mlp'] = first['mlp'].at[1, 5:9].set(0.0)
  last['mlp'] = last['mlp'].at[0, ::3].set(0.0)
  return first, last


def _batch(micro_batches=1):
  """Four sequences whose tokens count differently."""
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, CONFIG.vocab_size, (4, 9))
  weights = rng.choice([0.0, 1.0, 2.0], (4, 9), p=[0.5, 0.3, 0.2])
  return {
    'tokens': jnp.asarray(tokens).reshape(micro_batches, -1, 9),
    'weights': jnp.asarray(weights, jnp.float32).reshape(micro_batches, -1, 9),
  }


@pytest.fixture
def trees(random_params, random_lora):
  """Base, adapters and masks."""
  return random_params(CONFIG), random_lora(CONFIG, SETTINGS.lora), _masks()


def _gradients(trees, batch, key=0, **changes):
  settings = dataclasses.replace(SETTINGS, **changes)
  step = steps.make_lora_gradients(settings, _device())
  return step(*trees, batch, jax.random.key(key))


def _assert_close(got, want, atol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol),
    got,
    want,
  )


def _plain_loss(lora, params, masks, batch):
  """The loss by the formulas: dense W + s A B, no scan, no chunks."""
  tokens, weights = batch['tokens'][0], batch['weights'][0]
  length, half = tokens.shape[1], CONFIG.head_dim // 2
  angles = jnp.arange(length)[:, None] * 10000.0 ** (-jnp.arange(half) / half)
  causal = jnp.tril(jnp.ones((length, length), bool))

  def norm(x, weight):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight

  def rotate(x):
    shape = (length, *[1] * (x.ndim - 3), half)
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(
      1j * angles.reshape(shape)
    )
    return jnp.concatenate([turned.real, turned.imag], axis=-1)

  x = params['embed_tokens']['weight'][tokens]
  for stack, adapters, mask in zip(params['stacks'], lora, masks, strict=True):
    for i in range(len(mask['mlp'])):
      p, ab, heads, channels = jax.tree.map(
        lambda leaf, i=i: leaf[i],
        (stack, adapters, mask['kv_heads'], mask['mlp']),
      )

      def weight(part, name, p=p, ab=ab):
        factors = ab[part][name]
        update = jnp.tensordot(factors['a'], factors['b'], axes=1)
        return p[part][name]['weight'] + SETTINGS.lora.scale * update

      h = norm(x, p['input_layernorm']['weight'])
      q = jnp.einsum('BTD,DKGH->BTKGH', h, weight('self_attn', 'q_proj'))
      k = jnp.einsum('BTD,DKH->BTKH', h, weight('self_attn', 'k_proj'))
      v = jnp.einsum('BTD,DKH->BTKH', h, weight('self_attn', 'v_proj'))
      q = rotate(q * heads[:, None, None])
      k, v = rotate(k * heads[:, None]), v * heads[:, None]
      scores = jnp.einsum('BTKGH,BSKH->BKGTS', q, k) / np.sqrt(CONFIG.head_dim)
      scores = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
      out = jnp.einsum('BKGTS,BSKH->BTKGH', scores, v)
      x += jnp.einsum('BTKGH,KGHD->BTD', out, weight('self_attn', 'o_proj'))
      h = norm(x, p['post_attention_layernorm']['weight'])
      hidden = jax.nn.silu(h @ weight('mlp', 'gate_proj'))
      hidden *= h @ weight('mlp', 'up_proj') * channels
      x += hidden @ weight('mlp', 'down_proj')
  logits = norm(x, params['norm']['weight']) @ params['lm_head']['weight'].T
  log_probabilities = jax.nn.log_softmax(logits[:, :-1])
  target = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)
  return -jnp.sum(target[..., 0] * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def test_gradients_are_those_of_the_formulas(trees):
  params, lora, masks = trees
  metrics, grads = _gradients(trees, _batch())
  value, want = jax.value_and_grad(_plain_loss)(lora, params, masks, _batch())
  assert metrics['loss'] == pytest.approx(float(value), rel=1e-5)
  assert metrics['tokens'] == _batch()['weights'][..., 1:].sum()
  norm = float(optax.global_norm(want))
  assert metrics['grad_norm'] == pytest.approx(norm, rel=1e-4)
  _assert_close(grads, want)
  # The masks matter, and nothing pulls at what they cut off.
  unmasked = _plain_loss(
    lora, params, jax.tree.map(jnp.ones_like, masks), _batch()
  )
  assert abs(unmasked - value) > 0.01
  assert jnp.all(grads[0]['self_attn']['v_proj']['b'][0, :, 1] == 0)
  assert jnp.all(grads[0]['mlp']['down_proj']['a'][1, 5:9] == 0)


@pytest.mark.parametrize('micro_batches', [2, 4])
def test_micro_batches_add_up_to_the_batch(trees, micro_batches):
  whole, grads = _gradients(trees, _batch())
  parts, part_grads = _gradients(trees, _batch(micro_batches))
  # Their tokens count differently: a mean of means would be another loss.
  counts = _batch(micro_batches)['weights'][..., 1:].sum(axis=(1, 2))
  assert len(set(counts.tolist())) > 1
  _assert_close(parts, whole)
  _assert_close(part_grads, grads)


def test_gradients_are_clipped_to_the_norm(trees):
  metrics, grads = _gradients(trees, _batch())
  norm = optax.global_norm(grads)
  assert metrics['grad_norm'] == pytest.approx(float(norm), rel=1e-5)
  clipped_metrics, clipped = _gradients(trees, _batch(), clip_norm=0.01)
  assert optax.global_norm(clipped) == pytest.approx(0.01, rel=1e-3)
  assert clipped_metrics['grad_norm'] == metrics['grad_norm']
  _assert_close(clipped, jax.tree.map(lambda g: g * 0.01 / norm, grads), 1e-8)


def test_rematerialisation_changes_nothing(trees):
  lora = dataclasses.replace(SETTINGS.lora, dropout=0.3)
  results = [
    _gradients(trees, _batch(2), lora=lora, remat=remat)
    for remat in llama.REMAT_POLICIES
  ]
  assert len(results) == 2
  _assert_close(results[0], results[1])


def test_dropout_is_drawn_anew_for_each_key_and_micro_batch(trees):
  lora = dataclasses.replace(SETTINGS.lora, dropout=0.5)
  same = jax.tree.map(lambda x: x[:, :2], _batch())
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), same)
  losses = [
    float(_gradients(trees, batch, key, lora=lora)[0]['loss'])
    for batch, key in [(same, 0), (same, 0), (same, 1), (twice, 0)]
  ]
  assert losses[0] == losses[1]
  assert len({round(loss, 4) for loss in losses}) == 3


def test_adapters_on_a_bf16_base_have_float32_gradients(trees, random_params):
  _, lora, masks = trees
  base = random_params(CONFIG, 'bfloat16')
  metrics, grads = _gradients((base, lora, masks), _batch())
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), base)
  value, want = jax.value_and_grad(_plain_loss)(lora, exact, masks, _batch())
  assert metrics['loss'] == pytest.approx(float(value), rel=1e-5)
  _assert_close(grads, want)


class _Run:
  """The loop's functions on one device, as lorapr_jax/train.py calls them."""

  def __init__(self, params):
    self.params = params
    self.optimizer = make_optimizer(optax.constant_schedule(1e-2))
    self.lora_gradients = steps.make_lora_gradients(SETTINGS, _device())
    self.update_importance = steps.make_update_importance(
      SETTINGS, Criterion(), _device()
    )
    self.apply_update = steps.make_apply_update(self.optimizer, _device())
    state = steps.init_state(
      jax.random.key(0), SETTINGS, GROUPS, self.optimizer
    )
    self.state = jax.device_put(state, _device())

  def step(self, keep=None, params=None):
    params = self.params if params is None else params
    state = self.state
    metrics, grads = self.lora_gradients(
      params, state.lora, state.masks, _batch(2), jax.random.key(state.step)
    )
    importance, ok = self.update_importance(
      state.importance,
      params,
      state.lora,
      grads,
      state.masks,
      metrics['grad_norm'],
    )
    masks = state.masks
    if keep:
      masks = steps.select_stack_masks(
        importance, masks, steps.by_stack(keep, CONFIG)
      )
    state = state.replace(importance=importance, masks=masks)
    self.state = self.apply_update(state, grads, ok)
    return float(metrics['loss'])


def test_every_function_compiles_once_while_the_model_is_pruned(random_params):
  run = _Run(jax.device_put(random_params(CONFIG), _device()))
  before = steps.select_stack_masks._cache_size()
  keeps = [
    None,
    {'kv_heads': (2, 2, 2), 'mlp': (20, 20, 20)},
    None,
    {'kv_heads': (1, 1, 2), 'mlp': (8, 12, 20)},
  ]
  losses = [run.step(keep) for keep in keeps]
  assert len(set(losses)) == 4
  assert alive_counts(run.state.masks) == keeps[-1]
  for function in (run.lora_gradients, run.update_importance, run.apply_update):
    assert function._cache_size() == 1
  assert steps.select_stack_masks._cache_size() == before + 1


def test_training_lowers_the_loss(random_params):
  run = _Run(random_params(CONFIG))
  losses = [run.step() for _ in range(30)]
  assert losses[-1] < 0.8 * losses[0]
  assert run.state.step == 30
  assert run.state.skipped == 0


def _host_copy(tree):
  return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
  random_params,
):
  run = _Run(random_params(CONFIG))
  run.step()
  weight = run.params['stacks'][0]['mlp']['up_proj']['weight']
  broken = jax.tree.map(
    lambda x: x.at[0, 0, 0].set(jnp.nan) if x is weight else x, run.params
  )
  before = _host_copy(run.state)
  assert np.isnan(run.step(params=broken))
  assert np.isnan(run.step(params=broken))
  after = _host_copy(run.state)
  for name in ('lora', 'opt_state', 'masks', 'importance'):
    jax.tree.map(
      np.testing.assert_array_equal,
      getattr(after, name),
      getattr(before, name),
    )
  assert (before.step, after.step) == (1, 3)
  assert (after.skipped, after.skipped_in_a_row) == (2, 2)
  run.step()
  assert (run.state.skipped, run.state.skipped_in_a_row) == (2, 0)
  assert jnp.any(run.state.lora[0]['mlp']['up_proj']['b'] != 0)
  moved = run.state.importance[0]['mlp'] != before.importance[0]['mlp']
  assert np.all(moved)


def _abstract_smollm2(lora_config, dtype):
  """params, lora, masks, batch, key without any memory."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  init_lora = functools.partial(
    llama.init_lora, config=SMOLLM2, lora_config=lora_config
  )
  sizes = ((30, SMOLLM2.sizes(SMOLLM2.layers[0])),)
  return (
    llama.param_shapes(SMOLLM2, dtype),
    jax.eval_shape(init_lora, key),
    jax.eval_shape(lambda: initial_masks(GROUPS, sizes)),
    {
      'tokens': jax.ShapeDtypeStruct((1, 8, 128), jnp.int32),
      'weights': jax.ShapeDtypeStruct((1, 8, 128), jnp.float32),
    },
    key,
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_step_of_smollm2_holds_less_than_one_copy_of_the_model(dtype):
  settings = steps.StepSettings(SMOLLM2, LoraConfig(dropout=0.05))
  arguments = _abstract_smollm2(settings.lora, jnp.dtype(dtype))
  step = steps.make_lora_gradients(settings, _device())
  memory = step.lower(*arguments).compile().memory_analysis()
  base = SMOLLM2.num_parameters * jnp.dtype(dtype).itemsize
  assert memory.argument_size_in_bytes > base
  assert memory.temp_size_in_bytes < base
  # The base is not donated.
  assert memory.alias_size_in_bytes < 0.01 * base


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_importance_of_smollm2_needs_the_scores_of_one_layer(dtype):
  settings = steps.StepSettings(SMOLLM2)
  params, lora, masks, _, _ = _abstract_smollm2(settings.lora, jnp.dtype(dtype))
  update = steps.make_update_importance(settings, Criterion(), _device())
  norm = jax.ShapeDtypeStruct((), jnp.float32)
  lowered = update.lower(masks, params, lora, lora, masks, norm)
  memory = lowered.compile().memory_analysis()
  layer = 4 * SMOLLM2.layer_parameters(SMOLLM2.layers[0])
  assert memory.temp_size_in_bytes < 6 * layer
