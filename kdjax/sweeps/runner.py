"""Doing what a grid lacks: teachers, the pilot, then the main and the validated cells, each trained and scored.

    <grid>/grid.json        the config, resolved; compared on every later start
    <grid>/corpus.json      how many documents of each set were read, dropped and kept
    <grid>/pilot.json       what the pilot chose, with its whole curve, time stamp and hash; main cells start after it, and it never changes
    <grid>/jobs/<id>/       a unit of work: its owner, its state, its error, its unfinished attempts; job.json names the result files
    <grid>/cells/<id>/      one student's run folder (kdjax/runs/folder.py)
    <grid>/teachers/        the teachers' results; they themselves live in <runs>/teachers, shared by all grids

Any number of runners may work on one grid. A job is claimed as a run folder is; a dead runner's job is taken over where it stands.
"""

import dataclasses
import functools
import json
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from kdjax import config as config_lib
from kdjax import machine
from kdjax.config import Config, fields
from kdjax.data.corpus import Corpus
from kdjax.data.wanted import Origin
from kdjax.errors import OwnedError, StoreUnavailable, UserError
from kdjax.runs.checkpoint import steps_in
from kdjax.runs.folder import BEAT, Heartbeat, RunFolder
from kdjax.runtime import distributed, preemption
from kdjax.scoring import job as evaluation
from kdjax.scoring import results
from kdjax.storage import paths
from kdjax.storage.paths import read_json, write_json
from kdjax.sweeps import attempts, comparisons, pilots, plan
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps.cells import Cell, Group
from kdjax.sweeps.config import GridConfig
from kdjax.sweeps.names import format_exact, pilot_key
from kdjax.sweeps.plan import Job
from kdjax.trainer import experiments, preflight

log = logging.getLogger('kdjax')

STATES = ('done', 'running', 'stopped', 'failed', 'missing')
POLL = 5.0  # seconds between looks at jobs that other runners do
CORPUS = 'corpus.json'


def grid_folder(grid: GridConfig, workdir: paths.Path | None = None) -> paths.Path:
  return workdir or paths.runs_path(grid.runs) / f'{grid.name}-{config_lib.fingerprint(grid_identity(grid))}'


def grid_identity(grid: GridConfig) -> dict[str, Any]:
  """Return what a grid's results depend on. The contrasts are part of it, because they are declared before the runs."""
  values = fields.identity(grid)
  base = experiments.experiment_identity(grid.base) | {'eval': fields.identity(grid.base.eval)}
  for temperature in grid.temperature:  # each cell's temperature replaces the base's
    base['loss'] |= experiments.nucleus_identity(dataclasses.replace(grid.base.loss, temperature=temperature))
  return json.loads(json.dumps(values | {'base': base}))


def claim_grid(folder: paths.Path, grid: GridConfig) -> None:
  """Write grid.json, or refuse a folder that holds another grid."""
  known = read_json(folder / 'grid.json')
  if known is not None:
    RunFolder(folder).compare(fields.without_implied(known['identity'], GridConfig), grid_identity(grid))
  elif jax.process_index() == 0:
    # The vocabulary's size is recorded so that a report needs no tokenizer file.
    noted = {'runs': paths.relative(grid.runs, folder), 'vocab_size': cells_lib.vocab_size(grid)}
    resolved = config_lib.as_dict(grid) | noted
    write_json(
      folder / 'grid.json',
      {
        'identity': grid_identity(grid),
        'resolved': resolved,
        'versions': machine.versions(),
        'git': machine.git_commit(),
        'time': time.time(),
      },
    )


def record_corpus(folder: paths.Path, corpus: Corpus) -> None:
  """Record counts from reading the text for the report, above all the test documents that are in the training text too."""
  if jax.process_index() == 0:
    known = {'name': corpus.folder.name, 'fingerprint': corpus.fingerprint, 'counts': corpus.meta['counts']}
    write_json(folder / CORPUS, known)


def read_origin(folder: paths.Path) -> Origin:
  """Return where an earlier start of the grid found its text."""
  return Origin(corpus=(read_json(folder / CORPUS) or {}).get('name', ''))


def cell_folder(folder: paths.Path, cell: Cell) -> RunFolder:
  return RunFolder(folder / 'cells' / cell.id)


