"""What the TPU's compiler makes of the step: no TPU is needed for it.

Run by `make test-aot`, in an environment that has libtpu. Models have two
layers and few dimensions where only what must not be there is looked for.
"""

import functools
import itertools
import math
from pathlib import Path
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from lorapr_jax.cli.flags import parse_flags
from lorapr_jax.hf.config import config_from_hf
from lorapr_jax.models.attention import causal_attention
from lorapr_jax.models.compute import Compute
from lorapr_jax.models.config import LayerShape, LoraConfig, ModelConfig
from lorapr_jax.models.cost import (
  attention_flops_per_token,
  forward_flops_per_token,
)
from lorapr_jax.models.loss import chunked_cross_entropy
from lorapr_jax.models.trees import logical_axes, param_shapes
from lorapr_jax.planning.collectives import COLLECTIVES
from lorapr_jax.planning.hlo import Program
from lorapr_jax.planning.needs import plan_run
from lorapr_jax.planning.search import search
from lorapr_jax.planning.topology import SLICES, Topology
from lorapr_jax.pruning.compensation import repaired_of, without_repaired
from lorapr_jax.pruning.groups import CHANNELS, KV_HEADS
from lorapr_jax.pruning.importance import Criterion
from lorapr_jax.pruning.solve import solve_in_blocks
from lorapr_jax.runtime import sharding
from lorapr_jax.training import steps
from lorapr_jax.training.base import Places
from lorapr_jax.training.event import make_prune_layers
from lorapr_jax.training.state import init_state
from tests.aot.overlap import overlapped

pytestmark = pytest.mark.aot

GROUPS = (KV_HEADS, CHANNELS)
# Without dropout, whose generator takes the compiler over a minute.
LORA = LoraConfig(rank=8, alpha=16.0, dropout=0.0)
TOKENS = 8192


def _mesh(data: int, fsdp: int, tensor: int) -> Mesh:
  """Of the eight chips of a v5e slice that is not there."""
  topology = topologies.get_topology_desc('v5e:2x4', platform='tpu')
  sizes = (data, fsdp, 1, tensor)
  devices = np.array(topology.devices[: math.prod(sizes)])
  return Mesh(
    devices.reshape(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * 4
  )


def _whole(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def _config(shape: LayerShape, **more) -> ModelConfig:
  sizes = dict(
    vocab_size=1024,
    embed_dim=256,
    head_dim=64,
    layers=(shape,) * 2,
    max_positions=TOKENS,
  )
  return ModelConfig(**(sizes | more))


def _abstract(config: ModelConfig, mesh: Mesh):
  """params, lora, masks, as shapes that know where they lie."""
  whole = _whole(mesh)

  def placed(tree, places):
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
      tree,
      places,
    )

  shapes = param_shapes(config, jnp.bfloat16)
  axes = logical_axes(config)['params']
  state = jax.eval_shape(
    functools.partial(
      init_state,
      settings=Compute(config, LORA),
      groups=GROUPS,
      optimizer=optax.identity(),
    ),
    jax.eval_shape(lambda: jax.random.key(0)),
  )
  everywhere = jax.tree.map(lambda _: whole, state)
  state = placed(state, everywhere)
  return placed(shapes, sharding.shardings(mesh, axes, shapes)), state


def _compiled_step(
  config: ModelConfig,
  mesh: Mesh,
  batch: int,
  packed: bool = False,
  *,
  tokens: int = TOKENS,
  remat: str = 'blocks',
):
  settings = Compute(
    config,
    LORA,
    dtype=jnp.bfloat16,
    matmul_dtype=jnp.bfloat16,
    loss_chunk=512,
    remat=remat,
  )
  params, state = _abstract(config, mesh)
  place = sharding.sharding(mesh, ('accumulation', 'batch', 'length'))
  shape = (1, batch, tokens)
  inputs = {
    'tokens': jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place),
    'weights': jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
  }
  if packed:
    inputs['segments'] = inputs['tokens']
  whole = _whole(mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
  step = steps.make_lora_gradients(settings, whole)
  return step.lower(params, state.lora, state.masks, inputs, key).compile()


def _sizes(shape: str) -> list[int]:
  """Elements of every array in the text."""
  return [
    math.prod(map(int, sizes.split(',')))
    for sizes in re.findall(r'\w\[(\d+(?:,\d+)*)\]', shape)
  ]


def _exchanged(text: str) -> list[int]:
  """Elements of what each collective brings, of all its arrays together.

  The result of a start holds its operands too.
  """
  return [
    sum(_sizes(instruction.shape))
    for computation in Program.parse(text).computations.values()
    for instruction in computation.values()
    if instruction.opcode.removesuffix('-start') in COLLECTIVES
  ]


def _on_the_host(text: str) -> list[str]:
  """Instructions that move something to the host or from it."""
  moves = ('infeed', 'outfeed', 'send', 'recv')
  return [
    instruction.name
    for computation in Program.parse(text).computations.values()
    for instruction in computation.values()
    if instruction.opcode in moves
    or re.search('custom_call_target="[^"]*callback', instruction.text)
    # The memory space of the host.
    or 'S(5)' in instruction.shape
  ]


def _quadratic(text: str) -> list[str]:
  """Shapes with the sequence's length, or more, in two axes."""
  shapes = re.findall(r'\[(\d+(?:,\d+)+)\]', text)
  return [
    shape
    for shape in set(shapes)
    if sum(int(size) >= TOKENS for size in shape.split(',')) > 1
  ]


# Whole KV heads as pruning leaves them, on a chip; and the three mesh axes.
@pytest.mark.parametrize(
  ('shape', 'mesh', 'packed'),
  [
    (LayerShape(3, 2, 384), (1, 1, 1), False),
    (LayerShape(4, 2, 512), (2, 2, 2), True),
  ],
)
def test_no_array_is_quadratic_in_the_sequence(shape, mesh, packed):
  compiled = _compiled_step(_config(shape), _mesh(*mesh), 4, packed)
  assert not _quadratic(compiled.as_text())


def test_attention_without_a_kernel_is_quadratic():
  place = _whole(_mesh(1, 1, 1))
  q, k = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    for shape in ((1, TOKENS, 3, 2, 64), (1, TOKENS, 3, 64))
  )
  gradient = jax.grad(lambda q, k, v: jnp.sum(causal_attention(q, k, v)))
  assert _quadratic(jax.jit(gradient).lower(q, k, k).compile().as_text())


