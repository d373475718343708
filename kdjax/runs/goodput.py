"""Goodput: which share of a run's wall time went into steps that count, over all its starts, and where the rest went.

Each start of a run keeps a small file, <run>/sessions/<its time>.json, renewed at every checkpoint: which steps it did and the seconds of each
activity. Steps that a later start had to do again, because the save that followed them was cut short, do not count; what a killed start did after
its last checkpoint has left no trace, and is part of the time in which the run was down.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

from kdjax.storage import paths

ACTIVITIES = ('start', 'compile', 'steps', 'data', 'validation', 'checkpoints')


class Session:
  """One start's time by activity. The host's time: while a step runs on the device it waits for its metrics, which counts as `steps`.

  Args:
    folders: the runs that train side by side, in which the session is kept.
    begin: when the command turned to them (time.time()).
  """

  def __init__(self, folders: list[paths.Path], begin: float):
    self._files = [folder / 'sessions' / f'{begin:.3f}.json' for folder in folders]
    self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
    self._begin, self._first = begin, 0
    self._activity, self._since = 'start', begin

  def starts_at(self, step: int) -> None:
    self._first = step

  @contextlib.contextmanager
  def doing(self, activity: str) -> Iterator[None]:
    """Time inside is this activity's and not that of the one outside."""
    outer = self.turn_to(activity)
    try:
      yield
    finally:
      self.turn_to(outer)

  def turn_to(self, activity: str) -> str:
    """From now on; returns what it was until now."""
    now, before = time.time(), self._activity
    self._seconds[before] += now - self._since
    self._activity, self._since = activity, now
    return before

  def keep(self, step: int) -> None:
    """Write down that all up to `step` is done."""
    self.turn_to(self._activity)
    known = {'begin': self._begin, 'end': self._since, 'first': self._first, 'last': step, 'seconds': self._seconds}
    for file in self._files:
      paths.write_json(file, known)


@dataclasses.dataclass(frozen=True)
class Goodput:
  """Seconds of a run by what they went into; `steps` are those that count. The sum is the time from its first start to its last sign of life."""

  seconds: dict[str, float]
  starts: int

  @property
  def total(self) -> float:
    return sum(self.seconds.values())

  @property
  def share(self) -> float:
    return self.seconds['steps'] / self.total if self.total else 0.0

  def __str__(self) -> str:
    rest = sorted(((n, name) for name, n in self.seconds.items() if name != 'steps'), reverse=True)
    told = ', '.join(f'{name} {n / self.total:.1%}' for n, name in rest if n / self.total >= 0.0005)
    times = f', {self.starts} starts' if self.starts > 1 else ''
    return f'goodput {self.share:.1%} of {self.total:,.0f} s{times}' + (f': the rest is {told}' if told else '')


def goodput(folder: paths.Path) -> Goodput | None:
  """Of a run's folder; None where no session has been kept there."""
  files = sorted((folder / 'sessions').glob('*.json')) if (folder / 'sessions').is_dir() else []
  sessions = sorted((s for file in files if (s := paths.read_json(file))), key=lambda s: s['begin'])
  if not sessions:
    return None
  seconds = dict.fromkeys((*ACTIVITIES, 'repeated', 'down'), 0.0)
  for session, following in zip(sessions, [*sessions[1:], None], strict=True):
    for name, n in session['seconds'].items():
      seconds[name] += n
    if following is not None:
      again = _repeated(session, following['first'])
      seconds['steps'] -= again
      seconds['repeated'] += again
      seconds['down'] += max(0.0, following['begin'] - session['end'])
  return Goodput(seconds, len(sessions))


def _repeated(session: dict[str, Any], first: int) -> float:
  """Seconds of steps that the next start did again."""
  done = session['last'] - session['first']
  return (
    session['seconds']['steps'] * max(0, session['last'] - max(first, session['first'])) / done if done > 0 else 0.0
  )
