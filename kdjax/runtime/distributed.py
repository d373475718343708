"""Several processes: JAX's own runtime, what one process does first for the others, and a clear end where one of them is lost."""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdjax import machine
from kdjax.errors import UserError
from kdjax.runtime import environment, interrupts, options, preemption

T = TypeVar('T')

WATCHED = 'KDJAX_WATCHED'  # in the environment of a process whose parent watches it
AGAIN = 'start all processes again with the same commands: they go on from the last checkpoint'
# What a collective or the coordination service says where another process is gone.
LOST = re.compile(
  r'gloo|connection (reset|closed|refused)|socket closed|heartbeat|coordination service|barrier|UNAVAILABLE|DEADLINE_EXCEEDED',
  re.I,
)
LEFT_BEHIND = 'unset the TPU_* and MEGASCALE_* variables, where they are left behind by an earlier slice, or mend them'
SIGNALLED = 128  # an exit code above it, as in a shell: ended by signal `code - 128`


def watch() -> None:
  """Called first by a command: where it is one of several processes, the work is done in a child and this process only waits for it.

  JAX's runtime ends a process from C++, with no Python exception, where the coordinator is gone: somebody else must say so in one line.
  Returns in the process that does the work. The child dies with its parent.
  """
  if parent := os.environ.pop(WATCHED, ''):  # no longer there for what this process may start
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
      ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it died before
      sys.exit(1)
    return
  if not any(word.partition('=')[0] in ('--distributed', '--coordinator') for word in sys.argv[1:]):
    return
  child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=os.environ | {WATCHED: str(os.getpid())})
  signal.signal(signal.SIGTERM, functools.partial(_pass_on, child, itertools.count()))
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal gives it to the child too
  code = child.wait()
  if code < 0:
    print(f'error: {_ended_by(-code)}', file=sys.stderr, flush=True)
    code = SIGNALLED - code
  sys.exit(code)


def _pass_on(child: subprocess.Popen, times: Iterator[int], number: int, frame: FrameType | None) -> None:
  """Forward SIGTERM to the child. Report the first one here, because the child's runtime does not."""
  if next(times) == 0:
    interrupts.report(preemption.STOPPING)
  child.terminate()


def _ended_by(number: int) -> str:
  if number == signal.SIGABRT:
    return f'the runtime ended this process: the coordinator (process 0) or another process is gone or silent; {AGAIN}'
  name = signal.Signals(number).name
  hint = ' (the machine may have run out of memory)' if number == signal.SIGKILL else ''
  return f'this process was ended by {name}{hint}; {AGAIN}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group('several processes (on a TPU pod --distributed is enough)')
  group.add_argument('--distributed', action='store_true', help='join the processes that the environment describes')
  group.add_argument('--coordinator', metavar='HOST:PORT', help='address of process 0')
  group.add_argument('--processes', type=options.machines, help='number of processes')
  group.add_argument('--process', type=options.count, help='index of this process, from 0')


def check_environment(joins: bool, environment: Mapping[str, str], addresses: Sequence[str]) -> None:
  """Raise UserError if the environment describes a slice that this machine cannot be of: the TPU runtime would wait for it for ever.

  Args:
    joins: whether this process joins others (--distributed, --coordinator).
    environment: os.environ.
    addresses: of this machine.
  """
  if environment.get('JAX_PLATFORMS', '').startswith(('cpu', 'cuda')):
    return
  hosts = [host for host in environment.get('TPU_WORKER_HOSTNAMES', '').split(',') if host]
  if len(hosts) > 1 and not joins:
    raise UserError(
      f'TPU_WORKER_HOSTNAMES says that this machine is one of {len(hosts)} hosts of a slice: start the same command on all of them, with '
      '--distributed; or unset it, where it is left behind by an earlier slice'
    )
  number = environment.get('TPU_WORKER_ID', '')
  if hosts and number and not (number.isdigit() and int(number) < len(hosts)):
    raise UserError(f'TPU_WORKER_ID={number}: TPU_WORKER_HOSTNAMES has {len(hosts)} hosts; {LEFT_BEHIND}')
  if len(hosts) > 1 and all(map(_is_ipv4, hosts)) and addresses and not set(addresses) & set(hosts):
    raise UserError(f'TPU_WORKER_HOSTNAMES names {hosts[0]}, ... and not this machine ({addresses[0]}); {LEFT_BEHIND}')
  slices = {
    name: environment.get(f'MEGASCALE_{name}', '') for name in ('COORDINATOR_ADDRESS', 'NUM_SLICES', 'SLICE_ID')
  }
  missing = [f'MEGASCALE_{name}' for name, value in slices.items() if not value]
  if 0 < len(missing) < len(slices):
    raise UserError(f'of the variables of several slices {", ".join(missing)} is not set and others are; {LEFT_BEHIND}')
  count, which = slices['NUM_SLICES'], slices['SLICE_ID']
  if not missing and not (count.isdigit() and which.isdigit() and int(which) < int(count)):
    raise UserError(f'MEGASCALE_SLICE_ID={which}: there are MEGASCALE_NUM_SLICES={count} slices; {LEFT_BEHIND}')


