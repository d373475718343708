"""Where the runners of a grid run: here, on a Ray cluster, as an array of Slurm jobs, or wherever somebody pastes a command.

Runners need no scheduler among them: each claims what is open, waits for what others do, and takes over what a dead one has left
(kdjax/sweeps/runner.py). So an executor only starts N times the same command, on machines that see the same folder, and starts it again where
its machine was taken away.
"""

import dataclasses
import importlib.util
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdjax.errors import TEMPORARY, TrainingError, UserError
from kdjax.runtime.distributed import WATCHED
from kdjax.storage import paths

log = logging.getLogger('kdjax')

EXECUTORS = ('local', 'ray', 'slurm', 'print')
POLL = 10.0  # seconds between looks at a cluster's runners
RETRIES = 100  # times that Ray starts a runner again whose machine or process was lost


@dataclasses.dataclass(frozen=True)
class Work:
  """What runners are to do: the arguments of `python -m kdjax.grid run`, where, and how its state is told."""

  name: str
  folder: paths.Path
  arguments: tuple[str, ...]
  status: Callable[[], str]  # the text of `python -m kdjax.grid status`

  @property
  def words(self) -> list[str]:
    return [sys.executable, '-m', 'kdjax.grid', 'run', *self.arguments]


def parse_resources(text: str) -> dict[str, float]:
  """'CPU=2,GPU=1,TPU=4' -> what a runner takes of a Ray node. Raises UserError for anything else."""
  found: dict[str, float] = {}
  for part in filter(None, text.split(',')):
    name, equals, value = part.partition('=')
    if not equals or not re.fullmatch(r'\d{1,9}(\.\d{1,9})?', value) or not float(value) or not name.strip():
      raise UserError(
        f'--resources={text}: write NAME=NUMBER, with numbers above 0, separated by commas, as in --resources=CPU=2,GPU=1'
      )
    found[name.strip()] = float(value)
  return found


def format_commands(work: Work, runners: int) -> str:
  """The command of a runner, once for each."""
  line = f'cd {shlex.quote(os.getcwd())} && {shlex.join(work.words)}'
  return '\n'.join([line] * max(1, runners))


def slurm_options(work: Work, runners: int) -> list[str]:
  """Options of sbatch for an array of runners. Slurm signals a runner before its time limit or a preemption."""
  log = f'{paths.absolute(work.folder)}/runners/'.replace('%', '%%') + '%a.log'
  return [
    f'--job-name={work.name}',
    f'--array=1-{max(1, runners)}',
    f'--output={log}',
    '--open-mode=append',
    '--requeue',
    '--signal=TERM@120',
  ]


def slurm_script(work: Work) -> str:
  """The batch script of a runner: one that saved and has work left (TEMPORARY) goes back into the queue."""
  return '\n'.join(
    [
      '#!/usr/bin/env bash',
      f'cd {shlex.quote(os.getcwd())} || exit 1',
      f'srun --ntasks=1 {shlex.join(work.words)}',
      'code=$?',
      'state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")',
      f'if ((code == {TEMPORARY})) && [[ $state == RUNNING ]]; then',
      '  scontrol requeue "$SLURM_JOB_ID"',
      'fi',
      'exit "$code"',
      '',
    ]
  )


def check_executor(executor: str, folder: paths.Path) -> None:
  """Raise UserError if it cannot be used here; to be asked before anything is written."""
  if executor == 'ray' and importlib.util.find_spec('ray') is None:
    raise UserError("--executor=ray: Ray is not installed; pip install 'kdjax[ray]'")
  if executor == 'slurm' and shutil.which('sbatch') is None:
    raise UserError('--executor=slurm: there is no sbatch here; start this on a login node of the cluster')
  if executor == 'slurm' and paths.is_remote(folder):
    raise UserError(f'--executor=slurm writes its logs beside the grid, which is in a store ({folder}); use --workdir')


