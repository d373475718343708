"""The training loop of a cohort: students that share architecture, data and teacher, each with its own folder and checkpoints.

The host only dispatches: it fetches the metrics of a call after the next one has been dispatched, so the device never waits for it.
A run starts from its newest checkpoint that verifies, else from scratch.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import fingerprint
from kdjax.data.batches import local_rows, to_global
from kdjax.runs.checkpoint import CheckpointDamaged, Checkpoints, Restored
from kdjax.runs.checksums import params_fingerprint
from kdjax.runs.folder import Heartbeat, claim_all
from kdjax.runs.goodput import Session, goodput
from kdjax.runs.local_checkpoint import LocalCheckpoints
from kdjax.runs.metrics import read_metrics
from kdjax.runs.state import TrainState
from kdjax.runtime import distributed, sharding
from kdjax.runtime.preemption import Preempted, StopRequest, stop_signal
from kdjax.runtime.profiling import Profiler
from kdjax.storage import paths
from kdjax.trainer.cohort import Cohort
from kdjax.trainer.reporting import Reporter
from kdjax.trainer.step import init_state, make_step, state_shardings
from kdjax.trainer.validation import make_validation

log = logging.getLogger('kdjax')


def train_cohort(cohort: Cohort, mesh: Mesh) -> None:
  """Train the cohort to its last step, from its newest checkpoint. Returns at once if it is done.

  Raises:
    TrainingError: too many non-finite steps in a row, a folder taken over, a checkpoint that could not be written.
    UserError: a folder of another config or owned by a live trainer, damaged checkpoints.
    Preempted: stopped by a signal, saved.
  """
  began = time.time()
  for member in cohort.members:
    member.folder.check_config(member.config)
    member.folder.check_fingerprints(cohort.fingerprints)
  cohort = _unfinished(cohort)
  folders = [m.folder for m in cohort.members]
  if not folders:
    return
  claim_all(folders, cohort.config.heartbeat_timeout)
  heart = Heartbeat(folders, cohort.total_steps)
  with heart.beating(), stop_signal() as asked_to_stop, contextlib.ExitStack() as stack:
    abstract = _abstract(cohort, mesh)
    saves = _saves(cohort, stack)
    local = _local(cohort, abstract, stack)
    session = Session([f.path for f in folders if f.writes], began)
    run = _Run(cohort, mesh, saves, local, heart, asked_to_stop, session)
    states, start = _start(run, abstract)
    session.starts_at(start)
    stopped = _train(run, states, start)
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


@dataclasses.dataclass(frozen=True)
class _Run:
  """A cohort in training, and what its start and its steps share."""

  cohort: Cohort
  mesh: Mesh
  saves: list[Checkpoints]  # of each member
  local: LocalCheckpoints | None
  heart: Heartbeat
  asked_to_stop: StopRequest
  session: Session


def _unfinished(cohort: Cohort) -> Cohort:
  """The cohort without the members that are done. They are not trained again when another one is missing."""
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
  """Plan calls: (first step, number of steps) of each from `start` to `total`, cut at multiples of each of `every` and at the steps `at`."""
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
    shapes = jax.eval_shape(
      functools.partial(init_state, cohort.recipe, member.alpha), jax.random.key(cohort.section.seed)
    )
    placed = state_shardings(cohort.recipe, shapes, mesh)
    abstract.append(sharding.abstract(shapes, placed))
  return tuple(abstract)


def _start(run: _Run, abstract: tuple[TrainState, ...]) -> tuple[tuple[TrainState, ...], int]:
  """(states, step): from the newest step at which every member's checkpoint verifies, else fresh."""
  cohort, states = run.cohort, []
  found = _restore(run, abstract)
  params = cohort.initial() if cohort.initial and found is None else None
  for k, (member, shape) in enumerate(zip(cohort.members, abstract, strict=True)):
    known = dict(cohort.fingerprints)
    if found is None:
      placed = jax.tree.map(lambda x: x.sharding, shape)
      init = functools.partial(init_state, cohort.recipe, member.alpha)
      states.append(jax.jit(init, out_shardings=placed)(jax.random.key(cohort.section.seed), params))
      known['init'] = params_fingerprint(states[-1].params, like=member.folder.fingerprint('init'))
    else:
      run.saves[k].set_aside_after(found[k].step)
      states.append(found[k].state)
    notes = member.notes | {'facts': cohort.facts, 'tokenizer': member.folder.keep_tokenizer(cohort.tokenizer)}
    member.folder.record(member.config, known, notes)
  start = found[0].step if found else 0
  if run.local:
    run.local.forget_all_but(start)
  return tuple(states), start


