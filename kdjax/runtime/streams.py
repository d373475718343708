"""Prevent tracebacks from stdout and stderr: readers that exit, characters that cannot be encoded, closed streams."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

from kdjax.errors import NO_READER


def open_missing() -> None:
  """Open the null device for each standard stream that the caller has closed (`>&-`): otherwise the next opened file would take its number."""
  for name in ('stdin', 'stdout', 'stderr'):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, 'r' if name == 'stdin' else 'w'))  # noqa: SIM115 - for the process's whole life


def make_printable() -> None:
  """Print '?' for each character that stdout cannot encode. Python already escapes them on stderr."""
  with contextlib.suppress(AttributeError, ValueError):  # a notebook or a test may have replaced stdout
    sys.stdout.reconfigure(errors='replace')  # type: ignore[union-attr]


@contextlib.contextmanager
def exit_without_reader() -> Iterator[None]:
  """Exit quietly if the reader of stdout or stderr is gone (`| head`), as SIGPIPE ends other programs.

  Other errors of the block are still raised.
  """
  try:
    yield
    flushed = _flush()
  except BrokenPipeError:
    if not [_silence(stream) for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]:
      raise  # from another pipe or a socket
    flushed = False
  except BaseException as e:
    if not _flush() and isinstance(e, SystemExit) and not e.code:
      e.code = NO_READER
    raise
  if not flushed:
    raise SystemExit(NO_READER)


def _flush() -> bool:
  """Flush stdout; return whether it has a reader. Raises OSError if writing fails for another reason."""
  try:
    sys.stdout.flush()
    return True
  except BrokenPipeError:
    _silence(sys.stdout)
    return False
  except OSError as e:
    _silence(sys.stdout)  # the interpreter flushes again at exit
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
  """Redirect a stream, including its buffered output, to the null device."""
  null = os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, stream.fileno())
  os.close(null)
  return True
