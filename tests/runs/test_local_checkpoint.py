"""Local checkpoints: what they save a run that was cut off, from which it may go on, from which it must not."""

import contextlib
import errno
import json
import logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from kdjax.errors import UserError
from kdjax.runs import local_checkpoint
from kdjax.runs.local_checkpoint import LocalCheckpoints
from kdjax.runtime import sharding
from kdjax.trainer.step import state_shardings
from tests import commands, several, small
from tests.cohorts import assert_same_runs, at_step, fit, students

RESUMES = 'resumes from the local checkpoint of step'


class Crash(Exception):
  pass


@pytest.fixture
def fields(tmp_path):
  return {'checkpoint.every': 5, 'checkpoint.local': str(tmp_path / 'local'), 'checkpoint.local_every': 2}


@pytest.fixture
def cut_off(home, tmp_path, fields, monkeypatch):
  """A run that went down in its tenth step: its folder has a checkpoint of step 5, and local ones are there of 6 and 8."""

  go_down(home, tmp_path / 'r', fields, monkeypatch, 9)
  assert steps(tmp_path) == [6, 8]
  return tmp_path / 'r'


def go_down(home, folder, fields, monkeypatch, step):
  def down():
    raise Crash

  with at_step(monkeypatch, step, down), pytest.raises(Crash):
    fit(home, folder, **fields)


def steps(home):
  return sorted(int(path.stem) for path in (home / 'local').glob('*/0/*'))


def file_of(home, step):
  (file,) = (home / 'local').glob(f'*/0/{step}.safetensors')
  return file


def go_on(caplog, *args, **fields):
  with caplog.at_level(logging.INFO, 'kdjax'):
    fit(*args, **fields)
  return caplog.text


def test_a_run_goes_on_from_its_newest_local_checkpoint_bit_identically(
  home, undisturbed, cut_off, fields, caplog, tmp_path
):
  told = go_on(caplog, home, cut_off, **fields)
  assert f'{RESUMES} 8' in told
  assert_same_runs(cut_off, undisturbed)
  assert not list((tmp_path / 'local').iterdir())  # a run that is done leaves none


def test_a_checkpoint_of_the_folder_is_gone_on_from_where_it_is_newer(
  home, undisturbed, cut_off, fields, caplog, tmp_path
):
  for step in (6, 8):
    path = file_of(tmp_path, step)
    path.rename(path.with_stem(str(step - 4)))
  assert RESUMES not in go_on(caplog, home, cut_off, **fields)
  assert_same_runs(cut_off, undisturbed)


def cut(content: bytes) -> bytes:
  return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
  where = len(content) * 3 // 4
  return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


def other_names(content: bytes) -> bytes:
  return re.sub(rb'"1(_\d+)+"', lambda m: m[0].replace(b'1', b'7', 1), content)


def other_shapes(content: bytes) -> bytes:
  return re.sub(rb'"shape":\[(\d+),(\d\d)\]', rb'"shape":[\2,\1]', content)


def no_checksums(content: bytes) -> bytes:
  return content.replace(b'"checksums"', b'"checkmums"')


DAMAGE = [
  cut,
  flipped,
  other_names,
  other_shapes,
  no_checksums,
  lambda content: b'',
  lambda content: b'\xff' * len(content),
]


@pytest.mark.parametrize('damage', DAMAGE)
def test_one_that_is_damaged_is_passed_over(home, undisturbed, cut_off, fields, caplog, tmp_path, damage):
  file = file_of(tmp_path, 8)
  damaged = damage(file.read_bytes())
  assert damaged != file.read_bytes()
  file.write_bytes(damaged)
  told = go_on(caplog, home, cut_off, **fields)
  assert f'{RESUMES} 6' in told
  assert 'passing over local checkpoint 8' in told
  assert_same_runs(cut_off, undisturbed)


def test_those_of_a_run_that_was_deleted_are_not_gone_on_from(home, undisturbed, cut_off, fields, caplog):
  shutil.rmtree(cut_off)
  assert RESUMES not in go_on(caplog, home, cut_off, **fields)
  assert_same_runs(cut_off, undisturbed)


def test_those_of_a_run_that_was_deleted_and_begun_again_are_not_gone_on_from(
  home, undisturbed, cut_off, fields, caplog, tmp_path, monkeypatch
):
  old = file_of(tmp_path, 8).read_bytes()
  shutil.rmtree(cut_off)
  go_down(home, cut_off, fields, monkeypatch, 9)
  file_of(tmp_path, 8).write_bytes(old)  # of a host that was not there meanwhile
  assert f'{RESUMES} 6' in go_on(caplog, home, cut_off, **fields)
  assert_same_runs(cut_off, undisturbed)


