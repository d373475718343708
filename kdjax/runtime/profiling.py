"""A window of the profiler: `train --profile=20-29` leaves in the student's folder what each device did in those steps.

tensorboard --logdir=<run>/profile (with tensorboard-plugin-profile), or the .trace.json.gz in Perfetto. The parts of the step are named scopes
(kdjax/trainer/step.py, PARTS).
"""

import logging
import re

import jax

from kdjax.errors import UserError
from kdjax.storage import paths

log = logging.getLogger('kdjax')
Window = tuple[int, int]  # the first and the last step, from 1; (0, n): n steps, once those that compile are over


def parse_window(text: str) -> Window:
  """`20-29`, or `10` for ten steps as soon as possible. Raises UserError for anything else."""
  found = re.fullmatch(r'(?:(\d+)-)?(\d+)', text)
  first, last = (int(found[1] or 0), int(found[2])) if found else (0, 0)
  if last < 1 or (found and found[1] and not 1 <= first <= last):
    raise UserError(f'--profile={text}: write the steps as FIRST-LAST, as in --profile=20-29, or their number')
  return first, last


class Profiler:
  """Traces the window; it begins and ends with the device at rest, so that all of the steps and nothing else is in it.

  Args:
    folder: of the run; the traces go to its `profile`, one for each host.
    size: steps of a call.
  """

  def __init__(self, folder: paths.Path, window: Window | None, start: int, size: int):
    first, last = window or (0, 0)
    self.window = (start + 2 * size, start + 2 * size + last) if first == 0 else (first - 1, last)
    self._wanted = window is not None and self.window[1] > start
    self._mirror = paths.Mirror(folder / 'profile') if self._wanted else None
    self._running = False

  @property
  def edges(self) -> tuple[int, ...]:
    """Steps at which a call must end."""
    return self.window if self._wanted else ()

  def before(self, step: int, states) -> None:
    """`step` steps have been done."""
    if self._mirror is not None and self.window[0] <= step < self.window[1] and not self._running:
      jax.block_until_ready(states)
      jax.profiler.start_trace(str(self._mirror.local))
      self._running = True

  def after(self, step: int, metrics) -> None:
    if self._running and step >= self.window[1]:
      jax.block_until_ready(metrics)
      self.close(ended=False)

  def close(self, ended: bool = True) -> None:
    if self._mirror is not None and self._running:
      jax.profiler.stop_trace()
      self._mirror.push()
      log.info('profile: %s', self._mirror.folder)
      self._running, self._wanted = False, False
    elif self._wanted and ended:
      log.warning('--profile: the run ended before step %d; nothing was traced', self.window[0] + 1)
