"""Prepare the process of a command before its libraries are imported."""

# As little as can be before Ctrl-C is handled.
import os
import signal
import sys

RESUMABLE = ('train', 'evaluate', 'grid', 'prepare')


def command() -> str:
  """The COMMAND that Python is about to run with `python -m kdjax.COMMAND`, or ''. While it looks for the module, `sys.argv[0]` is '-m'."""
  words = [word.removeprefix('-m') for word in sys.orig_argv[1:]] if sys.argv[:1] == ['-m'] else []
  return next((word.removeprefix('kdjax.') for word in words if word.startswith('kdjax.')), '')


def prepare(command: str) -> None:
  """Make signals, closed streams and matplotlib's backend harmless to a command."""
  signal.signal(signal.SIGINT, lambda *_: os._exit(_stopped()))
  from kdjax.runtime import interrupts, streams

  interrupts.begin(command in RESUMABLE)
  streams.open_missing()
  os.environ['MPLBACKEND'] = (
    'agg'  # a command's figures are files; a notebook's backend may not exist in this environment
  )


def _stopped() -> int:
  os.write(2, b'stopped\n')
  return 130
