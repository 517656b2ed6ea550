"""What is read from a compiled program's text."""

import jax
import jax.numpy as jnp
import pytest

from lorapr_jax.planning.collectives import received, transfers
from lorapr_jax.planning.hlo import Program
from lorapr_jax.runtime import sharding
from tests.aot.overlap import beside, overlapped


def _program(function, *arguments):
  return Program.parse(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_loop_counts_as_often_as_it_turns():
  a, stack = jnp.ones((64, 128)), jnp.ones((5, 128, 128))

  def function(x, stack):
    def body(x, w):
      # The inner loop: three products more for each of the outer one.
      inner, _ = jax.lax.scan(lambda y, _: (y @ w, None), x, None, length=3)
      return jnp.sin(inner @ w), None

    return jax.lax.scan(body, x, stack)[0]

  one = 2 * 64 * 128 * 128
  assert _program(jnp.matmul, a, stack[0]).flops() == one
  assert _program(function, a, stack).flops() == 5 * 4 * one


def test_padding_is_no_product():
  image, kernel = jnp.ones((1, 1, 8)), jnp.ones((1, 1, 3))

  def function(image, kernel):
    return jax.lax.conv_general_dilated(image, kernel, (1,), 'SAME')

  # Eight places of three taps, but for one at each end.
  assert _program(function, image, kernel).flops() == 2 * (8 * 3 - 2)


@pytest.mark.mesh
def test_bytes_that_devices_exchange_are_counted():
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 8, 'tensor': 1})
  places = [
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    for spec in ((None, 'fsdp'), ())
  ]
  x = jax.device_put(jnp.ones((4, 16, 32)), places[0])

  def function(stack):
    def body(total, w):
      whole = jax.lax.with_sharding_constraint(w, places[1])
      return total + jnp.sin(whole), None

    return jax.lax.scan(body, jnp.zeros((16, 32)), stack)[0]

  compiled = jax.jit(function, out_shardings=places[1]).lower(x).compile()
  found = received(Program.parse(compiled.as_text()))
  # Gathered in each of the four turns, or the whole stack before them; an
  # eighth is here already.
  assert list(found) == ['all-gather']
  assert found['all-gather']['bytes'] == 4 * 16 * 32 * 4 * 7 / 8


# As XLA writes a product whose parts come from device to device: two steps a
# turn, and a kernel of splash attention after it.
WINDOWED = """HloModule jit_f

%cond (p: (u32[], bf16[8,4])) -> pred[] {
  %four = u32[]{:T(128)} constant(4), metadata={op_name="x"}
  %p = (u32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %four), direction=LT
}

%fused (a: bf16[8,4], b: bf16[4,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = bf16[4,4]{1,0} parameter(1)
  ROOT %conv = bf16[8,4]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%body (q: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %q = (u32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %j = u32[]{:T(128)} get-tuple-element(%q), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%q), index=1
  %w = bf16[4,4]{1,0} constant({...})
  %send = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) \
collective-permute-start(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  %sent = bf16[8,4]{1,0} collective-permute-done(%send)
  %next = u32[]{:T(128)} add(%j, %two)
  %y = bf16[8,4]{1,0} fusion(%sent, %w), kind=kOutput, calls=%fused
  ROOT %r = (u32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%next, %y)
}

ENTRY %main (x: (u32[], bf16[8,4])) -> f32[2,8,16] {
  %start = (u32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %while.1 = (u32[]{:T(128)}, bf16[8,4]{1,0}) while(%start), \
condition=%cond, body=%body
  %heads = bf16[2,8,16]{2,1,0} constant({...})
  %keys = bf16[2,32,16]{2,1,0} constant({...})
  %tiles = s8[2,8,32]{2,1,0} constant({...})
  ROOT %splash_mha_fwd_residuals.3 = f32[2,8,16]{2,1,0} custom-call(%tiles, \
%heads, %keys, %keys), custom_call_target="tpu_custom_call"
}
"""


@pytest.mark.parametrize('keys', (8, 32))
def test_a_turn_may_be_more_than_one_step(keys):
  text = WINDOWED.replace('bf16[2,32,16]', f'bf16[2,{keys},16]')
  program = Program.parse(text)
  product, turns = 2 * 8 * 4 * 4, 2
  # Two products of 8 queries with their own keys and those before, of 2 heads;
  # of 8 out of 32 on average, for which those are depends on the device.
  attention = 2 * 2 * 2 * (8 * (keys + 1) / 2) * 16
  assert program.flops() == turns * product + attention
  assert received(program) == {
    'collective-permute': {'count': turns, 'bytes': turns * 8 * 4 * 2}
  }


