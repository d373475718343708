"""Each process's own log, <folder>/logs/process-<i>.log: what the commands say, and now and then where the process stands.

A pod's hosts speak with one voice, process 0's; what the others saw is here.
"""

import contextlib
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator

import jax

from kdjax.storage import paths

log = logging.getLogger('kdjax')
EVERY = 60.0  # seconds between two lines of where a process stands, and between two copies to an object store


class _Handler(logging.Handler):
  """Appends lines."""

  def __init__(self, folder: paths.Path, process: int):
    super().__init__(logging.DEBUG)
    self._mirror = paths.Mirror(folder / 'logs')
    self._file = self._mirror.appending(f'process-{process}.log')
    self._pushed = time.monotonic()
    self.setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))

  def emit(self, record: logging.LogRecord) -> None:
    with contextlib.suppress(Exception):  # a full disk must not end a run because of a line of its log
      self._file.write(self.format(record) + '\n')
      self._file.flush()
      if time.monotonic() - self._pushed > EVERY:
        self._mirror.push()
        self._pushed = time.monotonic()

  def close(self) -> None:
    with contextlib.suppress(Exception):
      self._file.close()
      self._mirror.push()
    super().close()


@contextlib.contextmanager
def log_to(folder: paths.Path) -> Iterator[None]:
  """While the block runs, what `kdjax` logs goes there too, and what ends it."""
  handler = _Handler(folder, jax.process_index())
  terminal = {other: other.level for other in logging.getLogger().handlers}
  for other, before in terminal.items():
    other.setLevel(max(before, log.level, logging.INFO))  # what is for the file alone is not for the terminal
  level = log.level
  log.setLevel(logging.DEBUG)
  log.addHandler(handler)
  try:
    _who()
    yield
    log.debug('ended')
  except BaseException as e:
    log.debug('ended by %s: %s', type(e).__name__, e)
    raise
  finally:
    log.removeHandler(handler)
    log.setLevel(level)
    for other, before in terminal.items():
      other.setLevel(before)
    handler.close()


def _who() -> None:
  devices = jax.local_devices()
  log.debug(
    'process %d of %d on %s (pid %d): %d of %d devices (%s), jax %s, Python %s: %s',
    jax.process_index(), jax.process_count(), socket.gethostname(), os.getpid(), len(devices), jax.device_count(),
    devices[0].device_kind, jax.__version__, platform.python_version(), ' '.join(sys.argv),
  )  # fmt: skip
