"""Read, check and correct the environment variables of other libraries: XLA_FLAGS and MPLBACKEND.

With invalid flags, XLA's C++ code ends the process without a Python exception. Matplotlib cannot be imported if MPLBACKEND names a backend
that is not installed, and commands started from a notebook inherit the notebook's MPLBACKEND.
"""

import contextlib
import functools
import os
import re
import resource
import signal
import sys

from kdjax.errors import UserError
from kdjax.runtime import interrupts

DETERMINISTIC = 'xla_gpu_deterministic_ops'
STRICT = (DETERMINISTIC, 'xla_gpu_exclude_nondeterministic_ops')
PATIENCE = 20  # seconds for XLA to read its flags
SPACE = ' \t\r\n'  # characters that separate XLA's flags


def set_deterministic() -> None:
  """Ask XLA for deterministic reductions, so that a GPU gives the same bits for the same seed. Call this before JAX touches a device.

  If XLA_FLAGS names a file, it is not changed: the user must add the flag to the file.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if DETERMINISTIC not in flags and not _names_file(flags):
    os.environ['XLA_FLAGS'] = f'{flags} --{DETERMINISTIC}=true'.strip()


def is_deterministic() -> bool:
  """Return whether XLA_FLAGS, or the file it names, sets the flag to any value."""
  return DETERMINISTIC in xla_flags()


def excludes_nondeterminism() -> bool:
  """Return whether XLA refuses operations on a GPU that are not deterministic; the last value of a flag counts."""
  found = re.findall(rf'--({"|".join(STRICT)})(?:=(\S*))?', xla_flags())
  return any(value.lower() in ('', 'true', '1') for value in dict(found).values())


def xla_flags() -> str:
  """Return the flags that XLA reads: XLA_FLAGS, or the text of the file it names. Raises UserError if that file cannot be read."""
  flags = os.environ.get('XLA_FLAGS', '')
  if not _names_file(flags):
    return flags
  try:
    with open(flags, encoding='utf-8', errors='replace') as file:
      return file.read()
  except OSError as e:
    raise UserError(
      f"XLA_FLAGS={flags}: a value without a leading '-' names a file of flags, but this file cannot be read ({e.strerror}); "
      'correct the name, or unset XLA_FLAGS'
    ) from None


def check_xla_flags() -> None:
  """Raise UserError if XLA rejects XLA_FLAGS. Only commands check: the check forks, which is unsafe in programs with threads."""
  if interrupts.is_command():
    _check_xla_flags(os.environ.get('XLA_FLAGS', ''))


@functools.cache
def _check_xla_flags(flags: str) -> None:
  if not flags:
    return
  if not flags.strip(SPACE):
    del os.environ['XLA_FLAGS']  # XLA would read blanks as a file name
    return
  xla_flags()
  if complaint := _ask_xla():
    raise UserError(f'XLA_FLAGS: XLA rejects the flags ({complaint}); correct or unset it')


def import_matplotlib() -> None:
  """Import matplotlib even if MPLBACKEND is invalid: figures written to files need no backend. A valid one is kept for the caller's figures."""
  backend = os.environ.get('MPLBACKEND')
  if not backend or 'matplotlib' in sys.modules:
    return
  os.environ['MPLBACKEND'] = 'agg'
  try:
    import matplotlib

    with contextlib.suppress(ValueError):
      matplotlib.rcParams['backend'] = backend
  finally:
    os.environ['MPLBACKEND'] = backend


def _names_file(flags: str) -> bool:
  """Return whether XLA would read the value as a file name."""
  return flags.strip(SPACE)[:1] not in ('', '-')


def _ask_xla() -> str:
  """Let XLA parse its flags in a child process. Returns its error message; '' if it accepts them."""
  read, write = os.pipe()
  child = os.fork()
  if not child:
    _read_flags(write)
  os.close(write)
  with open(read, encoding='utf-8', errors='replace') as answer:
    lines = [line.partition('] ')[2] or line for line in answer.read().splitlines()]
  _, status = os.waitpid(child, 0)
  return lines[0].strip()[:200] if status and lines else ''


def _read_flags(stderr: int) -> None:
  """Let XLA parse its flags, write its messages to `stderr`, and end this process."""
  try:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.alarm(PATIENCE)  # a lock held by another thread at the fork is never released in the child
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(stderr, 2)
    from jaxlib import xla_client

    xla_client.CompileOptions()
  finally:
    os._exit(0)