def test_no_step_is_missing_from_the_metrics(home, undisturbed, cut_off, fields, caplog):
  metrics = students(cut_off)[1] / 'metrics.jsonl'  # as a start without that host has left it
  metrics.write_text(''.join(metrics.read_text().splitlines(keepends=True)[:7]))
  assert f'{RESUMES} 6' in go_on(caplog, home, cut_off, **fields)
  assert_same_runs(cut_off, undisturbed)


def test_where_the_folder_s_newest_is_damaged_the_local_ones_before_it_are_tried(
  home, undisturbed, fields, caplog, tmp_path, monkeypatch
):
  go_down(home, tmp_path / 'r', fields, monkeypatch, 11)
  assert steps(tmp_path) == [6, 8]
  for student in students(tmp_path / 'r'):
    shutil.rmtree(student / 'checkpoints' / '10' / 'params')
  told = go_on(caplog, home, tmp_path / 'r', **fields)
  assert 'passing over checkpoint 10' in told and f'{RESUMES} 8' in told
  assert_same_runs(tmp_path / 'r', undisturbed)


def test_rates_are_told_where_every_call_ends_with_a_local_checkpoint(home, tmp_path, fields):
  fit(home, tmp_path / 'r', **fields)
  lines = [json.loads(line) for line in (students(tmp_path / 'r')[0] / 'metrics.jsonl').read_text().splitlines()]
  assert sum('tokens_per_second' in line for line in lines) >= len(lines) // 3


def test_without_local_checkpoints_the_folder_s_is_gone_on_from(home, undisturbed, cut_off, caplog):
  assert RESUMES not in go_on(caplog, home, cut_off)
  assert_same_runs(cut_off, undisturbed)


def test_a_full_disk_is_told_and_does_not_end_the_run(home, undisturbed, fields, caplog, tmp_path, monkeypatch):
  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(local_checkpoint.safetensors.numpy, 'save_file', full)
  told = go_on(caplog, home, tmp_path / 'r', **fields)
  assert 'a local checkpoint could not be written' in told and 'No space left on device' in told
  assert_same_runs(tmp_path / 'r', undisturbed)


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(home, tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(
    UserError, match=r'checkpoint.local: .*/file/.* cannot be written .*; name a folder of each host'
  ) as e:
    fit(home, tmp_path / 'r', **{'checkpoint.local': str(tmp_path / 'file'), 'checkpoint.local_every': 2})
  assert '\n' not in str(e.value)


def placed_state(mesh):
  """(a state on the mesh, the shapes of it)."""
  recipe = small.recipe()
  state = small.state(recipe)
  state = jax.device_put(state, state_shardings(recipe, state, mesh))
  return (state,), jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state,))


def numbered(states, step: int):
  """The states as they would be after so many steps, as far as a checkpoint checks it."""
  return tuple(state._replace(step=jax.device_put(np.int32(step), state.step.sharding)) for state in states)


def test_each_part_is_written_once_and_comes_back_where_it_was(tmp_path):
  states, abstract = placed_state(small.mesh(2, 2, 2))
  saves = LocalCheckpoints(tmp_path, abstract, 'run')
  for step in (1, 2, 3):
    saves.save(step, numbered(states, step))
  saves.close()
  states = numbered(states, 3)
  saves = LocalCheckpoints(tmp_path, abstract, 'run')
  found, step = saves.restore(0, 9)
  assert step == 3
  small.assert_identical(small.host(found), small.host(states))
  assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(states), strict=True))
  n_numbers = sum(x.size for x in jax.tree.leaves(states))
  assert sum(x.size for x in local_checkpoint._parts(states).values()) == n_numbers
  assert saves.restore(3, 9) is None and saves.restore(0, 1) is None
  assert saves.restore(0, 2)[1] == 2
  saves.forget_all_but(2)
  assert saves.steps() == [2] and saves.restore(0, 9)[1] == 2
  saves.clear()
  assert not tmp_path.exists() or not list(tmp_path.iterdir())
  saves.close()


def test_what_is_left_of_processes_that_are_elsewhere_now_goes_once_all_have_written_newer(tmp_path):
  states, abstract = placed_state(small.mesh(2, 2, 2))
  left = tmp_path / '1'
  left.mkdir()
  for name in ('3.safetensors', '9.safetensors', '.0.9.safetensors'):
    (left / name).touch()
  saves = LocalCheckpoints(tmp_path, abstract, 'run')
  names = lambda: sorted(path.name for path in left.iterdir())
  assert names() == ['3.safetensors', '9.safetensors']  # what was cut off is gone
  saves.forget_all_but(3)
  saves.save(6, states)
  saves.wait()
  assert names() == ['3.safetensors']  # of another process the save may have been cut off
  saves.save(7, states)
  saves.close()
  assert names() == [] and saves.steps() == [6, 7]