def test_another_kind_of_loop_is_an_error():
  text = WINDOWED.replace('direction=LT', 'direction=GT')
  with pytest.raises(ValueError, match='how often while.1 turns'):
    Program.parse(text).flops()


# As XLA writes a gather that goes on beside the products of a loop, in parts,
# and one that nothing is done beside.
IN_PARTS = """HloModule jit_f, is_scheduled=true

%cond (p: (u32[], bf16[8,4])) -> pred[] {
  %p = (u32[], bf16[8,4]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %four = u32[] constant(4)
  ROOT %less = pred[] compare(%i, %four), direction=LT
}

%start (a: bf16[2,4]) -> (bf16[2,4], bf16[8,4]) {
  %a = bf16[2,4]{1,0} parameter(0)
  %gather.1 = bf16[8,4]{1,0} all-gather(%a), channel_id=7, dimensions={0}
  ROOT %call.1 = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) custom-call(%gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%part (b: bf16[2,4], c: bf16[8,4], d: bf16[4,4]) -> bf16[8,4] {
  %b = bf16[2,4]{1,0} parameter(0)
  %c = bf16[8,4]{1,0} parameter(1)
  %d = bf16[4,4]{1,0} parameter(2)
  %gather.2 = bf16[8,4]{1,0} all-gather(%b), channel_id=7, dimensions={0}
  ROOT %conv = bf16[8,4]{1,0} convolution(%c, %d), dim_labels=bf_io->bf
}

%done (e: bf16[2,4], f: bf16[8,4]) -> bf16[8,4] {
  %e = bf16[2,4]{1,0} parameter(0)
  %f = bf16[8,4]{1,0} parameter(1)
  %gather.3 = bf16[8,4]{1,0} all-gather(%e), channel_id=7, dimensions={0}
  ROOT %call.2 = bf16[8,4]{1,0} custom-call(%e, %f, %gather.3), \
custom_call_target="AsyncCollectiveDone"
}

%body (q: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %q = (u32[], bf16[8,4]{1,0}) parameter(0)
  %one = u32[] constant(1)
  %j = u32[] get-tuple-element(%q), index=0
  %next = u32[] add(%j, %one)
  %x = bf16[8,4]{1,0} get-tuple-element(%q), index=1
  %own = bf16[2,4]{1,0} constant({...})
  %w = bf16[4,4]{1,0} constant({...})
  %y = bf16[8,4]{1,0} fusion(%own, %x, %w), kind=kOutput, calls=%part
  ROOT %r = (u32[], bf16[8,4]{1,0}) tuple(%next, %y)
}

ENTRY %main (x: (u32[], bf16[8,4])) -> bf16[8,4] {
  %first = (u32[], bf16[8,4]{1,0}) parameter(0)
  %mine = bf16[2,4]{1,0} constant({...})
  %fusion.1 = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) fusion(%mine), kind=kCustom, \
calls=%start
  %while.1 = (u32[], bf16[8,4]{1,0}) while(%first), condition=%cond, body=%body
  %gather.4 = bf16[8,4]{1,0} all-gather(%mine), channel_id=8, dimensions={0}
  ROOT %fusion.2 = bf16[8,4]{1,0} fusion(%mine, %gather.4), kind=kCustom, \
calls=%done
}
"""


def test_a_gather_in_parts_counts_once_and_is_overlapped():
  program = Program.parse(IN_PARTS)
  lacking = (8 - 2) * 4 * 2
  in_parts, alone = transfers(program)
  assert (in_parts.bytes, in_parts.times) == (lacking, 1)
  assert beside(program, in_parts) == 4 * 2 * 8 * 4 * 4
  assert (alone.bytes, beside(program, alone)) == (lacking, 0)
  assert received(program)['all-gather']['bytes'] == 2 * lacking
  assert overlapped(program) == lacking


def test_a_start_with_no_product_before_its_end_is_not_overlapped():
  program = Program.parse(WINDOWED)
  assert [beside(program, x) for x in transfers(program)] == [0]
  # The end after the product in place of before it.
  end = '  %sent = bf16[8,4]{1,0} collective-permute-done(%send)\n'
  product = '  %y = bf16[8,4]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused\n'
  text = WINDOWED.replace(end, '').replace('fusion(%sent', 'fusion(%x')
  program = Program.parse(text.replace(product, product + end))
  assert [beside(program, x) for x in transfers(program)] == [2 * 8 * 4 * 4]
