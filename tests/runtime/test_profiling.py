"""A window of the profiler, and each process's own log."""

import logging

import pytest

from kdjax import train
from kdjax.errors import UserError
from kdjax.runtime import logs, profiling
from kdjax.storage import paths
from tests import tiny


@pytest.mark.parametrize(('text', 'window'), [('20-29', (20, 29)), ('3-3', (3, 3)), ('10', (0, 10))])
def test_a_window_is_two_steps_or_a_number(text, window):
  assert profiling.parse_window(text) == window


@pytest.mark.parametrize('text', ['', '0', '5-4', '0-4', 'a', '1-', '-3', '1-2-3'])
def test_anything_else_is_refused(text):
  with pytest.raises(UserError, match='write the steps as FIRST-LAST'):
    profiling.parse_window(text)


@pytest.mark.parametrize(
  ('window', 'start', 'edges'), [((20, 29), 0, (19, 29)), ((0, 10), 40, (44, 54)), ((5, 9), 100, ()), (None, 0, ())]
)
def test_calls_end_at_the_edges_of_the_window(tmp_path, window, start, edges):
  assert profiling.Profiler(paths.Path(tmp_path), window, start, size=2).edges == edges


def test_a_run_leaves_a_trace_of_the_parts_of_its_step_and_a_log(main_job, tmp_path, caplog):
  caplog.set_level(logging.INFO, 'kdjax')
  stores = str(main_job / 'runs' / 'stores')
  config = tiny.config(tmp_path, **{'data.cache': stores, 'student.arms': ('baseline',)} | tiny.write_text(main_job))
  folder = train.run(config, paths.Path(tmp_path / 'run'), progress=False, profile=(4, 6))
  (trace,) = (tmp_path / 'run' / 'students' / 'baseline' / 'profile').rglob('*.xplane.pb')
  assert trace.stat().st_size > 1000
  assert f'profile: {tmp_path / "run" / "students" / "baseline" / "profile"}' in caplog.text
  lines = (folder / 'logs' / 'process-0.log').read_text().splitlines()
  assert 'process 0 of 1 on ' in lines[0] and lines[-1].endswith('ended')
  # The same run again, with a window that is over: it says so, and its log goes on.
  train.run(config, paths.Path(tmp_path / 'run'), progress=False, profile=(4, 6))
  assert len((folder / 'logs' / 'process-0.log').read_text().splitlines()) > len(lines)


def test_a_window_that_is_not_reached_is_told(tmp_path, caplog):
  profiler = profiling.Profiler(paths.Path(tmp_path), (50, 60), 0, 1)
  profiler.before(10, None)
  profiler.after(11, None)
  profiler.close()
  assert 'ended before step 50' in caplog.text


def test_what_ends_a_process_is_in_its_log_and_the_terminals_handlers_see_no_more_than_before(tmp_path, capsys):
  with pytest.raises(UserError), logs.log_to(paths.Path(tmp_path)):
    raise UserError('the disk is gone')
  assert 'ended by UserError: the disk is gone' in (tmp_path / 'logs' / 'process-0.log').read_text()
  assert logging.getLogger('kdjax').handlers == []
  assert capsys.readouterr().err == ''
