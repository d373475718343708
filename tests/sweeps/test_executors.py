"""Runners on other machines: what is started there, with what, and what is refused."""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from kdjax import grid as command
from kdjax.errors import UserError
from kdjax.storage import paths
from kdjax.sweeps import executors
from tests import tiny


@pytest.fixture
def work(tmp_path):
  return executors.Work('tiny', paths.Path(tmp_path / 'grid'), ('--config=a file.py', '--config.x=1'), lambda: 'tiny')


def test_the_printed_command_is_one_a_runner_and_may_be_pasted(work):
  lines = executors.format_commands(work, 3).splitlines()
  assert len(lines) == 3 and len(set(lines)) == 1
  here, _, command_ = lines[0].partition(' && ')
  assert shlex.split(here) == ['cd', os.getcwd()]
  assert shlex.split(command_) == [sys.executable, '-m', 'kdjax.grid', 'run', '--config=a file.py', '--config.x=1']


@pytest.mark.parametrize(
  'text',
  ['CPU', 'CPU=', '=1', 'CPU=two', 'CPU=1;GPU=1', 'CPU=0', 'CPU=0.0,GPU=1', 'CPU=-1', 'CPU=nan', 'CPU=' + '9' * 400],
)
def test_resources_are_names_and_numbers(text):
  with pytest.raises(UserError, match='write NAME=NUMBER'):
    executors.parse_resources(text)
  assert executors.parse_resources('CPU=2,GPU=0.5') == {'CPU': 2.0, 'GPU': 0.5}
  assert executors.parse_resources('') == {}


def test_a_runner_is_on_one_node_and_takes_an_accelerator_where_there_is_one():
  nodes = [
    {'Alive': True, 'Resources': {'CPU': 8, 'GPU': 2}},
    {'Alive': True, 'Resources': {'CPU': 3, 'GPU': 4}},
    {'Alive': False, 'Resources': {'CPU': 64, 'GPU': 8}},
    {'Alive': True, 'Resources': {'CPU': 64}},
  ]
  assert executors._room(nodes, {'CPU': 2, 'GPU': 1}) == 3
  assert executors._room(nodes, {'GPU': 8}) == 0
  assert executors._usual_share({'CPU': 64, 'GPU': 8}) == {'GPU': 1}
  assert executors._usual_share({'CPU': 64}) == {'CPU': 1}


FAKES = {
  'srun': 'shift; echo "$@" > "$0.said"; exit "$CODE"',
  'squeue': 'echo "$STATE"',
  'scontrol': 'echo "$@" > "$0.said"',
}


@pytest.mark.parametrize(
  ('code', 'state', 'requeued'),
  [
    (0, 'RUNNING', False),  # all is done
    (75, 'RUNNING', True),  # it saved because its time was over
    (75, 'COMPLETING', False),  # cancelled
    (1, 'RUNNING', False),  # a job failed: the others are done
    (2, 'RUNNING', False),  # the config is wrong
    (130, 'RUNNING', False),  # stopped by the user
  ],
)
def test_a_slurm_runner_with_work_left_goes_back_into_the_queue(work, tmp_path, code, state, requeued):
  for name, text in FAKES.items():
    (tmp_path / name).write_text(f'#!/bin/bash\n{text}\n')
    (tmp_path / name).chmod(0o755)
  script = executors.slurm_script(work)
  told = {'CODE': str(code), 'STATE': state, 'SLURM_JOB_ID': '7'}
  path = f'{tmp_path}:{os.environ["PATH"]}'
  done = subprocess.run(['bash', '-c', script], env=os.environ | told | {'PATH': path}, timeout=60, check=False)
  assert done.returncode == code
  assert (tmp_path / 'srun.said').read_text().split()[1:4] == ['-m', 'kdjax.grid', 'run']
  assert (tmp_path / 'scontrol.said').exists() == requeued


def test_sbatch_gets_every_option_whole(work, tmp_path, monkeypatch):
  """Whatever the names of the folder and the grid are."""
  odd = dataclasses.replace(work, folder=paths.Path(tmp_path) / "100% my 'runs' [v1]", name='two words')
  (tmp_path / 'sbatch').write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$0.said"\necho Submitted batch job 7\n')
  (tmp_path / 'sbatch').chmod(0o755)
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
  assert executors.submit_to_slurm(odd, 4, ['--partition=gpu']) == 'Submitted batch job 7'
  *options, script, _ = (tmp_path / 'sbatch.said').read_text().split('\0')
  assert {'--job-name=two words', '--array=1-4', '--requeue', '--partition=gpu'} <= set(options)
  (log,) = [option for option in options if option.startswith('--output=')]
  assert log.replace('%%', '%') == f'--output={odd.folder}/runners/%a.log' and log.count('%%') == 1
  assert pathlib.Path(script).read_text() == executors.slurm_script(odd)


def refused(capsys, *arguments) -> str:
  with pytest.raises(SystemExit) as e:
    command.main(list(arguments))
  assert e.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  return line


def test_what_cannot_be_started_is_one_line_and_nothing_is_written(tiny_grid, tmp_path, capsys, monkeypatch):
  config = tiny.write_grid_config(tmp_path, tiny_grid[0])
  run = ('run', f'--config={config}', f'--workdir={tmp_path / "grid"}')
  monkeypatch.setenv('PATH', str(tmp_path))
  assert 'no sbatch here' in refused(capsys, *run, '--executor=slurm')
  assert 'leave --cell and --shard out' in refused(capsys, *run, '--executor=print', '--shard=1/2')
  assert 'write NAME=NUMBER' in refused(capsys, *run, '--executor=ray', '--resources=GPU')
  monkeypatch.setattr(executors.importlib.util, 'find_spec', lambda name: None)
  assert 'pip install' in refused(capsys, *run, '--executor=ray')
  assert not (tmp_path / 'grid').exists()


def test_print_names_the_folder_and_every_change(tiny_grid, tmp_path, capsys):
  config = tiny.write_grid_config(tmp_path, tiny_grid[0])
  arguments = (f'--config={config}', '--config.last=2', f'--workdir={tmp_path / "grid"}')
  command.main(['run', *arguments, '--executor=print', '--runners=2'])
  first, second = capsys.readouterr().out.splitlines()
  assert first == second and first.endswith(shlex.join(arguments))
  assert not (tmp_path / 'grid').exists()


def test_a_runner_on_ray_that_stops_with_work_left_is_started_again(tmp_path, capfd):
  script = tmp_path / 'runner.sh'
  script.write_text(
    '#!/bin/bash\necho x >> count; echo "saved $(wc -l < count)" >&2; (($(wc -l < count) < 3)) && exit 75; exit 1\n'
  )
  script.chmod(0o755)
  assert executors._runner(0, str(tmp_path), [str(script)]) == (1, 'saved 3')
