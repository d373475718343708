import json
import logging
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import TrainingError, UserError
from kdjax.runs import checkpoint as checkpoint_lib
from kdjax.runs.checkpoint import CheckpointDamaged, Checkpoints
from kdjax.runs.checksums import checksums, differ, params_fingerprint
from kdjax.runs.state import TrainState
from kdjax.runtime import sharding
from kdjax.trainer.step import state_shardings
from tests import commands, small

KNOWN = {'data': 'a', 'tokenizer': 'b'}


def make_state(step=0, param_dtype='float32', **fields) -> TrainState:
  """A step's state of random bits: no two values alike, negative zeros and tiny numbers among them."""
  recipe = small.recipe(student=small.model(param_dtype=param_dtype, **fields))
  rng = np.random.default_rng(step)

  def fill(x):
    if x.dtype == np.int32:
      return jnp.asarray(rng.integers(0, 1000, x.shape), jnp.int32)
    value = rng.standard_normal(x.shape) * 10.0 ** rng.integers(-30, 5, x.shape)
    return jnp.asarray(np.where(rng.random(x.shape) < 0.02, -0.0, value), x.dtype)

  return jax.tree.map(fill, small.state(recipe))._replace(step=jnp.asarray(step, jnp.int32))


def place(state, on):
  return jax.device_put(small.host(state), state_shardings(small.recipe(), state, on))


def abstract(state, on=None):
  placed = state_shardings(small.recipe(), state, on or small.mesh())
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed)


def save(folder, *steps, keep=10, on=None, **fields) -> dict[int, TrainState]:
  saves = Checkpoints(folder, keep=keep)
  states = {step: make_state(step, **fields) for step in steps}
  for step, state in states.items():
    saves.save(step, place(state, on or small.mesh()), KNOWN)
  saves.close()
  return states


@pytest.fixture(scope='module')
def three(tmp_path_factory):
  """A folder with steps 2, 4, 6, written once; tests damage copies."""
  folder = tmp_path_factory.mktemp('three') / 'checkpoints'
  return folder, save(folder, 2, 4, 6)


@pytest.fixture
def copy(three, tmp_path):
  folder = tmp_path / 'checkpoints'
  shutil.copytree(three[0], folder)
  return folder


def read(folder, like, **kwargs):
  saves = Checkpoints(folder)
  try:
    return saves.verified(abstract(like, **kwargs), KNOWN)
  finally:
    saves.close()


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_every_leaf_comes_back_bit_for_bit(tmp_path, param_dtype):
  states = save(tmp_path / 'c', 3, param_dtype=param_dtype)
  restored = read(tmp_path / 'c', states[3])
  assert restored.step == 3
  small.assert_identical(small.host(restored.state), small.host(states[3]))
  assert restored.state.params['embed']['embedding'].dtype == param_dtype


def test_a_checkpoint_of_one_mesh_is_read_on_another(tmp_path):
  states = save(tmp_path / 'c', 3, on=small.mesh(2, 2, 2))
  for shape in ((1, 2, 1), (1, 1, 1), (1, 2, 4)):
    restored = read(tmp_path / 'c', states[3], on=small.mesh(*shape))
    small.assert_identical(small.host(restored.state), small.host(states[3]))
    kernel = restored.state.params['blocks']['mlp']['up']['kernel']
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16 // shape[1], 32 // shape[2])


def test_the_weights_alone_are_read_without_the_optimizer(copy, three):
  shutil.rmtree(copy / '6' / 'optimizer')
  saves = Checkpoints(copy, read_only=True)
  params = saves.restore_params(6, abstract(three[1][6]).params)
  small.assert_identical(small.host(params), small.host(three[1][6].params))


def test_a_checkpoint_holds_the_student_and_nothing_else(three):
  saves = Checkpoints(three[0], read_only=True)
  assert saves.steps() == [2, 4, 6]
  assert {p.name for p in (three[0] / '6').iterdir() if p.is_dir()} == {'params', 'optimizer', 'counters', 'meta'}
  leaves = saves.meta(6)['leaves']
  names = {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(three[1][6].params)}
  assert leaves['params'].keys() == names
  assert len(leaves['optimizer']) == 2 * len(names) + 1


# Damage.


def files_of(step: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in step.rglob('*') if p.is_file())


