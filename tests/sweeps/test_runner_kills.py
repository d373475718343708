"""Real processes: runners that are killed, and several on one grid."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest

from kdjax import report
from kdjax.analysis.grid import effects
from kdjax.errors import FAILED, TEMPORARY
from kdjax.runs.folder import RunFolder
from kdjax.sweeps import attempts, runner
from tests import commands, several, tiny

pytestmark = pytest.mark.slow


@pytest.fixture
def fresh(tiny_grid, tmp_path):
  """(config file, folder to be) of the same grid, on the same token stores, with no run done."""
  return tiny.write_grid_config(tmp_path, tiny_grid[0]), tmp_path / 'grid'


@pytest.fixture(scope='module')
def undisturbed(tiny_grid, tmp_path_factory):
  """The folder of the same grid, run by one process like those below: this one has other devices, and so other roundings."""
  home = tmp_path_factory.mktemp('undisturbed')
  assert commands.finish(go(tiny.write_grid_config(home, tiny_grid[0]), home / 'grid', 'run'), timeout=600) == [0]
  return home / 'grid'


def tables(folder) -> pd.DataFrame:
  built = effects.build_tables(report.load_grid(folder), folder)
  return pd.concat([built.effects, built.contrasts])


def go(config, folder, *arguments):
  return commands.start(config, folder, *arguments, module='kdjax.grid')


def test_killed_at_any_point_it_ends_with_the_same_tables(undisturbed, fresh):
  config, folder = fresh
  moments = random.Random(1)
  for _ in range(6):
    process = go(config, folder, 'run')
    wait_until = time.monotonic() + moments.uniform(6, 25)
    while time.monotonic() < wait_until and process.poll() is None:
      time.sleep(0.1)
    commands.kill(process)
  assert commands.finish(go(config, folder, 'run'), timeout=600) == [0]
  pd.testing.assert_frame_equal(tables(folder), tables(undisturbed), check_exact=True)


def test_two_runners_do_each_job_once(tiny_grid, undisturbed, fresh):
  grid = tiny_grid[1]
  config, folder = fresh
  assert commands.finish(go(config, folder, 'run'), go(config, folder, 'run'), timeout=900) == [0, 0]
  for cell in (folder / 'cells').iterdir():
    assert len(json.loads((cell / 'run.json').read_text())['commands']) == 1, cell.name
  starts = [json.loads(path.read_text())['token'] for path in (folder / 'jobs').glob('*/owner-*.json')]
  assert len(set(starts)) == len(runner.list_jobs(grid, folder))
  pd.testing.assert_frame_equal(tables(folder), tables(undisturbed), check_exact=True)


def test_a_dead_runners_job_is_taken_over(tiny_grid, fresh):
  _, grid, _ = tiny_grid
  config, folder = fresh
  process = go(config, folder, 'run')
  running = lambda: [
    job for job in runner.list_jobs(grid, folder) if job.cells and runner.job_state(folder, job, 60) == 'running'
  ]
  commands.wait_for(running, process)
  (job,) = running()
  commands.kill(process)
  assert commands.finish(go(config, folder, 'run'), timeout=600) == [0]
  assert runner.job_state(folder, job, 60) == 'done'


def in_mid_cell(folder) -> bool:
  cells = [RunFolder(path) for path in (folder / 'cells').glob('*')]
  return any((s := cell.status()) and s['state'] == 'running' and s['step'] >= 4 for cell in cells)


def test_a_runner_of_two_processes_goes_on_after_one_is_killed(tiny_grid, undisturbed, fresh):
  config, folder = fresh
  both = lambda: several.start(2, config, folder, 'run', module='kdjax.grid')
  first, other = both()
  commands.wait_for(lambda: in_mid_cell(folder), first)
  commands.kill(other)
  assert commands.finish(first, timeout=60)[0] in (128 + signal.SIGABRT, TEMPORARY)
  again = both()
  several.done(*again, timeout=600)
  assert 'all done' in commands.output(again[0])[0]
  for job in runner.list_jobs(tiny_grid[1], folder):
    assert runner.job_state(folder, job, 60) == 'done'
  for cell in (folder / 'cells').iterdir():
    assert len(json.loads((cell / 'run.json').read_text())['commands']) <= 2, cell.name
  # Other devices, other roundings.
  np.testing.assert_allclose(tables(folder)['estimate'], tables(undisturbed)['estimate'], atol=1e-3)


def test_a_failed_job_ends_a_runner_of_two_processes(fresh):
  config, folder = fresh
  failing = ('--config.base.loss.z_loss=1e38', '--config.base.max_skipped=3')
  both = several.start(2, config, folder, 'run', *failing, module='kdjax.grid')
  codes = commands.finish(*both, timeout=300)
  assert all(codes) and 1 in codes
  assert any('error: teacher: the loss or a gradient was not finite' in commands.errors(process) for process in both)


@pytest.fixture(scope='module')
def cluster():
  """A Ray cluster of two nodes on this machine, one core each."""
  pytest.importorskip('ray', reason='Ray is in the [ray] extra')
  from ray.cluster_utils import Cluster

  with (
    pytest.MonkeyPatch.context() as m
  ):  # its workers are started from here, and the grid's config file imports `tests`
    m.setenv('PYTHONPATH', str(commands.REPO))
    cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1})
    cluster.add_node(num_cpus=1)
  yield cluster
  cluster.shutdown()


def ray_runners() -> list[psutil.Process]:
  """The processes that train for Ray, each under a worker of Ray's."""
  words = ['-m', 'kdjax.grid', 'run']
  known = [(p, p.info['cmdline'] or []) for p in psutil.process_iter(['cmdline'])]
  return [p for p, line in known if line[1:4] == words and not any(word.startswith('--executor') for word in line)]


