"""Show progress: a bar on a terminal; elsewhere (a log file, a notebook's shell) a line every 30 seconds."""

import logging
import os
import sys
from typing import Any

import tqdm

EVERY = 30.0  # seconds between two lines
LINE = '{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]'


def bar(title: str, total: int | None = None, *, enabled: bool = True, **options: Any) -> tqdm.tqdm:
  """Make a progress bar, or an object that prints lines instead. `options` are tqdm's."""
  common: dict[str, Any] = {'desc': title, 'total': total, 'disable': not enabled} | options
  if is_terminal():
    return tqdm.tqdm(mininterval=0.5, dynamic_ncols=True, **common)
  # delay, miniters: print no line at the start, and none from tqdm's monitor thread.
  form = {'bar_format': LINE} if total else {}
  return _Lines(mininterval=EVERY, delay=1e-9, miniters=1, ascii=True, **form, **common)


def is_terminal() -> bool:
  """Return whether stderr can redraw a line, as a bar needs."""
  return sys.stderr.isatty() and os.environ.get('TERM') != 'dumb'


class Handler(logging.StreamHandler):
  """Prints log records; on a terminal, above the bar."""

  def emit(self, record: logging.LogRecord) -> None:
    if not is_terminal():
      super().emit(record)
      return
    with tqdm.tqdm.external_write_mode(file=sys.stderr):
      super().emit(record)


class _Lines(tqdm.tqdm):
  """Prints whole lines instead of redrawing a bar."""

  disable: bool
  _shown: int | float | None = None  # the count in the last printed line

  def display(self, msg: str | None = None, pos: int | None = None) -> bool:
    self.fp.write(f'{self}\n')
    self.fp.flush()
    self._shown = self.n
    return True

  def close(self) -> None:
    if self.disable:
      return
    if self.n != self._shown and (self.leave or self._shown is not None):
      self.display()
    self.disable = True
    self._decr_instances(self)
