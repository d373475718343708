"""Several devices and several processes: the same data, the same losses to float tolerance, and no hang when one of them fails."""

import json
import subprocess
import sys

import numpy as np
import pytest

from kdjax import train
from kdjax.cli import load_config
from kdjax.data.batches import BatchStream, Windows
from kdjax.data.corpus import prepare
from kdjax.errors import UserError
from kdjax.runtime import distributed
from tests import commands, several

ARMS = ('baseline', 'distilled', 'unigram')


@pytest.fixture(scope='module')
def alone(home, tmp_path_factory):
  """The experiment in one process on one device."""
  config, workdir = several.experiment(home, tmp_path_factory.mktemp('alone') / 'e')
  several.done(commands.start(config, workdir))
  return workdir


ROWS_OF_A_PROCESS = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from kdjax.runtime import sharding
from kdjax.cli import load_config
from kdjax.config import MeshConfig
from kdjax.data.batches import BatchStream, Windows, local_rows, to_global
from kdjax.data.corpus import prepare
port, process, file, out = sys.argv[1:]
jax.distributed.initialize(f'127.0.0.1:{port}', 2, int(process))
config = load_config(file)
corpus = prepare(config.data, config.eval, config.runs, progress=False)
stream = BatchStream(Windows(corpus.train, config.data.seq_len), 8, 43)
for shape in ((1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)):
  mesh = sharding.make_mesh(MeshConfig(*shape))
  rows = local_rows(NamedSharding(mesh, P(sharding.BATCH_AXES)), 8)
  plan = [(0, 3), (3, 2)]
  parts = []
  for local in stream.iterate(plan, 3, rows, 2, 2):
    batch = to_global(local, rows, NamedSharding(mesh, P(None, sharding.BATCH_AXES)), 8)
    parts.append({k: [[s.index[1].indices(8)[:2], np.asarray(s.data).tolist()] for s in v.addressable_shards] for k, v in batch.items()})
  json.dump(parts, open(f'{out}/{"x".join(map(str, shape))}-{process}.json', 'w'))
"""


def test_every_process_reads_the_rows_that_one_process_would(home, tmp_path):
  config, _ = several.experiment(home, tmp_path / 'e')
  port = commands.free_port()
  both = [
    subprocess.Popen(
      [sys.executable, '-c', ROWS_OF_A_PROCESS, str(port), str(i), str(config), str(tmp_path)],
      env=commands.environment(devices=2),
    )
    for i in range(2)
  ]
  try:
    assert [p.wait(120) for p in both] == [0, 0]
  finally:
    for process in both:
      commands.kill(process)
  loaded = load_config(str(config))
  corpus = prepare(loaded.data, loaded.eval, loaded.runs, progress=False)
  stream = BatchStream(Windows(corpus.train, loaded.data.seq_len), 8, 43)
  for shape in ('1x4x1', '2x1x2', '1x2x2', '1x1x4'):
    seen = set()
    for i in range(2):
      for call, part in enumerate(json.loads((tmp_path / f'{shape}-{i}.json').read_text())):
        for name, shards in part.items():
          for (first, last), value in shards:
            seen.update(range(first, last))
            for k, step in enumerate(range(*((0, 3), (3, 5))[call])):
              np.testing.assert_array_equal(np.asarray(value)[k], stream.rows(step, range(first, last))[name])
    assert seen == set(range(8)), shape


@pytest.mark.slow
@pytest.mark.parametrize(
  ('arguments', 'devices'),
  [((), 1), ((), 2), (('--config.mesh.tensor=2', '--config.mesh.fsdp=1'), 1), (('--config.mesh.replica=2', '--config.mesh.tensor=2'), 2)],
  ids=['fsdp', 'fsdp of 4', 'tensor', 'replica and tensor'],
)  # fmt: skip
def test_two_processes_train_and_score_as_one_does(home, alone, tmp_path, arguments, devices):
  config, workdir = several.experiment(home, tmp_path / 'e')
  both = several.start(2, config, workdir, *arguments, devices=devices)
  several.done(*both)
  several.assert_close(workdir, alone)
  printed = [commands.output(p)[0] for p in both]
  assert 'bits/byte' in printed[0]
  assert not [line for line in printed[1].splitlines() if not line.startswith('[Gloo]')]  # one process speaks


@pytest.mark.slow
def test_eight_devices_train_and_score_as_one_does(home, alone, tmp_path):
  for name, arguments in (('a', ()), ('b', ('--config.mesh.replica=2', '--config.mesh.tensor=2'))):
    config, workdir = several.experiment(home, tmp_path / name)
    several.done(commands.start(config, workdir, *arguments, devices=8))
    several.assert_close(workdir, alone)


SAVE_AND_READ = """
import logging, os, pathlib, sys
import jax
from kdjax.runs.checkpoint import Checkpoints
from tests import small
from tests.runs.test_checkpoint import KNOWN, abstract, make_state, place
port, process, folder, damage = sys.argv[1:]
jax.distributed.initialize(f'127.0.0.1:{port}', 2, int(process))
from jax.experimental.multihost_utils import sync_global_devices
logging.basicConfig(level=logging.WARNING, format='%(message)s')
logging.getLogger('absl').setLevel(logging.CRITICAL)
on = small.mesh(1, 2, 1)
saves = Checkpoints(folder, keep=3)
for step in (2, 4):
  saves.save(step, place(make_state(step), on), KNOWN)
