"""Faults against tiny runs: each is followed by what a launcher does, and every bit of the result is compared with an undisturbed run.

    python -m benchmarks.faults --n=200      until 200 faults are done; results are kept, so it can be stopped and resumed
    python -m benchmarks.faults --report     write docs/FAULTS.md from the results

A fault ends well if the run finishes with the bits of an undisturbed run, or if it stops with one line that names a file or folder and says what to
do, where the launcher (launch/supervise.sh) does not restart it. Anything else is a failure: other bits, a restart that cannot help, a final stop
where a restart would have helped, a traceback, or a hang.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pandas as pd

from kdjax import machine
from kdjax.errors import FAILED, STOPPED, WRONG
from kdjax.scoring import results
from tests import bucket, commands, several, tiny

FILE = pathlib.Path(__file__).parents[1] / 'docs' / 'results' / 'faults.jsonl'
PAGE = FILE.parents[1] / 'FAULTS.md'
ENDS = (0, FAILED, WRONG, STOPPED)  # the exit codes after which launch/supervise.sh restarts nothing
ARMS = ('baseline', 'unigram')
TIMEOUT = 180.0  # seconds of one process
SAME, STOPS = 'same bits', 'one line, no restart'
Kind = Callable[['Case'], str]
KINDS: dict[str, tuple[Kind, float]] = {}  # name -> what it does, its weight


class Failure(Exception):
  """An outcome that is not one of the two good ones."""


class Base:
  """What all faults share: an undisturbed run, its stores, its time."""

  def __init__(self, home: pathlib.Path):
    self.home = home
    home.mkdir(parents=True, exist_ok=True)
    self.fields = {
      'student.arms': ARMS,
      'checkpoint.every': 2,
      'checkpoint.keep': 10,
      'eval.max_bytes': 800,
      'eval.batch_size': 64,
    }
    self.text = tiny.write_text(home / 'text')
    self.whole = home / 'whole' / 'run'
    self.config = self.write_config(home / 'whole', home / 'stores')
    began = time.monotonic()
    if not (self.whole / 'table.txt').exists():
      (code,) = commands.finish(commands.start(self.config, self.whole), timeout=TIMEOUT)
      assert code == 0
    self.seconds = max(6.0, time.monotonic() - began)

  def write_config(self, folder: pathlib.Path, stores: pathlib.Path, **fields: Any) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    return tiny.write_config(
      folder, **self.text | self.fields | {'data.cache': str(stores), 'runs': str(folder / 'runs')} | fields
    )

  @functools.cached_property
  def shim(self) -> pathlib.Path:
    target = self.home / 'faults.so'
    source = pathlib.Path(__file__).with_suffix('.c')
    subprocess.run(['cc', '-O1', '-shared', '-fPIC', '-o', target, source, '-ldl'], check=True)
    return target

  @functools.cached_property
  def of_two(self) -> pathlib.Path:
    """The same run, undisturbed, by two processes."""
    folder = self.home / 'two' / 'run'
    if not (folder / 'table.txt').exists():
      several.done(*several.start(2, self.config, folder))
    return folder


class Case:
  """One fault: a folder of its own, a random generator, and the launcher."""

  def __init__(self, base: Base, folder: pathlib.Path, seed: int):
    self.base, self.folder, self.rng = base, folder, random.Random(seed)
    self.run, self.config, self.expected = folder / 'run', base.config, base.whole
    self.starts = 0
    self.detail = ''
    self.lost: set[str] = set()  # arms whose metrics.jsonl was emptied

  def half(self) -> None:
    """A copy of the undisturbed run as a kill after some step leaves it."""
    shutil.copytree(self.base.whole, self.run)
    step = self.rng.choice([4, 6, 8, 10])
    for name in ('table.txt', 'results.csv', 'evaluation.json', 'run.png'):
      (self.run / name).unlink(missing_ok=True)
    for arm in ARMS:
      student = self.run / 'students' / arm
      shutil.rmtree(student / 'results', ignore_errors=True)
      status = json.loads((student / 'status.json').read_text())
      (student / 'status.json').write_text(json.dumps(status | {'state': 'running', 'step': step}))
      for saved in (student / 'checkpoints').iterdir():
        if saved.name.isdigit() and int(saved.name) > step:
          shutil.rmtree(saved)

  def start(self, *arguments: str, module: str = 'kdjax.train', **variables: str) -> subprocess.Popen:
    self.starts += 1
    return commands.start(self.config, self.run, *arguments, module=module, variables=variables, start_new_session=True)

  def wait(self, process: subprocess.Popen) -> int:
    try:
      code = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      raise Failure(f'hangs: {commands.errors(process)[-300:]}') from None
    if 'Traceback' in commands.errors(process):
      raise Failure(f'traceback: {commands.errors(process)[-1500:]}')
    return code

  def kill(self, process: subprocess.Popen, after: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(after)
    commands.kill(process)

  def launch(self, *arguments: str, module: str = 'kdjax.train') -> tuple[int, subprocess.Popen]:
    """Do what launch/supervise.sh does. Raises Failure where restarts do not help."""
    for _ in range(4):
      process = self.start(*arguments, module=module)
      if (code := self.wait(process)) in ENDS:
        return code, process
    raise Failure(f'wrong restart: it ends with {code} every time: {commands.errors(process)[-300:]}')

  def finish(self, may_stop: bool = False, module: str = 'kdjax.train') -> str:
    """Launch until it ends, and judge."""
    code, process = self.launch(module=module)
    if code == 0:
      for arm in self.lost:
        if f'{self.run / "students" / arm / "metrics.jsonl"}: the metrics of' not in commands.errors(process):
          raise Failure(f'silent loss: the metrics of {arm}')
      self.compare()
      return SAME
    check_line(process, self.folder)
    if not may_stop:
      raise Failure(f'wrong end: {code}, where a restart would have helped: {commands.errors(process)[-300:]}')
    return STOPS

  def compare(self) -> None:
    for arm in ARMS:
      one, other = self.run / 'students' / arm, self.expected / 'students' / arm
      if commands.leaves(one) != commands.leaves(other):
        raise Failure(f'silent difference: the weights of {arm}')
      got, wanted = commands.metrics(one), commands.metrics(other)
      if arm in self.lost:
        wanted = [record for record in wanted if record['step'] >= got[0]['step']]
      if got != wanted:
        raise Failure(f'silent difference: the metrics of {arm}')
    files = [sorted(folder.glob('students/*/results/*.parquet')) for folder in (self.run, self.expected)]
    tables = [(folder / 'table.txt').read_text().partition('\n')[2] for folder in (self.run, self.expected)]
    if tables[0] != tables[1] or [file.name for file in files[0]] != [file.name for file in files[1]]:
      raise Failure('silent difference: the table')
    for file, like in zip(*files, strict=True):
      pd.testing.assert_frame_equal(results.read_result(file)[0], results.read_result(like)[0], check_exact=True)


def check_line(process: subprocess.Popen, folder: pathlib.Path) -> None:
  """Raise Failure unless stderr holds one error of one line that names something in the folder."""
  lines = [line for line in commands.errors(process).splitlines() if line.startswith('error: ')]
  if len(lines) != 1 or str(folder) not in lines[0] or ';' not in lines[0]:
    raise Failure(f'no single line that names the file and the fix: {commands.errors(process)[-600:]}')


def fault(weight: float) -> Callable[[Kind], Kind]:
  def register(kind: Kind) -> Kind:
    KINDS[kind.__name__] = kind, weight
    return kind

  return register


# Kills.


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


def damage_file(path: pathlib.Path, rng: random.Random) -> str:
  data = bytearray(path.read_bytes())
  how = rng.choice(['bit', 'two bits', 'sign bits', 'blocks swapped', 'truncated', 'emptied', 'removed', 'zeros'])
  if not data and how != 'removed':
    how = 'removed'
  if how in ('bit', 'two bits', 'sign bits'):
    bit = 7 if how == 'sign bits' else rng.randrange(8)
    for _ in range(1 if how == 'bit' else 2):
      data[rng.randrange(len(data))] ^= 1 << bit
  elif how == 'blocks swapped' and len(data) >= 16:
    size = max(1, len(data) // 8)
    i, j = rng.sample(range(len(data) // size), 2)
    a, b = (slice(k * size, (k + 1) * size) for k in (i, j))
    data[a], data[b] = data[b], data[a]
  elif how == 'truncated':
    del data[rng.randrange(len(data)) :]
  elif how == 'emptied':
    data.clear()
  elif how == 'zeros':
    start = rng.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
  path.unlink()
  if how != 'removed':
    path.write_bytes(bytes(data))
  return how


@fault(2)
def store_damaged(case: Case) -> str:
  case.half()
  shutil.copytree(case.base.home / 'stores', case.folder / 'stores')
  case.config = case.base.write_config(case.folder, case.folder / 'stores')
  for _ in range(case.rng.randint(1, 2)):
    path = case.rng.choice(sorted(p for p in (case.folder / 'stores').rglob('*') if p.is_file()))
    case.detail += f'{path.relative_to(case.folder / "stores")}: {damage_file(path, case.rng)}; '
  return case.finish()


@fault(3)
def checkpoint_damaged(case: Case) -> str:
  case.half()
  for _ in range(case.rng.randint(1, 3)):
    path = case.rng.choice(sorted(p for p in case.run.glob('students/*/checkpoints/*/**/*') if p.is_file()))
    case.detail += f'{path.relative_to(case.run)}: {damage_file(path, case.rng)}; '
  return case.finish(may_stop=True)


@fault(3)
def weights_damaged(case: Case) -> str:
  """Sound files with other numbers: what a faulty memory writes."""
  case.half()
  student = case.run / 'students' / case.rng.choice(ARMS)
  newest = max((p for p in (student / 'checkpoints').iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
  reader = ocp.StandardCheckpointer()
  item = case.rng.choice(['params', 'optimizer'])
  tree = reader.restore(newest / item)
  leaves = ocp.tree.to_flat_dict(tree)
  name = case.rng.choice(sorted(key for key, leaf in leaves.items() if np.size(leaf) > 8))
  x = np.array(leaves[name])
  how = case.rng.choice(['negated', 'two signs', 'rows swapped', 'permuted', 'zeroed block', 'rounded'])
  generator = np.random.default_rng(case.rng.randrange(2**32))
  before, flat = x.tobytes(), x.reshape(-1)
  if how == 'negated':
    x = -x
  elif how == 'two signs':
    at = generator.choice(flat.size, 2, replace=False)
    flat[at] = -flat[at]
  elif how == 'rows swapped':
    i, j = generator.choice(len(x), 2, replace=False) if len(x) > 1 else (0, 0)
    x[[i, j]] = x[[j, i]]
  elif how == 'permuted':
    flat[:] = generator.permutation(flat)
  elif how == 'zeroed block':
    flat[: flat.size // 4] = 0
  else:
    x = np.asarray(np.asarray(x, np.float16), x.dtype)
  case.detail = f'{student.name}/{newest.name}/{item}/{"/".join(map(str, name))}: {how}'
  if x.tobytes() == before:
    case.detail += ' (no change)'
  shutil.rmtree(newest / item)
  leaves[name] = x
  with ocp.StandardCheckpointer() as writer:
    writer.save(newest / item, _nested(leaves))
  return case.finish(may_stop=True)


def _nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return tree


@fault(2)
def checkpoint_copied(case: Case) -> str:
  """A step's folder under another step's name."""
  case.half()
  folder = case.run / 'students' / case.rng.choice(ARMS) / 'checkpoints'
  source = case.rng.choice(sorted(p for p in folder.iterdir() if p.name.isdigit()))
  target = folder / str(
    case.rng.choice([step for step in (1, 3, 5, 7, 9, 11, 12) if not (folder / str(step)).exists()])
  )
  shutil.copytree(source, target)
  case.detail = f'{source.name} as {target.name}'
  return case.finish(may_stop=True)


@fault(1)
def result_damaged(case: Case) -> str:
  shutil.copytree(case.base.whole, case.run)
  path = case.rng.choice(sorted(case.run.glob('students/*/results/*.parquet')))
  case.detail = f'{path.name}: {damage_file(path, case.rng)}'
  return case.finish(may_stop=True, module='kdjax.evaluate')


@fault(2)
def emptied_by_a_crash(case: Case) -> str:
  """Small files without their content, as a crash of the host leaves renames that were not flushed."""
  case.half()
  small = [
    p for p in case.run.rglob('*') if p.is_file() and 'checkpoints' not in p.parts and p.suffix in ('.json', '.jsonl')
  ]
  for path in case.rng.sample(sorted(small), case.rng.randint(1, 3)):
    path.write_bytes(b'')
    case.detail += f'{path.relative_to(case.run)} '
    if path.name == 'metrics.jsonl':
      case.lost.add(path.parent.name)
  return case.finish(may_stop=True)


# Disks, stores, clocks, rivals.


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
    os.environ.update(environment)
    import fsspec

    fsspec.filesystem('gs').get(f'{home}/run/', str(case.run), recursive=True)
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
  if code:
    raise Failure(f'wrong end: {code}: {commands.errors(last)[-300:]}')
  cells = [sorted(p.name for p in (at / 'cells').iterdir()) for at in (folder, whole)]
  if cells[0] != cells[1] or any(
    commands.leaves(folder / 'cells' / c) != commands.leaves(whole / 'cells' / c) for c in cells[0]
  ):
    raise Failure('silent difference: the cells')
  return SAME


# The campaign.


def one(base: Base, seed: int) -> dict[str, Any]:
  """Run the fault of a seed."""
  names = list(KINDS)
  kind = random.Random(seed).choices(names, [KINDS[name][1] for name in names])[0]
  folder = pathlib.Path(tempfile.mkdtemp(prefix=f'{seed}-', dir=base.home))
  case, began = Case(base, folder, seed), time.monotonic()
  try:
    outcome = KINDS[kind][0](case)
  except Failure as e:
    outcome = f'FAILURE: {e}'
  except Exception:
    outcome = f'FAILURE: of the campaign itself: {traceback.format_exc()[-1500:]}'
  if not outcome.startswith('FAILURE'):
    shutil.rmtree(folder, ignore_errors=True)
  record = {'seed': seed, 'kind': kind, 'detail': case.detail.strip(' ;'), 'outcome': outcome, 'starts': case.starts}
  return record | {'seconds': round(time.monotonic() - began, 1)}


def known() -> list[dict[str, Any]]:
  return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def report() -> str:
  """The table of docs/FAULTS.md."""
  counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for record in known():
    counts[record['kind']][re.sub(r'^FAILURE.*', 'failures', record['outcome'], flags=re.S)] += 1
  columns = (SAME, STOPS, 'failures')
  rows = [
    [kind.replace('_', ' '), str(sum(counts[kind].values())), *(str(counts[kind][c]) for c in columns)]
    for kind in KINDS
    if kind in counts
  ]
  total = [sum(counts[kind][c] for kind in counts) for c in columns]
  rows.append(['**all**', str(sum(total)), *map(str, total)])
  head = ['fault', 'times', *columns]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows))


def write_page() -> None:
  text = PAGE.read_text()
  head, tail = text.split('<!-- faults -->')[0], text.split('<!-- /faults -->')[1]
  PAGE.write_text(f'{head}<!-- faults -->\n{report()}\n<!-- /faults -->{tail}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--n', type=int, default=200, help='faults in all, those of earlier starts included')
  parser.add_argument('--first', type=int, default=0, help='the first seed')
  parser.add_argument('--only', choices=list(KINDS), help='this kind alone; its results are printed and not kept')
  parser.add_argument('--jobs', type=int, default=2, help='faults at once')
  parser.add_argument('--work', type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / 'kdjax-faults')
  parser.add_argument('--report', action='store_true', help='write docs/FAULTS.md from the results and run nothing')
  args = parser.parse_args()
  if args.report:
    write_page()
    return
  if args.only:
    for name in set(KINDS) - {args.only}:
      del KINDS[name]
  for name in ('absl', 'gcsfs'):  # they warn at each read-only manager, and at each file read without credentials
    logging.getLogger(name).setLevel(logging.ERROR)
  os.environ['KDJAX_TEST_CACHE'] = str(args.work / 'compiled')  # half of a tiny run's time
  base = Base(args.work)
  done = set() if args.only else {record['seed'] for record in known()}
  seeds = [seed for seed in range(args.first, args.first + args.n) if seed not in done]
  print(f'{len(seeds)} faults; jax {machine.versions()["jax"]}', flush=True)
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    for finished in concurrent.futures.as_completed([pool.submit(one, base, seed) for seed in seeds]):
      record = finished.result()
      print(
        f'{record["seed"]:5d} {record["kind"]:22s} {record["seconds"]:6.1f} s  {record["outcome"][:100]}', flush=True
      )
      if not args.only:
        with FILE.open('a') as file:
          file.write(json.dumps(record) + '\n')
  if not args.only:
    write_page()


if __name__ == '__main__':
  main()
