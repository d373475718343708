"""Faults of what a run depends on: a failing disk, an object store that is away, clocks, several starts at once, a grid's runner."""

import errno
import os
import signal
import subprocess
import sys
import time

from benchmarks.faults.case import ENDS, SAME, STOPS, TIMEOUT, Case, Failure, check_line, fault
from kdjax.errors import FAILED, WRONG
from tests import bucket, commands, tiny


@fault(3)
def disk_failing(case: Case) -> str:
  """Some writes fail, or take long; then the disk is well again and the run is started again."""
  error = case.rng.choice([errno.ENOSPC, errno.EIO, 0])
  first = case.rng.randint(1, 400)
  case.detail = f'{errno.errorcode.get(error, "slow")} from write {first}'
  shim = {
    'LD_PRELOAD': str(case.base.shim), 'FAULTS_BELOW': f'{case.run}/', 'FAULTS_ERRNO': str(error), 'FAULTS_MS': '200',
    'FAULTS_FIRST': str(first), 'FAULTS_COUNT': str(case.rng.choice([1, 10, 100000])),
  }  # fmt: skip
  if not error:
    shim['FAULTS_COUNT'] = '20'
  process = case.start(**shim)
  code = case.wait(process)
  if code not in (0, FAILED, WRONG):
    raise Failure(f'wrong restart: {code} where the disk fails: {commands.errors(process)[-300:]}')
  if code:
    check_line(process, case.folder)
  return case.finish()


@fault(1)
def store_unavailable(case: Case) -> str:
  seconds = min(120.0, case.rng.expovariate(1 / 25) + 1)
  status = case.rng.choice([500, 503, 429, 401])
  case.detail = f'{seconds:.0f} s of {status}'
  with bucket.serving() as port:
    home = f'gs://{bucket.BUCKET}/{case.folder.name}'
    case.config = case.base.write_config(case.folder, case.base.home / 'stores', runs=home)
    environment = bucket.environment(port)
    command = [sys.executable, '-m', 'kdjax.train', f'--config={case.config}', f'--workdir={home}/run']
    code, log = None, case.folder / 'store.err'
    while code is None or code not in ENDS:
      with log.open('a') as file:
        process = subprocess.Popen(
          command, env=commands.environment() | environment, cwd=commands.REPO, stderr=file, stdout=file
        )
      if code is None:
        time.sleep(case.rng.uniform(0, 2 * case.base.seconds))
        bucket.begin_outage(port, seconds, status)
      case.starts += 1
      code = process.wait(TIMEOUT + 3 * seconds)
      if 'Traceback' in log.read_text():
        raise Failure(f'traceback: {log.read_text()[-1500:]}')
      if case.starts > 4:
        raise Failure(f'wrong restart: it ends with {code} every time: {log.read_text()[-300:]}')
    if code:
      raise Failure(f'wrong end: {code}: {log.read_text()[-500:]}')
    fetch = "import fsspec, sys; fsspec.filesystem('gs').get(sys.argv[1], sys.argv[2], recursive=True)"
    # In a process of its own: the emulator's address is an environment variable, and another case may have another emulator.
    subprocess.run(
      [sys.executable, '-c', fetch, f'{home}/run/', str(case.run)],
      env=os.environ | environment,
      check=True,
      capture_output=True,
    )
  case.compare()
  return SAME


SKEWED = """
import sys, time
real = time.time
time.time = lambda: real() + {skew}
from kdjax import machine
machine.pid_namespace = lambda: {namespace!r}
sys.argv = ['train', *sys.argv[1:]]
from kdjax import train
train.main()
"""


@fault(1)
def clocks_apart(case: Case) -> str:
  """A second trainer in another container, whose clock is wrong: it leaves a live run alone, and takes over a dead one."""
  skew = case.rng.choice([-90, 90, -3600])
  alive = case.rng.random() < 0.5
  case.detail = f'{skew} s, the first {"alive" if alive else "dead"}'
  case.config = case.base.write_config(case.folder, case.base.home / 'stores', heartbeat_timeout=6)
  first = case.start()
  marker = case.run / 'students' / 'baseline' / 'status.json'
  until = time.monotonic() + TIMEOUT
  while not marker.exists() and first.poll() is None and time.monotonic() < until:
    time.sleep(0.005)
  if not alive:
    commands.kill(first)
  else:
    first.send_signal(signal.SIGCONT)
  command = [
    sys.executable,
    '-c',
    SKEWED.format(skew=skew, namespace='pid:[1]'),
    f'--config={case.config}',
    f'--workdir={case.run}',
  ]
  second = subprocess.run(
    command, env=commands.environment(), cwd=case.folder, capture_output=True, text=True, timeout=TIMEOUT, check=False
  )
  case.starts += 1
  if 'Traceback' in second.stderr:
    raise Failure(f'traceback: {second.stderr[-1500:]}')
  if alive and case.wait(first) != 0:
    raise Failure(f'the live run was disturbed: {commands.errors(first)[-300:]}')
  if not alive and second.returncode != 0:
    raise Failure(f'wrong end: a dead run was not taken over: {second.stderr[-300:]}')
  return case.finish()


@fault(1)
def started_at_once(case: Case) -> str:
  n = case.rng.choice([2, 2, 8])
  case.detail = f'{n} processes'
  processes = [case.start() for _ in range(n)]
  codes = [case.wait(process) for process in processes]
  if 0 not in codes or set(codes) - {0, WRONG}:
    raise Failure(f'wrong end: {codes}: {commands.errors(processes[0])[-300:]}')
  for code, process in zip(codes, processes, strict=True):
    if code:
      check_line(process, case.folder)
  return case.finish()


@fault(0.5)
def grid_killed(case: Case) -> str:
  """The runner of a grid, killed some times; then its cells are those of an undisturbed one."""
  text = case.base.home / 'grid-text'
  tiny.write_text(text)
  whole = case.base.home / 'grid' / 'grid'
  if not (whole / 'pilot.json').exists():
    whole.parent.mkdir(parents=True, exist_ok=True)
    undisturbed = commands.start(tiny.write_grid_config(whole.parent, text), whole, 'run', module='kdjax.grid')
    assert commands.finish(undisturbed, timeout=900) == [0]
  config, folder = tiny.write_grid_config(case.folder, text), case.folder / 'grid'
  for _ in range(case.rng.randint(1, 3)):
    case.starts += 1
    case.kill(commands.start(config, folder, 'run', module='kdjax.grid'), case.rng.uniform(5, 60))
  case.starts += 1
  last = commands.start(config, folder, 'run', module='kdjax.grid')
  (code,) = commands.finish(last, timeout=900)
  if code == FAILED and 'its runner was killed 3 times in a row' in commands.errors(last):  # as it was
    check_line(last, case.folder)
    return STOPS
  if code:
    raise Failure(f'wrong end: {code}: {commands.errors(last)[-300:]}')
  cells = [sorted(p.name for p in (at / 'cells').iterdir()) for at in (folder, whole)]
  if cells[0] != cells[1] or any(
    commands.leaves(folder / 'cells' / c) != commands.leaves(whole / 'cells' / c) for c in cells[0]
  ):
    raise Failure('silent difference: the cells')
  return SAME
