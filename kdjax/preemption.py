"""Stop a run on request: of a signal, or of the notice that a preempted machine gives."""

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
  """A command was asked to stop, and has work left, which the same command resumes. Like KeyboardInterrupt it is no error: `except
  Exception` must not swallow it.

  Attributes:
    code: the exit code of the command.
  """

  def __init__(self, message: str, code: int = TEMPORARY):
    super().__init__(message)
    self.code = code


class StopRequest(Protocol):
  """`request(first, n)` says, after the call of n steps from `first`, whether to stop; all processes get the same answer."""

  @property
  def code(self) -> int:
    """The code that the command is to exit with."""

  def __call__(self, first: int, n: int) -> bool: ...

  def ask(self, code: int) -> None:
    """Ask for a stop, and exit with `code`, where there is no other process that would have to stop too."""


def terminated() -> Preempted:
  """What SIGTERM raises where a command is not in the middle of training."""
  return Preempted(interrupts.TERMINATED)


def check_notice() -> None:
  """Raise Preempted where a process of several has been told to stop. Called by all of them, between two pieces of work."""
  if jax.process_count() > 1 and _Notice()(0, 0):
    raise terminated()


@contextlib.contextmanager
def stop_signal() -> Iterator[StopRequest]:
  """Yield what says whether the run has been asked to stop.

  One process: a handler for SIGTERM and SIGINT; a second SIGINT stops at once. Several: JAX's own preemption notice, which a handler of
  ours would switch off.
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
    with interrupts.hearing(signals.hear):
      yield signals
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class _Notice:
  """JAX's preemption notice.

  The processes agree on the number after the greatest that any of them has asked about, and a number that is never asked about is missed. So
  the count is of all questions of a process, whatever its runs and their steps.
  """

  code = TEMPORARY

  def __call__(self, first: int, n: int) -> bool:
    return multihost_utils.reached_preemption_sync_point(next(_ASKED))

  def ask(self, code: int) -> None:
    pass


class _Signals:
  """The signals that have come: as the main thread takes them, and as another one hears them, at once."""

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
    # Of two that came while the main thread was in the compiler, Python hands over one.
    if number == signal.SIGINT and max(self._taken.count(number), self._heard.count(number)) > 1:
      raise KeyboardInterrupt

  def hear(self, number: int) -> None:
    """Report a signal. In a thread of its own: a handler may not print."""
    if number in SIGNALS:
      self._heard.append(number)
      if len(self._heard) == 1:
        log.warning('%s', STOPPING + AT_ONCE * (number == signal.SIGINT))
      elif number == signal.SIGINT and self._heard.count(number) > 1:
        interrupts.leave_within(interrupts.GRACE, 'stopped', STOPPED)
