"""Where a run's time went, over all its starts."""

import pytest

from kdjax.runs.goodput import ACTIVITIES, Session, goodput
from kdjax.storage import paths


@pytest.fixture
def clock(monkeypatch):
  """time.time(), set by hand."""
  now = [1000.0]
  monkeypatch.setattr('kdjax.runs.goodput.time.time', lambda: now[0])
  return now


def spend(session, clock, activity, seconds):
  session.turn_to(activity)
  clock[0] += seconds


def start(folder, clock, first, last, **seconds):
  """One start: its activities one after the other, then what is kept."""
  session = Session([folder], clock[0])
  session.starts_at(first)
  for activity, n in seconds.items():
    spend(session, clock, activity, n)
  session.keep(last)


def test_each_second_is_of_one_activity(tmp_path, clock):
  session = Session([paths.Path(tmp_path)], clock[0])
  clock[0] += 5
  spend(session, clock, 'compile', 20)
  spend(session, clock, 'steps', 30)
  with session.doing('validation'):
    clock[0] += 7
    with session.doing('checkpoints'):
      clock[0] += 3
  clock[0] += 35
  session.keep(10)
  found = goodput(paths.Path(tmp_path))
  expected = {'start': 5, 'compile': 20, 'steps': 65, 'validation': 7, 'checkpoints': 3}
  assert {k: v for k, v in found.seconds.items() if v} == expected
  assert found.total == 100 and found.share == 0.65 and found.starts == 1
  assert (
    str(found) == 'goodput 65.0% of 100 s: the rest is compile 20.0%, validation 7.0%, start 5.0%, checkpoints 3.0%'
  )


def test_steps_that_were_done_again_and_the_time_between_starts_do_not_count(tmp_path, clock):
  folder = paths.Path(tmp_path)
  start(folder, clock, 0, 100, start=10, steps=50)
  clock[0] += 20  # killed: nobody is there
  start(folder, clock, 80, 200, start=10, steps=60)  # from the checkpoint of step 80
  found = goodput(folder)
  assert found.seconds['repeated'] == pytest.approx(10)  # 20 of the first start's 100 steps
  assert found.seconds['down'] == 20
  assert found.seconds['steps'] == pytest.approx(100)
  assert found.total == 150 and found.starts == 2
  assert 'of 150 s, 2 starts' in str(found)


def test_a_start_that_did_all_its_steps_in_vain(tmp_path, clock):
  folder = paths.Path(tmp_path)
  start(folder, clock, 0, 10, steps=40)
  start(folder, clock, 0, 10, steps=40)
  assert goodput(folder).seconds['repeated'] == 40 and goodput(folder).share == 0.5


def test_a_run_without_sessions_has_none(tmp_path):
  assert goodput(paths.Path(tmp_path)) is None


def test_a_finished_run_says_where_its_time_went(main_job):
  for student in (main_job / 'runs').glob('tiny-*/students/*'):
    found = goodput(paths.Path(student))
    assert found.starts == 1 and 0 < found.share < 1
    assert all(found.seconds[name] > 0 for name in ACTIVITIES)
    assert found.seconds['down'] == found.seconds['repeated'] == 0
