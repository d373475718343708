"""Prepare the process of a command before its libraries are imported."""

# Import as little as possible before Ctrl-C is handled.
import os
import signal
import sys

RESUMABLE = ('train', 'evaluate', 'grid', 'prepare')


def command() -> str:
  """Return COMMAND if Python is about to run `python -m kdjax.COMMAND`, else ''. While Python searches for the module, `sys.argv[0]` is '-m'."""
  words = [word.removeprefix('-m') for word in sys.orig_argv[1:]] if sys.argv[:1] == ['-m'] else []
  return next((word.removeprefix('kdjax.') for word in words if word.startswith('kdjax.')), '')


def prepare(command: str) -> None:
  """Protect a command from signals during imports, closed streams and a missing matplotlib backend."""
  signal.signal(signal.SIGINT, lambda *_: os._exit(_stopped()))
  from kdjax.runtime import interrupts, streams

  interrupts.begin(command in RESUMABLE)
  streams.open_missing()
  os.environ['MPLBACKEND'] = 'agg'  # a command writes figures to files; a notebook's backend may not be installed here


def _stopped() -> int:
  os.write(2, b'stopped\n')
  return 130