def test_offload_keeps_the_blocks_inputs_in_the_hosts_memory():
  config, tokens = _config(LayerShape(3, 2, 384)), 1024
  compiled = {
    remat: _compiled_step(config, _mesh(1, 1, 1), 4, tokens=tokens, remat=remat)
    for remat in ('blocks', 'offload')
  }
  on_host = {
    remat: step.memory_analysis().host_temp_size_in_bytes
    for remat, step in compiled.items()
  }
  inputs = 2 * len(config.layers) * 4 * tokens * config.embed_dim
  assert on_host['blocks'] < inputs <= on_host['offload']
  assert not _on_the_host(compiled['blocks'].as_text())
  assert _on_the_host(compiled['offload'].as_text())


def test_a_callback_is_a_move_to_the_host():
  def function(x):
    jax.debug.print('{}', x)
    return x + 1

  x = jax.ShapeDtypeStruct((), jnp.float32, sharding=_whole(_mesh(1, 1, 1)))
  assert _on_the_host(jax.jit(function).lower(x).compile().as_text())


def test_a_base_that_is_gathered_at_once_is_seen():
  mesh = _mesh(1, 8, 1)
  config = _config(LayerShape(4, 2, 384))
  params, _ = _abstract(config, mesh)
  gathers = jax.jit(lambda x: x, out_shardings=_whole(mesh))
  text = gathers.lower(params['stacks']).compile().as_text()
  stack = len(config.layers) * config.embed_dim * 384
  assert max(_exchanged(text)) >= stack
  assert stack in _sizes(text)


def test_importance_holds_no_array_of_a_projections_size():
  # The layers of Llama 2 7B.
  shape = LayerShape(num_kv_heads=32, queries_per_kv=1, mlp_dim=11008)
  config = _config(shape, embed_dim=4096, head_dim=128)
  mesh = _mesh(1, 1, 1)
  whole = _whole(mesh)
  params, state = _abstract(config, mesh)
  settings = Compute(config, LORA)
  update = steps.make_update_importance(settings, Criterion('lora'), whole)
  norm = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
  memory = (
    update.lower(
      state.importance, params, state.lora, state.lora, {}, state.masks, norm
    )
    .compile()
    .memory_analysis()
  )
  smallest_projection = 2 * 4096 * 4096
  assert memory.temp_size_in_bytes < 0.1 * smallest_projection


