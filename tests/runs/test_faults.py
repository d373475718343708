"""Several real processes, some of which are lost: the others end with a line, and all go on where they were."""

import contextlib
import signal
import time

import psutil
import pytest

from kdjax.errors import TEMPORARY
from kdjax.runs.folder import RunFolder
from kdjax.runtime import distributed
from tests import commands, several

ARMS = several.LONG['student.arms']
FIELDS = several.LONG | {'student.tokens': 60 * 8 * 16, 'checkpoint.every': 10, 'heartbeat_timeout': 10}


@pytest.fixture(scope='module')
def undisturbed(home, tmp_path_factory):
  """number of processes -> the folder of the experiment that so many did without any trouble."""
  known = {}

  def of(n):
    if n not in known:
      config, workdir = several.experiment(home, tmp_path_factory.mktemp(f'undisturbed{n}') / 'e', **FIELDS)
      several.done(*several.start(n, config, workdir))
      known[n] = workdir
    return known[n]

  return of


def left(workdir):
  """All that the runs of an experiment leave."""
  return [(commands.leaves(folder), commands.metrics(folder)) for folder in several.trained(workdir, ARMS)]


def begun(home, folder, n):
  """(config, workdir, processes) of an experiment past its second checkpoint."""
  config, workdir = several.experiment(home, folder, **FIELDS)
  processes = several.start(n, config, workdir)
  commands.wait_for(lambda: several.lines(workdir) >= 25, processes[0], timeout=300)
  return config, workdir, processes


@contextlib.contextmanager
def stopped(process):
  """The process and its children make no step while this lasts."""
  tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
  for one in tree:
    one.suspend()
  yield
  for one in tree:
    one.resume()


def assert_all_ended_with_a_line(processes, victim):
  """Within a minute, none in the dark."""
  commands.finish(*processes, timeout=60)
  for process in (p for k, p in enumerate(processes) if k != victim):
    assert process.returncode in (128 + signal.SIGABRT, TEMPORARY)
    told = [line for line in commands.errors(process).splitlines() if line.startswith('error: ')]
    assert len(told) == 1 and 'gone' in told[0] and distributed.AGAIN in told[0]
    assert 'Traceback' not in commands.errors(process)


@pytest.mark.parametrize(
  ('n', 'victim'), [(2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 0), (4, 0), (4, 3)])]
)
def test_one_killed_ends_the_others_and_all_started_again_go_on_bit_identically(home, undisturbed, tmp_path, n, victim):
  config, workdir, processes = begun(home, tmp_path / 'e', n)
  commands.kill(processes[victim])
  assert_all_ended_with_a_line(processes, victim)
  several.done(*several.start(n, config, workdir))
  assert left(workdir) == left(undisturbed(n))


@pytest.mark.slow
@pytest.mark.parametrize(('n', 'then'), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_what_some_began_another_number_finishes(home, undisturbed, tmp_path, n, then):
  config, workdir, processes = begun(home, tmp_path / 'e', n)
  for process in processes:
    commands.kill(process)
  several.done(*several.start(then, config, workdir))
  several.assert_close(workdir, undisturbed(2), ARMS, rtol=0.005)


@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 4])
def test_told_to_stop_all_save_at_one_step_and_one_process_goes_on(home, undisturbed, tmp_path, n):
  config, workdir, processes = begun(home, tmp_path / 'e', n)
  with stopped(processes[0]):  # the steps are so short that else the run would be over before the word is round
    processes[-1].send_signal(signal.SIGTERM)  # one of them alone: the others are told
    time.sleep(5)
  assert commands.finish(*processes, timeout=400) == [TEMPORARY] * n
  assert (
    sum('Stopping after this step.' in commands.errors(process) for process in processes) == 1
  )  # in the process that got the signal
  assert 'saved. The same command resumes it.' in commands.errors(processes[0])
  folders = several.trained(workdir, ARMS)
  (step,) = {commands.leaves(folder)['step'] for folder in folders}
  assert 25 <= step < 60
  assert {RunFolder(folder).status()['state'] for folder in folders} == {'preempted'}
  several.done(commands.start(config, workdir))
  several.assert_close(workdir, undisturbed(2), ARMS, rtol=0.005)
  assert several.lines(workdir) == 60