def phases(grid: GridConfig, folder: paths.Path) -> list[tuple[str, list[Group]]]:
  """Return (phase, its groups) of each known phase. The validated cells are known once the pilot has finished."""
  pilot = pilots.read_outcome(folder, grid)
  known = [('pilot', cells_lib.pilot_groups(grid)), ('main', cells_lib.main_groups(grid))]
  if pilot is None:
    return known
  pairs = comparisons.reversal_pairs(grid, pilot['curves'])
  return [*known, ('validated', cells_lib.validated_groups(grid, pilot['chosen'], pairs))]


def list_jobs(grid: GridConfig, folder: paths.Path) -> list[Job]:
  """Every job that is known by now, in the order in which they are done."""
  found: list[Job] = []
  for phase, groups in phases(grid, folder):
    found += plan.plan_jobs(grid, phase, groups, found)
  return found


def job_state(folder: paths.Path, job: Job, timeout: float) -> str:
  """One of STATES."""
  status = RunFolder(folder / 'jobs' / job.id).status()
  if status is None:
    return 'missing'
  if status['state'] == 'running' and time.time() - status['heartbeat'] > timeout:
    return 'stopped'
  return {'preempted': 'stopped'}.get(status['state'], status['state'])


def job_states(folder: paths.Path, jobs: Sequence[Job], timeout: float) -> list[str]:
  """Return the state of each job. A clock may be off: a heartbeat that looks old is looked at again a little later."""
  found = [job_state(folder, job, timeout) for job in jobs]
  late = [k for k, job in enumerate(jobs) if found[k] == 'stopped' and _heartbeat(folder, job)]
  before = [_heartbeat(folder, jobs[k]) for k in late]
  if late:
    time.sleep(3 * BEAT)
  for k, heartbeat in zip(late, before, strict=True):
    if _heartbeat(folder, jobs[k]) != heartbeat:
      found[k] = job_state(folder, jobs[k], math.inf)
  return found


def _heartbeat(folder: paths.Path, job: Job) -> float | None:
  """Return the heartbeat of a job that says that it is running."""
  status = RunFolder(folder / 'jobs' / job.id).status() or {}
  return status.get('heartbeat') if status.get('state') == 'running' else None


Wanted = Callable[[Sequence[Job]], set[str]]  # of all jobs that are known by now, the ids of a runner's share


def everything(jobs: Sequence[Job]) -> set[str]:
  return {job.id for job in jobs}


