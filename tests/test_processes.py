"""Whole commands as notebooks, pipelines and schedulers run them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from kdjax import cli
from kdjax.runs.folder import RunFolder
from kdjax.scoring import job as jobs
from kdjax.storage.paths import write_json
from kdjax.sweeps import config as grid_config
from kdjax.sweeps import runner
from kdjax.sweeps.config import GridConfig
from tests import commands, several, tiny


def command(module: str, *arguments, **options) -> subprocess.Popen:
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'stdin': subprocess.DEVNULL}
  return subprocess.Popen([sys.executable, '-m', f'kdjax.{module}', *map(str, arguments)], **pipes | options)


def shell_of_colab() -> dict[str, str]:
  """The environment of `!python -m ...` in a cell: the notebook's backend, no terminal; here also an ASCII-only stdout."""
  env = {name: value for name, value in commands.environment().items() if name not in ('COLUMNS', 'LINES', 'LC_ALL')}
  return env | {'MPLBACKEND': 'module://matplotlib_inline.backend_inline', 'TERM': 'dumb', 'PYTHONIOENCODING': 'ascii'}


def test_the_main_job_runs_in_a_shell_like_colabs(home, tmp_path):
  config = tiny.write_config(
    tmp_path,
    **tiny.write_text(home) | {'data.cache': str(home / 'runs' / 'stores'), 'student.arms': ('baseline', 'unigram')},
  )
  process = command('train', f'--config={config}', f'--workdir={tmp_path / "run"}', env=shell_of_colab(), cwd=tmp_path)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err.decode()
  assert b'\r' not in out + err and b'\x1b' not in out + err and b'Traceback' not in err
  assert 'bits/byte' in out.decode('ascii') and 'figure: ' in out.decode('ascii')
  assert (tmp_path / 'run' / 'run.png').stat().st_size > 10_000
  lines = err.decode('ascii').splitlines()
  assert len(lines) < 20 and all(len(line) < 300 for line in lines)
  assert [line for line in lines if line.startswith('2 students: 100%| 12/12 [')]


def long_run(home, folder, **fields):
  """Return (config file, folder) of a run that lasts until it is stopped."""
  endless = {'student.tokens': 10_000 * 8 * 16, 'checkpoint.every': 5000, 'eval.every': 5000}
  return several.experiment(home, folder, **{'student.arms': ('baseline',), **endless, **fields})


@pytest.mark.parametrize(
  ('number', 'code'), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_training_that_is_told_to_stop_says_so_saves_and_exits_with_work_left(home, tmp_path, number, code):
  config, workdir = long_run(home, tmp_path / 'e')
  process = commands.start(config, workdir)
  commands.wait_for(lambda: several.lines(workdir) > 0 or (workdir / 'students/baseline/run.json').exists(), process)
  process.send_signal(number)
  assert commands.finish(process, timeout=120) == [code]
  told = [line for line in commands.errors(process).splitlines() if 'sees' not in line and 'goodput' not in line]
  assert told[0].startswith('Stopping after this step. The run is saved, and the same command resumes it.')
  assert told[-1].startswith('student: stopped at step ') and told[-1].endswith('saved. The same command resumes it.')
  assert sum('topping' in line for line in told) == 1 and 'Traceback' not in commands.errors(process)
  student = RunFolder(workdir / 'students' / 'baseline')
  assert student.status()['state'] == 'preempted'
  assert commands.leaves(student.path)['step'] > 0


def test_an_evaluation_that_is_told_to_stop_exits_with_work_left(main_job, tmp_path):
  (experiment,) = (path.parent for path in (main_job / 'runs').glob('tiny-*/experiment.json'))
  shutil.copytree(main_job, tmp_path / 'home')
  workdir = tmp_path / 'home' / 'runs' / experiment.name
  for run in jobs.find_job(workdir).students:  # it looks as if it is still training
    write_json(run.path / 'status.json', run.status() | {'state': 'running', 'heartbeat': time.time() + 1e6})
  process = commands.start(tmp_path, workdir, '--watch', module='kdjax.evaluate')
  commands.wait_for(lambda: 'scored' in commands.errors(process), process)
  process.send_signal(signal.SIGTERM)
  assert commands.finish(process, timeout=60) == [75]
  told = commands.errors(process).splitlines()
  assert told[
    -1
  ] == 'Stopped by SIGTERM. The same command resumes what is left.' and 'Traceback' not in commands.errors(process)


def test_a_reader_that_leaves_a_generation_ends_it_without_a_word(main_job):
  (run,) = (main_job / 'runs').glob('tiny-*/students/distilled')
  process = command('generate', run, 'α', '--samples', 50, '--max-tokens', 12, env=commands.environment())
  assert process.stdout.readline() == b'--- 1\n'
  process.stdout.close()
  assert process.wait(120) == 141
  assert process.stderr.read() == b''


def test_a_prompt_that_is_not_utf_8_is_one_line(tmp_path):
  process = command('generate', tmp_path, os.fsdecode(b'caf\xe9'), env=commands.environment())
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out) == (2, b'')
  (line,) = err.decode().splitlines()
  assert line.startswith("error: argument PROMPT: must be UTF-8 text, got 'caf\\udce9'")


