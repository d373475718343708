"""The launch scripts: their dry runs are what was recorded, every missing setting is named at once, and what is supervised is started again or not."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

REPO = pathlib.Path(__file__).parents[2]
RECORDED = REPO / 'tests' / 'launch'
PLACE = ['--name=kd', '--project=my-project', '--zone=us-east5-b']
GPUS = ['--name=kd', '--nodes=4', '--gpus-per-node=8']
PODS = ['--name=kd', '--image=us-docker.pkg.dev/my-project/my/kdjax']
XPK = [*PLACE, '--cluster=my-cluster']
TRAIN = ['--', '--config=configs/weak2strong.py:scale=paper']
KEPT = [*TRAIN, '--config.runs=gs://my-bucket/runs']
LOCAL = ['--config.checkpoint.local=/dev/shm/kdjax', '--config.checkpoint.local_every=50']


def launch(script: str, *arguments: str, root: pathlib.Path = REPO, **environment: str) -> subprocess.CompletedProcess:
  clean = {name: value for name, value in os.environ.items() if name in ('PATH', 'HOME', 'LANG')}
  return subprocess.run(
    [root / 'launch' / script, *arguments],
    capture_output=True,
    text=True,
    env=clean | environment,
    cwd='/',
    timeout=60,
  )


DRY = {
  'create': ['tpu.sh', 'create', *PLACE, '--accelerator=v6e-64', '--spot'],
  'create_slices': ['tpu.sh', 'create', *PLACE, '--accelerator=v5litepod-256', '--slices=4', '--reserved'],
  'setup': ['tpu.sh', 'setup', *PLACE],
  'run': ['tpu.sh', 'run', *PLACE, *TRAIN, '--config.name=two words'],
  'run_slices': ['tpu.sh', 'run', *PLACE, '--slices=2', *TRAIN, '--config.mesh.replica=2'],
  'resume': ['tpu.sh', 'resume', *PLACE, '--accelerator=v6e-64', *TRAIN],
  'stop': ['tpu.sh', 'stop', *PLACE],
  'logs': ['tpu.sh', 'logs', *PLACE],
  'delete': ['tpu.sh', 'delete', *PLACE],
  'slurm_run': ['slurm.sh', 'run', *GPUS, *TRAIN, '--config.name=two words'],
  'slurm_run_all': [
    'slurm.sh', 'run', *GPUS, '--cpus-per-task=12', '--partition=gpu', '--account=kd', '--time=12:00:00', *TRAIN,
  ],
  'slurm_resume': ['slurm.sh', 'resume', *GPUS, *TRAIN],
  'slurm_logs': ['slurm.sh', 'logs', '--name=kd'],
  'slurm_status': ['slurm.sh', 'status', '--name=kd'],
  'slurm_stop': ['slurm.sh', 'stop', '--name=kd'],
  'gke_run': ['gke.sh', 'run', *PODS, '--accelerator=v6e-64', '--context=my-cluster', '--namespace=kd', *KEPT],
  'gke_logs': ['gke.sh', 'logs', '--name=kd'],
  'gke_status': ['gke.sh', 'status', '--name=kd'],
  'gke_stop': ['gke.sh', 'stop', '--name=kd'],
  'gke_delete': ['gke.sh', 'delete', '--name=kd'],
  'gke_print': ['gke.sh', 'print', *PODS, '--accelerator=v6e-64', '--spot', *KEPT],
  'gke_print_slices': [
    'gke.sh', 'print', *PODS, '--accelerator=v5p-64', '--slices=2', *KEPT, '--config.mesh.replica=2', "--config.name=it's $(HOME)",
  ],
  'gke_print_bucket': [
    'gke.sh', 'print', *PODS, '--accelerator=v4-128', '--bucket=b', '--service-account=kd', *TRAIN, '--config.runs=/mnt/bucket/runs',
  ],
  'gke_print_local': [
    'gke.sh', 'print', *PODS, '--accelerator=v6e-64', '--bucket=b', '--local=/dev/shm/kdjax', *TRAIN, '--config.runs=/mnt/bucket/runs',
    '--config.checkpoint.local=/mnt/local', '--config.checkpoint.local_every=50',
  ],
  'xpk_run': ['xpk.sh', 'run', *XPK, '--accelerator=v6e-64', '--image=my/kdjax', '--spot', *KEPT, "--config.name=it's two"],
  'xpk_run_slices': ['xpk.sh', 'run', *XPK, '--accelerator=v5p-64', '--slices=2', '--base-image=my/kdjax', *KEPT],
  'xpk_logs': ['xpk.sh', 'logs', '--name=kd'],
  'xpk_status': ['xpk.sh', 'status', *XPK],
  'xpk_delete': ['xpk.sh', 'delete', *XPK],
}  # fmt: skip


@pytest.mark.parametrize('name', list(DRY))
def test_a_dry_run_prints_what_would_be_done_and_does_nothing(name):
  script, command, *rest = DRY[name]
  done = launch(script, command, '--dry-run', *rest)
  assert done.returncode == 0, done.stderr
  assert done.stdout == (RECORDED / f'{name}.txt').read_text()


def test_what_a_slice_was_asked_for_is_known_to_the_commands_that_follow(tmp_path):
  shutil.copytree(REPO / 'launch', tmp_path / 'launch')
  (tmp_path / 'bin').mkdir()
  gcloud = tmp_path / 'bin' / 'gcloud'
  gcloud.write_text('#!/bin/sh\necho "gcloud $*"\n')
  gcloud.chmod(0o755)
  fake = {'root': tmp_path, 'PATH': f'{gcloud.parent}:{os.environ["PATH"]}'}
  asked = ('--accelerator=v5litepod-256', '--slices=2', '--spot')
  created = launch('tpu.sh', 'create', *PLACE, *asked, **fake)
  assert created.returncode == 0, created.stderr
  resumed = launch('tpu.sh', 'resume', *PLACE, '--dry-run', *TRAIN, **fake)
  assert resumed.returncode == 0, resumed.stderr
  assert created.stdout.strip() in resumed.stdout.splitlines()
  assert {'--spot', '--node-count=2', '--runtime-version=v2-alpha-tpuv5-lite'} <= set(created.stdout.split())
  assert all(f'ssh kd-{i}' in launch('tpu.sh', 'stop', *PLACE, **fake).stdout for i in range(2))
  other = launch('tpu.sh', 'resume', *PLACE, '--accelerator=v6e-64', '--reserved', '--dry-run', *TRAIN, **fake).stdout
  assert '--accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --node-count=2' in other
  assert '--reserved' in other and '--spot' not in other


@pytest.mark.parametrize('where', ['=/mnt/local', ' /mnt/local', '=/mnt/local/kd'])
def test_local_checkpoints_in_what_is_mounted_are_no_mistake(where):
  pod = launch(
    'gke.sh',
    'print',
    *PODS,
    '--accelerator=v6e-64',
    '--local=/l',
    *KEPT,
    *f'{LOCAL[0].partition("=")[0]}{where}'.split(),
  )
  assert pod.returncode == 0, pod.stderr
  assert "hostPath: {path: '/l'" in pod.stdout


def test_every_recorded_dry_run_is_compared():
  assert {path.stem for path in RECORDED.glob('*.txt')} == set(DRY)


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    (['tpu.sh', 'create'], 'create: missing --name=... --project=... --zone=... --accelerator=...'),
    (['tpu.sh', 'setup', '--zone=z'], 'setup: missing --name=... --project=...'),
    (['tpu.sh', 'run', *PLACE], 'run: missing -- and what python -m kdjax.train is to be given'),
    (['tpu.sh', 'create', *PLACE, '--acelerator=v6e-64'], 'unknown option --acelerator=v6e-64; see launch/tpu.sh'),
    (['tpu.sh', 'create', *PLACE, '--spot=yes'], 'unknown option --spot=yes'),
    (['tpu.sh', 'create', '--name', 'kd'], '--name needs a value, as in --name=...'),
    (['tpu.sh', 'destroy', *PLACE], 'unknown command destroy; there are create, setup'),
    (['tpu.sh', 'create', 'delete', *PLACE], 'one command at a time: create or delete'),
    (['slurm.sh', 'run'], 'run: missing --name=... --nodes=... --gpus-per-node=...'),
    (['slurm.sh', 'stop'], 'stop: missing --name=...'),
    (['slurm.sh', 'run', *GPUS], 'run: missing -- and what'),
    (['slurm.sh', 'resume', '--name=never', *GPUS[1:]], 'resume: launched/never/command is not here'),
    (['slurm.sh', 'stop', '--name=never'], 'stop: launched/never is not here'),
    (['slurm.sh', 'delete', *GPUS], 'unknown command delete; there are run, logs, status, stop, resume'),
    (['gke.sh', 'run'], 'run: missing --name=... --image=... --accelerator=...'),
    (['gke.sh', 'run', *PODS, '--accelerator=v6e-64'], 'run: missing -- and what'),
    (['gke.sh', 'run', *PODS, '--accelerator=v6e-64', *TRAIN], 'add --config.runs=gs://BUCKET/runs'),
    (['gke.sh', 'print', *PODS, '--accelerator=v9-64', *KEPT], '--accelerator=v9-64: no such slice; as in v4-128,'),
    (['gke.sh', 'print', *PODS, '--accelerator=v6e-48', *KEPT], '--accelerator=v6e-48: counts chips; there are slices'),
    (['gke.sh', 'run', *PODS, '--accelerator=v5p-7', *KEPT], '--accelerator=v5p-7: counts TensorCores, two a chip'),
    (['gke.sh', 'run', *PODS, '--accelerator=v6e-64', *KEPT, *LOCAL], 'would go with the pods; add --local=FOLDER'),
    (['gke.sh', 'run', *PODS, '--accelerator=v6e-64', *KEPT, *LOCAL[0].split('=')], 'would go with the pods'),
    (['gke.sh', 'run', *PODS, '--accelerator=v6e-64', '--local=/l', *KEPT, *LOCAL], 'would go with the'),
    (
      ['gke.sh', 'run', *PODS, '--accelerator=v6e-64', '--local=/l', *KEPT, '--config.checkpoint.local=/mnt/local2'],
      'would go with the',
    ),
    (
      [
        'gke.sh',
        'run',
        *PODS,
        '--accelerator=v6e-64',
        '--local=/l',
        *KEPT,
        '--config.checkpoint.local=/mnt/local',
        *LOCAL,
      ],
      'would go with the',
    ),
    (['gke.sh', 'run', *PODS, '--accelerator=v6e-64', '--local=shm', *KEPT], '--local=shm: must be an absolute path'),
    (['xpk.sh', 'run', *XPK, '--accelerator=v6e-64', '--image=i', *KEPT, *LOCAL], "would go with xpk's pods"),
    (['gke.sh', 'resume', '--name=never'], 'resume: launched/never/jobset.yaml is not here'),
    (
      ['xpk.sh', 'run', '--zone=z'],
      'run: missing --name=... --cluster=... --project=... --accelerator=... --image=...',
    ),
    (['xpk.sh', 'run', '--image=a', '--base-image=b'], 'run: --image or --base-image, not both'),
    (['xpk.sh', 'delete'], 'delete: missing --name=... --cluster=... --project=... --zone=...'),
  ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, says):
  done = launch(*arguments)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith('error: ') and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_settings_may_stand_in_the_environment():
  place = {'NAME': 'kd', 'PROJECT': 'my-project', 'ZONE': 'us-east5-b', 'ACCELERATOR': 'v6e-64'}
  for spot in ({'PROVISIONING': 'spot'}, {'SPOT': 'true'}):
    done = launch('tpu.sh', 'create', '--dry-run', **place, **spot)
    assert done.stdout == (RECORDED / 'create.txt').read_text()
  done = launch(
    'slurm.sh', 'run', '--dry-run', *TRAIN, '--config.name=two words', NAME='kd', NODES='4', GPUS_PER_NODE='8'
  )
  assert done.stdout == (RECORDED / 'slurm_run.txt').read_text()


@pytest.mark.parametrize('script', ['tpu.sh', 'slurm.sh', 'gke.sh', 'xpk.sh'])
def test_help_is_the_scripts_own_words(script):
  done = launch(script, '--help')
  assert done.returncode == 0 and f'launch/{script} run ' in done.stdout and 'It has been checked' in done.stdout
  assert launch(script).stderr == done.stdout and launch(script).returncode == 2


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not installed')
def test_shellcheck_has_nothing_to_say():
  scripts = sorted(path.relative_to(REPO) for path in (REPO / 'launch').glob('*.sh'))
  done = subprocess.run(['shellcheck', '-x', *scripts], capture_output=True, text=True, cwd=REPO)
  assert done.returncode == 0, done.stdout


# What runs on a host.


def supervised(code: str, *arguments: str, restarts: int = 100, **environment: str) -> subprocess.Popen:
  return subprocess.Popen(
    [REPO / 'launch' / 'supervise.sh', sys.executable, '-c', code, *arguments],
    env=os.environ | environment | {'PAUSE': '0', 'RESTARTS': str(restarts)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def wait_for(file: pathlib.Path, text: str, times: int = 1) -> None:
  deadline = time.time() + 30
  while not (file.exists() and file.read_text().count(text) >= times):
    assert time.time() < deadline, f'{file} never said {text}'
    time.sleep(0.05)


COUNT = """
import os, pathlib, signal, sys
file = pathlib.Path(sys.argv[1]); n = len(file.read_text()) if file.exists() else 0
file.write_text('x' * (n + 1))
"""


@pytest.mark.parametrize('code', [0, 1, 2, 130])
def test_what_is_done_or_wrong_is_not_started_again(tmp_path, code):
  run = supervised(f'{COUNT}sys.exit({code})', str(tmp_path / 'count'))
  run.communicate(timeout=60)
  assert run.returncode == code
  assert (tmp_path / 'count').read_text() == 'x'


@pytest.mark.parametrize('how', ['os.kill(os.getpid(), signal.SIGKILL)', 'os.abort()', 'os._exit(77)', 'os._exit(75)'])
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


@pytest.mark.parametrize(('last', 'restarts'), [(75, 0), (75, 100), (0, 100)])
def test_a_command_that_was_told_to_stop_ends_with_its_own_code(tmp_path, last, restarts):
  """75: work is left; 0: it was the last step."""
  code = f"""{COUNT}