def test_on_a_ray_cluster_a_worker_killed_in_mid_cell_changes_nothing(cluster, undisturbed, fresh):
  config, folder = fresh
  process = go(config, folder, 'run', '--executor=ray', f'--address={cluster.address}')
  commands.wait_for(lambda: in_mid_cell(folder), process, timeout=300)
  before = ray_runners()
  assert len(before) == 2
  for victim in before:  # whichever of them has the cell
    victim.parent().kill()
  commands.wait_for(lambda: len(set(ray_runners()) - set(before)) == 2, process, timeout=120)
  assert not [
    p for p in before if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
  ]  # they died with Ray's workers
  assert commands.finish(process, timeout=600) == [0]
  assert 'all done' in commands.output(process)[0]
  assert '2 runners on Ray, 2 at a time' in commands.errors(process)
  # Ray gives its workers other numbers of threads, and so other roundings.
  np.testing.assert_allclose(tables(folder)['estimate'], tables(undisturbed)['estimate'], atol=1e-3)


POISON = """
import os, signal
from kdjax.sweeps import attempts, runner
do = runner.Runner._do
def poisoned(self, job):
  if job.phase == 'pilot' and job.cells and job.cells[0].arm == 'distilled':
    os.kill(os.getpid(), signal.SIGKILL)
  return do(self, job)
runner.Runner._do = poisoned
from kdjax import grid
grid.main()
"""


def test_a_job_that_kills_its_runner_is_given_up_and_the_others_are_done(tiny_grid, fresh):
  """As a launcher restarts a runner whose job is killed for its memory."""
  grid = tiny_grid[1]
  config, folder = fresh
  codes = []
  while not codes or codes[-1] == -signal.SIGKILL:
    command = [sys.executable, '-c', POISON, 'run', f'--config={config}', f'--workdir={folder}']
    codes.append(
      subprocess.run(command, env=commands.environment(), cwd=commands.REPO, timeout=300, check=False).returncode
    )
  pilot = [job for job in runner.list_jobs(grid, folder) if job.phase == 'pilot']
  states = {job.id: runner.job_state(folder, job, 60) for job in pilot}
  poisoned = [job.id for job in pilot if job.cells[0].arm == 'distilled']
  assert codes == [-signal.SIGKILL] * attempts.MOST * len(poisoned) + [FAILED]
  assert {job for job, state in states.items() if state == 'failed'} == set(poisoned)
  assert {state for job, state in states.items() if job not in poisoned} == {'done'}
  assert 'killed 3 times in a row' in (RunFolder(folder / 'jobs' / poisoned[0]).status() or {})['error']