OWNER = """
import os, sys, time
from kdjax.runs.folder import Heartbeat, RunFolder
folder = RunFolder(sys.argv[1])
folder.claim(5)
with Heartbeat([folder], 9).beating():
  print('owned', flush=True)
  time.sleep(600)
"""
IN_A_CONTAINER = ['unshare', '--pid', '--fork', '--mount-proc', '--kill-child']


def in_containers() -> bool:
  return subprocess.run([*IN_A_CONTAINER, 'true'], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not shutil.which('unshare') or not in_containers(), reason='no PID namespace can be made here')
def test_a_live_trainer_of_another_container_of_the_same_name_keeps_its_folder(tmp_path):
  """Each container sees only its own processes: the owner's PID is another process there, or none."""
  words = [*IN_A_CONTAINER, sys.executable, '-c', OWNER, str(tmp_path / 'r')]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'env': commands.environment(), 'text': True}
  first = subprocess.Popen(words, **pipes)
  try:
    assert first.stdout.readline() == 'owned\n'
    second = subprocess.Popen(words, **pipes)
    _, error = second.communicate(timeout=60)
    assert second.returncode and 'another trainer owns it' in error
    first.kill()
    first.wait(60)
    third = subprocess.Popen(words, **pipes)  # its heartbeat has stopped: the folder is taken over after the timeout
    lines = [third.stdout.readline(), third.stdout.readline()]
    assert 'waiting up to 5 s to see whether it is alive' in lines[0] and lines[1] == 'owned\n'
    third.kill()
  finally:
    first.kill()


SHORT_GRID = {  # a baseline, a teacher and its student, without a pilot: overrides of the tiny grid
  'seed': '43',
  'student_tokens': f'{200 * 8 * 16}',
  'base.checkpoint.every': '150',
  'base.eval.every': '150',
  'pilot.skip': 'true',
  'controls.tuned.enabled': 'false',
  'controls.unigram': 'false',
  'controls.flop_matched': '',
  'contrasts': 'weak_helps',
  'primary': 'weak_helps:in-domain',
}


def test_a_grid_that_is_told_to_stop_says_so_and_is_finished_by_the_same_command(home, tmp_path):
  """In the middle of a cell, and between two jobs: the teacher's is owned by this process, and its student waits."""
  config, folder = tiny.write_grid_config(tmp_path, home), tmp_path / 'grid'
  overrides = [f'--config.{name}={value}' for name, value in SHORT_GRID.items()]
  go = lambda: commands.start(config, folder, 'run', *overrides, module='kdjax.grid')
  grid = cli.load_as(GridConfig, grid_config.problems, str(config), SHORT_GRID)
  all_jobs = runner.list_jobs(grid, folder)
  states = lambda: {
    name: runner.job_state(folder, job, 60) for name, job in zip(('teacher', 'lm', 'kd'), all_jobs, strict=True)
  }
  baseline = RunFolder(folder / 'cells' / all_jobs[1].cells[0].id)
  teacher = RunFolder(folder / 'jobs' / all_jobs[0].id)
  teacher.claim(60)

  process = go()
  commands.wait_for(lambda: baseline.metrics.exists() and baseline.metrics.read_bytes(), process)
  process.send_signal(signal.SIGTERM)
  assert commands.finish(process, timeout=60) == [75]
  told = [line for line in commands.errors(process).splitlines() if 'sees' not in line and 'goodput' not in line]
  assert told[0] == 'Stopping after this step. The run is saved, and the same command resumes it.'
  assert len(told) == 2 and re.fullmatch(
    r'student: stopped at step \d+ of 200 and saved. The same command resumes it.', told[1]
  )
  stopped_at = commands.leaves(baseline.path)['step']
  assert 0 < stopped_at < 200 and states() == {'teacher': 'missing', 'lm': 'stopped', 'kd': 'missing'}

  process = go()
  commands.wait_for(lambda: states()['lm'] == 'done', process)
  process.send_signal(signal.SIGTERM)
  assert commands.finish(process, timeout=60) == [75]
  told = [line for line in commands.errors(process).splitlines() if 'sees' not in line and 'goodput' not in line]
  assert told == ['Stopped by SIGTERM. The same command resumes what is left.']
  assert states() == {'teacher': 'missing', 'lm': 'done', 'kd': 'missing'}

  teacher.release()
  process = go()
  assert commands.finish(process, timeout=180) == [0]
  assert 'all done' in commands.output(process)[0] and set(states().values()) == {'done'}
  assert [record['step'] for record in commands.metrics(baseline.path)][-1] == 200
  assert len(baseline.read_record()['commands']) == 2