def assert_never_wrong(folder, states, caplog):
  """What is restored is what was written at that step, bit for bit; an older step only with a warning that says why."""
  caplog.clear()
  with caplog.at_level(logging.WARNING, 'kdjax'):
    found = read(folder, states[6])
  small.assert_identical(small.host(found.state), small.host(states[found.step]))
  if found.step != 6:
    assert any(
      r.message.startswith('passing over checkpoint 6') and len(r.message.rpartition(': ')[2]) > 10
      for r in caplog.records
    )
  return found.step


def test_a_bit_flipped_anywhere_is_never_read_in_silence(three, tmp_path, caplog):
  """One bit, in random places of each kind of file of a checkpoint."""
  source, states = three
  rng = np.random.default_rng(0)
  passed_over = 0
  kinds: dict[str, list[pathlib.Path]] = {}
  for path in files_of(source / '6'):
    name = path.relative_to(source / '6')
    kinds.setdefault(f'{name.parts[0]}/{"data" if "d" in name.parts else name.name}', []).append(path)
  assert len(kinds) > 12
  folder = tmp_path / 'checkpoints'
  shutil.copytree(source, folder)
  for kind, paths in kinds.items():
    for _ in range(6 if kind.endswith(('data', 'metadata')) else 2):
      path = folder / paths[rng.integers(len(paths))].relative_to(source)
      good = path.read_bytes()
      if not good:
        continue
      bad = bytearray(good)
      bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
      path.write_bytes(bytes(bad))
      step = assert_never_wrong(folder, states, caplog)
      passed_over += step != 6
      path.write_bytes(good)
  assert passed_over > 10
  assert assert_never_wrong(folder, states, caplog) == 6


@pytest.mark.parametrize('damage', ['truncated', 'emptied', 'removed'])
def test_a_truncated_or_removed_file_is_never_read_in_silence(three, tmp_path, caplog, damage):
  source, states = three
  folder = tmp_path / 'checkpoints'
  shutil.copytree(source, folder)
  passed_over = 0
  for path in files_of(folder / '6'):
    good = path.read_bytes()
    if damage == 'removed':
      path.unlink()
    else:
      path.write_bytes(good[: len(good) // 2] if damage == 'truncated' else b'')
    passed_over += assert_never_wrong(folder, states, caplog) != 6
    path.write_bytes(good)
  assert passed_over > 5


@pytest.mark.parametrize('item', ['params', 'optimizer', 'counters', 'meta'])
def test_a_removed_item_is_walked_back_over(copy, three, caplog, item):
  shutil.rmtree(copy / '6' / item)
  assert assert_never_wrong(copy, three[1], caplog) == 4


def test_weights_rewritten_in_another_dtype_are_walked_back_over(copy, three, tmp_path, caplog):
  import orbax.checkpoint as ocp

  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), three[1][6].params)
  shutil.rmtree(copy / '6' / 'params')
  with ocp.StandardCheckpointer() as writer:
    writer.save(copy / '6' / 'params', narrow)
  assert assert_never_wrong(copy, three[1], caplog) == 4
  assert 'checksum of params/' in caplog.text


def test_a_step_that_was_swapped_for_another_is_walked_back_over(copy, three, caplog):
  shutil.rmtree(copy / '6' / 'params')
  shutil.copytree(copy / '4' / 'params', copy / '6' / 'params')
  assert assert_never_wrong(copy, three[1], caplog) == 4


def test_it_walks_back_as_far_as_it_must(copy, three, caplog):
  for step in (6, 4):
    shutil.rmtree(copy / str(step) / 'params')
  assert assert_never_wrong(copy, three[1], caplog) == 2
  assert [r.message.split(' of ')[0] for r in caplog.records] == [
    'passing over checkpoint 6',
    'passing over checkpoint 4',
  ]


def test_where_none_verifies_it_says_so_and_starts_nothing(copy, three, caplog):
  for step in (2, 4, 6):
    shutil.rmtree(copy / str(step) / 'counters')
  with pytest.raises(CheckpointDamaged, match='none of its checkpoints can be resumed'):
    read(copy, three[1][6])
  for step in (2, 4, 6):
    assert f'passing over checkpoint {step} of' in caplog.text


def test_an_empty_folder_has_no_checkpoint(tmp_path):
  assert read(tmp_path / 'none', make_state()) is None