def _lowered_event(
  mesh: Mesh, micro_batches: int, tokens: int, criterion: Criterion
):
  config = _config(LayerShape(4, 2, 2048))
  settings = Compute(
    config, LORA, dtype=jnp.bfloat16, matmul_dtype=jnp.bfloat16
  )
  params, state = _abstract(config, mesh)
  places = jax.tree.map(lambda x: x.sharding, params)
  rows = sharding.sharding(mesh, ('accumulation', 'batch', 'length'))
  shape = (micro_batches, 4, tokens)
  batch = {
    'tokens': jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
    'weights': jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows),
  }
  prune_layers = make_prune_layers(
    settings, criterion, True, Places(places, rows, _whole(mesh))
  )
  counts = jax.tree.map(
    lambda mask: jax.ShapeDtypeStruct(mask.shape[:1], jnp.int32), state.masks
  )
  return prune_layers.lower(
    *(repaired_of(params), without_repaired(params), state.lora),
    *(state.masks, state.importance, counts, (batch,)),
  )


@pytest.mark.parametrize('criterion', ['lora', 'obs'])
def test_an_event_leaves_its_tokens_where_they_lie(criterion):
  micro_batches, tokens, channels = 4, 1024, 2048
  compiled = _lowered_event(
    _mesh(2, 2, 2), micro_batches, tokens, Criterion(criterion)
  ).compile()
  # What down_proj reads, of the tokens of a device: a batch is in four parts.
  read = micro_batches * tokens * channels
  gathered = re.findall(
    r'= \(?\w+\[([\d,]+)\]\S* all-gather', compiled.as_text()
  )
  assert gathered
  for shape in gathered:
    assert math.prod(int(x) for x in shape.split(',')) <= read
    assert shape != f'{channels},{channels}'  # X^T X
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert temporaries < 2 * (2 * read + 4 * channels**2)


def test_more_rows_to_solve_for_are_more_turns_of_the_same_loops():
  mesh = _mesh(2, 2, 2)
  whole = _whole(mesh)
  count = []
  for rows in (1024, 2048):
    arrays = [
      jax.ShapeDtypeStruct((rows, n), jnp.float32, sharding=whole)
      for n in (rows, 512)
    ]
    solver = jax.jit(functools.partial(solve_in_blocks, mesh=mesh))
    text = solver.lower(*arrays).compile().as_text()
    count.append(text.count(' fusion('))
  assert count[1] < 1.2 * count[0]


def test_the_loss_gathers_no_vocabulary():
  mesh = _mesh(1, 4, 2)
  n, d, v = 8 * 2048, 512, 128256

  def loss(hidden, *rest):
    return jnp.sum(chunked_cross_entropy(hidden, *rest, 512, mesh=mesh))

  arrays = [
    ((n, d), jnp.bfloat16, ('batch', 'head_dim')),
    ((v, d), jnp.bfloat16, ('vocab', 'embed')),
    ((n,), jnp.int32, ('batch',)),
    ((n,), jnp.float32, ('batch',)),
  ]
  inputs = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.sharding(mesh, axes))
    for shape, dtype, axes in arrays
  ]
  compiled = jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()
  gathered = re.findall(
    r'= \(?\w+\[([\d,]+)\]\S* all-gather', compiled.as_text()
  )
  assert gathered
  for shape in gathered:
    assert math.prod(int(x) for x in shape.split(',')) <= 512 * d


MODELS = Path(__file__).parents[2] / 'configs' / 'models.py'
LLAMA = (f'--config={MODELS}:llama-7b', '--config.prune.criterion=lora')


def _planned(topology: str, *flags: str):
  config, _ = parse_flags([*LLAMA, *flags, '--workdir=none'])
  return plan_run(config, Topology.of(topology))


@pytest.fixture
def _not_kept():
  # What is compiled for devices that are not there cannot be read back.
  jax.config.update('jax_enable_compilation_cache', False)
  yield
  jax.config.update('jax_enable_compilation_cache', True)


@pytest.mark.usefixtures('_not_kept')
def test_llama_7b_is_planned_for_eight_chips():
  flags = ['--config.mesh.data=1', '--config.mesh.fsdp=8']
  # Without dropout, as above.
  step, importance = itertools.islice(
    _planned('v5e:2x4', *flags, '--config.lora.dropout=0.0'), 2
  )
  assert step.fits and importance.fits
  own, weights = step.compiled, 2 * 6_738_415_616
  # An eighth of the base, and the adapters whole.
  assert weights / 8 < own.arguments < weights / 8 + 0.2e9
  assert own.temporaries < 2e9
  # Each block is computed a second time: three passes where two would do.
  config, _ = parse_flags([*LLAMA, '--workdir=none'])
  sizes, tokens = config_from_hf(dict(config.model.sizes)), 128 * 512 / 8
  least = 2 * forward_flops_per_token(sizes, 512)
  least += attention_flops_per_token(sizes, 512)
  assert 1.35 < own.flops / (least * tokens) < 1.45
  # Forward and back, every micro-batch gathers what it lacks; the parts of a
  # product that come from chip to chip go on for two steps too many.
  gathered = own.received() / (8 * weights * 7 / 8)
  assert 2 < gathered < 2.7
  # Products run meanwhile, by the compiler's own defaults.
  assert overlapped(Program.parse(own.text)) > 0.9 * own.received()
  # No more than a tensor of a layer is ever gathered; no stack and no
  # embedding is whole anywhere, whatever its shape; the host has no part.
  layer, stack = 4096 * 11008, 32 * 4096 * 4096
  assert max(_exchanged(own.text)) <= layer
  sizes = _sizes(own.text)
  assert max(sizes) < stack and 32000 * 4096 not in sizes
  assert not _on_the_host(own.text)
  # One layer's dense products at most: with fused sums, none.
  assert importance.compiled.temporaries < 0.1 * 2 * 4096 * 4096


