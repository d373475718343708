import json
import logging
import os
import shutil
import signal
import threading
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdjax.errors import TrainingError, UserError
from kdjax.runs import metrics
from kdjax.runs.checkpoint import Checkpoints
from kdjax.runs.folder import RunFolder
from kdjax.runs.metrics import MetricWriter, read_metrics
from kdjax.runtime.preemption import Preempted
from kdjax.storage.paths import write_json
from kdjax.trainer import loop, reporting
from kdjax.trainer.loop import calls
from tests import commands, tiny
from tests.cohorts import assert_same_runs, at_step, fit, interrupted, students


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 12), st.lists(st.integers(0, 13), max_size=3))
def test_calls_cover_every_step_once_and_are_cut_at_every_boundary(start, more, size, every):
  total = start + more
  plan = calls(start, total, size, *every)
  assert [step for first, n in plan for step in range(first, first + n)] == list(range(start, total))
  assert all(1 <= n <= size for _, n in plan)
  ends = {first + n for first, n in plan}
  assert {b for e in every if e for b in range(e, total + 1, e) if b > start} <= ends
  # And at nothing else: a call is short only because of a boundary or the end.
  assert all(n == size or first + n == total or any(e and (first + n) % e == 0 for e in every) for first, n in plan)


def test_a_run_writes_one_line_a_step_checkpoints_and_what_it_is(undisturbed):
  for student in students(undisturbed):
    records = commands.metrics(student)
    assert [r['step'] for r in records] == list(range(1, tiny.STEPS + 1))
    assert {'loss', 'ce', 'grad_norm', 'learning_rate', 'alpha', 'tokens', 'skipped'} <= records[0].keys()
    assert [r['step'] for r in records if 'validation_ce' in r] == [5, 10, 12]
    assert RunFolder(student).status()['step'] == tiny.STEPS
    identity = RunFolder(student).read_record()
    assert {'data', 'tokenizer', 'init'} <= identity['fingerprints'].keys()
    assert identity['config']['arm'] == student.name
  assert commands.leaves(students(undisturbed)[0])['step'] == tiny.STEPS


def test_each_multiple_of_the_period_is_saved_and_stays_whatever_the_other_saves_are(home, undisturbed, tmp_path):
  fit(home, tmp_path, **{'checkpoint.every': 4, 'checkpoint.keep': 1, 'checkpoint.keep_period': 5})
  for student, same in zip(students(tmp_path), students(undisturbed), strict=True):
    steps = sorted(int(path.name) for path in (student / 'checkpoints').iterdir() if path.name.isdigit())
    assert steps == [5, 10, 12]  # not 8, which was the newest for a time
    assert commands.metrics(student) == commands.metrics(same)  # saving changes nothing


def test_what_a_validation_takes_is_in_no_rate(home, tmp_path, monkeypatch):
  now = 0.0
  step = loop.make_step

  class Prompt:
    """A clock that sees each call end at once."""

    def watch(self, arrays):
      done = Future()
      done.set_result(now)
      return done

    def close(self):
      pass

  def slow_step(*args):
    run = step(*args)

    def call(*state):
      nonlocal now
      now += 1
      return run(*state)

    return call

  def slow_validation(*args):
    validate = validation(*args)

    def call(params):
      nonlocal now
      now += 100
      return validate(params)

    return call

  validation = loop.make_validation
  monkeypatch.setattr(metrics.time, 'perf_counter', lambda: now)
  monkeypatch.setattr(reporting, 'Clock', Prompt)
  monkeypatch.setattr(loop, 'make_step', slow_step)
  monkeypatch.setattr(loop, 'make_validation', slow_validation)
  fit(home, tmp_path / 'r', **{'checkpoint.every': 99, 'eval.every': 6, 'steps_per_call': 1})
  records = read_metrics(students(tmp_path / 'r')[0])
  rates = {r['step']: r['tokens_per_second'] for r in records if 'tokens_per_second' in r}
  assert rates == dict.fromkeys(range(2, tiny.STEPS + 1), 8 * 16)  # the first call compiles


def test_a_finished_run_does_nothing_when_started_again(home, undisturbed, tmp_path):
  shutil.copytree(undisturbed, tmp_path / 'r')
  stat = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / 'r').rglob('*') if p.is_file()}
  before = stat()
  fit(home, tmp_path / 'r')
  assert stat() == before


def test_a_finished_member_is_not_trained_again_because_another_is_missing(home, undisturbed, tmp_path):
  shutil.copytree(undisturbed, tmp_path / 'r')
  finished, missing = students(tmp_path / 'r')
  shutil.rmtree(missing)
  stat = lambda: {p: p.stat().st_mtime_ns for p in finished.rglob('*') if p.is_file()}
  before = stat()
  fit(home, tmp_path / 'r')
  assert stat() == before
  assert RunFolder(missing).is_done()
  alone, together = (commands.metrics(each / 'students' / missing.name) for each in (tmp_path / 'r', undisturbed))
  np.testing.assert_allclose([r['ce'] for r in alone], [r['ce'] for r in together], rtol=1e-5)