def _is_ipv4(host: str) -> bool:
  return re.fullmatch(r'(\d{1,3}\.){3}\d{1,3}', host) is not None


def _addresses() -> list[str]:
  """This machine's own, as far as its name tells them."""
  with contextlib.suppress(OSError):
    found = {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    return sorted(address for address in found if not address.startswith('127.'))
  return []


def initialize(args: argparse.Namespace, heartbeat_timeout: int) -> None:
  """Joins the processes, where there are several. To be called before JAX touches a device."""
  environment.check_xla_flags()
  check_environment(args.distributed or args.coordinator is not None, os.environ, _addresses())
  named = (args.coordinator, args.processes, args.process)
  if any(value is not None for value in named):
    if any(value is None for value in named):
      raise UserError('--coordinator, --processes and --process belong together: one of them is missing')
    if not re.fullmatch(r'.+:\d{1,5}', args.coordinator):
      raise UserError(f'--coordinator={args.coordinator}: must be HOST:PORT, as in 10.0.0.1:1234')
    if not 0 <= args.process < args.processes:
      raise UserError(f'--process={args.process}: must be from 0 to {args.processes - 1}')
  elif not args.distributed:
    return
  try:
    jax.distributed.initialize(
      args.coordinator, args.processes, args.process, heartbeat_timeout_seconds=heartbeat_timeout
    )
  except (RuntimeError, ValueError) as e:
    raise UserError(f'the processes could not be joined: {str(e).splitlines()[0]}') from None
  check_same_software()


def check_same_software() -> None:
  """Raise UserError, on every process, where the processes of a job run different versions: they would compute different programs."""
  if jax.process_count() == 1:
    return
  mine = machine.versions() | {'kdjax': machine.git_commit()}
  found = [json.loads(text) for text in _gather_texts(json.dumps(mine))]
  for process, other in enumerate(found):
    if different := [
      f'{name} {other.get(name)} instead of {found[0][name]}' for name in found[0] if other.get(name) != found[0][name]
    ]:
      raise UserError(
        f'process {process} runs {", ".join(different)} of process 0; install the same versions and the same code on all hosts'
      )


def _gather_texts(text: str, size: int = 4096) -> list[str]:
  """Return the text of every process."""
  mine = np.frombuffer(text.encode()[:size].ljust(size), np.uint8)
  return [bytes(one).decode().rstrip() for one in np.asarray(multihost_utils.process_allgather(mine))]


def is_lost(error: Exception) -> bool:
  """Return whether an error is what a process gets where another one of its job is gone."""
  return jax.distributed.is_initialized() and LOST.search(str(error)) is not None


def first_process_first(work: Callable[[], T]) -> T:
  """Run `work` on process 0, then on the others, which find on a shared disk what it made (and on a disk of their own make it again)."""
  if jax.process_count() == 1:
    return work()
  result, error = None, None
  if jax.process_index() == 0:
    try:
      result = work()
    except Exception as e:  # raised again below, once the others know
      error = e
  failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(error is not None)))
  if error is not None:
    raise error
  if failed:
    raise UserError('process 0 stopped with an error; its log says why')
  return result if jax.process_index() == 0 else work()  # type: ignore[return-value]


def of_first_process(numbers: Sequence[int]) -> list[int]:
  """Process 0's numbers on every process: what one sees on disk now, another may have seen a moment before."""
  if jax.process_count() == 1:
    return list(numbers)
  count = int(multihost_utils.broadcast_one_to_all(np.asarray(len(numbers))))
  mine = np.asarray(numbers if jax.process_index() == 0 else [0] * count, np.int32)
  return [int(n) for n in multihost_utils.broadcast_one_to_all(mine)] if count else []


def on_any_process(flag: bool) -> bool:
  return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).any())


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
  """Around a command: a process of several that fails ends here and now.

  Leaving in the ordinary way waits for the others, which wait for this one in the middle of a step or a save.
  """
  try:
    yield
  except BaseException as e:
    if not jax.distributed.is_initialized():
      raise
    if not isinstance(e, SystemExit):
      traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError):  # the reader is gone
        stream.flush()
    os._exit(e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 1)


def from_first_process(values: Sequence[bool]) -> list[bool]:
  """Process 0's values, on every process: what each decides by looking at a disk that may be its own."""
  if jax.process_count() == 1 or not values:
    return list(values)
  return [bool(v) for v in multihost_utils.broadcast_one_to_all(np.asarray(values, bool))]