saves.wait()
for path in sorted(pathlib.Path(folder, '4').rglob('*')):
  if path.is_file() and path.stat().st_size > 200:
    good = path.read_bytes()
    sync_global_devices('before')
    if process == '0':
      bad = bytearray(good)
      bad[len(bad) * 2 // 3] ^= 4
      path.write_bytes(bytes(bad) if damage == 'flipped' else good[:len(good) // 2])
    sync_global_devices('damaged')
    found = saves.verified(abstract(make_state(2), on), KNOWN)
    mine = lambda tree: jax.tree.map(lambda x: x.addressable_data(0), tree)
    small.assert_identical(small.host(mine(found.state)), small.host(mine(place(make_state(found.step), on))))
    print(path.relative_to(folder), found.step, flush=True)
    sync_global_devices('after')
    if process == '0':
      path.write_bytes(good)
"""


@pytest.mark.slow
@pytest.mark.parametrize('damage', ['truncated', 'flipped'])
def test_processes_agree_on_a_damaged_checkpoint_although_one_alone_sees_it(tmp_path, damage):
  port, folder = commands.free_port(), tmp_path / 'run' / 'checkpoints'
  both = [
    subprocess.Popen(
      [sys.executable, '-c', SAVE_AND_READ, str(port), str(i), str(folder), damage],
      env=commands.environment(),
      cwd=commands.REPO,
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    out = [process.communicate(timeout=120)[0].splitlines() for process in both]
  finally:
    for process in both:
      commands.kill(process)
  assert [process.returncode for process in both] == [0, 0]
  seen = [[line for line in lines_ if not line.startswith('[Gloo]')] for lines_ in out]
  assert seen[0] == seen[1]
  assert sum(line.endswith(' 2') for line in seen[0]) > 5


def assert_one_line(process, text, code=2):
  assert process.returncode == code, commands.errors(process)
  told = [line for line in commands.errors(process).splitlines() if 'error' in line]
  assert len(told) == 1, told
  assert text in told[0]
  assert 'Traceback' not in commands.errors(process)


@pytest.mark.slow
def test_a_config_that_is_wrong_ends_both_processes_with_its_line(home, tmp_path):
  config, workdir = several.experiment(home, tmp_path / 'e')
  both = several.start(2, config, workdir, '--config.student.alpha=2')
  commands.finish(*both, timeout=60)
  for process in both:
    assert_one_line(process, 'student.alpha: must be in [0, 1], got 2')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('argument', 'text'),
  [
    ('--config.data.source=nowhere.txt', 'nowhere.txt'),
    ('--config.mesh.fsdp=3', 'does not divide the 2 devices'),
    ('--config.student.batch_size=9', 'does not divide'),
  ],
)
def test_an_error_of_the_data_or_the_mesh_ends_both_processes_and_one_tells(home, tmp_path, argument, text):
  config, workdir = several.experiment(home, tmp_path / 'e')
  both = several.start(2, config, workdir, argument)
  codes = commands.finish(*both, timeout=90)
  assert 0 not in codes
  assert_one_line(both[0], text)


@pytest.mark.slow
def test_a_folder_lost_in_mid_run_ends_both_processes_and_one_tells(home, tmp_path):
  config, workdir = several.experiment(home, tmp_path / 'e', **several.LONG)
  both = several.start(2, config, workdir)
  commands.wait_for(lambda: several.lines(workdir) >= 40, both[0])
  (workdir / 'students' / 'baseline' / 'owner-99.json').write_text('{"token": "another"}')
  assert 0 not in commands.finish(*both, timeout=90)
  assert_one_line(both[0], 'another trainer has taken this folder over', code=1)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('--coordinator=127.0.0.1:1', '--processes=2'), 'belong together'),
    (('--coordinator=127.0.0.1:1', '--processes=2', '--process=2'), 'must be from 0 to 1'),
    (('--process=0',), 'belong together'),
    (('--coordinator=localhost', '--processes=2', '--process=1'), 'must be HOST:PORT'),
    (('--coordinator=localhost:abc', '--processes=2', '--process=1'), 'must be HOST:PORT'),
  ],
)
def test_incomplete_addresses_are_refused(home, tmp_path, capsys, arguments, message):
  config, workdir = several.experiment(home, tmp_path / 'e')
  with pytest.raises(SystemExit) as e:
    train.main([f'--config={config}', f'--workdir={workdir}', *arguments])
  assert e.value.code == 2
  assert message in capsys.readouterr().err


def test_one_process_does_its_own_work():
  assert distributed.first_process_first(lambda: 3) == 3
  assert distributed.of_first_process([1, 2]) == [1, 2]
  assert distributed.from_first_process([True, False]) == [True, False]
  assert distributed.on_any_process(True) and not distributed.on_any_process(False)


SLICE = {'TPU_WORKER_HOSTNAMES': '10.0.0.1,10.0.0.2', 'TPU_WORKER_ID': '1'}
SLICES = {'MEGASCALE_COORDINATOR_ADDRESS': '10.0.0.1', 'MEGASCALE_NUM_SLICES': '2', 'MEGASCALE_SLICE_ID': '1'}


@pytest.mark.parametrize(
  ('joins', 'environment', 'says'),
  [
    (False, SLICE, 'one of 2 hosts of a slice'),
    (True, SLICE | {'TPU_WORKER_ID': '2'}, 'TPU_WORKER_ID=2: TPU_WORKER_HOSTNAMES has 2 hosts'),
    (
      True,
      SLICE | {'TPU_WORKER_HOSTNAMES': '10.0.1.1,10.0.1.2'},
      r'names 10.0.1.1, ... and not this machine \(10.0.0.2\)',
    ),
    (True, SLICE | {'MEGASCALE_NUM_SLICES': '2'}, 'MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_SLICE_ID is not set'),
    (True, SLICE | SLICES | {'MEGASCALE_SLICE_ID': '2'}, 'MEGASCALE_SLICE_ID=2: there are MEGASCALE_NUM_SLICES=2'),
  ],
)
def test_variables_that_an_earlier_slice_has_left_are_told_in_one_line(joins, environment, says):
  with pytest.raises(UserError, match=says) as e:
    distributed.check_environment(joins, environment, ['10.0.0.2'])
  assert '\n' not in str(e.value)
  distributed.check_environment(joins, environment | {'JAX_PLATFORMS': 'cpu'}, ['10.0.0.2'])


@pytest.mark.parametrize(
  ('joins', 'environment'),
  [
    (True, SLICE),
    (True, SLICE | SLICES),
    (False, {}),
    (False, {'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}),
    (
      True,
      {'TPU_WORKER_HOSTNAMES': 'kd-slice-0-0.kd,kd-slice-0-1.kd', 'TPU_WORKER_ID': '1'},
    ),  # GKE: names, not addresses
  ],
)
def test_a_slice_that_is_here_is_none_of_an_earlier_one(joins, environment):
  distributed.check_environment(joins, environment, ['10.0.0.2'])


def test_processes_with_other_versions_are_refused_by_name(monkeypatch):
  import json

  from kdjax import machine

  mine = machine.versions() | {'kdjax': machine.git_commit()}
  monkeypatch.setattr(distributed.jax, 'process_count', lambda: 3)
  monkeypatch.setattr(distributed, '_gather_texts', lambda text: [text, text, text])
  distributed.check_same_software()
  other = json.dumps(mine | {'jax': '9.9'})
  monkeypatch.setattr(distributed, '_gather_texts', lambda text: [text, text, other])
  with pytest.raises(
    UserError, match=rf'process 2 runs jax 9\.9 instead of {mine["jax"]} of process 0; install the same'
  ):
    distributed.check_same_software()
