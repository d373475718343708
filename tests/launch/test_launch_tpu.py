"""Cloud TPU with a fake gcloud: what a slice's state makes of setup and resume; and a host's own script, with real processes."""

import json
import os
import pathlib
import shutil
import subprocess

import psutil
import pytest

from tests import commands
from tests.launch.test_launch import PLACE, REPO, TRAIN, launch

GCLOUD = """#!/usr/bin/env bash
echo "$*" >>"$HOME/calls"
[[ $* == *describe* ]] || exit 0
read -r state <"$HOME/states"
[[ $(wc -l <"$HOME/states") == 1 ]] || sed -i 1d "$HOME/states"
case $state in
NONE) echo 'ERROR: (gcloud) NOT_FOUND: Resource was not found.' >&2; exit 1 ;;
DOWN) echo 'ERROR: (gcloud) There was a problem refreshing your current auth tokens' >&2; exit 1 ;;
*) echo "$state" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
  """A git checkout with the launch scripts, and a fake gcloud on the PATH."""
  shutil.copytree(REPO / 'launch', tmp_path / 'launch')
  for name in ('kept.py', 'gone.py', 'two words.py'):
    (tmp_path / name).write_text(name)
  git = lambda *words: subprocess.run(
    ['git', '-c', 'user.name=k', '-c', 'user.email=k@d', *words], cwd=tmp_path, check=True, capture_output=True
  )
  git('init', '-q'), git('add', '.'), git('commit', '-qm', 'all')
  (tmp_path / 'bin').mkdir()
  (tmp_path / 'bin' / 'gcloud').write_text(GCLOUD)
  (tmp_path / 'bin' / 'gcloud').chmod(0o755)
  return tmp_path


def tpu(
  project: pathlib.Path, command: str, *states: str, arguments=()
) -> tuple[subprocess.CompletedProcess, list[str]]:
  """Run a command while the slice has these states, one after the other; returns what gcloud was asked, without questions for the state."""
  (project / 'states').write_text('\n'.join(states) + '\n')
  (project / 'calls').write_text('')
  fake = {'HOME': str(project), 'PATH': f'{project / "bin"}:{os.environ["PATH"]}', 'PAUSE': '0.01'}
  done = launch('tpu.sh', command, *PLACE, '--accelerator=v6e-8', *arguments, root=project, **fake)
  calls = [line.split(' kd')[0] for line in (project / 'calls').read_text().splitlines()]
  return done, [call for call in calls if 'describe' not in call]


DELETE = 'compute tpus queued-resources delete'
CREATE = 'compute tpus queued-resources create'
COPY = 'compute tpus tpu-vm scp launched/kd.tar.gz'
SSH = 'compute tpus tpu-vm ssh'


@pytest.mark.parametrize(
  ('states', 'calls'),
  [
    (['ACTIVE'], [SSH]),
    (['SUSPENDED', 'ACCEPTED', 'PROVISIONING', 'ACTIVE'], [DELETE, CREATE, COPY, SSH, SSH]),
    (['FAILED', 'ACTIVE'], [DELETE, CREATE, COPY, SSH, SSH]),
    (['NONE', 'ACCEPTED', 'ACTIVE'], [CREATE, COPY, SSH, SSH]),
    (['WAITING_FOR_RESOURCES', 'DOWN', 'PROVISIONING', 'ACTIVE'], [COPY, SSH, SSH]),
  ],
  ids=lambda value: '-'.join(value) if value[0].isupper() else '',
)
def test_resume_deletes_only_what_was_taken_away(project, states, calls):
  done, asked = tpu(project, 'resume', *states, arguments=TRAIN)
  assert done.returncode == 0, done.stderr
  assert asked == calls


def test_resume_changes_nothing_where_the_state_is_not_known(project):
  done, asked = tpu(project, 'resume', 'DOWN', arguments=TRAIN)
  assert done.returncode == 2 and asked == []
  (line,) = done.stderr.splitlines()
  assert 'the state of kd is not known, so nothing was changed' in line and 'auth tokens' in line


@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDED', 'NONE'])
def test_setup_does_not_wait_for_what_will_not_come(project, state):
  done, asked = tpu(project, 'setup', 'ACCEPTED', state)
  assert done.returncode == 2 and asked == []
  assert 'waiting for kd to become ACTIVE (ACCEPTED)' in done.stdout
  assert 'will not become active' in done.stderr


def test_setup_gives_up_where_the_state_stays_unknown(project):
  done, asked = tpu(project, 'setup', 'DOWN')
  assert done.returncode == 2 and asked == [] and 'auth tokens' in done.stderr


def test_setup_packs_the_tracked_files_that_are_there(project):
  (project / 'gone.py').unlink()
  (project / 'untracked.py').write_text('')
  (project / 'kept.py').write_text('changed')
  done, _ = tpu(project, 'setup', 'ACTIVE')
  assert done.returncode == 0, done.stderr
  out = project / 'out'
  out.mkdir()
  subprocess.run(['tar', '-xzf', project / 'launched' / 'kd.tar.gz', '-C', out], check=True)
  assert {path.name for path in out.glob('*.py')} == {'kept.py', 'two words.py'}
  assert (out / 'kept.py').read_text() == 'changed'


# A host's own script.

PYTHON = """#!/usr/bin/env python3
import json, pathlib, signal, sys, time
home = pathlib.Path(__file__).parents[1]
with open(home / 'starts', 'a') as file:
  print(json.dumps(sys.argv[1:]), file=file)
