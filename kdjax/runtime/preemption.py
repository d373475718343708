"""Stop a run on a signal or on the preemption notice of a machine."""

import contextlib
import itertools
import logging
import signal
from collections.abc import Iterator
from typing import Protocol

import jax
from jax.experimental import multihost_utils

from kdjax.errors import STOPPED, TEMPORARY
from kdjax.runtime import interrupts

log = logging.getLogger('kdjax')

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPING = 'Stopping after this step. The run is saved, and the same command resumes it.'
AT_ONCE = ' Ctrl-C again: stop at once, unsaved.'
_ASKED = itertools.count(1)  # how often this process has asked for a preemption notice


class Preempted(BaseException):
  """A command was asked to stop before it was done; the same command resumes it. Like KeyboardInterrupt, this is not an error: `except
  Exception` must not catch it.

  Attributes:
    code: the exit code of the command.
  """

  def __init__(self, message: str, code: int = TEMPORARY):
    super().__init__(message)
    self.code = code


class StopRequest(Protocol):
  """`request(first, n)` returns, after a call of n steps from `first`, whether to stop; all processes get the same answer."""

  @property
  def code(self) -> int:
    """The exit code for the command."""

  def __call__(self, first: int, n: int) -> bool: ...

  def ask(self, code: int) -> None:
    """Request a stop with exit code `code`. Has no effect with several processes, which must stop together."""


def termination_error() -> Preempted:
  """Return the exception that SIGTERM raises while a command is not training."""
  return Preempted(interrupts.TERMINATED)


def check_notice() -> None:
  """Raise Preempted if one of several processes has been asked to stop. All processes must call this, between two units of work."""
  if jax.process_count() > 1 and _Notice()(0, 0):
    raise termination_error()


@contextlib.contextmanager
def stop_signal() -> Iterator[StopRequest]:
  """Yield a StopRequest for a run.

  A single process handles SIGTERM and SIGINT; a second SIGINT stops at once. Several processes use JAX's preemption notice, which a signal
  handler of kdjax would disable.
  """
  if jax.process_count() > 1:
    yield _Notice()
    return
  signals = _Signals()
  if not interrupts.is_main_thread():
    yield signals
    return
  before = {number: signal.signal(number, signals.take) for number in SIGNALS}
  try:
    with interrupts.forward_signals(signals.hear):
      yield signals
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class _Notice:
  """JAX's preemption notice.

  The processes agree to stop at the step after the greatest one that any of them has asked about, and miss a step that is never asked about.
  So the step passed to JAX counts all calls in a process, across its runs.
  """

  code = TEMPORARY

  def __call__(self, first: int, n: int) -> bool:
    return multihost_utils.reached_preemption_sync_point(next(_ASKED))

  def ask(self, code: int) -> None:
    pass


class _Signals:
  """Records the signals received by the main thread's handler (delayed) and by the listening thread (immediate)."""

  def __init__(self) -> None:
    self._taken: list[int] = []
    self._heard: list[int] = []
    self._code = 0

  def __call__(self, first: int, n: int) -> bool:
    return bool(self._taken or self._code)

  @property
  def code(self) -> int:
    if signal.SIGINT in self._taken:
      return STOPPED
    return TEMPORARY if self._taken else self._code

  def ask(self, code: int) -> None:
    self._code = code

  def take(self, number: int, frame) -> None:
    """Handle a signal in the main thread."""
    self._taken.append(number)
    # If two arrive while the main thread is in the compiler, Python calls the handler once.
    if number == signal.SIGINT and max(self._taken.count(number), self._heard.count(number)) > 1:
      raise KeyboardInterrupt

  def hear(self, number: int) -> None:
    """Report a signal. Runs in the listening thread, because a signal handler must not print."""
    if number in SIGNALS:
      self._heard.append(number)
      if len(self._heard) == 1:
        log.warning('%s', STOPPING + AT_ONCE * (number == signal.SIGINT))
      elif number == signal.SIGINT and self._heard.count(number) > 1:
        interrupts.leave_within(interrupts.GRACE, 'stopped', STOPPED)
