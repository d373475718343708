"""Start commands as real processes, wait for them, and read what their runs wrote."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from kdjax.runs.checkpoint import read_checkpoints
from kdjax.runs.metrics import read_metrics

REPO = pathlib.Path(__file__).parents[1]
UNSTABLE = {
  'tokens_per_second',
  'student_tflops',
  'teacher_tflops',
  'mfu',
  'memory_gib',
}  # metrics that no two runs share


def environment(devices: int = 1) -> dict[str, str]:
  """Of a process on the CPU with so many virtual devices. KDJAX_TEST_CACHE names a folder for compiled programs; without it each process compiles."""
  cache = os.environ.get('KDJAX_TEST_CACHE')
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ.get('XLA_FLAGS', ''))
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{flags} --xla_force_host_platform_device_count={devices}'.strip(),
    'PYTHONPATH': str(REPO),
    'JAX_ENABLE_COMPILATION_CACHE': str(bool(cache)).lower(),
    'JAX_COMPILATION_CACHE_DIR': cache or '',
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    'PYTHONUNBUFFERED': '1',
  }


def start(
  config: pathlib.Path,
  workdir: pathlib.Path,
  *arguments: str,
  devices: int = 1,
  module='kdjax.train',
  variables: Mapping[str, str] = types.MappingProxyType({}),
  **options: Any,
) -> subprocess.Popen:
  """Start `python -m kdjax.train`; stdout and stderr go to files beside the workdir.

  Args:
    variables: of the environment, besides the usual ones.
    options: of subprocess.Popen.
  """
  command = [sys.executable, '-m', module, f'--workdir={workdir}', *arguments]
  if module in ('kdjax.train', 'kdjax.grid'):
    command.insert(3, f'--config={config}')
  workdir.parent.mkdir(parents=True, exist_ok=True)
  name = f'{workdir.name}-{len(list(workdir.parent.glob(f"{workdir.name}-*.err")))}'
  with open(workdir.parent / f'{name}.out', 'w') as out, open(workdir.parent / f'{name}.err', 'w') as err:
    process = subprocess.Popen(
      command, stdout=out, stderr=err, env={**environment(devices), **variables}, cwd=workdir.parent, **options
    )
  process.log = workdir.parent / name  # type: ignore[attr-defined]
  return process


def output(process) -> tuple[str, str]:
  return process.log.with_name(process.log.name + '.out').read_text(), errors(process)


def errors(process) -> str:
  """stderr without the progress bars."""
  text = process.log.with_name(process.log.name + '.err').read_text()
  lines = [line.rpartition('\r')[2] for line in text.splitlines()]
  return '\n'.join(line for line in lines if line.strip() and '%|' not in line and 'B/s]' not in line)


def finish(*processes, timeout: float = 180) -> list[int]:
  """Exit codes; whoever is left after the timeout is killed and the test fails."""
  until = time.monotonic() + timeout
  try:
    return [p.wait(max(0.1, until - time.monotonic())) for p in processes]
  except subprocess.TimeoutExpired:
    raise AssertionError(f'hangs after {timeout} s:\n' + '\n'.join(errors(p)[-2000:] for p in processes)) from None
  finally:
    for process in processes:
      kill(process)


def kill(process) -> None:
  if process.poll() is None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait_for(condition, process=None, timeout: float = 120, every: float = 0.02) -> None:
  """Until the condition holds; fails at once where the process has ended, or after the timeout."""
  until = time.monotonic() + timeout
  while not condition():
    if process is not None and process.poll() is not None:
      if condition():
        return
      raise AssertionError(f'ended with {process.returncode} while it was waited for:\n{errors(process)[-3000:]}')
    if time.monotonic() > until:
      raise AssertionError(f'not seen within {timeout} s:\n{errors(process)[-3000:] if process else ""}')
    time.sleep(every)


def small_disk(folder: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
  """A tmpfs, for fixtures to yield from; the test is skipped where none can be mounted."""
  folder.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'none', str(folder)]
  mounted = subprocess.run(command, capture_output=True, text=True, check=False)
  if mounted.returncode:
    pytest.skip(f'no tmpfs can be mounted here: {mounted.stderr.strip()}')
  yield folder
  wait_for(lambda: subprocess.run(['umount', str(folder)], check=False, capture_output=True).returncode == 0, every=0.2)


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def metrics(folder: pathlib.Path) -> list[dict[str, float]]:
  """metrics.jsonl without rates and memory."""
  return [{k: v for k, v in record.items() if k not in UNSTABLE} for record in read_metrics(folder)]


def leaves(folder: pathlib.Path, step: int | None = None) -> dict[str, Any]:
  """dtype, shape and checksum of each leaf of a run's newest checkpoint: equal means bit-identical."""
  with read_checkpoints(folder / 'checkpoints') as saves:
    step = step or saves.steps()[-1]
    return {'step': step, **saves.meta(step)['leaves']}
