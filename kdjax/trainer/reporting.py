"""Write the metrics of a run while it runs, behind the device: those of a call once the next one has been dispatched."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax

from kdjax.errors import NO_READER, TrainingError
from kdjax.runs.metrics import Clock, MetricWriter, Progress, Speed, memory_gib
from kdjax.runtime.preemption import StopRequest
from kdjax.trainer.cohort import Cohort


class _Call(NamedTuple):
  """A dispatched call of the step: its first step, how many, their metrics, when its dispatch began, and when its results were ready."""

  first: int
  n: int
  metrics: Any
  dispatched: float
  done: Future


class Reporter:
  """Writes a call's metrics once the next call has been dispatched, and ends a run that no longer learns with a TrainingError."""

  def __init__(self, cohort: Cohort, start: int, asked_to_stop: StopRequest):
    self._cohort, self._asked_to_stop = cohort, asked_to_stop
    self._pending: _Call | None = None
    self._rates: dict[str, float] | None = None  # of the pending call, once measured
    writes = jax.process_index() == 0
    self._writers = [
      MetricWriter(m.folder.path, start, cohort.config.trackers, m.about) for m in (cohort.members if writes else ())
    ]
    teacher = cohort.recipe.teacher if 'teacher' in cohort.recipe.targets else None
    self._speed = Speed(cohort.recipe.student, len(cohort.members), teacher, cohort.stream.windows.seq_len)
    self._clock = Clock()
    self._bar = Progress(cohort.title, cohort.total_steps, start, enabled=cohort.progress)

  def next(self, first: int, n: int, metrics, dispatched: float) -> None:
    """Take over the metrics of a call whose dispatch began at that time."""
    done = self._clock.watch(metrics[0]['tokens'])
    self._settle()
    self._pending = _Call(first, n, metrics, dispatched, done)

  def measure(self) -> None:
    """Wait for the call that was dispatched last: what follows does not count for its rates."""
    assert self._pending
    call = self._pending
    tokens = float(jax.device_get(call.metrics[0]['tokens'])[: call.n].sum())
    self._rates = self._speed(tokens, call.dispatched, call.done.result())

  def validated(self, losses: Sequence[jax.Array]) -> None:
    """The students' validation losses after that call."""
    self._settle(losses)
    self.flush()

  def flush(self, pause: bool = True) -> None:
    self._settle()
    for writer in self._writers:
      writer.flush()
    if pause:
      self._speed.pause()

  def close(self) -> None:
    self._bar.close()
    self._clock.close()
    for writer in self._writers:
      writer.close()

  def _settle(self, validation: Sequence[jax.Array] | None = None) -> None:
    if self._pending:
      if self._rates is None:
        self.measure()
      self._write(self._pending.first, self._pending.n, self._pending.metrics, validation)
    self._pending = self._rates = None

  def _write(self, first: int, n: int, metrics, validation) -> None:
    metrics, validation = jax.device_get((metrics, validation))
    rates = (self._rates or {}) | {'memory_gib': memory_gib()}
    for k, writer in enumerate(self._writers):
      for i in range(n):
        values = {name: float(value[i]) for name, value in metrics[k].items()} | rates
        if validation is not None and i == n - 1:
          values['validation_ce'] = float(validation[k])
        writer.write(first + i + 1, values)
    names = [m.label for m in self._cohort.members]
    losses = {f'{name} ce': f'{m["ce"][n - 1]:.3f}' for name, m in zip(names, metrics, strict=True)}
    kd = {f'{name} kd': f'{m["kd"][n - 1]:.3f}' for name, m in zip(names, metrics, strict=True) if 'kd' in m}
    tokens = {'tok/s': f'{rates["tokens_per_second"]:,.0f}'} if 'tokens_per_second' in rates else {}
    try:
      self._bar.update(n, **tokens, **losses, **kd)
    except BrokenPipeError:  # Ctrl-C also ends `| tee`, before this run has saved
      self._asked_to_stop.ask(NO_READER)
    for name, m in zip(names, metrics, strict=True):
      if m['skipped_in_row'][:n].max() >= self._cohort.config.max_skipped:
        raise TrainingError(
          f'{name}: the loss or a gradient was not finite {self._cohort.config.max_skipped} steps in a row, up to step {first + n}; '
          'the updates were left out and the last checkpoint is good; lower the learning rate or look at the data, then start again'
        )
