import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kdjax.config import MeshConfig, TeacherConfig, fields
from kdjax.errors import UserError
from kdjax.runtime import sharding
from tests import small


@pytest.mark.parametrize('fields', [{}, {'tied': False}, {'qk_norm': True}, {'tied': False, 'qk_norm': True}])
def test_every_parameter_of_every_kind_of_model_has_a_rule(fields):
  on = small.mesh(2, 2, 2)
  specs = sharding.param_shardings(small.model(**fields).abstract(), on)
  for path, leaf in jax.tree_util.tree_leaves_with_path(specs):
    name = sharding.path_name(path)
    assert (leaf.spec == P()) == name.endswith('scale'), name


@pytest.mark.parametrize('layout', sharding.LAYOUTS)
def test_a_layout_cuts_each_matrix_once_or_not_at_all(layout):
  on = small.mesh(2, 2, 2)
  params = small.model(32).abstract()
  for path, leaf in jax.tree_util.tree_leaves_with_path(sharding.param_shardings(params, on, layout)):
    name = sharding.path_name(path)
    axes = [axis for dim in leaf.spec for axis in ((dim,) if isinstance(dim, str) else dim or ())]
    assert sorted(axes) == ([] if name.endswith('scale') or layout == 'replicated' else ['fsdp', 'tensor']), name


def test_a_layout_that_the_mesh_does_not_divide_is_refused_by_both_axes():
  params = {'embed': {'embedding': jax.ShapeDtypeStruct((40, 12), 'float32')}}
  with pytest.raises(UserError, match=r'fsdp x tensor = 8 does not divide 12 of embed/embedding'):
    sharding.param_shardings(params, small.mesh(1, 4, 2), 'fsdp')


def test_the_configs_layouts_are_those_that_there_are():
  assert fields.choices(TeacherConfig, 'layout') == sharding.LAYOUTS


def test_a_parameter_that_no_rule_matches_is_refused_by_name():
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, 'float32')
  params = {'blocks': {'attn': {'q': {'kernel': leaf(2, 16, 32), 'gate': leaf(2, 16)}}}}
  with pytest.raises(UserError, match=r'blocks/attn/q/gate \(2, 16\)'):
    sharding.param_shardings(params, small.mesh())


def test_a_rule_matches_the_whole_name():
  params = {'other': {'embed': {'embedding': jax.ShapeDtypeStruct((40, 16), 'float32')}}}
  with pytest.raises(UserError, match='other/embed/embedding'):
    sharding.param_shardings(params, small.mesh())


def test_a_dimension_that_the_mesh_does_not_divide_is_refused_by_name():
  with pytest.raises(UserError, match=r'fsdp = 8 does not divide 12 of embed/embedding.*--config\.mesh\.fsdp'):
    sharding.param_shardings({'embed': {'embedding': jax.ShapeDtypeStruct((40, 12), 'float32')}}, small.mesh(1, 8, 1))


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 2, 1), (4, 2, 1)), ((1, 1, 8), (1, 1, 8))],
)
def test_one_axis_takes_the_devices_that_are_left(shape, expected):
  on = sharding.make_mesh(MeshConfig(*shape))
  assert tuple(on.shape.values()) == expected
  assert set(on.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize('shape', [(1, 3, 1), (3, -1, 1), (1, 1, 1), (2, 8, 1), (16, -1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(shape):
  with pytest.raises(UserError, match='8 devices'):
    sharding.make_mesh(MeshConfig(*shape))


def test_hidden_states_keep_their_rows_apart():
  with jax.set_mesh(small.mesh(2, 2, 2)):
    rows = jax.jit(sharding.constrain)(jax.numpy.zeros((8, 4, 16)))
  assert rows.sharding.shard_shape(rows.shape) == (2, 4, 16)


def test_one_device_needs_no_constraint():
  assert sharding.mesh_in_use() is None
  with jax.set_mesh(small.mesh()):
    assert sharding.mesh_in_use() is None
  with jax.set_mesh(small.mesh(1, 2, 1)):
    assert sharding.mesh_in_use() is not None


class _Slice:
  """A device of one of several slices, as far as the arrangement of a mesh looks at it."""

  platform, device_kind, process_index = 'cpu', 'cpu', 0

  def __init__(self, index: int, slice_index: int):
    self.id, self.slice_index = index, slice_index


@pytest.mark.parametrize(('shape', 'axis'), [((2, 4, 1), 0), ((1, 8, 1), 1), ((4, 1, 2), 0), ((2, 2, 2), 0)])
def test_slices_lie_along_a_data_parallel_axis(shape, axis):
  devices = [_Slice(i, i // 4) for i in range(8)]
  arranged = sharding._arranged(shape, devices)
  assert arranged.shape == shape
  assert sorted(d.id for d in arranged.flat) == list(range(8))
  halves = np.split(arranged, 2, axis)
  assert [{d.slice_index for d in half.flat} for half in halves] == [{0}, {1}]


def test_a_mesh_whose_tensor_axis_would_cross_slices_is_refused():
  with pytest.raises(UserError, match=r'is a multiple of the 2 slices; set --config\.mesh\.replica=2'):
    sharding._arranged((1, 1, 8), [_Slice(i, i // 4) for i in range(8)])
