"""The training loop of a cohort: students that share architecture, data and teacher, each with its own folder and checkpoints.

The host only dispatches: it fetches the metrics of a call after the next one has been dispatched, so the device never waits for it.
Where a run may start: its newest checkpoint that verifies, else from scratch.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import fingerprint
from kdjax.data.batches import Windows, local_rows, to_global
from kdjax.errors import NO_READER, TrainingError
from kdjax.losses import fused_loss
from kdjax.runs.checkpoint import CheckpointDamaged, Checkpoints, Restored, params_fingerprint
from kdjax.runs.folder import Heartbeat, RunFolder, claim_all
from kdjax.runs.goodput import Session, goodput
from kdjax.runs.local_checkpoint import LocalCheckpoints
from kdjax.runs.metrics import Clock, MetricWriter, Progress, Speed, memory_gib, read_metrics
from kdjax.runs.state import TrainState
from kdjax.runtime import distributed, sharding
from kdjax.runtime.preemption import Preempted, StopRequest, stop_signal
from kdjax.runtime.profiling import Profiler
from kdjax.storage import paths
from kdjax.trainer.cohort import Cohort
from kdjax.trainer.step import init_state, make_step, state_shardings

log = logging.getLogger('kdjax')


def train_cohort(cohort: Cohort, mesh: Mesh) -> None:
  """Trains the cohort to its last step, from wherever it stands. Returns at once where it is done.

  Raises:
    TrainingError: too many non-finite steps in a row, a folder taken over, a checkpoint that could not be written.
    UserError: a folder of another config or owned by a live trainer, damaged checkpoints.
    Preempted: stopped by a signal, saved.
  """
  begin = time.time()
  for member in cohort.members:
    member.folder.check_config(member.config)
    member.folder.check_fingerprints(cohort.fingerprints)
  cohort = _unfinished(cohort)
  folders = [m.folder for m in cohort.members]
  if not folders:
    return
  claim_all(folders, cohort.heartbeat_timeout)
  heart = Heartbeat(folders, cohort.total_steps)
  # A kill may leave one member a checkpoint ahead: the one before must still be there.
  keep = max(cohort.keep, 2) if len(folders) > 1 else cohort.keep
  with heart.beating(), stop_signal() as asked_to_stop, contextlib.ExitStack() as stack:
    abstract = _abstract(cohort, mesh)
    saves = [_saves(f, keep, cohort, stack) for f in folders]
    local = _local(cohort, abstract, stack)
    session = Session([f.path for f in folders if f.writes], begin)
    states, start = _start(cohort, saves, local, abstract)
    session.starts_at(start)
    stopped = _train(cohort, mesh, states, start, saves, local, heart, asked_to_stop, session)
    heart.finish('preempted' if stopped is not None and stopped < cohort.total_steps else 'done')
    if local and stopped in (None, cohort.total_steps):
      local.clear()
    if cohort.progress and folders[0].writes:
      log.info('%s: %s', cohort.title, goodput(folders[0].path))
    if stopped is not None:
      raise Preempted(
        f'{cohort.title}: stopped at step {stopped} of {cohort.total_steps} and saved. The same command resumes it.',
        asked_to_stop.code,
      )


def _unfinished(cohort: Cohort) -> Cohort:
  """The cohort without the members that are done: they are never trained again because another one is missing."""
  done = [
    m.folder.is_done()
    and m.folder.read_record() is not None
    and (m.folder.checkpoints / str(cohort.total_steps)).is_dir()
    for m in cohort.members
  ]
  done = distributed.from_first_process(done)
  left = [(m, target) for m, target, over in zip(cohort.members, cohort.recipe.targets, done, strict=True) if not over]
  targets = tuple(target for _, target in left)
  return dataclasses.replace(cohort, members=tuple(m for m, _ in left), recipe=cohort.recipe._replace(targets=targets))


def calls(start: int, total: int, size: int, *every: int, at: Sequence[int] = ()) -> list[tuple[int, int]]:
  """(first step, number of steps) of each call from `start` to `total`, cut at the multiples of each of `every` and at the steps `at`."""
  out = []
  while start < total:
    ends = [total, start + size] + [(start // e + 1) * e for e in every if e] + [step for step in at if step > start]
    out.append((start, min(ends) - start))
    start = min(ends)
  return out


def _abstract(cohort: Cohort, mesh: Mesh) -> tuple[TrainState, ...]:
  """Each member's state, as ShapeDtypeStructs with shardings."""
  abstract = []
  for member in cohort.members:
    shapes = jax.eval_shape(functools.partial(init_state, cohort.recipe, member.alpha), jax.random.key(cohort.seed))
    placed = state_shardings(cohort.recipe, shapes, mesh)
    abstract.append(sharding.abstract(shapes, placed))
  return tuple(abstract)