import time
signal.signal(signal.SIGTERM, lambda *_: os._exit({last}))
file.write_text('ready')
time.sleep(60)
"""
  run = supervised(code, str(tmp_path / 'count'), restarts=restarts)
  wait_for(tmp_path / 'count', 'ready')
  run.send_signal(signal.SIGTERM)
  _, error = run.communicate(timeout=60)
  assert run.returncode == last and not error


@pytest.mark.parametrize(('code', 'reason'), [(0, None), (1, '1'), (2, '2'), (75, None)])
def test_a_reason_to_end_is_written_down_where_the_code_alone_would_be_lost(tmp_path, code, reason):
  file = tmp_path / 'reason'
  run = supervised(f'import os; os._exit({code})', restarts=0, REASON=str(file))
  _, error = run.communicate(timeout=60)
  assert run.returncode == code and not error
  assert (file.read_text().strip() if file.exists() else None) == reason


def test_a_stop_reaches_the_command_and_is_not_followed_by_a_restart(tmp_path):
  code = f"""{COUNT}
import time
signal.signal(signal.SIGTERM, lambda *_: (file.write_text('saved'), os._exit(143)))
file.write_text('ready')
time.sleep(60)
"""
  run = supervised(code, str(tmp_path / 'count'))
  wait_for(tmp_path / 'count', 'ready')
  run.send_signal(signal.SIGTERM)
  _, error = run.communicate(timeout=60)
  assert (tmp_path / 'count').read_text() == 'saved'
  assert run.returncode == 143 and 'starting again' not in error
