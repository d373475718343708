"""Tell this machine, and the processes that this one can see, from all others; and what is installed on it."""

import contextlib
import os
import pathlib
import platform
import socket
import subprocess
from importlib import metadata


def boot_id() -> str:
  """Return an id that differs between hosts of the same name, and between two boots of a host; '' where there is none."""
  with contextlib.suppress(OSError):
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  return ''


def name() -> str:
  """Return the host's name and the beginning of its boot id: part of the names of files that only this machine may clean up."""
  return f'{socket.gethostname()}-{boot_id()[:8]}'


def pid_namespace() -> str:
  """Return the id of the set of processes that this one can see: two containers of one host may share a name, and each have a process 1."""
  with contextlib.suppress(OSError):
    return os.readlink('/proc/self/ns/pid')
  return ''


def start_time(pid: int) -> str | None:
  """When a process began (clock ticks since boot), so that a reused pid is not taken for the old process; None if there is none."""
  try:
    fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return None if fields[0] in 'ZX' else fields[19]
  except OSError:
    pass
  if pathlib.Path('/proc/self/stat').exists():
    return None
  try:  # no /proc: whether it runs at all
    os.kill(pid, 0)
    return 'running'
  except OSError:
    return None


def versions() -> dict[str, str]:
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'tokenizers')
  return {'python': platform.python_version(), **{name: metadata.version(name) for name in names}}


def git_commit() -> str:
  """The commit of kdjax's checkout, '+' appended where it has changes; '' outside one."""
  folder = pathlib.Path(__file__).parent
  run = lambda *args: subprocess.run(('git', *args), cwd=folder, capture_output=True, text=True, check=False)
  with contextlib.suppress(FileNotFoundError):
    head = run('rev-parse', 'HEAD')
    if head.returncode == 0:
      return head.stdout.strip() + ('+' if run('status', '--porcelain', '--untracked-files=no').stdout.strip() else '')
  return ''
