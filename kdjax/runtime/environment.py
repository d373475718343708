"""Read, check and correct the environment variables of the libraries below: XLA_FLAGS and MPLBACKEND.

XLA's C++ side ends a process that has wrong flags, without an exception. Matplotlib cannot be imported with a backend that is not installed,
as every command of a notebook's shell has it from the notebook.
"""

import contextlib
import functools
import os
import resource
import signal
import sys

from kdjax.errors import UserError
from kdjax.runtime import interrupts

DETERMINISTIC = 'xla_gpu_deterministic_ops'
PATIENCE = 20  # seconds for XLA to read its flags
SPACE = ' \t\r\n'  # to XLA


def set_deterministic() -> None:
  """Ask XLA for deterministic reductions, so that a GPU gives the same bits for the same seed. To be called before JAX touches a device.

  An XLA_FLAGS that names a file is left alone: the flag belongs into that file.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if DETERMINISTIC not in flags and not _names_file(flags):
    os.environ['XLA_FLAGS'] = f'{flags} --{DETERMINISTIC}=true'.strip()


def is_deterministic() -> bool:
  """Say whether the flag is set, to whatever value, in XLA_FLAGS or in the file that it names."""
  return DETERMINISTIC in xla_flags()


def xla_flags() -> str:
  """The flags that XLA reads: XLA_FLAGS, or the text of the file that it names. Raises UserError where there is no such file."""
  flags = os.environ.get('XLA_FLAGS', '')
  if not _names_file(flags):
    return flags
  try:
    with open(flags, encoding='utf-8', errors='replace') as file:
      return file.read()
  except OSError as e:
    raise UserError(
      f"XLA_FLAGS={flags}: a value that does not begin with '-' is the name of a file of flags, and this one cannot be read ({e.strerror}); "
      'correct the name, or unset XLA_FLAGS'
    ) from None


def check_xla_flags() -> None:
  """Raise UserError where XLA cannot read XLA_FLAGS. Of a command: another program may have threads that no fork survives."""
  if interrupts.is_command():
    _check_xla_flags(os.environ.get('XLA_FLAGS', ''))


@functools.cache
def _check_xla_flags(flags: str) -> None:
  if not flags:
    return
  if not flags.strip(SPACE):
    del os.environ['XLA_FLAGS']  # XLA takes blanks for the name of a file
    return
  xla_flags()
  if complaint := _ask_xla():
    raise UserError(f'XLA_FLAGS: XLA refuses its flags ({complaint}); correct or unset it')


def import_matplotlib() -> None:
  """Import matplotlib whatever MPLBACKEND says: figures that go to files need no backend. One that is installed is kept for the caller's own."""
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
  """As XLA tells a file's name from flags."""
  return flags.strip(SPACE)[:1] not in ('', '-')


def _ask_xla() -> str:
  """What XLA says of its flags before it ends the process; '' where it reads them. It is asked in a child."""
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
  """Let XLA read its flags, with its messages in `stderr`, and end this process."""
  try:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.alarm(PATIENCE)  # a lock that another thread held at the fork is never released here
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(stderr, 2)
    from jaxlib import xla_client

    xla_client.CompileOptions()
  finally:
    os._exit(0)