def test_a_damaged_teacher_is_refused(copy, three):
  (file,) = (copy / '6' / 'meta').glob('metadata')
  file.write_text('{}')
  saves = Checkpoints(copy, read_only=True)
  with pytest.raises(CheckpointDamaged, match='checkpoint 6 is damaged: its metadata is not what was written'):
    saves.restore_params(6, abstract(three[1][6]).params)


SAVE_FOREVER = """
import os
os.environ['JAX_PLATFORMS'] = 'cpu'
import sys
from kdjax.runs.checkpoint import Checkpoints
from tests import small
from tests.runs.test_checkpoint import KNOWN, make_state, place
saves = Checkpoints(sys.argv[1], keep=3)
for step in range(2, 10000, 2):
  saves.save(step, place(make_state(step), small.mesh()), KNOWN)
  print(step, flush=True)
"""


def test_a_kill_in_mid_save_leaves_the_step_before(tmp_path):
  folder = tmp_path / 'checkpoints'
  process = subprocess.Popen(
    [sys.executable, '-c', SAVE_FOREVER, str(folder)], stdout=subprocess.PIPE, text=True, cwd=commands.REPO
  )
  try:
    for _ in range(3):
      process.stdout.readline()
    commands.wait_for(lambda: any('tmp' in p.name for p in folder.iterdir()), process, every=0.0005)
  finally:
    commands.kill(process)
  left = [p.name for p in folder.iterdir()]
  state = make_state()
  saves = Checkpoints(folder, keep=3)
  found = saves.verified(abstract(state), KNOWN)
  assert found.step >= 4
  small.assert_identical(small.host(found.state), small.host(make_state(found.step)))
  # The cut save is swept away, and the step can be saved again.
  cut = found.step + 2
  saves.save(cut, place(make_state(cut), small.mesh()), KNOWN)
  saves.wait()
  saves.close()
  assert read(folder, state).step == cut
  assert not [name for name in (p.name for p in folder.iterdir()) if 'tmp' in name], left


# Another run's checkpoint is sound: it is refused, not walked back over.


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'n_layers': 3}, r'blocks/attn/k/kernel is float32\(2, 16, 16\), the config says float32\(3, 16, 16\)'),
    ({'tied': False}, r'of another architecture: it lacks head/kernel'),
    ({'qk_norm': True}, r'of another architecture: it lacks blocks/attn/k_norm/scale'),
    ({'param_dtype': 'bfloat16'}, r'is float32\(2, 16, 16\), the config says bfloat16'),
  ],
)
def test_another_architecture_or_dtype_is_refused_by_name(copy, fields, message, caplog):
  with pytest.raises(UserError, match=message) as e:
    read(copy, make_state(**fields))
  assert not isinstance(e.value, CheckpointDamaged)
  assert 'passing over' not in caplog.text


@pytest.mark.parametrize(
  ('left', 'right', 'expected'),
  [
    ('2-aa', '2-aa', False),
    ('2-aa', '2-ab', True),
    ('aa', 'ab', True),
    ('aa', '2-ab', False),  # of two versions: nothing is known
    ('aa', None, True),
    ('', '2-aa', True),
    (None, None, False),
  ],
)
def test_fingerprints_of_one_version_show_different_weights(left, right, expected):
  assert differ(left, right) == differ(right, left) == expected


def test_another_fingerprint_is_refused_by_name(copy, three, caplog):
  saves = Checkpoints(copy)
  with pytest.raises(UserError, match=r'checkpoint 6 was written with another data \(a, here z\)') as e:
    saves.verified(abstract(three[1][6]), {**KNOWN, 'data': 'z'})
  assert not isinstance(e.value, CheckpointDamaged)
  assert 'passing over' not in caplog.text


# Which steps stay.


def test_the_newest_and_the_multiples_of_the_period_stay(tmp_path):
  saves = Checkpoints(tmp_path / 'c', keep=2, keep_period=6)
  state = place(make_state(), small.mesh())
  for step in range(2, 15, 2):
    saves.save(step, state, KNOWN)
  saves.wait()
  assert saves.steps() == [6, 12, 14]
  saves.close()


def test_without_a_period_only_the_newest_stay(tmp_path):
  saves = Checkpoints(tmp_path / 'c', keep=1)
  state = place(make_state(), small.mesh())
  for step in (2, 4, 6):
    saves.save(step, state, KNOWN)
  saves.wait()
  assert saves.steps() == [6]
  saves.close()


