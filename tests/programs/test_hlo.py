"""The reader of compiled programs, on real ones of 8 virtual devices and on lines that only other compilers write."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.programs import hlo

MESH = {'replica': 2, 'fsdp': 2, 'tensor': 2}


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * 3)


def collectives(f, mesh, specs, *shapes):
  args = [
    jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p)) for s, p in zip(shapes, specs, strict=True)
  ]
  return hlo.Program(jax.jit(f).lower(*args).compile().as_text()).collectives(MESH)


def mapped(mesh, specs, out):
  return functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)


@pytest.mark.parametrize('axis', list(MESH))
def test_each_kind_is_found_with_its_axis_and_its_bytes(mesh, axis):
  x, spec = (16, 8), P(axis)
  local = 8 * 8 * 4  # bytes of one device's part
  gather = mapped(mesh, (spec,), P())(lambda x: jax.lax.all_gather(x, axis, tiled=True))
  (one,) = collectives(gather, mesh, [spec], x)
  assert (one.kind, one.axes, one.bytes, one.times) == ('all-gather', (axis,), local, 1)
  (one,) = collectives(mapped(mesh, (spec,), P())(lambda x: jax.lax.psum(x, axis)), mesh, [spec], x)
  assert (one.kind, one.axes, one.bytes) == ('all-reduce', (axis,), local)
  scatter = mapped(mesh, (P(),), spec)(lambda x: jax.lax.psum_scatter(x, axis, tiled=True))
  (one,) = collectives(scatter, mesh, [P()], x)
  assert (one.kind, one.axes, one.bytes) == ('reduce-scatter', (axis,), local)
  shift = mapped(mesh, (spec,), spec)(lambda x: jax.lax.ppermute(x, axis, [(0, 1), (1, 0)]))
  (one,) = collectives(shift, mesh, [spec], x)
  assert (one.kind, one.axes, one.bytes) == ('collective-permute', (axis,), local)


def test_several_axes_are_named_in_the_meshs_order(mesh):
  both = mapped(mesh, (P(),), P())(lambda x: jax.lax.psum(x, ('tensor', 'replica')))
  (one,) = collectives(both, mesh, [P()], (16, 8))
  assert one.axes == ('replica', 'tensor')
  assert one.bytes == 2 * 16 * 8 * 4 * 3 / 4


def test_a_collective_in_loops_counts_as_often_as_it_runs(mesh):
  def f(x):
    inner = lambda x, _: (jnp.tanh(jax.lax.psum(x, 'fsdp')), None)
    outer = lambda x, _: jax.lax.scan(inner, jax.lax.psum(x, 'tensor'), length=5)
    return jax.lax.scan(outer, x, length=3)[0]

  found = collectives(mapped(mesh, (P(),), P())(f), mesh, [P()], (16, 8))
  assert {(one.axes, one.times, one.loop) for one in found} == {(('fsdp',), 15, 2), (('tensor',), 3, 1)}
  assert found[0].axes == ('fsdp',)  # the most bytes first
  assert found[0].total == 15 * found[0].bytes


def test_the_partitioners_own_collectives_are_found(mesh):
  """A matrix product over a sharded dimension, which nothing asked to be summed by name."""
  found = collectives(lambda x, w: x @ w, mesh, [P(('replica', 'fsdp'), 'tensor'), P('tensor')], (16, 8), (8, 32))
  assert [(one.kind, one.axes) for one in found] == [('all-reduce', ('tensor',))]


def test_a_program_without_any(mesh):
  assert collectives(lambda x: x + 1, mesh, [P('fsdp')], (16, 8)) == []


def test_the_largest_array(mesh):
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
  program = hlo.Program(jax.jit(lambda x: jnp.sin(x @ x.T).sum()).lower(x).compile().as_text())
  assert program.largest_array() == (64 * 64 * 4, 'f32[64,64]')


def line(text: str, name: str = 'main') -> list[hlo.Collective]:
  return hlo.Program(f'ENTRY %{name} (p: f32[4]) -> f32[4] {{\n  ROOT {text}\n}}').collectives(
    {'replica': 2, 'fsdp': 4, 'tensor': 2}
  )


@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}', ('tensor',)),
    ('[4,4]<=[2,4,2]T(0,2,1)', ('fsdp',)),
    ('[8,2]<=[16]', ('tensor',)),
    ('[2,8]<=[16]', ('fsdp', 'tensor')),
    ('{}', ('replica', 'fsdp', 'tensor')),
    ("mesh['a'=2,'b'=4,'c'=2] {'b'}", ('fsdp',)),
    ("mesh['a'=2,'b'=8] {'a'}", ('replica',)),
    ("mesh['a'=2,'b'=8] {'b':(4)2}", ('tensor',)),
  ],
)
def test_every_way_of_writing_groups_is_read(groups, axes):
  (one,) = line(
    f'%g = f32[8,128]{{1,0:T(8,128)}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}'
  )
  assert one.axes == axes and one.array == 'f32[8,128]'


def test_groups_of_one_send_nothing():
  assert line('%g = f32[8] all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add') == []


def test_an_asynchronous_collective_is_counted_once_and_by_its_result():
  (one,) = line(
    '%s = (bf16[4,128]{1,0}, bf16[16,128]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p), replica_groups=[4,4]<=[2,4,2]T(0,2,1), '
    'metadata={op_name="jit(run)/jvp(student)/dot_general"}'
  )
  assert (one.kind, one.array, one.bytes) == ('all-gather', 'bf16[16,128]', 16 * 128 * 2 * 3 / 4)
  assert one.source == 'jit(run)/jvp(student)/dot_general'
  assert line('%d = bf16[16,128] all-gather-done(%s)') == []


def test_what_goes_between_slices_is_a_transfer_by_way_of_the_host():
  (one,) = line(
    '%send = (f32[256,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, '
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
  )
  assert (one.kind, one.axes, one.bytes) == ('transfer', (hlo.SLICES,), 4 * 256 * 8 * 128)
  assert line('%send = (f32[8], u32[], token[]) send(%x, %t), is_host_transfer=true') == []  # a callback's


def test_a_tpus_fused_sum_and_slice_is_a_reduce_scatter():
  (one,) = line(
    '%r = f32[16,8] all-reduce(%p), replica_groups=[4,4]<=[2,4,2]T(0,2,1), to_apply=%add', 'all-reduce-scatter.3'
  )
  assert (one.kind, one.bytes) == ('reduce-scatter', 16 * 8 * 4 * 3 / 4)


def test_a_joined_collective_of_a_loop_is_of_what_else_is_in_it():
  text = """%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8] multiply(%a, %b), metadata={op_name="jit(run)/jvp(teacher)/while/body/dot_general"}
  %y = f32[8] add(%a, %b), metadata={op_name="jit(run)/jvp(teacher)/while/body/dot_general"}
  %z = f32[8] add(%a, %b), metadata={op_name="jit(run)/other"}
  %r = (f32[8], f32[4]) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %r)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%init), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %s = f32[8] all-reduce(%q), replica_groups={{0,1}}, to_apply=%add
}"""
  inside, top = hlo.Program(text).collectives({'tensor': 2})
  assert inside.source == 'jit(run)/jvp(teacher)/while/body/dot_general' and inside.times == 3
  assert top.source == ''


def test_a_loops_length_is_read_from_its_condition_where_the_compiler_does_not_say_it():
  text = """%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[8]) tuple(%i, %r)
}
%condition (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(24)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8] get-tuple-element(%w), index=1
}"""
  (one,) = hlo.Program(text).collectives({'tensor': 2})
  assert (one.times, one.loop) == (24, 1)
