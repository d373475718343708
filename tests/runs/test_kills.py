"""Real trainers, killed at any point and started again: in the end there is no trace of it in any number."""

import contextlib
import itertools
import random
import time

import pandas as pd
import pytest

from kdjax.runs.folder import RunFolder
from kdjax.scoring import results
from tests import commands, tiny

STUDENTS = {'fast': ('baseline', 'unigram'), 'whole': ('baseline', 'distilled', 'unigram')}


class Experiment:
  """An experiment in a folder of its own, with its own token stores and teacher."""

  def __init__(self, folder, kind):
    self.folder, self.kind, self.workdir = folder, kind, folder / 'run'
    fields = {'student.arms': STUDENTS[kind], 'checkpoint.every': 2, 'eval.max_bytes': 800, 'eval.batch_size': 64}
    folder.mkdir()
    self.config = tiny.write_config(folder, **fields)

  def start(self):
    return commands.start(self.config, self.workdir)

  def finish(self):
    """Runs it to the end; what it printed, less its own place."""
    process = self.start()
    assert commands.finish(process, timeout=300) == [0], commands.errors(process)
    return commands.output(process)[0].replace(str(self.folder), '')

  def glob(self, pattern):
    with contextlib.suppress(FileNotFoundError):  # a folder that was renamed while it was looked through
      return list(self.folder.glob(pattern))
    return []

  def trained(self):
    return [self.workdir / 'students' / arm for arm in STUDENTS[self.kind]] + self.glob('runs/teachers/*')


@pytest.fixture(scope='module', params=[pytest.param(kind, marks=pytest.mark.slow) for kind in STUDENTS])
def undisturbed(request, tmp_path_factory):
  experiment = Experiment(tmp_path_factory.mktemp('undisturbed') / 'e', request.param)
  return experiment, experiment.finish()


def assert_same(experiment: Experiment, printed: str, undisturbed) -> None:
  expected, table = undisturbed
  assert printed == table
  for one, other in zip(experiment.trained(), expected.trained(), strict=True):
    assert commands.leaves(one) == commands.leaves(other), one.name
    assert commands.metrics(one) == commands.metrics(other), one.name
    assert RunFolder(one).is_done()
    files = [sorted((folder / 'results').glob('*.parquet')) for folder in (one, other)]
    assert files[0]
    for file, like in zip(*files, strict=True):
      assert file.name == like.name
      pd.testing.assert_frame_equal(results.read_result(file)[0], results.read_result(like)[0], check_exact=True)


# When to kill: each is seen in the files; what makes it so, with the time of its last change.


def building_stores(experiment):
  return stamped([] if experiment.glob('runs/stores/*/corpus.json') else experiment.glob('runs/stores/*/*'))


def compiling(experiment):
  """A run folder is claimed and not a step has been written."""
  claimed = experiment.glob('**/run.json')
  return stamped(p for p in claimed if not any((p.parent / name).exists() for name in ('results', 'metrics.jsonl')))


def saving(experiment):
  return stamped(experiment.glob('**/checkpoints/*tmp*'))


def started(experiment):
  return {(experiment.folder, time.monotonic_ns())}


def stamped(paths):
  found = set()
  for path in paths:
    with contextlib.suppress(FileNotFoundError):
      found.add((path, path.stat().st_mtime_ns))
  return found


def kill_when(experiment, condition, delay: float = 0.0) -> bool:
  """Starts it and kills it at the moment; False where it has come to its end before."""
  left = condition(experiment)  # by the kill before
  process = experiment.start()
  until = time.monotonic() + 200
  while process.poll() is None and not condition(experiment) - left:
    assert time.monotonic() < until, commands.errors(process)
    time.sleep(0.002)
  time.sleep(delay)
  alive = process.poll() is None
  commands.kill(process)
  assert alive or process.returncode == 0, commands.errors(process)
  return alive


def test_killed_while_building_compiling_and_saving_it_ends_as_if_it_had_not_been(undisturbed, tmp_path):
  experiment = Experiment(tmp_path / 'e', undisturbed[0].kind)
  assert kill_when(experiment, building_stores)
  assert not experiment.glob('runs/stores/*/corpus.json')
  assert kill_when(experiment, compiling, 0.3)
  assert not experiment.glob('**/metrics.jsonl') or experiment.kind == 'whole'
  assert kill_when(experiment, saving)
  assert saving(experiment)  # it was in flight
  assert_same(experiment, experiment.finish(), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('undisturbed', ['whole'], indirect=True)
def test_killed_twenty_times_at_random_points_it_ends_as_if_it_had_not_been(undisturbed, tmp_path):
  rng = random.Random(0)
  began = time.monotonic()
  undisturbed[0].finish()
  whole = time.monotonic() - began  # a start that finds all done: mostly imports
  seen = (building_stores, compiling, saving)
  plan = [(condition, delay) for condition in seen for delay in (0.0, 0.0, rng.uniform(0, 2), rng.uniform(0, 2))]
  plan += [(started, rng.uniform(0.3, 3) * whole) for _ in range(8)]
  rng.shuffle(plan)
  in_flight = 0
  numbers = itertools.count()
  while plan:
    experiment = Experiment(tmp_path / f'e{next(numbers)}', 'whole')
    alive = True
    while alive and plan:  # what comes too late in this experiment is the first in the next
      condition, delay = plan[-1]
      left = saving(experiment)
      alive = kill_when(experiment, condition, delay)
      in_flight += alive and bool(saving(experiment) - left)
      if alive:
        plan.pop()
    assert_same(experiment, experiment.finish(), undisturbed)
  assert in_flight >= 2


@pytest.fixture
def disk(tmp_path):
  yield from commands.small_disk(tmp_path / 'disk', '24m')


@pytest.mark.slow
def test_a_disk_that_fills_up_in_mid_run_ends_it_with_one_line_and_nothing_lost(tmp_path, disk):
  fields = {
    'student.arms': ('baseline', 'unigram'), 'student.tokens': 400 * 8 * 16, 'checkpoint.every': 10,
    'eval.max_bytes': 800, 'data.cache': str(tmp_path / 'stores'),
  }  # fmt: skip
  ends = []
  for place in (tmp_path / 'undisturbed', disk / 'filled'):
    experiment = Experiment(place, 'fast')
    experiment.config = tiny.write_config(tmp_path, **fields)
    if place.parent == disk:
      experiment.workdir = disk / 'run'
      process = commands.start(experiment.config, experiment.workdir)
      student = experiment.workdir / 'students' / 'baseline'
      commands.wait_for(lambda student=student: (student / 'checkpoints' / '100').exists(), process, every=0.002)
      filler = disk / 'filler'
      with contextlib.suppress(OSError), open(filler, 'wb', buffering=0) as file:
        while True:
          file.write(bytes(1000))
      assert commands.finish(process, timeout=120) == [1], commands.errors(process)
      told = [line for line in commands.errors(process).splitlines() if 'sees' not in line]
      assert len(told) == 1, '\n'.join(line[:300] for line in told)
      assert told[0].startswith('error: ')
      assert 'free some disk space' in told[0]
      filler.unlink()
      saved = commands.leaves(student)['step']
      assert 100 <= saved < 400
    experiment.finish()
    ends.append([(commands.leaves(f), commands.metrics(f)) for f in experiment.trained()])
  assert ends[0] == ends[1]