def test_a_finished_run_is_refused_where_its_data_has_changed(home, undisturbed, tmp_path):
  shutil.copytree(undisturbed, tmp_path / 'r')
  path = students(tmp_path / 'r')[0] / 'run.json'
  identity = json.loads(path.read_text())
  identity['fingerprints']['tokenizer'] = 'another'
  write_json(path, identity)
  with pytest.raises(UserError, match='the tokenizer is not the one the run began with'):
    fit(home, tmp_path / 'r')


def test_validation_ce_holds_no_z_loss(home, tmp_path):
  fit(home, tmp_path / 'r', **{'loss.z_loss': 0.5, 'student.tokens': 5 * 8 * 16})
  for student in students(tmp_path / 'r'):
    last = commands.metrics(student)[-1]
    assert last['loss'] > last['ce'] + 1
    assert abs(last['validation_ce'] - last['ce']) < 1


def test_a_run_resumed_at_any_checkpoint_is_bit_identical(home, undisturbed, tmp_path):
  for step in (3, 12):
    interrupted(undisturbed, tmp_path / str(step), step, step)
    fit(home, tmp_path / str(step))
    assert_same_runs(tmp_path / str(step), undisturbed)


def test_a_cohort_goes_on_from_the_newest_step_that_all_members_have(home, undisturbed, tmp_path):
  interrupted(undisturbed, tmp_path / 'r', 9, 6)
  fit(home, tmp_path / 'r')
  assert_same_runs(tmp_path / 'r', undisturbed)


def test_a_cohort_walks_back_together_over_a_damaged_checkpoint(home, undisturbed, tmp_path, caplog):
  interrupted(undisturbed, tmp_path / 'r', 9, 9)
  shutil.rmtree(students(tmp_path / 'r')[1] / 'checkpoints' / '9' / 'optimizer')
  with caplog.at_level(logging.WARNING, 'kdjax'):
    fit(home, tmp_path / 'r')
  assert 'passing over checkpoint 9 of' in caplog.text
  assert_same_runs(tmp_path / 'r', undisturbed)


@pytest.mark.slow
def test_a_cohort_killed_in_its_first_save_starts_again_and_says_so(home, undisturbed, tmp_path, caplog):
  interrupted(undisturbed, tmp_path / 'r', 3, 0)
  with caplog.at_level(logging.WARNING, 'kdjax'):
    fit(home, tmp_path / 'r')
  assert 'starting from step 0' in caplog.text
  assert_same_runs(tmp_path / 'r', undisturbed)


def test_a_run_that_is_done_but_whose_last_checkpoint_is_gone_is_trained_to_the_end_again(home, undisturbed, tmp_path):
  shutil.copytree(undisturbed, tmp_path / 'r')
  for student in students(tmp_path / 'r'):
    shutil.rmtree(student / 'checkpoints' / '12')
  fit(home, tmp_path / 'r')
  assert_same_runs(tmp_path / 'r', undisturbed)


@pytest.mark.slow
def test_the_second_of_two_checkpoints_is_kept_for_a_cohort_that_keeps_one(home, tmp_path):
  fit(home, tmp_path / 'r', **{'checkpoint.keep': 1})
  for student in students(tmp_path / 'r'):
    assert sorted(int(p.name) for p in (student / 'checkpoints').iterdir()) == [9, 12]


def test_no_member_is_more_than_one_checkpoint_ahead(home, tmp_path, monkeypatch):
  """Each save begins when all members' saves of the step before are on disk."""
  steps = {}
  save = Checkpoints.save

  def watched(self, step, *args):
    others = [path for path in students(tmp_path / 'r') if path.exists()]
    for other in others:
      done = [int(p.name) for p in (other / 'checkpoints').iterdir() if p.name.isdigit()]
      assert step <= 3 or max(done) >= step - 3, (other.name, step, done)
    steps[str(self.folder)] = step
    return save(self, step, *args)

  monkeypatch.setattr(Checkpoints, 'save', watched)
  fit(home, tmp_path / 'r')
  assert set(steps.values()) == {12}


@pytest.mark.parametrize('tail', ['{"step": 10, "lo', '{"step": 10, "loss": 1.0}', '\x00\x00'])
def test_metrics_beyond_the_checkpoint_or_torn_are_mended(tmp_path, tail):
  lines = [json.dumps({'step': step, 'loss': step / 3}) + '\n' for step in range(1, 10)]
  (tmp_path / 'metrics.jsonl').write_text(''.join(lines) + tail)
  assert [r['step'] for r in read_metrics(tmp_path)] == list(range(1, 10))
  writer = MetricWriter(tmp_path, 6)
  writer.write(7, {'loss': 7 / 3})
  writer.close()
  assert (tmp_path / 'metrics.jsonl').read_text() == ''.join(lines[:7])
  writer = MetricWriter(tmp_path, 0)
  writer.close()
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


def test_a_torn_line_is_not_joined_to_the_next(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 2}')
  writer = MetricWriter(tmp_path, 2)
  writer.write(3, {})
  writer.close()
  assert [r['step'] for r in read_metrics(tmp_path)] == [1, 3]


