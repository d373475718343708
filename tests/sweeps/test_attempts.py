"""A job that kills its runner is given up after three times."""

import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from kdjax.errors import TrainingError
from kdjax.runs.folder import RunFolder
from kdjax.storage import paths
from kdjax.storage.paths import read_json, write_json
from kdjax.sweeps import attempts, runner
from tests import commands

KILLED = """
import os, signal, sys
from kdjax.sweeps import attempts
from kdjax.runs.folder import RunFolder
with attempts.count_attempt(RunFolder(sys.argv[1]), lambda: 0):
  os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def here(tmp_path) -> RunFolder:
  (tmp_path / 'job').mkdir()
  return RunFolder(tmp_path / 'job')


def known(here):
  return read_json(here.path / attempts.FILE)


def killed(here, times: int, progress: int = 0) -> None:
  write_json(here.path / attempts.FILE, {'unfinished': times, 'progress': progress})


def test_a_job_whose_clock_is_off_is_running_while_its_heart_beats(tmp_path, monkeypatch):
  monkeypatch.setattr(runner, 'BEAT', 0.1)
  jobs = [types.SimpleNamespace(id=id) for id in ('beats', 'silent', 'ahead', 'done')]
  status = lambda id, state, late: write_json(
    tmp_path / 'jobs' / id / 'status.json', {'state': state, 'heartbeat': time.time() - late}
  )
  for id, state, late in (
    ('beats', 'running', 1000),
    ('silent', 'running', 1000),
    ('ahead', 'running', -1000),
    ('done', 'done', 1000),
  ):
    status(id, state, late)
  timer = threading.Timer(0.1, status, ('beats', 'running', 998))
  timer.start()
  found = runner.job_states(paths.Path(tmp_path), jobs, 60)
  timer.join()
  assert found == ['running', 'stopped', 'running', 'done']


def test_a_killed_attempt_stays_counted(here):
  done = subprocess.run(
    [sys.executable, '-c', KILLED, str(here.path)], env=commands.environment(), cwd=commands.REPO, check=False
  )
  assert done.returncode == -signal.SIGKILL
  assert known(here) == {'unfinished': 1, 'progress': 0}


def test_after_three_the_job_fails_without_being_tried_and_says_how_to_try_again(here):
  killed(here, 2)
  with attempts.count_attempt(here, lambda: 0):
    assert known(here)['unfinished'] == 3
  killed(here, 3)
  with (
    pytest.raises(TrainingError, match=r'killed 3 times in a row .*delete attempts\.json'),
    attempts.count_attempt(here, lambda: 0),
  ):
    raise AssertionError
  assert known(here)['unfinished'] == 3  # it fails the next time too
  (here.path / attempts.FILE).unlink()
  with attempts.count_attempt(here, lambda: 0):
    pass


def test_an_attempt_that_saved_something_is_no_failure(here):
  killed(here, 3, progress=10)
  with attempts.count_attempt(here, lambda: 11):
    assert known(here) == {'unfinished': 1, 'progress': 11}


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_an_attempt_that_ends_in_any_other_way_is_not_counted(here, error):
  with pytest.raises(error), attempts.count_attempt(here, lambda: 0):
    raise error
  assert known(here) is None


def test_an_attempt_that_lost_another_process_is_counted(here, monkeypatch):
  monkeypatch.setattr(attempts.distributed, 'is_lost', lambda error: True)
  with pytest.raises(ValueError, match='gloo'), attempts.count_attempt(here, lambda: 0):
    raise ValueError('gloo: connection closed')
  assert known(here)['unfinished'] == 1