def test_where_one_could_not_be_written_the_one_before_stays(tmp_path, monkeypatch):
  states, abstract = placed_state(small.mesh(2, 2, 2))
  saves = LocalCheckpoints(tmp_path, abstract, 'run')
  saves.save(1, states)
  saves.save(2, states)
  wait = saves.wait
  with monkeypatch.context() as m:
    m.setattr(saves, 'wait', lambda: wait() and False)  # as of another process
    saves.save(3, states)
    saves.save(4, states)
  saves.close()
  assert saves.steps() == [1, 4]


@pytest.mark.parametrize(('number', 'raised'), [(errno.ENOSPC, False), (errno.EACCES, True)])
def test_a_disk_that_is_full_at_the_start_is_told_and_does_not_end_the_run(
  tmp_path, monkeypatch, caplog, number, raised
):
  def broken(**kwargs):
    raise OSError(number, 'trouble')

  monkeypatch.setattr(local_checkpoint.tempfile, 'TemporaryFile', broken)
  abstract = placed_state(small.mesh())[1]
  with pytest.raises(UserError, match='trouble') if raised else contextlib.nullcontext():
    LocalCheckpoints(tmp_path, abstract, 'run').close()
  assert raised or 'cannot be written (trouble)' in caplog.text


def test_parts_that_are_not_of_one_start_are_not_put_together(tmp_path, monkeypatch, caplog):
  states, abstract = placed_state(small.mesh())
  saves = LocalCheckpoints(tmp_path, abstract, 'run')
  saves.save(1, states)
  saves.wait()
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(local_checkpoint, '_of_each', lambda value: np.asarray(two(value)))
  two = lambda value: [value, value + (1 if value.dtype == np.uint32 else 0)]  # the other's checksums are others
  monkeypatch.setattr(local_checkpoint, '_gives', lambda has: [0, 1])
  assert saves._restored(1, {0}) is None
  assert 'its parts are not of one start' in caplog.text
  monkeypatch.undo()
  saves.close()


def test_where_the_config_leaves_no_room_for_any_it_is_told(home, tmp_path, fields, caplog):
  told = go_on(caplog, home, tmp_path / 'r', **fields | {'checkpoint.every': 0, 'checkpoint.local_every': 500})
  assert 'no local checkpoint is written: of 12 steps every 500, where the folder has one every 1' in told


def test_the_order_of_an_array_in_memory_is_not_the_file_s(tmp_path):
  on = jax.NamedSharding(small.mesh(1, 2, 1), jax.P('fsdp'))
  wanted = np.arange(32.0, dtype=np.float32).reshape(4, 8)
  matrix = jax.device_put(wanted, Format(Layout((1, 0)), on))
  assert not np.asarray(matrix.addressable_shards[0].data).flags.c_contiguous
  (state,), (abstract,) = placed_state(small.mesh(1, 2, 1))
  state = state._replace(params={'matrix': matrix})
  abstract = abstract._replace(params={'matrix': jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=on)})
  saves = LocalCheckpoints(tmp_path, (abstract,), 'run')
  saves.save(1, numbered([state], 1))
  saves.wait()
  small.assert_identical(small.host(saves.restore(0, 1)[0][0].params['matrix']), wanted)
  saves.close()


@pytest.mark.parametrize(('identity', 'shape'), [('another', (2, 2, 2)), ('run', (1, 8, 1)), ('run', (1, 1, 1))])
def test_those_of_another_run_or_mesh_are_not_gone_on_from(tmp_path, identity, shape):
  states, abstract = placed_state(small.mesh(2, 2, 2))
  saves = LocalCheckpoints(tmp_path, abstract, 'run')
  saves.save(1, states)
  saves.close()
  saves = LocalCheckpoints(tmp_path, placed_state(small.mesh(*shape))[1], identity)
  assert saves.restore(0, 9) is None
  saves.close()


@pytest.mark.parametrize('moved', [False, True])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8])
@pytest.mark.parametrize('spec', [jax.P(), jax.P('fsdp'), jax.P(None, ('fsdp', 'tensor')), jax.P('tensor', 'fsdp')])
def test_what_one_device_of_a_group_gives_all_of_it_have_bit_for_bit(dtype, spec, moved):
  mesh = small.mesh(2, 2, 2)
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 256, (4, 8, jnp.dtype(dtype).itemsize), np.uint8)  # -0.0, infinities and NaNs of any payload
  wanted = np.ascontiguousarray(bits).view(dtype)[..., 0]
  wanted[0, 0] = -0.0
  on = jax.NamedSharding(mesh, spec)
  devices, places = list(mesh.devices.flat), on.devices_indices_map(wanted.shape)
  groups = {}
  for place, device in enumerate(devices):
    groups.setdefault(str(places[device]), []).append(place)
  givers = {group[rng.integers(len(group))] for group in groups.values()}
  to = rng.permutation(len(devices)) if moved else np.arange(len(devices))
  zeros = np.zeros(on.shard_shape(wanted.shape), dtype)
  blocks = [wanted[places[devices[place]]] if place in givers else zeros for place in to]
  stack = jax.device_put(np.stack(blocks), jax.NamedSharding(mesh, jax.P(sharding.AXES)))
  moves = tuple((i, int(place)) for i, place in enumerate(to) if place in givers) if moved else ()
  got = jax.jit(lambda x: local_checkpoint._sum_of_given(x, on, moves), out_shardings=on)(stack)
  assert np.asarray(got).tobytes() == wanted.tobytes()
  for shard in got.addressable_shards:
    assert np.asarray(shard.data).tobytes() == wanted[shard.index].tobytes()