print('started', flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
time.sleep(0 if (home / 'finish').exists() else 60)
"""
CRONTAB = """#!/usr/bin/env bash
if [[ $1 == -l ]]; then cat "$HOME/crontab"; else cat >"$HOME/new" && mv "$HOME/new" "$HOME/crontab"; fi
"""


@pytest.fixture
def host(tmp_path):
  shutil.copytree(REPO / 'launch', tmp_path / 'launch')
  (tmp_path / 'bin').mkdir()
  for name, text in (('python', PYTHON), ('crontab', CRONTAB)):
    (tmp_path / 'bin' / name).write_text(text)
    (tmp_path / 'bin' / name).chmod(0o755)
  yield tmp_path
  on(tmp_path, 'stop')
  commands.wait_for(lambda: not (tmp_path / 'train.pid').exists())


def on(host, *words) -> subprocess.CompletedProcess:
  fake = {'HOME': str(host), 'PATH': f'{host / "bin"}:{os.environ["PATH"]}'}
  return subprocess.run(
    [host / 'launch' / 'host.sh', *words], env=fake, cwd='/', capture_output=True, text=True, timeout=60, check=False
  )


def starts(host) -> list[list[str]]:
  file = host / 'starts'
  return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


ARGUMENTS = ['--config=c.py', '--config.name=two "words"']
COMMAND = ['-m', 'kdjax.train', '--distributed', *ARGUMENTS]


def test_a_host_starts_once_and_again_after_a_reboot_until_it_is_stopped(host):
  (host / 'crontab').write_text('5 4 * * * backup\n')
  (host / 'train.log').write_text('of an earlier run\n')
  assert on(host, 'start', '--', *ARGUMENTS).returncode == 0
  commands.wait_for(lambda: starts(host) == [COMMAND])
  again = on(host, 'start', '--', *ARGUMENTS)
  assert again.returncode == 2 and 'runs on this host already' in again.stderr
  assert (host / 'crontab').read_text() == f'5 4 * * * backup\n@reboot {host}/launch/host.sh reboot\n'

  supervisor = psutil.Process(int((host / 'train.pid').read_text()))
  for process in [supervisor, *supervisor.children(recursive=True)]:  # the host goes down
    process.kill()
  assert on(host, 'reboot').returncode == 0
  commands.wait_for(lambda: starts(host) == [COMMAND] * 2)
  commands.wait_for(lambda: (host / 'train.log').read_text() == 'of an earlier run\nstarted\nstarted\n')

  assert on(host, 'stop').returncode == 0
  commands.wait_for(lambda: not (host / 'train.pid').exists())
  assert (host / 'crontab').read_text() == '5 4 * * * backup\n'
  assert on(host, 'reboot').returncode == 0 and len(starts(host)) == 2


def test_a_host_that_shuts_down_in_order_starts_again_and_a_finished_run_does_not(host):
  on(host, 'start', '--', *ARGUMENTS)
  commands.wait_for(lambda: len(starts(host)) == 1)
  subprocess.run(['pkill', '-TERM', '-P', (host / 'train.pid').read_text().strip()], check=True)
  commands.wait_for(lambda: not (host / 'train.pid').exists())
  (host / 'finish').touch()
  on(host, 'reboot')
  commands.wait_for(lambda: len(starts(host)) == 2 and not (host / 'train.args').exists())
  on(host, 'reboot')
  assert len(starts(host)) == 2
