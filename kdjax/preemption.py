"""A run that is asked to stop: by a signal, or by the notice that a preempted machine gives."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

_ASKED = itertools.count(1)  # how often this process has asked for a preemption notice


class Preempted(Exception):
  """The run was asked to stop; it has saved and goes on with the same command. `code` is for the command to exit with."""

  code = 0


class _Asked:
  """Whether a signal has come, and which."""

  number = 0

  def __call__(self, first: int, n: int) -> bool:
    return self.number != 0


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int, int], bool]]:
  """Says after a call (first step, number of steps) whether the run has been asked to stop, the same on all processes.

  One process: a handler for SIGTERM and SIGINT; a second SIGINT stops at once. Several: JAX's own preemption notice, which a handler of
  ours would switch off.
  """
  if jax.process_count() > 1:
    # The processes agree on the number after the greatest that any of them has asked about, and a number that is never asked about is
    # missed: so the count goes on through all the runs of a process, whatever their steps.
    yield lambda first, n: multihost_utils.reached_preemption_sync_point(next(_ASKED))
    return
  asked = _Asked()
  if threading.current_thread() is not threading.main_thread():
    yield lambda first, n: False
    return

  def ask(number, frame):
    if asked.number and number == signal.SIGINT:
      raise KeyboardInterrupt
    asked.number = number

  old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield asked
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