def _start(
  cohort: Cohort, saves: list[Checkpoints], local: LocalCheckpoints | None, abstract: tuple[TrainState, ...]
) -> tuple[tuple[TrainState, ...], int]:
  """(states, step): from the newest step at which every member's checkpoint verifies, else fresh."""
  states = []
  found = _restore(cohort, saves, local, abstract)
  params = cohort.initial() if cohort.initial and found is None else None
  for k, (member, shape) in enumerate(zip(cohort.members, abstract, strict=True)):
    known = dict(cohort.fingerprints)
    if found is None:
      placed = jax.tree.map(lambda x: x.sharding, shape)
      init = functools.partial(init_state, cohort.recipe, member.alpha)
      states.append(jax.jit(init, out_shardings=placed)(jax.random.key(cohort.seed), params))
      known['init'] = params_fingerprint(states[-1].params, like=member.folder.fingerprint('init'))
    else:
      saves[k].set_aside_after(found[k].step)
      states.append(found[k].state)
    notes = member.notes | {'facts': cohort.facts, 'tokenizer': member.folder.keep_tokenizer(cohort.tokenizer)}
    member.folder.record(member.config, known, notes)
  start = found[0].step if found else 0
  if local:
    local.forget_all_but(start)
  return tuple(states), start


def _restore(
  cohort: Cohort, saves: list[Checkpoints], local: LocalCheckpoints | None, abstract: tuple[TrainState, ...]
) -> list[Restored] | None:
  """Every member's state at the newest step of which all have a checkpoint, in their folders or on the hosts, that verifies; None where no
  step has been saved by all."""
  common = set.intersection(*(set(save.steps()) for save in saves))
  upto, damaged = _recorded(cohort) if local else 0, None
  for step in (*sorted(common, reverse=True), 0):
    if local and (kept := local.restore(step, upto)):
      log.info('%s: goes on from the local checkpoint of step %d', cohort.title, kept[1])
      return [Restored(state, kept[1]) for state in kept[0]]
    try:
      found = [save.verified(one, cohort.fingerprints, {step}) for save, one in zip(saves, abstract, strict=True)]
      if step:
        return [one for one in found if one]
    except CheckpointDamaged as e:
      damaged = e.with_traceback(None)  # which would keep the arrays that have been read
    upto = min(upto, step)
  if damaged:
    raise damaged
  if any(save.steps() for save in saves):
    log.warning('no checkpoint of one step is in every folder of the cohort: starting from step 0')
  return None


def _recorded(cohort: Cohort) -> int:
  """The last step that all members' metrics have: a run that went on from a later one would lack some."""
  files = [member.folder.path for member in cohort.members if member.folder.writes]
  last = [max((int(record['step']) for record in read_metrics(path)), default=0) for path in files]
  return distributed.of_first_process([min(last, default=0)])[0]


def _train(
  cohort: Cohort,
  mesh: Mesh,
  states: tuple[TrainState, ...],
  start: int,
  saves: list[Checkpoints],
  local: LocalCheckpoints | None,
  heart: Heartbeat,
  asked_to_stop: StopRequest,
  session: Session,
) -> int | None:
  """Trains to the last step, or until asked to stop: then returns the step that it stopped at. Everything is saved."""
  recipe, stream, total = cohort.recipe, cohort.stream, cohort.total_steps
  step_fn = make_step(recipe, [state_shardings(recipe, state, mesh) for state in states])
  validate = _validation(cohort, mesh)
  report = _Report(cohort, start, asked_to_stop)
  stacked = NamedSharding(mesh, P(None, sharding.BATCH_AXES))
  rows = local_rows(NamedSharding(mesh, P(sharding.BATCH_AXES)), stream.batch_size)
  profiler = Profiler(cohort.members[0].folder.path, cohort.profile, start, recipe.size)
  at = (*cohort.keep_steps, *profiler.edges)
  every = (cohort.checkpoint_every, cohort.keep_period, cohort.local_every, cohort.eval_every)
  plan = calls(start, total, recipe.size, *every, at=at)
  stopped = None
  with contextlib.closing(report), contextlib.closing(profiler):
    session.turn_to('data')
    for (first, n), held in zip(
      plan, stream.iterate(plan, recipe.size, rows, cohort.threads, cohort.prefetch), strict=True
    ):
      session.turn_to('compile' if first == start else 'steps')
      batches = to_global(held, rows, stacked, stream.batch_size)
      profiler.before(first, states)
      dispatched = time.perf_counter()
      states, metrics = step_fn(states, cohort.teacher, batches, n)
      session.turn_to('steps')
      step = first + n
      profiler.after(step, metrics)
      report.next(first, n, metrics, dispatched)
      if (cohort.eval_every and step % cohort.eval_every == 0) or step == total:
        report.measure()  # nothing is lost: the validation's result is waited for too
        with session.doing('validation'):
          report.validated([validate(s.params) for s in states])
      heart.step(step)
      stop = asked_to_stop(first, n)
      if stop or step == total or cohort.saves_at(step):
        report.flush()
        with session.doing('checkpoints'):
          _save(cohort, saves, step, states)
          session.keep(step)
      elif local and step % cohort.local_every == 0:
        report.flush(pause=False)  # what it takes belongs to the rates: it may follow on every call
        with session.doing('checkpoints'):
          local.save(step, states)
          session.keep(step)
      if stop:
        stopped = step
        break
      session.turn_to('data')
    report.flush()
    session.turn_to('checkpoints')
    for save in saves:
      save.wait()
    session.keep(stopped or total)
  return stopped