@pytest.mark.parametrize(
  ('has', 'gives'),
  [
    (['100', '010', '001'], [0, 1, 2]),
    (['010', '001', '100'], [1, 2, 0]),  # all elsewhere than before
    (['111', '111', '111'], [0, 1, 2]),  # a folder that all see
    (['011', '011', '000'], [2, 1, None]),
    (['000', '000', '001'], [None, None, 2]),
    (['010', '010', '000'], [None, 1, None]),
  ],
)
def test_each_process_gives_what_its_host_has_its_own_before_others(has, gives):
  assert local_checkpoint._gives(np.asarray([[x == '1' for x in row] for row in has])) == gives


def start(n, config, workdir, *hosts):
  """So many processes, each on a host of its own: those of a list of folders."""
  return several.start(n, config, workdir, each=[[f'--config.checkpoint.local={host}'] for host in hosts])


def begun(home, folder, n, **fields):
  """(config, workdir, hosts) of an experiment that was killed past several local checkpoints and one of the folder's."""
  shared = {'student.tokens': 60 * 8 * 16, 'heartbeat_timeout': 10, 'checkpoint.every': 20}
  local_ = {'checkpoint.local': str(folder / 'host'), 'checkpoint.local_every': 3}
  config, workdir = several.experiment(home, folder, **several.LONG | shared | local_ | fields)
  hosts = [folder / f'host{process}' for process in range(n)]
  processes = start(n, config, workdir, *hosts)
  commands.wait_for(lambda: several.lines(workdir) >= 28, processes[0], timeout=300)
  for process in processes:
    commands.kill(process)
  commands.finish(*processes, timeout=60)
  return config, workdir, hosts


CASES = [
  (2, {'mesh.replica': 2, 'mesh.fsdp': 1}, [1], [0, 1], True),  # a replica has lost its disk
  pytest.param(
    4, {'mesh.replica': 2, 'mesh.fsdp': 2}, [0, 3], [0, 1, 2, 3], True, marks=pytest.mark.slow
  ),  # half of each
  pytest.param(
    4, {'mesh.replica': 2, 'mesh.fsdp': 2}, [1, 3], [0, 1, 2, 3], False, marks=pytest.mark.slow
  ),  # of both the same
  pytest.param(2, {'mesh.replica': 1, 'mesh.fsdp': 2}, [1], [0, 1], False, marks=pytest.mark.slow),
  pytest.param(2, {'mesh.replica': 1, 'mesh.fsdp': 2}, [], [0, 1], True, marks=pytest.mark.slow),
  pytest.param(
    2, {'mesh.replica': 1, 'mesh.fsdp': 2}, [], [1, 0], True, marks=pytest.mark.slow
  ),  # elsewhere than before
  pytest.param(4, {'mesh.replica': 2, 'mesh.fsdp': 2}, [0, 3], [1, 3, 0, 2], True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(('n', 'mesh', 'lost', 'placed', 'whole'), CASES)
def test_several_processes_go_on_from_what_is_left_of_their_local_checkpoints(
  home, tmp_path, n, mesh, lost, placed, whole
):
  config, workdir, hosts = begun(home, tmp_path / 'e', n, **mesh)
  for process in lost:
    shutil.rmtree(hosts[process])
  processes = start(n, config, workdir, *(hosts[host] for host in placed))
  several.done(*processes)
  told = commands.errors(processes[0])
  assert (RESUMES in told) == whole
  assert whole or 'is on no host here' in told
  undisturbed, _ = several.experiment(home, tmp_path / 'u', **several.LONG | {'student.tokens': 60 * 8 * 16, **mesh})
  several.done(*several.start(n, undisturbed, tmp_path / 'u' / 'run'))
  for one, other in zip(
    *(several.trained(each, several.LONG['student.arms']) for each in (workdir, tmp_path / 'u' / 'run')), strict=True
  ):
    assert commands.leaves(one) == commands.leaves(other)
    assert commands.metrics(one) == commands.metrics(other)
  assert not list((tmp_path / 'e').glob('host*/*/*/*'))