def test_a_step_saved_again_replaces_a_damaged_one(copy, three):
  (copy / '6' / 'meta' / 'metadata').write_text('{}')
  saves = Checkpoints(copy, keep=10)
  new = make_state(99)._replace(step=jnp.asarray(6, jnp.int32))
  saves.save(6, place(new, small.mesh()), KNOWN)
  saves.close()
  small.assert_identical(small.host(read(copy, new).state), small.host(new))


def test_what_lies_beyond_the_step_gone_on_from_is_set_aside_whole_and_not_counted_as_newest(copy, three):
  files = lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
  before = files(copy / '6')
  saves = Checkpoints(copy, keep=2)
  saves.set_aside_after(2)
  assert saves.steps() == [2]
  assert files(copy / '6.damaged') == before
  state = place(make_state(), small.mesh())
  for step in (3, 4):
    saves.save(step, state, KNOWN)
  saves.wait()
  assert saves.steps() == [3, 4]
  for step in (5, 6):
    saves.save(step, state, KNOWN)
  saves.set_aside_after(5)  # again
  assert saves.steps() == [5] and files(copy / '6.damaged') != before
  saves.close()


def test_a_reader_writes_and_sweeps_nothing(copy, three):
  (copy / '8.orbax-checkpoint-tmp').mkdir()
  before = sorted(str(p) for p in copy.rglob('*'))
  saves = Checkpoints(copy, read_only=True)
  saves.restore_params(6, abstract(three[1][6]).params)
  saves.close()
  assert sorted(str(p) for p in copy.rglob('*')) == before


# Checksums.


def test_checksums_do_not_depend_on_the_mesh():
  state = make_state()
  expected = checksums(state)
  for shape in ((1, 8, 1), (2, 2, 2), (1, 2, 4)):
    assert checksums(place(state, small.mesh(*shape))) == expected


def checksum(x, version=checkpoint_lib.FORMAT) -> int:
  return checksums({'x': jnp.asarray(x)}, version)['x']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8'])
def test_checksums_see_every_flipped_bit(dtype):
  rng = np.random.default_rng(0)
  x = np.asarray(jnp.asarray(rng.permutation(35).reshape(5, 7)).astype(dtype))
  known = checksum(x)
  for _ in range(40):
    flipped = np.ascontiguousarray(x).view(np.uint8).copy()
    flipped.flat[rng.integers(flipped.size)] ^= 1 << rng.integers(8)
    assert checksum(flipped.view(x.dtype).reshape(x.shape)) != known


def signs(x, rng):
  """Flip the signs of an even number of elements."""
  at = rng.choice(x.size, 2 * rng.integers(1, 50), replace=False)
  x.flat[at] = -x.flat[at]


def row_signs(x, rng):
  row = rng.integers(len(x))
  x[row] = -x[row]


def swapped_elements(x, rng):
  i, j = rng.choice(x.size, 2, replace=False)
  x.flat[[i, j]] = x.flat[[j, i]]


def swapped_rows(x, rng):
  i, j = rng.choice(len(x), 2, replace=False)
  x[[i, j]] = x[[j, i]]


