"""React to Ctrl-C and SIGTERM immediately.

Python runs a signal handler in the main thread, between two bytecode instructions, so never while that thread waits for a compiler or a
device. The interpreter's C handler runs at once and can write the signal's number to a pipe (`signal.set_wakeup_fd`). A thread that reads the
pipe can print a line or end the process while the main thread is still inside the compiler.

Only the process of a command is ended here. A notebook or another program that calls kdjax gets only exceptions.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from kdjax.errors import STOPPED, TEMPORARY

TERMINATED = 'Stopped by SIGTERM. The same command resumes what is left.'
GRACE = 2.0  # seconds for a command to exit after Ctrl-C
GRACE_TERMINATED = 10.0  # the same after SIGTERM; Kubernetes sends SIGKILL after 30

_is_command = False
_ended = threading.Lock()  # acquired by the first thread that reports the end of the process, never released


def begin(resumable: bool = False) -> None:
  """Make Ctrl-C (and SIGTERM, if `resumable`) end the process with one line. For the time of imports, when there is nothing to save."""
  global _is_command
  _is_command = True
  signal.signal(signal.SIGINT, _leave_at_once)
  if resumable:
    signal.signal(signal.SIGTERM, lambda *_: _leave(TERMINATED, TEMPORARY))


def is_command() -> bool:
  """Return whether this is the process of a command, which may be ended, rather than a notebook or another program."""
  return _is_command


def report_end(text: str) -> None:
  """Print why the process ends. In a command, only the first call prints."""
  if not _is_command:
    print(text, file=sys.stderr)
  elif _ended.acquire(blocking=False):
    report(text)


def report(text: str) -> None:
  """Print a line to stderr in one system call, which is safe in a signal handler."""
  below = '\n' if os.isatty(2) else ''  # start below ^C or a progress bar
  with contextlib.suppress(OSError):  # the reader may be gone
    os.write(2, f'{below}{text}\n'.encode())


def leave_within(seconds: float, text: str, code: int) -> None:
  """End a command's process after `seconds`, if it is still running."""
  if _is_command:
    timer = threading.Timer(seconds, _leave, (text, code))
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def forward_signals(hear: Callable[[int], None]) -> Iterator[None]:
  """Call `hear` with the number of each signal that has a Python handler, immediately and from another thread. For the main thread only."""
  read, write = os.pipe()
  os.set_blocking(write, False)
  thread = threading.Thread(target=_listen, args=(read, hear), name='signals', daemon=True)
  thread.start()
  before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(write)
    thread.join(1)


@contextlib.contextmanager
def raise_on_signals(terminated: BaseException | None = None) -> Iterator[None]:
  """Make Ctrl-C raise KeyboardInterrupt in a command, and SIGTERM raise `terminated`, if given.

  If the main thread does not raise in time, or hangs while it exits, the process is ended. A second Ctrl-C ends it at once. After the block
  SIGTERM is ignored: the interpreter's exit takes a moment, in which it would turn a finished command's 0 into 143.
  """
  if not _is_command or not is_main_thread():
    yield
    return
  taken: list[int] = []

  def take(number: int, frame: FrameType | None) -> None:
    taken.append(number)
    if len(taken) == 1:
      raise KeyboardInterrupt if number == signal.SIGINT or terminated is None else terminated
    if number == signal.SIGINT:
      _leave('stopped', STOPPED)

  def hear(number: int) -> None:
    if number == signal.SIGINT:
      leave_within(GRACE, 'stopped', STOPPED)
    elif number == signal.SIGTERM:
      leave_within(GRACE_TERMINATED, str(terminated), TEMPORARY)

  signal.signal(signal.SIGINT, take)
  if terminated is not None:
    signal.signal(signal.SIGTERM, take)
  try:
    with forward_signals(hear):
      yield
  finally:
    signal.signal(signal.SIGINT, _leave_at_once)
    if terminated is not None:
      signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the work is done, and its exit code stands


def is_main_thread() -> bool:
  return threading.current_thread() is threading.main_thread()


def _listen(read: int, hear: Callable[[int], None]) -> None:
  while numbers := os.read(read, 64):
    for number in numbers:
      hear(number)
  os.close(read)


def _leave_at_once(number: int, frame: FrameType | None) -> NoReturn:
  _leave('stopped', STOPPED)


def _leave(text: str, code: int) -> NoReturn:
  report_end(text)
  os._exit(code)