def submit_to_slurm(work: Work, runners: int, options: Sequence[str]) -> str:
  """Submit the array; return what sbatch prints."""
  (work.folder / 'runners').mkdir(parents=True, exist_ok=True)
  script = work.folder / 'runners' / 'job.sh'
  paths.write_text(script, slurm_script(work))
  # As arguments: a #SBATCH line would be split at the blanks of a folder's name.
  command = ['sbatch', *slurm_options(work, runners), *options, str(script)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise UserError(f'sbatch: {(done.stderr.strip().splitlines() or ["failed"])[-1]} ({script})')
  return done.stdout.strip()


def run_on_ray(work: Work, runners: int, per_runner: Mapping[str, float], address: str = '') -> None:
  """Run on a Ray cluster until all is done. Raises TrainingError if a runner failed, UserError where there is no cluster or no room.

  Each runner is a task with a process of its own. Ray starts one again whose process or node was lost; the grid's folder, and this checkout
  at this path, must be seen by every node.
  """
  import ray

  try:
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address or None, log_to_driver=True, logging_level=logging.ERROR)
    if callable(handler):
      signal.signal(signal.SIGTERM, handler)  # Ray has replaced ours
  except (ConnectionError, ValueError, RuntimeError) as e:
    raise UserError(
      f'--executor=ray: no cluster ({(str(e).splitlines() or [""])[0]}); ray start --head, or give --address'
    ) from None
  try:
    per_runner = dict(per_runner) or _usual_share(ray.cluster_resources())
    room = _room(ray.nodes(), per_runner)
    if not room:
      asked = ', '.join(f'{name} {n:g}' for name, n in per_runner.items())
      raise UserError(f'--executor=ray: no node of the cluster has {asked} for a runner; change --resources')
    count = runners or room
    log.info('%s: %d runners on Ray, %d at a time', work.name, count, min(count, room))
    task = _task(ray, per_runner)
    here = {'folder': os.getcwd(), 'words': work.words}
    _follow(ray, work, {task.remote(k, **here): k for k in range(count)})
  finally:
    ray.shutdown()


def _task(ray, per_runner: Mapping[str, float]):
  other = {name: n for name, n in per_runner.items() if name not in ('CPU', 'GPU')}
  # max_calls: JAX keeps its devices as long as its process lives.
  options = {'num_cpus': per_runner.get('CPU', 0), 'num_gpus': per_runner.get('GPU', 0), 'resources': other}
  return ray.remote(**options, max_retries=RETRIES, max_calls=1)(_runner)


def _runner(number: int, folder: str, words: Sequence[str]) -> tuple[int, str]:
  """Run a runner on a node of the cluster, and rerun it while it stops with work left; return (exit code, last line of its stderr)."""
  for _ in range(RETRIES):
    code, last = _run_once(number, folder, words)
    if code != TEMPORARY:
      break
  return code, last


def _run_once(number: int, folder: str, words: Sequence[str]) -> tuple[int, str]:
  # A child process gives kdjax and JAX a clean environment. It dies with this process (distributed.watch).
  child = subprocess.Popen(
    list(words),
    cwd=folder,
    env=os.environ | {WATCHED: str(os.getpid())},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    errors='replace',
  )
  last = ''
  for line in child.stderr or ():
    if line.strip():
      last = line.strip().rpartition('\r')[2]
      print(f'runner {number}: {last}', flush=True)
  return child.wait(), last


def _follow(ray, work: Work, tasks: dict[Any, int]) -> None:
  """Until every runner has ended, telling now and then how the grid stands."""
  told, failed = '', Counter[str]()
  left = list(tasks)
  while left:
    done, left = ray.wait(left, timeout=POLL)
    for task in done:
      try:
        code, last = ray.get(task)
      except ray.exceptions.RayError as e:
        code, last = 1, ([line for line in str(e).splitlines() if line.strip()] or [''])[-1]
      if code:
        log.error('runner %d ended with code %d', tasks[task], code)
        failed[last] += 1
    now = work.status().splitlines()[1]
    if now != told:
      told = now
      log.info('%s  %s', time.strftime('%H:%M:%S'), now)
  if failed:
    raise TrainingError(*(f'{n} runners failed: {line}' for line, n in failed.items()))


def _usual_share(total: Mapping[str, float]) -> dict[str, float]:
  """Where nothing is said: one accelerator, or one core."""
  return {'GPU': 1.0} if total.get('GPU') else {'TPU': 1.0} if total.get('TPU') else {'CPU': 1.0}


def _room(nodes: Sequence[Mapping[str, Any]], per_runner: Mapping[str, float]) -> int:
  """How many runners the cluster has room for; a runner is on one node."""
  alive = [node['Resources'] for node in nodes if node['Alive']]
  return sum(int(min(have.get(name, 0) // n for name, n in per_runner.items() if n)) for have in alive)
