"""Faults that kill processes: training, building, evaluation, one process of two."""

import shutil
import time

from benchmarks.faults.case import ENDS, SAME, TIMEOUT, Case, Failure, fault
from tests import commands


@fault(3)
def killed_in_training(case: Case) -> str:
  for _ in range(case.rng.randint(1, 3)):
    case.kill(case.start(), case.rng.uniform(0, 1.2 * case.base.seconds))
  return case.finish()


@fault(1)
def killed_in_building(case: Case) -> str:
  case.config = case.base.write_config(case.folder, case.folder / 'stores')
  for _ in range(case.rng.randint(1, 3)):
    process = case.start()
    until = time.monotonic() + TIMEOUT
    while process.poll() is None and not list(case.folder.glob('stores/*')) and time.monotonic() < until:
      time.sleep(0.001)
    case.kill(process, case.rng.uniform(0, 0.5))
    if case.rng.random() < 0.5:
      shutil.rmtree(case.folder / 'stores', ignore_errors=True)
  return case.finish()


@fault(1)
def killed_in_evaluation(case: Case) -> str:
  shutil.copytree(case.base.whole, case.run)
  for name in ('table.txt', 'results.csv', 'evaluation.json'):
    (case.run / name).unlink(missing_ok=True)
  for folder in case.run.glob('students/*/results'):
    shutil.rmtree(folder)
  for _ in range(case.rng.randint(1, 3)):
    case.kill(case.start(module='kdjax.evaluate'), case.rng.uniform(0, case.base.seconds))
  return case.finish(module='kdjax.evaluate')


@fault(1)
def one_of_two_killed(case: Case) -> str:
  """Two processes, each under a launcher of its own, as on two hosts; one is killed."""
  case.expected = case.base.of_two
  flags = f'--coordinator=127.0.0.1:{commands.free_port()}', '--processes=2'
  start = lambda i: case.start(*flags, f'--process={i}')
  processes = [start(0), start(1)]
  case.kill(case.rng.choice(processes), case.rng.uniform(0, 1.5 * case.base.seconds))
  until = time.monotonic() + 2 * TIMEOUT
  while any(process.poll() != 0 for process in processes):
    for i, process in enumerate(processes):
      if (code := process.poll()) is None or code == 0:
        continue
      case.wait(process)  # for its traceback
      if code in ENDS:
        raise Failure(f'wrong end: {code}: {commands.errors(process)[-300:]}')
      if case.starts > 10:
        raise Failure(f'wrong restart: {commands.errors(process)[-300:]}')
      processes[i] = start(i)
    if time.monotonic() > until:
      for process in processes:
        commands.kill(process)
      raise Failure(f'hangs: {commands.errors(processes[0])[-300:]}')
    time.sleep(0.1)
  case.compare()
  return SAME


# Damage.