def _save(cohort: Cohort, saves: list[Checkpoints], step: int, states: Sequence[TrainState]) -> None:
  for save in saves:  # so that no member is ever more than one checkpoint ahead of another
    save.wait()
  for member, save, state in zip(cohort.members, saves, states, strict=True):
    member.folder.check_owner()
    save.save(step, state, cohort.fingerprints)


def _validation(cohort: Cohort, mesh: Mesh) -> Callable[[Any], jax.Array]:
  """params -> mean CE in nats over the first windows of the validation split."""
  recipe, batch_size = cohort.recipe, cohort.stream.batch_size
  rows = local_rows(NamedSharding(mesh, P(sharding.BATCH_AXES)), batch_size)
  n = min(cohort.eval_batches, -(-len(cohort.validation) // batch_size))
  local = {
    name: np.stack([np.stack([_window(cohort.validation, b * batch_size + r)[name] for r in rows]) for b in range(n)])
    for name in ('tokens', 'labels', 'segment_ids')
  }
  batches = to_global(local, rows, NamedSharding(mesh, P(None, sharding.BATCH_AXES)), batch_size)

  def mean_ce(params, batches):
    def body(total, batch):
      hidden = recipe.student.hidden(params, batch['tokens'], batch['segment_ids'] if recipe.mask_documents else None)
      weights = (batch['labels'] >= 0).astype(jnp.float32)
      vocab_size = recipe.student.config.vocab_size
      _, sums = fused_loss(
        hidden,
        recipe.student.head(params),
        batch['labels'],
        weights,
        loss=recipe.loss,
        vocab_size=vocab_size,
        diagnostics=False,
      )
      return (total[0] + sums['ce'], total[1] + weights.sum()), None  # not the loss, which may hold a z-loss

    (ce, count), _ = jax.lax.scan(body, (jnp.zeros(()), jnp.zeros(())), batches)
    return ce / count

  jitted = jax.jit(mean_ce)
  # Waited for: one model after the other, as in checkpoint.checksums.
  return lambda params: jax.block_until_ready(jitted(params, batches))


def _window(windows: Windows, i: int) -> dict[str, np.ndarray]:
  """A window, or one of padding beyond the last."""
  if i < len(windows):
    return windows.window(i)
  empty = np.zeros(windows.seq_len, np.int32)
  return {'tokens': empty, 'labels': empty - 1, 'segment_ids': empty}


class _Call(NamedTuple):
  """A dispatched call of the step: its first step, how many, their metrics, when its dispatch began, and when its results were ready."""

  first: int
  n: int
  metrics: Any
  dispatched: float
  done: Future


class _Report:
  """Writes a call's metrics once the next call has been dispatched, and stops a run that no longer learns."""

  def __init__(self, cohort: Cohort, start: int, asked_to_stop: StopRequest):
    self._cohort, self._asked_to_stop = cohort, asked_to_stop
    self._pending: _Call | None = None
    self._rates: dict[str, float] | None = None  # of the pending call, once measured
    writes = jax.process_index() == 0
    self._writers = [
      MetricWriter(m.folder.path, start, cohort.trackers, m.about) for m in (cohort.members if writes else ())
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
      if m['skipped_in_row'][:n].max() >= self._cohort.max_skipped:
        raise TrainingError(
          f'{name}: the loss or a gradient was not finite {self._cohort.max_skipped} steps in a row, up to step {first + n}; '
          'the updates were left out and the last checkpoint is good; lower the learning rate or look at the data, then start again'
        )


def _saves(folder: RunFolder, keep: int, cohort: Cohort, stack: contextlib.ExitStack) -> Checkpoints:
  saves = Checkpoints(folder.checkpoints, keep, cohort.keep_period, cohort.keep_minutes, cohort.keep_steps)
  stack.callback(saves.close)
  return saves


def _local(cohort: Cohort, abstract: tuple[TrainState, ...], stack: contextlib.ExitStack) -> LocalCheckpoints | None:
  if not cohort.local_every:
    return None
  if cohort.local_every >= cohort.total_steps or not cohort.local_every % cohort.checkpoint_every:
    log.warning(
      '%s: no local checkpoint is written: of %d steps every %d, where the folder has one every %d',
      *(cohort.title, cohort.total_steps, cohort.local_every, cohort.checkpoint_every),
    )
  path = paths.absolute(cohort.members[0].folder.path)
  marks = distributed.of_first_process([member.folder.birthmark for member in cohort.members])
  identity = (
    [[m.folder.name, m.config, mark] for m, mark in zip(cohort.members, marks, strict=True)],
    cohort.fingerprints,
  )
  local = LocalCheckpoints(os.path.join(cohort.local, f'{path.name}-{fingerprint(str(path), 8)}'), abstract, identity)
  stack.callback(local.close)
  return local