@dataclasses.dataclass
class Runner:
  """One runner's view of a grid.

  A runner of several processes goes by what process 0 sees: the others may find a job's end a moment sooner or later, and all must take
  the same job next. There a failure ends the runner, as it ends a single run: the others may be in the middle of a step.
  """

  grid: GridConfig
  folder: paths.Path
  corpus: Corpus
  mesh: Mesh
  progress: bool = True

  def run(self, wanted: Wanted = everything) -> list[Job]:
    """Compute what is wanted and missing, with the teachers that it needs, phase after phase; return the jobs that failed."""
    failed: dict[str, Job] = {}
    self._phase(_of_pilot, wanted, failed)
    if cells_lib.pilot_groups(self.grid) and not self._agreed((self.folder / pilots.FILE).exists()):
      pilot = [job.id for job in list_jobs(self.grid, self.folder) if job.phase == 'pilot']
      missing = [name for name, done in zip(pilot, self._done(pilot), strict=True) if not done]
      if missing:
        log.warning('the pilot is not finished (%d jobs are missing): main cells wait for it', len(missing))
        return list(failed.values())
      distributed.first_process_first(self._choose)
    self._phase(lambda jobs: jobs, wanted, failed)
    return list(failed.values())

  def _phase(self, select: Callable[[list[Job]], list[Job]], wanted: Wanted, failed: dict[str, Job]) -> None:
    while True:
      known = list_jobs(self.grid, self.folder)
      jobs, mine = select(known), wanted(known)
      mine = mine | {job.teacher for job in jobs if job.cells and job.id in mine}
      mine_jobs = [job for job in jobs if job.id in mine and job.id not in failed]
      done = self._done([job.id for job in mine_jobs])
      open_jobs = [job for job, is_done in zip(mine_jobs, done, strict=True) if not is_done]
      if not open_jobs:
        return
      moved = False
      for job in open_jobs:
        if job.teacher and job.teacher in failed:
          log.warning('%s waits for a teacher that failed: left out', job.id)
          failed[job.id] = job
          moved = True
        elif not job.teacher or self._done([job.teacher])[0]:
          moved |= self._try(job, failed)
      if not moved:
        preemption.check_notice()
        time.sleep(POLL)

  def _try(self, job: Job, failed: dict[str, Job]) -> bool:
    """Return whether the job was ours to do. A failure is recorded in the job's folder, and the others continue."""
    here = RunFolder(self.folder / 'jobs' / job.id)
    if not self._claims(here):
      return False
    if self._done([job.id])[0]:
      here.release()
      return True
    started = time.time()
    try:
      heart = Heartbeat([here], len(job.cells))
      with heart.beating():
        try:
          with attempts.count_attempt(here, functools.partial(self._saved_steps, job)):
            scores = self._do(job)
        except OwnedError:
          heart.finish('preempted')
          raise
        flop = plan.estimate_cost(self.grid, job).flops
        record = {'cells': [cell.id for cell in job.cells], 'seconds': time.time() - started, 'flops': flop}
        if here.writes:
          write_json(here.path / 'job.json', record | {'scores': scores})
        heart.finish('done')
    except OwnedError:
      if jax.process_count() > 1:
        raise
      return False  # a teacher that a runner of another grid trains at this moment
    except Exception as e:  # whatever stops one job must not stop the others; it is told, and kept with its traceback
      if distributed.is_lost(e) or isinstance(e, StoreUnavailable):
        raise
      failed[job.id] = job
      log.error('%s failed: %s', job.id, (str(e).splitlines() or [type(e).__name__])[0])
      if here.writes:
        (here.path / 'error.txt').write_text(traceback.format_exc(), encoding='utf-8')
      if jax.process_count() > 1:
        raise
    return True

  def _saved_steps(self, job: Job) -> int:
    """Return how many steps of the job's runs are saved."""
    teacher = None if job.cells else experiments.teacher_folder(job.config, self.corpus)
    folders = [teacher] if teacher else [cell_folder(self.folder, cell) for cell in job.cells]
    return sum(max(steps_in(folder.checkpoints), default=0) for folder in folders)

  def _do(self, job: Job) -> dict[str, Any]:
    """Train and score; return run -> step -> set -> result file, relative to the grid's folder."""
    with jax.set_mesh(self.mesh):
      teacher = experiments.teacher_folder(job.config, self.corpus)
      if not job.cells:
        assert teacher is not None
        experiments.train_teacher(job.config, self.corpus, teacher, self.mesh, self.progress)
        steps = experiments.trunk_steps(job.config) or steps_in(teacher.checkpoints)[-1:]
        return {job.id: self._score(teacher, job.config, teacher, steps, None)}
      arms = [
        experiments.Arm(c.config, c.arm, cell_folder(self.folder, c), f'{c.arm} {format_exact(c.alpha)}')
        for c in job.cells
      ]
      preflight.check_run(job.config, self.corpus, self.mesh)
      experiments.train_students(arms, self.corpus, teacher, self.mesh, self.progress)
      sets = {evaluation.VALIDATION} if job.phase == 'pilot' else None
      kept = self.grid.last if self._noise_is_asked(job) else 1
      return {
        cell.id: self._score(arm.folder, cell.config, teacher, steps_in(arm.folder.checkpoints)[-kept:], sets)
        for cell, arm in zip(job.cells, arms, strict=True)
      }

  def _score(
    self, run: RunFolder, config: Config, teacher: RunFolder | None, steps: Sequence[int], sets
  ) -> dict[str, Any]:
    found = evaluation.Job(run.path, config, [run], teacher)
    at = [(run, step) for step in steps]
    scores: dict[str, dict[str, str]] = {}
    for task in evaluation.score_missing(found, at, self.corpus, self.mesh, self.progress, sets=sets):
      file = task.file if task.file.is_relative_to(self.folder) else self._copy(task.file)
      scores.setdefault(str(task.step), {})[task.name] = paths.relative(file, self.folder)
    return scores

  def _copy(self, file: paths.Path) -> paths.Path:
    """A teacher's results, which live in its own folder: copied, so that the grid's folder is all that a report needs."""
    copy = self.folder / 'teachers' / file.parent.parent.name / file.name
    if jax.process_index() == 0:
      with paths.replacing(copy) as temporary:
        temporary.write_bytes(file.read_bytes())
    return copy

  def _noise_is_asked(self, job: Job) -> bool:
    """An arm with one seed gets the noise of its last checkpoints."""
    return len({'main': self.grid.seed, 'validated': self.grid.validated_seed}.get(job.phase, ())) == 1

  def _choose(self) -> None:
    """Write down what the pilot chose. The first of several runners to get here says it; the content is the same for all."""
    scores = read_scores(self.grid, self.folder)
    curves: dict[str, dict[str, float]] = {}
    for group in cells_lib.pilot_groups(self.grid):
      (cell,) = group.cells
      table, _ = results.read_result(paths.resolve(self.folder, newest_step(scores[cell.id])[evaluation.VALIDATION]))
      value = results.bits_per_byte(table)
      if group.kind == 'baseline':
        for learner in pilots.learners(self.grid, group.setting, 'unigram'):
          curves.setdefault(pilot_key(group.setting, learner), {})['0'] = value
      else:
        curves.setdefault(group.pilot_key, {})[group.draw or format_exact(group.alpha)] = value
    outcome = pilots.choose_values(curves)
    if jax.process_index() == 0 and not (self.folder / pilots.FILE).exists():
      write_json(self.folder / pilots.FILE, outcome)
    for key, values in outcome.get('not_finite', {}).items():
      log.warning('pilot: %s: the likelihood at %s is not finite, so it is never chosen', key, ', '.join(values))
    log.info('pilot: %s', ', '.join(f'{key}: {value}' for key, value in outcome['chosen'].items()))

  def _claims(self, here: RunFolder) -> bool:
    try:
      here.claim(self.grid.base.heartbeat_timeout)
      claimed = True
    except OwnedError:
      claimed = False
    return self._agreed(claimed)

  def _done(self, names: Sequence[str]) -> list[bool]:
    """Which jobs are done."""
    asked = names if jax.process_index() == 0 else []
    done = [RunFolder(self.folder / 'jobs' / name).is_done() for name in asked]
    return distributed.from_first_process(done or [False] * len(names))

  def _agreed(self, flag: bool) -> bool:
    return distributed.from_first_process([flag])[0]


