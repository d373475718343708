"""The launch scripts: their dry runs are what was recorded, every missing setting is named at once, and what is supervised is started again or not."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

REPO = pathlib.Path(__file__).parents[1]
PLACE = ['--name=kd', '--project=my-project', '--zone=us-east5-b']


def tpu(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
  clean = {name: value for name, value in os.environ.items() if name in ('PATH', 'HOME', 'LANG')}
  return subprocess.run(
    [REPO / 'launch' / 'tpu.sh', *arguments],
    capture_output=True,
    text=True,
    env=clean | environment,
    cwd='/',
    timeout=60,
  )


DRY = {
  'create': ['create', '--accelerator=v6e-64', '--spot'],
  'create_slices': ['create', '--accelerator=v5litepod-256', '--slices=4', '--reserved'],
  'setup': ['setup'],
  'run': ['run', '--', '--config=configs/weak2strong.py:scale=paper', '--config.name=two words'],
  'run_slices': ['run', '--slices=2', '--', '--config=configs/weak2strong.py:scale=paper', '--config.mesh.replica=2'],
  'resume': ['resume', '--accelerator=v6e-64', '--', '--config=configs/weak2strong.py:scale=paper'],
  'stop': ['stop'],
  'logs': ['logs'],
  'delete': ['delete'],
}


@pytest.mark.parametrize('name', list(DRY))
def test_a_dry_run_prints_what_would_be_done_and_does_nothing(name):
  command, *rest = DRY[name]
  done = tpu(command, '--dry-run', *PLACE, *rest)
  assert done.returncode == 0, done.stderr
  assert done.stdout == (REPO / 'tests' / 'launch' / f'{name}.txt').read_text()


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['create'], 'create: missing --name=... --project=... --zone=... --accelerator=...'),
    (['setup', '--zone=z'], 'setup: missing --name=... --project=...'),
    (['run', *PLACE], 'run: missing -- and what python -m kdjax.train is to be given'),
    (['create', *PLACE, '--acelerator=v6e-64'], 'unknown option --acelerator=v6e-64'),
    (['destroy', *PLACE], 'unknown command destroy; there are create, setup'),
    (['create', 'delete', *PLACE], 'one command at a time: create or delete'),
  ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, says):
  done = tpu(*arguments)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith('error: ') and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_settings_may_stand_in_the_environment():
  done = tpu(
    'create', '--dry-run', NAME='kd', PROJECT='my-project', ZONE='us-east5-b', ACCELERATOR='v6e-64', PROVISIONING='spot'
  )
  assert done.stdout == (REPO / 'tests' / 'launch' / 'create.txt').read_text()


def test_help_is_the_scripts_own_words():
  assert 'follows host 0' in tpu('--help').stdout


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not installed')
@pytest.mark.parametrize('script', sorted((REPO / 'launch').glob('*.sh')), ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
  done = subprocess.run(['shellcheck', script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


# What runs on a host.


def supervised(code: str, *arguments: str, restarts: int = 100) -> subprocess.Popen:
  return subprocess.Popen(
    [REPO / 'launch' / 'supervise.sh', sys.executable, '-c', code, *arguments],
    env=os.environ | {'PAUSE': '0', 'RESTARTS': str(restarts)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


COUNT = """
import os, pathlib, signal, sys
file = pathlib.Path(sys.argv[1]); n = len(file.read_text()) if file.exists() else 0
file.write_text('x' * (n + 1))
"""


@pytest.mark.parametrize('code', [0, 1, 2])
def test_what_is_done_or_wrong_is_not_started_again(tmp_path, code):
  run = supervised(f'{COUNT}sys.exit({code})', str(tmp_path / 'count'))
  run.communicate(timeout=60)
  assert run.returncode == code
  assert (tmp_path / 'count').read_text() == 'x'


@pytest.mark.parametrize('how', ['os.kill(os.getpid(), signal.SIGKILL)', 'os.abort()', 'os._exit(77)'])
def test_what_was_killed_is_started_again(tmp_path, how):
  run = supervised(f'{COUNT}{how} if n < 3 else sys.exit(0)', str(tmp_path / 'count'))
  _, error = run.communicate(timeout=60)
  assert run.returncode == 0
  assert (tmp_path / 'count').read_text() == 'xxxx' and error.count('starting again') == 3


def test_it_gives_up_in_the_end(tmp_path):
  run = supervised(f'{COUNT}os._exit(9)', str(tmp_path / 'count'), restarts=2)
  _, error = run.communicate(timeout=60)
  assert run.returncode == 9 and 'after 2 restarts; giving up' in error
  assert (tmp_path / 'count').read_text() == 'xxx'


def test_a_stop_reaches_the_command_and_is_not_followed_by_a_restart(tmp_path):
  code = f"""{COUNT}
import time
signal.signal(signal.SIGTERM, lambda *_: (file.write_text('saved'), os._exit(143)))
file.write_text('ready')
time.sleep(60)
"""
  run = supervised(code, str(tmp_path / 'count'))
  deadline = time.time() + 30
  while not ((tmp_path / 'count').exists() and (tmp_path / 'count').read_text() == 'ready') and time.time() < deadline:
    time.sleep(0.05)
  run.send_signal(signal.SIGTERM)
  _, error = run.communicate(timeout=60)
  assert (tmp_path / 'count').read_text() == 'saved'
  assert run.returncode == 143 and 'starting again' not in error