def test_too_many_steps_that_are_not_finite_stop_the_run_and_its_last_checkpoint_stands(home, tmp_path):
  fields = {'student.optimizer.learning_rate': 1e37, 'student.optimizer.warmup_fraction': 0.5, 'max_skipped': 3}
  with pytest.raises(TrainingError, match=r'not finite 3 steps in a row.*last checkpoint is good') as e:
    fit(home, tmp_path / 'r', **fields)
  assert '\n' not in str(e.value)
  for student in students(tmp_path / 'r'):
    status = RunFolder(student).status()
    assert status['state'] == 'failed'
    assert 'not finite' in status['error']
  # Started again it fails again, having lost nothing.
  steps = [p.name for p in (students(tmp_path / 'r')[0] / 'checkpoints').iterdir()]
  with pytest.raises(TrainingError, match='not finite'):
    fit(home, tmp_path / 'r', **fields)
  assert [p.name for p in (students(tmp_path / 'r')[0] / 'checkpoints').iterdir()] == steps


@pytest.mark.parametrize('number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_the_run_saved_and_it_goes_on_bit_identically(home, undisturbed, tmp_path, monkeypatch, number):
  before = signal.getsignal(number)
  with at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), number)):
    with pytest.raises(Preempted, match='stopped at step 8 of 12 and saved') as e:
      fit(home, tmp_path / 'r')
  assert e.value.code == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
  assert signal.getsignal(number) is before
  for student in students(tmp_path / 'r'):
    assert RunFolder(student).status()['state'] == 'preempted'
    assert commands.leaves(student)['step'] == 8
  fit(home, tmp_path / 'r')
  assert_same_runs(tmp_path / 'r', undisturbed)


def test_a_signal_in_the_last_step_ends_the_command_with_the_run_done(home, undisturbed, tmp_path, monkeypatch):
  with at_step(monkeypatch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM)):
    with pytest.raises(Preempted, match='stopped at step 12 of 12'):
      fit(home, tmp_path / 'r')
  assert_same_runs(tmp_path / 'r', undisturbed)


def test_a_run_whose_progress_nobody_reads_stops_saved(home, undisturbed, tmp_path, monkeypatch):
  """Ctrl-C ends the `tee` that reads a training run at once: the broken pipe must not end the run before it has saved."""

  def update(self, n, **postfix):
    raise BrokenPipeError

  with monkeypatch.context() as m:
    m.setattr(metrics.Progress, 'update', update)
    with pytest.raises(Preempted, match='stopped at step 3 of 12 and saved') as e:
      fit(home, tmp_path / 'r', steps_per_call=2)
  assert e.value.code == 141
  fit(home, tmp_path / 'r')
  assert_same_runs(tmp_path / 'r', undisturbed)


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(home, tmp_path, monkeypatch):
  def twice():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)

  with at_step(monkeypatch, 4, twice), pytest.raises(KeyboardInterrupt):
    fit(home, tmp_path / 'r')
  assert RunFolder(students(tmp_path / 'r')[0]).status()['state'] == 'failed'


@pytest.mark.slow
def test_a_trainer_in_another_thread_sets_no_signal_handler(home, undisturbed, tmp_path):
  thread = threading.Thread(target=fit, args=(home, tmp_path / 'r'))
  thread.start()
  thread.join()
  assert_same_runs(tmp_path / 'r', undisturbed)


def test_a_folder_taken_over_in_mid_run_is_left_at_the_next_checkpoint_untouched(home, tmp_path, monkeypatch):
  (first, _), seen = students(tmp_path / 'r'), []

  def take_over():
    (claim,) = first.glob('owner-*.json')
    write_json(first / 'owner-9.json', json.loads(claim.read_text()) | {'token': 'another', 'host': 'elsewhere'})
    seen.extend(sorted((first / 'checkpoints').iterdir()))

  with at_step(monkeypatch, 8, take_over):
    with pytest.raises(TrainingError, match='taken this folder over'):
      fit(home, tmp_path / 'r')
  left = [p for p in sorted((first / 'checkpoints').iterdir()) if p.name.isdigit()]
  assert [p.name for p in left] == ['3', '6']
  assert json.loads((first / 'owner-9.json').read_text())['token'] == 'another'
  assert RunFolder(first).status()['state'] == 'running'  # the new owner's to change


def test_another_config_is_refused_before_anything_is_touched(home, undisturbed, tmp_path):
  shutil.copytree(undisturbed, tmp_path / 'r')
  with pytest.raises(UserError, match=r'written by another config: .*seed is 43 there, 44 here'):
    fit(home, tmp_path / 'r', **{'student.seed': 44})
  assert_same_runs(tmp_path / 'r', undisturbed)


def test_a_data_stream_of_another_order_is_refused_by_name(home, undisturbed, tmp_path):
  interrupted(undisturbed, tmp_path / 'r', 6, 6)
  for student in students(tmp_path / 'r'):
    identity = json.loads((student / 'run.json').read_text())
    identity['fingerprints']['data'] = 'another'
    write_json(student / 'run.json', identity)
  with pytest.raises(UserError, match=r'the data is not the one the run began with \(another, now'):
    fit(home, tmp_path / 'r')
