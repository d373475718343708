"""launch/slurm.sh and the batch script that it submits, with fake Slurm commands: what goes back into the queue, and what does not."""

import os
import pathlib
import shutil
import signal
import subprocess

import pytest

from tests.launch.test_launch import GPUS, REPO, launch, wait_for

RECORD = 'printf "%s\\n" "$@" >>"$ROOT/calls/${0##*/}"'  # the arguments, one a line
COMMANDS = {
  'sbatch': RECORD,
  'scancel': RECORD,
  'scontrol': RECORD,
  'squeue': 'cat "$ROOT/state"',
  'srun': """# two processes; the greatest of their codes
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do SLURM_PROCID=$i "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || codes+=($?); done
exit "$(printf '%s\\n' 0 "${codes[@]}" | sort -n | tail -n 1)"
""",
  'python': """# exits at once with its code of CODES, or works until SIGTERM, then saves
echo "$*" >>"$ROOT/calls/python"
if [[ -n $CODES ]]; then set -- $CODES && shift "$SLURM_PROCID" && exit "$1"; fi
trap 'exit 75' TERM
echo "$PPID" >>"$ROOT/supervisors"
for ((i = 0; i < 300; i++)); do sleep 0.1; done
""",
}


class Slurm:
  """A working tree of its own, where Slurm is the commands above."""

  def __init__(self, root: pathlib.Path):
    self.root = root
    for folder in ('calls', 'bin', 'launched/kd'):
      (root / folder).mkdir(parents=True)
    shutil.copytree(REPO / 'launch', root / 'launch')
    for name, text in COMMANDS.items():
      (root / 'bin' / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
      (root / 'bin' / name).chmod(0o755)
    for command in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'x']):
      subprocess.run(['git', '-c', 'user.name=x', '-c', 'user.email=x@y', *command], cwd=root, check=True)
    self.stop = root / 'launched' / 'kd' / 'stop'
    self.in_state('RUNNING')
    self.environment = {'PATH': f'{root / "bin"}:{os.environ["PATH"]}', 'ROOT': str(root)}

  def in_state(self, state: str) -> None:
    (self.root / 'state').write_text(f'{state}\n')

  def launch(self, *arguments: str) -> None:
    done = launch('slurm.sh', *arguments, root=self.root, **self.environment)
    assert done.returncode == 0, done.stderr

  def job(self, *arguments: str, codes: str = '', restarted: int = 0) -> subprocess.Popen:
    """Starts the batch script, as Slurm does."""
    environment = {'SLURM_JOB_ID': '7', 'SLURM_JOB_NAME': 'kd', 'CODES': codes}
    if restarted:
      environment['SLURM_RESTART_COUNT'] = str(restarted)
    return subprocess.Popen(
      ['bash', self.root / 'launch' / 'slurm_job.sh', *arguments],
      env=os.environ | self.environment | environment, cwd=self.root, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

  def tell(self) -> None:
    """SIGTERM to both processes and not to the batch script: what Slurm does near the end of the time, and `scancel --signal=TERM`."""
    file = self.root / 'supervisors'
    wait_for(file, '\n', times=2)
    for process in file.read_text().split():
      os.kill(int(process), signal.SIGTERM)

  def calls(self, command: str) -> list[str]:
    file = self.root / 'calls' / command
    return file.read_text().splitlines() if file.exists() else []

  @property
  def requeued(self) -> bool:
    assert self.calls('scontrol') in ([], ['requeue', '7'])
    return bool(self.calls('scontrol'))


@pytest.fixture
def slurm(tmp_path):
  return Slurm(tmp_path)


@pytest.mark.parametrize(
  ('codes', 'code', 'again'),
  [
    ('0 0', 0, False),  # done
    ('2 2', 2, False),  # a config error
    ('1 1', 1, False),
    ('130 130', 130, False),
    ('75 134', 0, True),  # another process is gone
    ('137 75', 0, True),
    ('0 143', 0, True),
    ('134 2', 2, False),  # the reason is one process's own, however the other ended without it
    ('1 75', 1, False),
  ],
)
def test_what_is_done_or_wrong_ends_the_job_and_anything_else_goes_back_into_the_queue(slurm, codes, code, again):
  job = slurm.job('--config=a', codes=codes)
  _, error = job.communicate(timeout=60)
  assert job.returncode == code and slurm.requeued == again
  assert ('back into the queue' in error) == again
  assert slurm.calls('python') == 2 * ['-m kdjax.train --distributed --config=a']


def test_what_is_saved_near_the_end_of_the_time_goes_back_into_the_queue(slurm):
  job = slurm.job()
  slurm.tell()
  _, error = job.communicate(timeout=60)
  assert slurm.requeued and 'ended with code 75; back into the queue' in error


def test_what_is_stopped_on_purpose_does_not(slurm):
  job = slurm.job()
  wait_for(slurm.root / 'supervisors', '\n')
  slurm.launch('stop', '--name=kd')
  assert slurm.calls('scancel')[-4:] == ['--me', '--name=kd', '--state=RUNNING', '--signal=TERM']
  slurm.tell()
  job.communicate(timeout=60)
  assert job.returncode == 0 and not slurm.requeued


@pytest.mark.parametrize('state', ['COMPLETING', 'PENDING', ''])
def test_what_slurm_has_cancelled_or_put_back_itself_is_left_to_it(slurm, state):
  slurm.in_state(state)
  job = slurm.job(codes='75 75')
  _, error = job.communicate(timeout=60)
  assert job.returncode == 75 and not slurm.requeued and f'the job is {state or "gone"}' in error


def test_a_job_that_was_stopped_while_it_waited_does_not_start(slurm):
  slurm.stop.touch()
  job = slurm.job(restarted=1)
  job.communicate(timeout=60)
  assert job.returncode == 0 and not slurm.calls('python')


def test_a_new_job_knows_nothing_of_the_one_before(slurm):
  slurm.stop.touch()
  (slurm.root / 'launched' / 'kd' / 'reason').write_text('2\n')
  job = slurm.job(codes='75 75')
  job.communicate(timeout=60)
  assert slurm.requeued


def test_it_gives_up_in_the_end(slurm):
  job = slurm.job(codes='75 75', restarted=100)
  _, error = job.communicate(timeout=60)
  assert job.returncode == 75 and not slurm.requeued and 'after 100 restarts; giving up' in error


def test_what_was_submitted_is_recorded_and_submitted_again(slurm):
  slurm.launch('run', *GPUS, '--', '--config=a', "--config.name=it's two words")
  words = slurm.calls('sbatch')
  assert words[-3:] == ['launch/slurm_job.sh', '--config=a', "--config.name=it's two words"]
  assert '--ntasks-per-node=8' in words and '--gpus-per-node=8' in words
  folder = slurm.root / 'launched' / 'kd'
  assert {path.name for path in folder.iterdir()} == {'commit', 'uncommitted.diff', 'command'}
  slurm.launch('resume', *GPUS)
  assert slurm.calls('sbatch') == 2 * words


def test_slurm_reads_its_own_options_in_the_batch_script():
  lines = (REPO / 'launch' / 'slurm_job.sh').read_text().splitlines()
  first = next(i for i, line in enumerate(lines) if line and not line.startswith('#'))
  options = {line.removeprefix('#SBATCH ') for line in lines[:first] if line.startswith('#SBATCH ')}
  assert options == {'--requeue', '--open-mode=append', '--signal=TERM@120', '--dependency=singleton'}
