"""One fault: what it starts from, what a launcher does after it, and how its outcome is judged."""

import contextlib
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pandas as pd

from kdjax.errors import FAILED, STOPPED, WRONG
from kdjax.scoring import results
from tests import commands, several, tiny

ENDS = (0, FAILED, WRONG, STOPPED)  # the exit codes after which launch/supervise.sh restarts nothing
ARMS = ('baseline', 'unigram')
TIMEOUT = 180.0  # seconds of one process
SAME, STOPS = 'same bits', 'one line, no restart'


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
    source = pathlib.Path(__file__).with_name('faults.c')
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


def fault(weight: float) -> Callable[[Callable[['Case'], str]], Any]:
  """Declare a kind of fault: it does its harm to a case and returns SAME or STOPS. `weight`: how often it is drawn."""

  def declare(kind: Any) -> Any:
    kind.weight = weight
    return kind

  return declare