def swapped_blocks(x, rng):
  """Two blocks of memory, whose places differ by a power of two."""
  size = 2 ** rng.integers(2, 8)
  i, j = rng.choice(x.size // size, 2, replace=False) * size
  flat = x.reshape(-1)
  flat[i : i + size], flat[j : j + size] = flat[j : j + size].copy(), flat[i : i + size].copy()


def permuted(x, rng):
  x[:] = x[rng.permutation(len(x))]


def permuted_columns(x, rng):
  x[:] = x[:, rng.permutation(x.shape[1])]


def zeroed(x, rng):
  size = 2 ** rng.integers(2, 8)
  start = rng.integers(x.size - size)
  x.reshape(-1)[start : start + size] = 0


def shifted(x, rng):
  x[:] = np.roll(x.reshape(-1), rng.integers(1, x.size)).reshape(x.shape)


def pairs_of_bits(x, rng):
  """Flip the same bit of an even number of elements."""
  bits = x.view(f'u{x.itemsize}').reshape(-1)
  bits[rng.choice(bits.size, 2 * rng.integers(1, 5), replace=False)] ^= bits.dtype.type(
    1 << rng.integers(8 * x.itemsize)
  )


DAMAGES = [
  signs, row_signs, swapped_elements, swapped_rows, swapped_blocks, permuted, permuted_columns, zeroed, shifted, pairs_of_bits,
]  # fmt: skip


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16 in float32', 'bfloat16'])
def test_checksums_see_every_random_damage(damage, dtype):
  """340 of each kind and dtype, 10,200 in all. Weights that came from bfloat16 have 16 bits of zeros."""
  rng = np.random.default_rng([DAMAGES.index(damage), len(dtype)])
  x = rng.standard_normal((48, 64)).astype(np.float32)
  if 'bfloat16' in dtype:
    x = np.asarray(jnp.asarray(x, jnp.bfloat16).astype(dtype.rpartition(' ')[2]))
  known = checksum(x)
  for _ in range(340):
    y = x.copy()
    damage(y, rng)
    assert y.tobytes() != x.tobytes() and checksum(y) != known


def test_the_sum_of_format_1_misses_two_signs_and_a_negated_array():
  """Why there is a format 2."""
  x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
  two = x.copy()
  two[0, 1], two[3, 2] = -two[0, 1], -two[3, 2]
  for y in (-x, two):
    assert checksum(y, 1) == checksum(x, 1) and checksum(y) != checksum(x)


def test_the_checksum_of_a_position_does_not_depend_on_the_machine():
  """A stored checksum is compared with one that another version of JAX computes: NumPy's 64-bit integers as the reference."""
  x = np.random.default_rng(1).standard_normal((3, 4, 5)).astype(np.float32)

  def mix(h):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      h = (h ^ (h >> shift)) * factor % 2**32
    return h ^ (h >> 16)

  total = 0
  for index in np.ndindex(*x.shape):
    position = sum(mix((i + (axis + 1) * 0x9E3779B9) % 2**32) for axis, i in enumerate(index)) % 2**32
    total += mix(int(x[index].view(np.uint32)) ^ position)
  assert checksum(x) == total % 2**32


def write_format_1(monkeypatch, folder, *steps):
  """A folder as older versions wrote it."""
  monkeypatch.setattr(checkpoint_lib, 'FORMAT', 1)
  monkeypatch.setattr(checkpoint_lib.checksums, '__defaults__', (1,))
  states = save(folder, *steps)
  monkeypatch.undo()
  return states


def test_a_checkpoint_of_format_1_is_read_and_says_so(tmp_path, monkeypatch, caplog):
  states = write_format_1(monkeypatch, tmp_path / 'c', 2, 4)
  caplog.set_level(logging.INFO)
  found = read(tmp_path / 'c', states[4])
  assert found.step == 4
  small.assert_identical(small.host(found.state), small.host(states[4]))
  assert 'checkpoint 4 has checksums of format 1' in caplog.text
  saves = Checkpoints(tmp_path / 'c', read_only=True)
  old = saves.fingerprint(4)
  assert old == params_fingerprint(states[4].params, like=old) != params_fingerprint(states[4].params)
  saves.close()


def test_a_flipped_bit_in_a_checkpoint_of_format_1_is_walked_back_over(tmp_path, monkeypatch, caplog):
  states = write_format_1(monkeypatch, tmp_path / 'c', 2, 4)
  largest = max(files_of(tmp_path / 'c' / '4' / 'params'), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(bytes(data))
  assert read(tmp_path / 'c', states[4]).step == 2


def test_a_checkpoint_of_a_newer_format_is_refused(copy, three, monkeypatch):
  monkeypatch.setattr(checkpoint_lib, 'FORMAT', 1)
  with pytest.raises(UserError, match=r'a newer kdjax wrote checkpoint 6 \(format 2\); update kdjax'):
    read(copy, three[1][6])


def test_a_copy_under_another_step_is_walked_back_over(copy, three, caplog):
  shutil.copytree(copy / '4', copy / '11')
  found = read(copy, three[1][6])
  assert found.step == 6
  assert 'passing over checkpoint 11' in caplog.text and 'a copy of checkpoint 4 under another name' in caplog.text
  saves = Checkpoints(copy, read_only=True)
  for work in (lambda: saves.restore_params(11, abstract(three[1][4]).params), lambda: saves.fingerprint(11)):
    with pytest.raises(CheckpointDamaged, match='a copy of checkpoint 4'):
      work()
  saves.close()


def test_a_state_of_another_step_is_walked_back_over(tmp_path, caplog):
  """The metadata are of the folder's step, and the state is not."""
  states = {step: make_state(step) for step in (2, 4)}
  saves = Checkpoints(tmp_path / 'c', keep=10)
  for step, state in states.items():
    saves.save(step, place(state._replace(step=jnp.asarray(2, jnp.int32)), small.mesh()), KNOWN)
  saves.close()
  assert read(tmp_path / 'c', states[2]).step == 2
  assert 'its state is of step 2' in caplog.text


def test_negative_zero_is_not_zero():
  assert checksums({'x': jnp.zeros(3)}) != checksums({'x': -jnp.zeros(3)})


def test_a_fingerprint_is_of_the_weights():
  params = make_state().params
  assert params_fingerprint(params) == params_fingerprint(jax.tree.map(jnp.array, params))
  moved = jax.tree.map(jnp.array, params)
  moved['embed']['embedding'] = moved['embed']['embedding'].at[3, 1].add(1e-3)
  assert params_fingerprint(params) != params_fingerprint(moved)


def test_the_metadata_is_sealed():
  meta = json.loads(json.dumps(checkpoint_lib._sealed({'step': 3, 'leaves': {'params': {'w': ['float32', [2], 17]}}})))
  assert checkpoint_lib._unsealed(dict(meta))['step'] == 3
  meta['leaves']['params']['w'][2] = 18
  with pytest.raises(CheckpointDamaged):
    checkpoint_lib._unsealed(meta)


# A full disk.

FILL = """
import os
os.environ['JAX_PLATFORMS'] = 'cpu'
import resource, signal, sys
from kdjax import cli
from kdjax.runs.checkpoint import Checkpoints
from tests import small
from tests.runs.test_checkpoint import KNOWN, make_state, place
with cli.user_errors():
  saves = Checkpoints(sys.argv[1], keep=3)
  saves.save(2, place(make_state(2), small.mesh()), KNOWN)
  saves.wait()
  print('first', flush=True)
  {limit}
  for step in range(4, 40, 2):
    saves.save(step, place(make_state(step, n_layers={layers}), small.mesh()), KNOWN)
  saves.close()
  print('not full')
"""


def assert_full(process, folder):
  out, err = process.communicate(timeout=120)
  assert out == 'first\n', err
  (line,) = err.splitlines()
  assert line.startswith(f'error: {folder}: a checkpoint could not be written')
  assert 'free some disk space and run the same command again' in line
  assert process.returncode == 1


def fill(folder, limit='pass', layers=2):
  return subprocess.Popen(
    [sys.executable, '-c', FILL.format(limit=limit, layers=layers), str(folder)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=commands.REPO,
  )


def test_a_file_that_may_not_grow_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(tmp_path):
  limit = 'resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))'
  assert_full(fill(tmp_path / 'c', limit, layers=8), tmp_path / 'c')
  state = make_state(2)
  found = read(tmp_path / 'c', state)
  assert found.step == 2
  small.assert_identical(small.host(found.state), small.host(state))


@pytest.fixture
def small_disk(tmp_path):
  yield from commands.small_disk(tmp_path / 'disk', '700k')


def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(small_disk):
  folder = small_disk / 'c'
  assert_full(fill(folder, layers=24), folder)
  state = make_state(2)
  found = read(folder, state)
  assert found.step == 2
  small.assert_identical(small.host(found.state), small.host(state))


def test_a_save_that_fails_is_told_by_the_next_one(tmp_path, monkeypatch):
  saves = Checkpoints(tmp_path / 'c')
  monkeypatch.setattr(saves._manager, 'save', lambda *a, **k: (_ for _ in ()).throw(OSError(28, 'No space left')))
  with pytest.raises(TrainingError, match=r'could not be written .*free some disk space'):
    saves.save(2, place(make_state(), small.mesh()), KNOWN)
  saves.close()


@pytest.mark.parametrize(('minutes', 'left'), [(0, [8]), (60, [2, 8]), (1e-6, [2, 4, 6, 8])])
def test_checkpoints_so_far_apart_in_time_stay(tmp_path, minutes, left):
  saves = Checkpoints(tmp_path / 'c', keep=1, keep_minutes=minutes)
  state = place(make_state(), small.mesh())
  for step in (2, 4, 6, 8):
    saves.save(step, state, KNOWN)
  saves.wait()
  assert saves.steps() == left
  saves.close()
