"""Show progress: a bar on a terminal, and elsewhere (a log file, a notebook's shell) a line now and then."""

import logging
import os
import sys
from typing import Any

import tqdm

EVERY = 30.0  # seconds between two lines
LINE = '{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]'


def bar(title: str, total: int | None = None, *, enabled: bool = True, **options: Any) -> tqdm.tqdm:
  """Make a bar, or what prints lines instead of one. `options` are tqdm's."""
  common: dict[str, Any] = {'desc': title, 'total': total, 'disable': not enabled} | options
  if is_terminal():
    return tqdm.tqdm(mininterval=0.5, dynamic_ncols=True, **common)
  # delay, miniters: no line at the start, none from tqdm's monitor.
  form = {'bar_format': LINE} if total else {}
  return _Lines(mininterval=EVERY, delay=1e-9, miniters=1, ascii=True, **form, **common)


def is_terminal() -> bool:
  """Say whether stderr can show a bar: a line that is written again and again."""
  return sys.stderr.isatty() and os.environ.get('TERM') != 'dumb'


class Handler(logging.StreamHandler):
  """Prints log records, on a terminal above the bar and not in it."""

  def emit(self, record: logging.LogRecord) -> None:
    if not is_terminal():
      super().emit(record)
      return
    with tqdm.tqdm.external_write_mode(file=sys.stderr):
      super().emit(record)


class _Lines(tqdm.tqdm):
  """Whole lines in the place of a bar that is drawn again and again."""

  disable: bool
  _shown: int | float | None = None  # what the last line said

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
