"""The step's gradients, and what it may hold in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np
import optax
import pytest

from lorapr_jax.axes import LORA_TARGETS, PROJECTIONS
from lorapr_jax.models import decoder
from lorapr_jax.models.compute import Compute, token_losses
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.rope import Rope
from lorapr_jax.models.trees import init_lora, param_shapes
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.pruning.masks import (
  alive_counts,
  by_stack,
  initial_masks,
  select_masks,
)
from lorapr_jax.training import steps
from lorapr_jax.training.state import init_state
from lorapr_jax.training.steps import make_optimizer

SELECT = jax.jit(select_masks)
GROUPS = ('kv_heads', 'mlp')
CONFIG = ModelConfig(
  vocab_size=40,
  embed_dim=16,
  head_dim=8,
  layers=(LayerShape(2, 2, 24),) * 2,
)
SETTINGS = Compute(
  CONFIG,
  LoraConfig(rank=2, alpha=3.0, dropout=0.0),
  loss_chunk=10,
  clip_norm=0.1,
)
DROPOUT = dataclasses.replace(
  SETTINGS, lora=dataclasses.replace(SETTINGS.lora, dropout=0.3)
)
SMOLLM2 = ModelConfig(
  vocab_size=49152,
  embed_dim=576,
  head_dim=64,
  layers=(LayerShape(3, 3, 1536),) * 30,
  norm_eps=1e-5,
  ropes=(Rope(100000.0),),
  tie_embeddings=True,
)
RANK_8 = LoraConfig(rank=8, alpha=16.0, dropout=0.0)


def _device():
  return SingleDeviceSharding(jax.devices()[0])


def _masks():
  """With one KV head and some channels masked."""
  (masks,) = initial_masks(GROUPS, ((2, CONFIG.sizes(CONFIG.layers[0])),))
  masks = jax.tree.map(np.array, masks)
  masks['kv_heads'][0, 1] = 0.0
  masks['mlp'][1, 5:9] = 0.0
  return (masks,)


def _batch(micro_batches=1):
  """Four sequences whose tokens count differently."""
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, CONFIG.vocab_size, (4, 9))
  weights = rng.choice([0.0, 1.0, 2.0], (4, 9), p=[0.5, 0.3, 0.2])
  return {
    'tokens': tokens.astype(np.int32).reshape(micro_batches, -1, 9),
    'weights': weights.astype(np.float32).reshape(micro_batches, -1, 9),
  }


@pytest.fixture
def trees(random_params, random_lora):
  """Base, adapters and masks, which a test may change."""
  params, lora = random_params(CONFIG), random_lora(CONFIG, SETTINGS.lora)
  return jax.tree.map(np.array, (params, lora, _masks()))


@functools.cache
def _step(settings, base_grads=False):
  base = {'stacks': [dict.fromkeys(PROJECTIONS, _device())]}
  return steps.make_lora_gradients(
    settings, _device(), base_sharding=base if base_grads else None
  )


def _gradients(trees, batch, settings=SETTINGS, key=0, base_grads=False):
  results = _step(settings, base_grads)(*trees, batch, jax.random.key(key))
  return jax.device_get(results)


def _norm(tree):
  return np.sqrt(sum(np.sum(x * x) for x in jax.tree.leaves(tree)))


def _assert_close(got, want, atol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol),
    got,
    want,
  )


def _plain(*arguments):
  """Of `_loss`: its value and the gradients of the adapters."""
  return jax.device_get(_value_and_grads(*arguments))


@jax.jit
@jax.value_and_grad
def _value_and_grads(lora, params, masks, batch):
  return _loss(lora, params, masks, batch)


def _loss(lora, params, masks, batch):
  """By the formulas: dense W + s A B, no scan, no chunks."""
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


def test_gradients_are_those_of_the_formulas_clipped(trees):
  params, lora, masks = trees
  metrics, grads, _ = _gradients(trees, _batch())
  value, want = _plain(lora, params, masks, _batch())
  assert metrics['loss'] == pytest.approx(float(value), rel=1e-5)
  norm = _norm(want)
  assert norm > 10 * SETTINGS.clip_norm
  assert metrics['grad_norm'] == pytest.approx(float(norm), rel=1e-4)
  clip = SETTINGS.clip_norm / norm
  _assert_close(grads, jax.tree.map(lambda g: g * clip, want), atol=1e-6)
  # The masks matter, and nothing pulls at what they cut off.
  everything = jax.tree.map(np.ones_like, masks)
  assert abs(_plain(lora, params, everything, _batch())[0] - value) > 0.01
  assert np.all(grads[0]['self_attn']['v_proj']['b'][0, :, 1] == 0)
  assert np.all(grads[0]['mlp']['down_proj']['a'][1, 5:9] == 0)


@pytest.mark.parametrize('micro_batches', [1, 2])
def test_gradients_of_the_base_are_those_of_the_formulas(trees, micro_batches):
  params, lora, masks = trees
  batch = _batch(micro_batches)
  metrics, grads, more = _gradients(trees, batch, base_grads=True)
  plain = jax.jit(jax.grad(lambda p: _loss(lora, p, masks, _batch())))
  want = steps.projections(jax.device_get(plain(params))['stacks'])
  clip = SETTINGS.clip_norm / metrics['grad_norm']
  want = jax.tree.map(lambda g: g * clip, want)
  _assert_close(more, {'base_grads': want}, atol=1e-6)
  # They are more than LoRA's, which stay as they are.
  _assert_close(grads, _gradients(trees, batch)[1], atol=1e-6)
  assert _norm(want) > 0.1


def test_where_nothing_learns_there_is_the_loss_and_no_gradient(trees):
  step = steps.make_lora_gradients(SETTINGS, _device(), learns=False)
  batch = _batch(2)
  found, grads, _ = step(*trees, batch, jax.random.key(0))
  expected, _, _ = _gradients(trees, batch)
  assert found['loss'] == pytest.approx(expected['loss'], abs=1e-6)
  assert found['grad_norm'] == 0 and _norm(jax.device_get(grads)) == 0


def test_small_gradients_are_not_clipped(trees):
  params, lora, masks = trees
  # A small last norm makes small logits, and those small gradients.
  params['norm']['weight'] *= 1e-3
  metrics, grads, _ = _gradients(trees, _batch())
  _, want = _plain(lora, params, masks, _batch())
  assert 1e-4 < metrics['grad_norm'] < SETTINGS.clip_norm
  _assert_close(grads, want, atol=1e-7)


def test_a_batch_without_a_target_has_no_loss_that_a_step_would_use(trees):
  batch = _batch()
  # The first token is nobody's target.
  weights = np.zeros_like(batch['weights'])
  weights[..., 0] = 1.0
  metrics, grads, _ = _gradients(trees, {**batch, 'weights': weights})
  assert np.isnan(metrics['loss']) and np.isnan(metrics['grad_norm'])
  assert all(np.all(np.isnan(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
  'remat', sorted(decoder.REMAT_POLICIES.keys() - {'blocks'})
)
def test_rematerialisation_changes_nothing(trees, remat):
  blocks, other = (
    _gradients(trees, _batch(2), dataclasses.replace(DROPOUT, remat=x))
    for x in ('blocks', remat)
  )
  _assert_close(blocks, other, atol=1e-6)


@pytest.mark.parametrize('remat', ['blocks', 'none'])
def test_layers_compiled_apart_are_those_of_the_loop(trees, remat):
  loop, apart = (
    _gradients(
      trees,
      _batch(2),
      dataclasses.replace(DROPOUT, remat=remat, scan_layers=scan_layers),
    )
    for scan_layers in (True, False)
  )
  _assert_close(loop, apart, atol=1e-6)


def test_layers_compiled_apart_are_in_no_loop(trees):
  loop, apart = (
    _step(dataclasses.replace(SETTINGS, scan_layers=scan_layers))
    .lower(*trees, _batch(), jax.random.key(0))
    .as_text()
    for scan_layers in (True, False)
  )
  # One goes over the layers, one back.
  assert loop.count('stablehlo.while') - apart.count('stablehlo.while') == 2


def test_the_compiler_is_given_the_options_of_the_settings(trees):
  settings = dataclasses.replace(
    SETTINGS, compiler_options=(('xla_go_faster', True),)
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match='xla_go_faster'):
    _gradients(trees, _batch(), settings)


def test_products_of_bfloat16_operands_give_nearly_the_same_gradients(trees):
  exact, rounded = (
    _gradients(trees, _batch(), dataclasses.replace(SETTINGS, matmul_dtype=x))
    for x in (jnp.float32, jnp.bfloat16)
  )
  assert exact[0]['loss'] != rounded[0]['loss']
  np.testing.assert_allclose(
    exact[0]['loss'], rounded[0]['loss'], rtol=0, atol=0.01
  )
  norm = _norm(exact[1])
  assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(rounded[1]))
  error = _norm(jax.tree.map(np.subtract, exact[1], rounded[1]))
  assert error < 0.05 * norm


def test_dropout_is_drawn_anew_for_each_key_and_micro_batch(trees):
  batch = _batch(2)
  swapped = jax.tree.map(lambda x: x[::-1], batch)
  losses = [
    float(_gradients(trees, tokens, DROPOUT, key)[0]['loss'])
    for tokens, key in [(batch, 0), (batch, 0), (batch, 1), (swapped, 0)]
  ]
  assert losses[0] == losses[1]
  # Were one draw used for both halves, their order would not matter.
  assert len({round(loss, 4) for loss in losses}) == 3


def test_adapters_on_a_bf16_base_have_float32_gradients(trees, random_params):
  _, lora, masks = trees
  base = jax.tree.map(np.array, random_params(CONFIG, 'bfloat16'))
  metrics, grads, _ = _gradients((base, lora, masks), _batch())
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  exact = jax.tree.map(lambda x: x.astype(np.float32), base)
  value, want = _plain(lora, exact, masks, _batch())
  assert metrics['loss'] == pytest.approx(float(value), rel=1e-5)
  clip = SETTINGS.clip_norm / _norm(want)
  _assert_close(grads, jax.tree.map(lambda g: g * clip, want), atol=1e-6)


OPTIMIZER = make_optimizer(optax.constant_schedule(1e-2))


@pytest.fixture(scope='module')
def functions():
  """lora_gradients, update_importance and apply_update, not compiled yet."""
  return (
    steps.make_lora_gradients(SETTINGS, _device()),
    steps.make_update_importance(SETTINGS, Criterion('lora'), _device()),
    steps.make_apply_update(OPTIMIZER, _device()),
  )


@pytest.fixture
def state():
  """Step 0."""
  state = init_state(jax.random.key(0), SETTINGS, GROUPS, OPTIMIZER)
  return jax.device_put(state, _device())


def _train_step(functions, state, params, keep=None, batch=None):
  """One turn of the loop in lorapr_jax/train.py: (loss, the next state)."""
  lora_gradients, update_importance, apply_update = functions
  metrics, grads, more = lora_gradients(
    params, state.lora, state.masks, batch or _batch(2), jax.random.key(0)
  )
  importance, ok = update_importance(
    state.importance,
    params,
    state.lora,
    grads,
    more,
    state.masks,
    metrics['grad_norm'],
  )
  masks = state.masks
  if keep:
    masks = SELECT(importance, masks, by_stack(keep, CONFIG))
  state = state.replace(importance=importance, masks=masks)
  return float(metrics['loss']), apply_update(state, grads, ok)


def test_micro_batches_add_up_to_the_batch(functions, trees):
  trees = jax.device_put(trees, _device())
  whole, grads, _ = _gradients(trees, _batch())
  parts, part_grads, _ = functions[0](*trees, _batch(2), jax.random.key(0))
  # Their tokens count differently: a mean of means would be another loss.
  counts = _batch(2)['weights'][..., 1:].sum(axis=(1, 2))
  assert counts[0] != counts[1]
  _assert_close(parts, whole)
  _assert_close(part_grads, grads, atol=1e-6)


def test_every_function_compiles_once_while_the_model_is_pruned(
  functions, state, random_params
):
  params = jax.device_put(random_params(CONFIG), _device())
  compiled = *functions, SELECT
  before = [function._cache_size() for function in compiled]
  keeps = [
    None,
    {'kv_heads': (2, 2), 'mlp': (20, 20)},
    None,
    {'kv_heads': (1, 2), 'mlp': (8, 12)},
  ]
  losses = []
  for keep in keeps:
    loss, state = _train_step(functions, state, params, keep)
    losses.append(loss)
  assert len(set(losses)) == 4
  assert alive_counts(state.masks) == keeps[-1]
  for function, size in zip(compiled, before, strict=True):
    assert function._cache_size() <= size + 1


def test_training_lowers_the_loss(functions, state, random_params):
  params, losses = jax.device_put(random_params(CONFIG), _device()), []
  for _ in range(30):
    loss, state = _train_step(functions, state, params)
    losses.append(loss)
  assert losses[-1] < 0.8 * losses[0]
  assert (state.step, state.skipped) == (30, 0)


def _host_copy(tree):
  return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
  functions, state, random_params
):
  params = jax.device_put(random_params(CONFIG), _device())
  _, state = _train_step(functions, state, params)
  before = _host_copy(state)
  weight = params['stacks'][0]['mlp']['up_proj']['weight']
  broken = jax.tree.map(
    lambda x: x.at[0, 0, 0].set(jnp.nan) if x is weight else x, params
  )
  loss, state = _train_step(functions, state, broken)
  assert np.isnan(loss)
  # A batch of which no token is a target.
  batch = {**_batch(2), 'weights': np.zeros_like(_batch(2)['weights'])}
  batch['weights'][..., 0] = 1.0
  loss, state = _train_step(functions, state, params, batch=batch)
  assert np.isnan(loss)
  after = _host_copy(state)
  for name in ('lora', 'opt_state', 'masks', 'importance'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(after, name), getattr(before, name)
    )
  assert (before.step, after.step) == (1, 3)
  assert (after.skipped, after.skipped_in_a_row) == (2, 2)
  _, state = _train_step(functions, state, params)
  assert (state.skipped, state.skipped_in_a_row) == (2, 0)
  for name in ('lora', 'importance'):
    moved = jax.tree.map(
      lambda x, y: np.any(x != y), getattr(state, name), getattr(before, name)
    )
    assert all(jax.tree.leaves(moved))


def _abstract_smollm2(lora_config, dtype, config=SMOLLM2):
  """params, lora, masks, batch, key without any memory."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  init = functools.partial(init_lora, config=SMOLLM2, lora_config=lora_config)
  sizes = ((30, SMOLLM2.sizes(SMOLLM2.layers[0])),)
  return (
    param_shapes(config, dtype),
    jax.eval_shape(init, key),
    jax.eval_shape(lambda: initial_masks(GROUPS, sizes)),
    {
      'tokens': jax.ShapeDtypeStruct((1, 8, 128), jnp.int32),
      'weights': jax.ShapeDtypeStruct((1, 8, 128), jnp.float32),
    },
    key,
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_step_of_smollm2_holds_less_than_one_copy_of_the_model(dtype):
  settings = Compute(SMOLLM2, dataclasses.replace(RANK_8, dropout=0.05))
  arguments = _abstract_smollm2(settings.lora, jnp.dtype(dtype))
  step = steps.make_lora_gradients(settings, _device())
  memory = step.lower(*arguments).compile().memory_analysis()
  base = SMOLLM2.num_parameters * jnp.dtype(dtype).itemsize
  assert memory.argument_size_in_bytes > base
  assert memory.temp_size_in_bytes < base
  # The base is not donated.
  assert memory.alias_size_in_bytes < 0.01 * base


def test_an_int8_base_is_dequantised_a_layer_at_a_time():
  held = {}
  for quantized in ((), LORA_TARGETS):
    config = dataclasses.replace(SMOLLM2, quantized=quantized)
    settings = Compute(config, RANK_8)
    arguments = _abstract_smollm2(settings.lora, jnp.dtype('float32'), config)
    step = steps.make_lora_gradients(settings, _device())
    held[quantized] = step.lower(*arguments).compile().memory_analysis()
  float32, int8 = held[()], held[LORA_TARGETS]
  layers = sum(SMOLLM2.layer_parameters(x) for x in SMOLLM2.layers)
  saved = float32.argument_size_in_bytes - int8.argument_size_in_bytes
  # Scales are a float32 for each output of hundreds of inputs.
  assert saved > 0.99 * 3 * layers
  more = int8.temp_size_in_bytes - float32.temp_size_in_bytes
  assert more < 2 * 4 * layers / len(SMOLLM2.layers)


def test_the_true_gradient_costs_a_copy_of_the_projections():
  settings = Compute(SMOLLM2, RANK_8)
  arguments = _abstract_smollm2(settings.lora, jnp.dtype('bfloat16'))
  held = {}
  for base_grads in (False, True):
    step = _step(settings, base_grads)
    memory = step.lower(*arguments).compile().memory_analysis()
    held[base_grads] = memory.temp_size_in_bytes + memory.output_size_in_bytes
  gradient = 4 * sum(SMOLLM2.layer_parameters(x) for x in SMOLLM2.layers)
  assert held[True] - held[False] > 0.95 * gradient


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_importance_of_smollm2_needs_the_scores_of_one_layer(dtype):
  settings = Compute(SMOLLM2, RANK_8)
  params, lora, masks, _, _ = _abstract_smollm2(settings.lora, jnp.dtype(dtype))
  update = steps.make_update_importance(settings, Criterion('lora'), _device())
  norm = jax.ShapeDtypeStruct((), jnp.float32)
  lowered = update.lower(masks, params, lora, lora, {}, masks, norm)
  memory = lowered.compile().memory_analysis()
  layer = 4 * SMOLLM2.layer_parameters(SMOLLM2.layers[0])
  assert memory.temp_size_in_bytes < 6 * layer


# Two documents and padding in one window; the same two in the other order.
SEGMENTS = np.array(
  [[1] * 4 + [2] * 3 + [0] * 2, [1] * 3 + [2] * 4 + [0] * 2], np.int32
)


def _packed():
  """A batch of packed documents, and the documents alone: (ids, ...)."""
  rng = np.random.default_rng(5)
  documents = [rng.integers(0, CONFIG.vocab_size, n) for n in (4, 3, 3, 4)]
  tokens = np.zeros(SEGMENTS.shape, np.int32)
  tokens[SEGMENTS > 0] = np.concatenate(documents)
  # A document's first token is no target; nor is padding.
  inside = np.roll(SEGMENTS, 1, axis=1) == SEGMENTS
  inside[:, 0] = False
  weights = (inside & (SEGMENTS > 0)).astype(np.float32)
  batch = {'tokens': tokens, 'weights': weights, 'segments': SEGMENTS}
  return {k: v[None] for k, v in batch.items()}, documents


@jax.jit
def _alone(lora, params, masks, documents):
  """The losses of each document's tokens, each in a window of its own."""
  losses = {}
  # Those of one length at a time, to compile less.
  for size in sorted({len(d) for d in documents}):
    same = [i for i, d in enumerate(documents) if len(d) == size]
    tokens = jnp.stack([documents[i] for i in same])
    each = token_losses(
      params, tokens, jnp.ones(tokens.shape), SETTINGS, lora=lora, masks=masks
    )
    losses |= dict(zip(same, each, strict=True))
  return jnp.concatenate([losses[i] for i in range(len(documents))])


def test_packed_documents_have_the_losses_of_each_alone(trees):
  params, lora, masks = trees
  batch, documents = _packed()
  packed = jax.tree.map(lambda x: x[0], batch)

  @jax.jit
  def losses(segments):
    return token_losses(
      params,
      packed['tokens'],
      packed['weights'],
      SETTINGS,
      segments=segments,
      lora=lora,
      masks=masks,
    )

  together = np.asarray(losses(packed['segments']))
  alone = _alone(lora, params, masks, documents)
  np.testing.assert_allclose(together[SEGMENTS > 0], alone, atol=1e-5)
  assert np.all(together[SEGMENTS == 0] == 0)
  # Without segments they are others: attention then crosses.
  crossing = losses(np.ones_like(packed['segments']))
  assert np.abs(crossing - together).max() > 1e-3


def test_packed_documents_have_the_gradient_of_each_alone(trees):
  params, lora, masks = trees
  batch, documents = _packed()
  settings = dataclasses.replace(SETTINGS, clip_norm=1e9)
  metrics, grads, _ = _gradients(trees, batch, settings)

  @jax.jit
  @jax.value_and_grad
  def loss(lora):
    losses = _alone(lora, params, masks, documents)
    return jnp.sum(losses) / sum(len(d) - 1 for d in documents)

  value, want = loss(lora)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-5)
  _assert_close(grads, want)
