"""Keep stdout and stderr from ending a command with a traceback: readers that leave, characters without an encoding, closed streams."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

from kdjax.errors import NO_READER


def open_missing() -> None:
  """Put the null device in the place of a stdout or stderr that the caller has closed (`>&-`): else the next file opened would take its number."""
  for name in ('stdin', 'stdout', 'stderr'):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, 'r' if name == 'stdin' else 'w'))  # noqa: SIM115 - for the process's whole life


def make_printable() -> None:
  """Print '?' for each character that stdout's encoding lacks. Python does the like for stderr already."""
  with contextlib.suppress(AttributeError, ValueError):  # not a file: a notebook's or a test's own
    sys.stdout.reconfigure(errors='replace')  # type: ignore[union-attr]


@contextlib.contextmanager
def ending_with_reader() -> Iterator[None]:
  """End the command quietly where nobody reads its stdout or stderr any more (`| head`), as SIGPIPE ends other programs.

  An error that the block raises is still raised.
  """
  try:
    yield
    flushed = _flush()
  except BrokenPipeError:
    if not [_silence(stream) for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]:
      raise  # another pipe's, or a socket's
    flushed = False
  except BaseException as e:
    if not _flush() and isinstance(e, SystemExit) and not e.code:
      e.code = NO_READER
    raise
  if not flushed:
    raise SystemExit(NO_READER)


def _flush() -> bool:
  """Flush stdout and return whether someone can read it. Raise OSError where it cannot be written for another reason."""
  try:
    sys.stdout.flush()
    return True
  except BrokenPipeError:
    _silence(sys.stdout)
    return False
  except OSError as e:
    _silence(sys.stdout)  # the interpreter flushes once more at its end
    e.filename = 'stdout'
    raise


def _has_no_reader(stream: Any) -> bool:
  try:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
  except (AttributeError, OSError, ValueError):
    return False


def _silence(stream: Any) -> bool:
  """Send what is left of a stream, and all that follows, to the null device."""
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, stream.fileno())
  os.close(null)
  return True