def _restore(run: _Run, abstract: tuple[TrainState, ...]) -> list[Restored] | None:
  """Restore every member's state at the newest step of which all have a checkpoint that verifies, in their folders or on the hosts.

  Returns None if no step has been saved by all.
  """
  cohort, saves, local = run.cohort, run.saves, run.local
  common = set.intersection(*(set(save.steps()) for save in saves))
  upto, damaged = _recorded(cohort) if local else 0, None
  for step in (*sorted(common, reverse=True), 0):
    if local and (kept := local.restore(step, upto)):
      log.info('%s: resumes from the local checkpoint of step %d', cohort.title, kept[1])
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
  """The last step that is in all members' metrics: a run resumed from a later step would miss some."""
  files = [member.folder.path for member in cohort.members if member.folder.writes]
  last = [max((int(record['step']) for record in read_metrics(path)), default=0) for path in files]
  return distributed.of_first_process([min(last, default=0)])[0]


def _train(run: _Run, states: tuple[TrainState, ...], start: int) -> int | None:
  """Train to the last step, or until asked to stop: then return the step that it stopped at. Everything is saved."""
  cohort, session = run.cohort, run.session
  recipe, stream, total = cohort.recipe, cohort.stream, cohort.total_steps
  step_fn = make_step(recipe, [state_shardings(recipe, state, run.mesh) for state in states])
  validate = make_validation(cohort, run.mesh)
  report = Reporter(cohort, start, run.asked_to_stop)
  stacked = NamedSharding(run.mesh, P(None, sharding.BATCH_AXES))
  rows = local_rows(NamedSharding(run.mesh, P(sharding.BATCH_AXES)), stream.batch_size)
  profiler = Profiler(cohort.members[0].folder.path, cohort.profile, start, recipe.size)
  at = (*cohort.keep_steps, *profiler.edges)
  kept = cohort.config.checkpoint
  every = (cohort.checkpoint_every, kept.keep_period, kept.local_every, cohort.eval_every)
  data = cohort.config.data
  plan = calls(start, total, recipe.size, *every, at=at)
  stopped = None
  with contextlib.closing(report), contextlib.closing(profiler):
    session.turn_to('data')
    for (first, n), held in zip(
      plan, stream.iterate(plan, recipe.size, rows, data.threads, data.prefetch), strict=True
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
      run.heart.step(step)
      stop = run.asked_to_stop(first, n)
      if stop or step == total or cohort.saves_at(step):
        report.flush()
        with session.doing('checkpoints'):
          _save(run, step, states)
          session.keep(step)
      elif run.local and step % kept.local_every == 0:
        report.flush(pause=False)  # what it takes belongs to the rates: it may follow on every call
        with session.doing('checkpoints'):
          run.local.save(step, states)
          session.keep(step)
      if stop:
        stopped = step
        break
      session.turn_to('data')
    report.flush()
    session.turn_to('checkpoints')
    for save in run.saves:
      save.wait()
    session.keep(stopped or total)
  return stopped


def _save(run: _Run, step: int, states: Sequence[TrainState]) -> None:
  for save in run.saves:  # so that no member is ever more than one checkpoint ahead of another
    save.wait()
  for member, save, state in zip(run.cohort.members, run.saves, states, strict=True):
    member.folder.check_owner()
    save.save(step, state, run.cohort.fingerprints)


def _saves(cohort: Cohort, stack: contextlib.ExitStack) -> list[Checkpoints]:
  """The checkpoints of each member."""
  kept = cohort.config.checkpoint
  # A kill may leave one member a checkpoint ahead: the one before must still be there.
  keep = max(kept.keep, 2) if len(cohort.members) > 1 else kept.keep
  saves = []
  for member in cohort.members:
    saves.append(Checkpoints(member.folder.checkpoints, keep, kept.keep_period, kept.keep_minutes, cohort.keep_steps))
    stack.callback(saves[-1].close)
  return saves


def _local(cohort: Cohort, abstract: tuple[TrainState, ...], stack: contextlib.ExitStack) -> LocalCheckpoints | None:
  every, folder = cohort.config.checkpoint.local_every, cohort.config.checkpoint.local
  if not every:
    return None
  if every >= cohort.total_steps or not every % cohort.checkpoint_every:
    log.warning(
      '%s: no local checkpoint is written: of %d steps every %d, where the folder has one every %d',
      *(cohort.title, cohort.total_steps, every, cohort.checkpoint_every),
    )
  path = paths.absolute(cohort.members[0].folder.path)
  marks = distributed.of_first_process([member.folder.birthmark for member in cohort.members])
  identity = (
    [[m.folder.name, m.config, mark] for m, mark in zip(cohort.members, marks, strict=True)],
    cohort.fingerprints,
  )
  local = LocalCheckpoints(os.path.join(folder, f'{path.name}-{fingerprint(str(path), 8)}'), abstract, identity)
  stack.callback(local.close)
  return local