def _of_pilot(jobs: list[Job]) -> list[Job]:
  """The pilot's jobs and the teachers that they need."""
  needed = {job.teacher for job in jobs if job.phase == 'pilot'}
  return [job for job in jobs if job.phase == 'pilot' or job.id in needed]


def read_scores(grid: GridConfig, folder: paths.Path) -> dict[str, dict[str, dict[str, str]]]:
  """Run (a cell's or a teacher job's id) -> step -> set -> result file, of all jobs that are done."""
  found: dict[str, dict[str, dict[str, str]]] = {}
  for job in list_jobs(grid, folder):
    here = RunFolder(folder / 'jobs' / job.id)
    if here.is_done():
      found |= (read_json(here.path / 'job.json') or {'scores': {}})['scores']
  return found


def newest_step(steps: dict[str, dict[str, str]]) -> dict[str, str]:
  """The sets of the newest step."""
  return steps[max(steps, key=int)]


def shard(jobs: Sequence[Job], text: str) -> set[str]:
  """`i/n`, from 1: the ids of every n-th job with students. Raises UserError for anything else."""
  part, slash, whole = text.partition('/')
  if not slash or not (part.isdigit() and whole.isdigit()) or not 1 <= int(part) <= int(whole):
    raise UserError(f'--shard={text}: write i/n with 1 <= i <= n, as in --shard=1/8')
  return {job.id for k, job in enumerate(job for job in jobs if job.cells) if k % int(whole) == int(part) - 1}


def failed_lines(folder: paths.Path, jobs: Iterable[Job]) -> list[str]:
  return [
    f'{job.id}: {(RunFolder(folder / "jobs" / job.id).status() or {}).get("error", "its teacher failed")}'
    for job in jobs
  ]