@pytest.mark.usefixtures('_not_kept')
def test_the_step_holds_one_layers_weights_beside_the_base():
  # Of 7B's width, where the compiler has copied a stack to pad its axes.
  flags = ['--config.model.sizes.num_hidden_layers=8', '--config.data.eval=']
  flags += ['--config.train.micro_batch_size=1', '--config.lora.dropout=0.0']
  # Which would leave two projections as they are.
  flags += ['--config.prune.compensate=none']
  half, int8 = (
    next(
      _planned('v5e:1x1', *flags, f'--config.model.base_dtype={dtype}')
    ).compiled
    for dtype in ('bfloat16', 'int8')
  )
  layer = 4 * 4096**2 + 3 * 4096 * 11008
  assert half.temporaries < 2 * layer and int8.temporaries < 2 * layer
  # A byte a weight, but for the scales.
  saved = half.arguments - int8.arguments
  assert 0.99 * 8 * layer < saved < 8 * layer


@pytest.mark.usefixtures('_not_kept')
def test_a_search_ends_with_the_smallest_slice_that_fits():
  flags = ['--config.model.sizes.num_hidden_layers=2', '--config.data.eval=']
  flags += ['--config.train.micro_batch_size=128', '--config.model.remat=none']
  flags += ['--config.lora.dropout=0.0', '--config.train.batch_size=128']
  flags += ['--config.prune.compensate=none']
  config, _ = parse_flags([*LLAMA, *flags, '--workdir=none'])
  small, large = search(config, 'v5e')
  assert small.topology.name == 'v5e:1x1' and not small.fits
  assert small.needs[0].total > small.topology.chip.hbm
  assert large.topology.name == 'v5e:2x2' and large.fits
  assert large.mesh == {'data': 1, 'fsdp': 4, 'sequence': 1, 'tensor': 1}
  assert [x.name for x in large.needs] == ['step', 'importance', 'optimiser']


@pytest.mark.usefixtures('_not_kept')
def test_what_cannot_fit_or_be_cut_so_is_not_compiled(monkeypatch):
  monkeypatch.setattr('lorapr_jax.planning.search.plan_run', None)
  config, _ = parse_flags([f'--config={MODELS}:llama-65b', '--workdir=none'])
  config.train.micro_batch_size = 2
  found = itertools.islice(search(config, 'v5e'), 4)
  reasons = [(x.topology.name, x.mesh['tensor'], x.reason) for x in found]
  assert reasons[0] == ('v5e:1x1', 1, 'the base alone takes 130.6 GB')
  assert reasons[1] == (
    *('v5e:2x2', 1),
    'train.micro_batch_size 2 is not a multiple of mesh.data * mesh.fsdp = 4',
  )
  assert reasons[2][:2] == ('v5e:2x2', 2) and '32.6 GB' in reasons[2][2]


@pytest.mark.usefixtures('_not_kept')
def test_what_is_too_large_is_refused():
  flags = ['--config.model.sizes.num_hidden_layers=2']
  flags += ['--config.train.micro_batch_size=128', '--config.model.remat=none']
  step = next(_planned('v5e:1x1', *flags, '--config.lora.dropout=0.0'))
  assert step.fits is False and step.compiled is None
  assert step.total > Topology.of('v5e:1x1').chip.hbm


@pytest.mark.parametrize('kind', SLICES)
def test_slices_are_the_compilers_in_ascending_order(kind):
  found = [Topology.of(f'{kind}:{sizes}') for sizes in SLICES[kind]]
  counts = [len(topology.devices) for topology in found]
  for count, sizes in zip(counts, SLICES[kind], strict=True):
    assert count == math.prod(map(int, sizes.split('x')))
  assert counts == sorted(set(counts))
