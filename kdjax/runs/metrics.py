"""Where a run's numbers go: a JSONL line a step, its trackers (trackers.py), a progress bar."""

import contextlib
import json
import logging
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax

from kdjax.errors import StoreUnavailable, TrainingError
from kdjax.models import Model, flops
from kdjax.runs.trackers import KINDS, Csv
from kdjax.runtime import logs, progress
from kdjax.storage import paths

log = logging.getLogger('kdjax')


class MetricWriter:
  """A run's metrics.jsonl and its trackers from `step` on; lines of later steps, left by a killed run, are dropped.

  Args:
    trackers: names of trackers.KINDS.
    about: of the run, for those that show it elsewhere: id, name, group, config.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    step: int,
    trackers: Sequence[str] = ('tensorboard',),
    about: dict[str, Any] | None = None,
  ):
    self.path = paths.Path(folder) / 'metrics.jsonl'
    with self._disk():
      self._mirror = paths.Mirror(folder)
      local = self._mirror.local
      if 'csv' in trackers:
        self._mirror.fetch(Csv.FILE)
      self._trackers = [KINDS[name](local, step, about or {}) for name in trackers]
      kept = {record['step']: line for line, record in _lines(self.path) if record['step'] <= step}
      paths.write_text(local / self.path.name, ''.join(kept.values()))
      self._file = open(local / self.path.name, 'a', encoding='utf-8')  # noqa: SIM115 - closed by close()
    if len(kept) < step:
      log.warning(
        '%s: the metrics of %d of the first %d steps are lost; the checkpoint is not affected',
        self.path,
        step - len(kept),
        step,
      )

  def write(self, step: int, values: dict[str, float]) -> None:
    with self._disk():
      self._file.write(json.dumps({'step': step, **values}) + '\n')
      for tracker in self._trackers:
        tracker.write(step, values)

  def flush(self) -> None:
    with self._disk():
      self._file.flush()
      os.fsync(self._file.fileno())  # a checkpoint may follow, which a crash of the host must not leave without them
      for tracker in self._trackers:
        tracker.flush()
      self._mirror.push()

  def close(self) -> None:
    with contextlib.suppress(OSError):  # what must be on disk was flushed before
      self._file.close()
    for tracker in self._trackers:
      tracker.close()
    # What a tracker wrote last of all. A store's error must not hide the one that ended the run.
    with contextlib.suppress(*paths.read_errors(self.path)):
      self._mirror.push()

  @contextlib.contextmanager
  def _disk(self) -> Iterator[None]:
    try:
      yield
    except StoreUnavailable:
      raise
    except OSError as e:
      raise TrainingError(
        f'{self.path} cannot be written ({e.strerror or e}); free some disk space and run the same command again: '
        'it goes on from the last good checkpoint'
      ) from None


def read_metrics(folder: str | os.PathLike) -> list[dict[str, float]]:
  """The records of metrics.jsonl, in order; a last line cut by a kill is left out."""
  return [record for _, record in _lines(paths.Path(folder) / 'metrics.jsonl')]


def _lines(path: paths.Path):
  if path.exists():
    for line in paths.read_bytes(path).decode(errors='replace').splitlines(keepends=True):
      if not line.endswith('\n'):
        return
      with contextlib.suppress(ValueError):  # a damaged line loses itself, not those after it
        yield line, json.loads(line)


class Clock:
  """Notes when arrays are ready, in a thread of its own: the host may be held up meanwhile, also by the dispatch of the next call.

  On a GPU the dispatch of a loop whose length is traced returns only once the loop has ended.
  """

  def __init__(self):
    self._waiting: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=self._run, name='clock', daemon=True).start()

  def watch(self, arrays: Any) -> Future:
    """Return the future time (of `time.perf_counter`) at which the arrays are ready, in the order of the calls."""
    ready: Future = Future()
    self._waiting.put((arrays, ready))
    return ready

  def close(self) -> None:
    self._waiting.put(None)

  def _run(self) -> None:
    while (item := self._waiting.get()) is not None:
      arrays, ready = item
      try:
        jax.block_until_ready(arrays)
        ready.set_result(time.perf_counter())
      except BaseException as e:  # a failed call: raised where its result is asked for
        ready.set_exception(e)


class Speed:
  """Rates of a call: tokens/s, student and teacher TFLOP/s apart, MFU where the device's peak is known.

  Model FLOPs (kdjax/models/flops.py): nothing is counted for recomputation. With K students in a cohort the student's rate is all K's.
  """

  def __init__(self, student: Model, n_students: int, teacher: Model | None, seq_len: int):
    self._student = n_students * flops.training_flops(student.config, seq_len)
    self._teacher = flops.forward_flops(teacher.config, seq_len) if teacher else 0.0
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    self._peak = peak * jax.device_count() if peak else None
    self._last: float | None = None  # when the device was done with the call before
    self._is_first = True

  def __call__(self, tokens: float, dispatched: float, done: float) -> dict[str, float]:
    """Rates of one call, from the end of the call before to its own; after a pause, from its dispatch. {} for the first, which compiles.

    Args:
      tokens: of the call.
      dispatched: when its dispatch began, seconds.
      done: when its results were ready.
    """
    start = dispatched if self._last is None else self._last
    is_first, self._is_first, self._last = self._is_first, False, done
    if is_first:
      return {}
    rate = tokens / max(done - start, 1e-9)
    rates = {
      'tokens_per_second': rate,
      'student_tflops': rate * self._student / 1e12,
      'teacher_tflops': rate * self._teacher / 1e12,
    }
    if self._peak:
      rates['mfu'] = rate * (self._student + self._teacher) / self._peak
    return rates

  def pause(self) -> None:
    """Leave out what comes next (a checkpoint, a validation pass). The device must be idle."""
    self._last = None


def memory_gib() -> float:
  """Peak memory so far in GiB: the device's where it tells, else the process's."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use'] / 2**30
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Progress:
  """Shows rate, ETA and losses: a bar on a terminal, otherwise a line every 30 seconds."""

  def __init__(self, title: str, total: int, initial: int = 0, unit: str = 'step', enabled: bool = True):
    self._bar = progress.bar(title, total, initial=initial, unit=unit, enabled=enabled and jax.process_index() == 0)
    self._title, self._done, self._total, self._told = title, initial, total, time.monotonic()

  def update(self, n: int, **postfix: Any) -> None:
    self._done += n
    if time.monotonic() - self._told > logs.EVERY:
      self._told = time.monotonic()
      log.debug('%s: %d of %d %s', self._title, self._done, self._total, postfix)
    self._bar.set_postfix(postfix, refresh=False)
    try:
      self._bar.update(n)
    except BrokenPipeError:
      self._bar.disable = True  # otherwise close() would raise again
      raise

  def close(self) -> None:
    self._bar.close()
