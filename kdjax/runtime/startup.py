"""Prepare the process of a command before its libraries are imported."""

# As little as can be before Ctrl-C is handled.
import os
import signal
import sys


def is_command() -> bool:
  """Say whether Python is about to run `python -m kdjax.COMMAND`: while it looks for the module, `sys.argv[0]` is '-m'."""
  return sys.argv[:1] == ['-m'] and any(word.removeprefix('-m').startswith('kdjax.') for word in sys.orig_argv)


def prepare() -> None:
  """Make Ctrl-C, closed streams and matplotlib's backend harmless to a command."""
  signal.signal(signal.SIGINT, lambda *_: os._exit(_stopped()))
  from kdjax.runtime import interrupts, streams

  interrupts.begin()
  streams.open_missing()
  os.environ['MPLBACKEND'] = (
    'agg'  # a command's figures are files; a notebook's backend may not exist in this environment
  )


def _stopped() -> int:
  os.write(2, b'stopped\n')
  return 130
