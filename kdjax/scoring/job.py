"""The eval job's work: what there is to score in a folder, and scoring what has not been scored yet."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Collection
from typing import Any

import jax
import ml_collections
import pandas as pd
from jax.sharding import Mesh

from kdjax import config as config_lib
from kdjax.config import Config, checks
from kdjax.data.corpus import Corpus, EvalSet
from kdjax.data.wanted import Origin
from kdjax.errors import UserError
from kdjax.models import build
from kdjax.models.decoder import compute_dtype
from kdjax.runs.checkpoint import read_checkpoints, steps_in
from kdjax.runs.folder import RunFolder
from kdjax.runs.metrics import Progress
from kdjax.runtime import distributed, preemption
from kdjax.scoring import choices, results
from kdjax.scoring.choices import ChoiceSet
from kdjax.scoring.text import (
  TEMPERATURES,
  Scored,
  difficulties,
  expected_calibration_error,
  fit_temperature,
  score_documents,
)
from kdjax.storage import paths
from kdjax.storage.paths import read_json, write_json
from kdjax.teachers import frozen

log = logging.getLogger('kdjax')

VERSION = 3  # of what a result means; part of its fingerprint
IN_DOMAIN = 'in-domain'
HARNESS = checks.HARNESS_SETS
VALIDATION = 'validation'  # the in-domain validation split as a set of its own: scored only where it is named


@dataclasses.dataclass(frozen=True)
class Job:
  """The models to score: run folders, the teacher first, and the config and teacher they share.

  Attributes:
    folder: the folder in which they were found.
    origin: where their training found its text.
  """

  folder: paths.Path
  config: Config
  runs: list[RunFolder]
  teacher: RunFolder | None
  origin: Origin = Origin()

  def is_teacher(self, run: RunFolder) -> bool:
    return self.teacher is not None and run.path == self.teacher.path

  def arm(self, run: RunFolder) -> str:
    return 'teacher' if self.is_teacher(run) else run.name

  @property
  def students(self) -> list[RunFolder]:
    return [run for run in self.runs if not self.is_teacher(run)]

  @property
  def teacher_step(self) -> int:
    """Which of its checkpoints it is; 0: its newest."""
    return frozen.teacher_step(self.config)


def find_job(workdir: paths.Path) -> Job:
  """What a folder holds: an experiment, or one run. Raises UserError if it is neither."""
  experiment = read_json(workdir / 'experiment.json')
  if experiment is not None:
    if not {'resolved', 'teacher', 'students'} <= experiment.keys():
      raise UserError(
        f'{workdir / "experiment.json"} is damaged; start the run again with the same command: it is written anew'
      )
    config = _config(experiment['resolved'], workdir)
    teacher = _relative(workdir, experiment['teacher']) if experiment['teacher'] else None
    students = [_relative(workdir, name) for name in experiment['students']]
    return Job(workdir, config, ([teacher] if teacher else []) + students, teacher, read_origin(workdir, experiment))
  run = read_json(workdir / 'run.json')
  if run is None:
    raise UserError(f'{workdir} is neither an experiment nor a run: it has no experiment.json and no run.json')
  if 'resolved' not in run:
    raise UserError(f'{workdir / "run.json"} is damaged: it holds no config; restore it')
  return Job(workdir, _config(run['resolved'], workdir), [RunFolder(workdir)], None, read_origin(workdir, run))


def read_origin(folder: paths.Path, known: dict[str, Any]) -> Origin:
  """Return where a run or an experiment found its text, according to its folder's JSON file; earlier versions did not record it."""
  origin = known.get('origin', {})
  seen_from = os.path.abspath(paths.resolve(folder, origin['folder'])) if origin else os.getcwd()
  return Origin('' if seen_from == os.getcwd() else seen_from, origin.get('corpus', ''))


def evaluate(job: Job, corpus: Corpus, mesh: Mesh, step: int = 0, progress: bool = True) -> None:
  """Score what has not been scored yet, at the steps that `checkpoints` returns.

  Then list the result files that belong together (arm -> set -> path) in the folder's evaluation.json, or in evaluation-step<N>.json if a
  step is named.
  """
  while True:
    chosen = step or _common_step(job)
    at = list_checkpoints(job, chosen)
    try:
      tasks = score_missing(job, at, corpus, mesh, progress)
      break
    except UserError:
      if step or chosen == _common_step(job):
        raise
      log.info('%s: its trainer has deleted step %d meanwhile; going on with a newer one', job.folder, chosen)
  if jax.process_index() == 0:
    files: dict[str, dict[str, str]] = {}
    for task in tasks:
      files.setdefault(job.arm(task.run), {})[task.name] = paths.relative(task.file, job.folder)
    for arm, kept in _of_harness(job, step, dict(at)).items():
      files[arm] |= kept
    write_json(job.folder / file_name(step), files)


def list_checkpoints(job: Job, step: int = 0) -> list[tuple[RunFolder, int]]:
  """Return (run, step) of each model: the teacher at the step that the students learn from, the students at `step` or their newest common step.

  Raises UserError if a model has no such checkpoint.
  """
  chosen = step or _common_step(job)
  return [(run, _step(run, job.teacher_step if job.is_teacher(run) else chosen)) for run in job.runs]


def is_of_step(file: str, step: int) -> bool:
  """Check by its name (results.result_path) that a result file is of that step."""
  return f'-step{step}-' in file.rpartition('/')[2]


def _of_harness(job: Job, step: int, at: dict[RunFolder, int]) -> dict[str, dict[str, str]]:
  """The harness's results that are known of the same checkpoints: arm -> set -> path."""
  known = read_json(job.folder / file_name(step)) or {}
  steps = {job.arm(run): of_run for run, of_run in at.items()}
  return {
    arm: {
      name: file for name, file in known.get(arm, {}).items() if name.startswith(HARNESS) and is_of_step(file, of_run)
    }
    for arm, of_run in steps.items()
  }


def file_name(step: int = 0) -> str:
  """The file that names an evaluation's results."""
  return f'evaluation-step{step}.json' if step else 'evaluation.json'


def _common_step(job: Job) -> int:
  """The newest step of which every student has a checkpoint. Raises UserError if there is none."""
  steps = [steps_in(run.checkpoints) for run in job.students]
  common = set.intersection(*map(set, steps))
  if not common:
    empty = next((run.path for run, found in zip(job.students, steps, strict=True) if not found), None)
    what = f'{empty} has no checkpoint yet' if empty else 'no step has a checkpoint of every student'
    raise UserError(f'{job.folder}: {what}; let the run go on, or name a --step')
  return max(common)


def score_missing(
  job: Job,
  checkpoints: list[tuple[RunFolder, int]],
  corpus: Corpus,
  mesh: Mesh,
  progress: bool = True,
  sets: Collection[str] | None = None,
) -> list['Task']:
  """Score those (run, step) on those sets that have no result file yet; return all, in order.

  Args:
    sets: names of text sets and of downstream tasks; None: all but VALIDATION.

  Raises:
    UserError: a name that is none, a task's file that cannot be read, a run that learned with another tokenizer.
  """
  for run, _ in checkpoints:
    run.check_fingerprints({'tokenizer': corpus.tokenizer.fingerprint})
  wanted_sets = _sets(job, corpus, sets)
  teacher = ''  # only in the students' key, because a teacher that is still training has no final step yet
  if job.teacher and not all(job.is_teacher(run) for run, _ in checkpoints):
    teacher = (
      f'{frozen.saved_fingerprint(job.teacher, _step(job.teacher, job.teacher_step))} in {job.config.teacher.dtype}'
    )
  tasks = [
    _task(job, run, step, weights, teacher, name, eval_set, corpus.train.fingerprint)
    for run, step, weights in [(run, step, frozen.saved_fingerprint(run, step)) for run, step in checkpoints]
    for name, eval_set in wanted_sets.items()
  ]
  missing = distributed.from_first_process([not task.file.exists() for task in tasks])
  models = _Models(job, mesh)
  difficulty_V = difficulties(corpus.token_counts) if any(missing) else None
  total = sum(_n_tokens(task.eval_set) for task, wanted in zip(tasks, missing, strict=True) if wanted)
  bar = Progress('evaluation', total, unit='token', enabled=progress and total > 0)
  with contextlib.closing(bar):
    for task, wanted in zip(tasks, missing, strict=True):
      if wanted:
        preemption.check_notice()
        if isinstance(task.eval_set, ChoiceSet):
          table, meta = _score_choices(task, models, job, mesh, bar)
        else:
          table, meta = _score(task, models, job, mesh, bar, difficulty_V)
        if task.run.writes:
          results.write_result(task.file, table, meta)
  return tasks


@dataclasses.dataclass(frozen=True)
class Task:
  """One checkpoint on one set; `key` is what the result depends on."""

  run: RunFolder
  step: int
  name: str
  eval_set: EvalSet | ChoiceSet
  key: dict[str, Any]

  @property
  def vocab_size(self) -> int:
    """The vocabulary of the set's tokenizer. A model's embedding rows beyond it are never labels."""
    return _vocab_size(self.eval_set)

  @property
  def file(self) -> paths.Path:
    return results.result_path(self.run.results, self.step, self.name, config_lib.fingerprint(self.key))


def _sets(job: Job, corpus: Corpus, names: Collection[str] | None) -> dict[str, EvalSet | ChoiceSet]:
  text = {
    IN_DOMAIN: EvalSet(corpus.validation, corpus.test),
    VALIDATION: EvalSet(corpus.validation, corpus.validation),
    **corpus.ood,
  }
  evals = job.config.eval
  known = [*text, *evals.tasks]
  names = [name for name in known if name != VALIDATION] if names is None else names
  if unknown := sorted(set(names) - set(known)):
    raise UserError(f'no set is named {", ".join(unknown)}; there are {", ".join(known)}')
  asked = {name: source for name, source in evals.tasks.items() if name in names}
  items = choices.read_tasks(asked, evals.max_items, job.origin.folder, corpus.tasks)
  tasks = {name: ChoiceSet(found, corpus.tokenizer) for name, found in items.items()}
  return {name: eval_set for name, eval_set in (text | tasks).items() if name in names}


def _task(
  job: Job,
  run: RunFolder,
  step: int,
  weights: str,
  teacher: str,
  name: str,
  eval_set: EvalSet | ChoiceSet,
  training_text: str,
) -> Task:
  window = job.config.eval.window or job.config.data.seq_len
  model = frozen.build_model(run).config
  key: dict[str, Any] = {'version': VERSION, 'window': window, 'weights': weights, 'dtype': str(compute_dtype(model))}
  if model.vocab_size > _vocab_size(eval_set):
    key['vocabulary'] = _vocab_size(eval_set)
  if isinstance(eval_set, ChoiceSet):
    key |= {'kind': 'task', 'items': eval_set.fingerprint, 'tokenizer': eval_set.tokenizer.fingerprint}
    key |= {'pairs': 'strict'} if any(item.kind == 'pair' for item in eval_set.items) else {}
  else:
    key |= {
      'validation': eval_set.validation.fingerprint,
      'test': eval_set.test.fingerprint,
      'stride': job.config.eval.stride or max(1, window // 2),
      'teacher': '' if job.is_teacher(run) else teacher,
      'difficulty': training_text,
    }
  return Task(run, step, name, eval_set, key)


def _score(
  task: Task, models: '_Models', job: Job, mesh: Mesh, bar: Progress, difficulty_V
) -> tuple[pd.DataFrame, dict[str, Any]]:
  """Return (per-document table of the test documents, metadata).

  First fit the temperature on the set's validation documents. VALIDATION has no other documents, so it gets no fit.
  """
  assert isinstance(task.eval_set, EvalSet)
  window, stride = task.key['window'], task.key['stride']
  on = functools.partial(
    score_documents, window=window, stride=stride, batch_size=job.config.eval.batch_size, mesh=mesh, progress=bar
  )
  student = models.load(task.run, task.step, 'float32', task.vocab_size)
  teacher = (
    models.load(job.teacher, _step(job.teacher, job.teacher_step), job.config.teacher.dtype, task.vocab_size)
    if job.teacher and task.key['teacher']
    else None
  )
  fits = task.name != VALIDATION
  fitted = (
    fit_temperature(on(student, None, task.eval_set.validation, TEMPERATURES), TEMPERATURES) if fits else math.nan
  )
  table = on(student, teacher, task.eval_set.test, [fitted] if fits else [], difficulty_V=difficulty_V)
  if fits:
    table['nll_fitted'] = [values[0] for values in table.pop('nll_at')]
  meta = {
    **task.key,
    'run': task.run.name,
    'step': task.step,
    'set': task.name,
    'temperature': fitted,
    'fitted_on': task.eval_set.validation.n_docs if fits else 0,
    'ece': expected_calibration_error(table),
    'windows': f'windows of {window} tokens, documents that are longer in strides of {stride}',
  }
  return table, meta


def _score_choices(
  task: Task, models: '_Models', job: Job, mesh: Mesh, bar: Progress
) -> tuple[pd.DataFrame, dict[str, Any]]:
  """(per-item table, metadata) of a downstream task."""
  assert isinstance(task.eval_set, ChoiceSet)
  model, window = models.load(task.run, task.step, 'float32', task.vocab_size), task.key['window']
  table = choices.score_choices(
    model, task.eval_set.items, task.eval_set.tokenizer, window, job.config.eval.batch_size, mesh, bar
  )
  meta = {**task.key, 'run': task.run.name, 'step': task.step, 'set': task.name, 'normalised': 'per byte'}
  return table, meta | choices.summarize(table)


class _Models:
  """Weights as they are needed: the teacher stays, of the others the last one."""

  def __init__(self, job: Job, mesh: Mesh):
    self._job, self._mesh = job, mesh
    self._loaded: dict[str, Scored] = {}

  def load(self, run: RunFolder, step: int, dtype: str, vocab_size: int) -> Scored:
    """Load a model restricted to the first `vocab_size` tokens of its embedding table."""
    name = f'{run.path}@{step}:{dtype}:{vocab_size}'
    if name not in self._loaded:
      kept = {
        key: value
        for key, value in self._loaded.items()
        if self._job.teacher and key.startswith(f'{self._job.teacher.path}@')
      }
      self._loaded = kept
      arm = (run.read_record() or {}).get('config', {}).get('arm')
      like = self._job.config.teacher.model if arm == 'teacher' else self._job.config.student.model
      model, params, *_ = frozen.load_teacher(run, dtype, self._mesh, step, like)
      self._loaded[name] = Scored(build(frozen.restrict_tokens(model.config, vocab_size)), params)
    return self._loaded[name]


def _step(run: RunFolder, step: int) -> int:
  with read_checkpoints(run.checkpoints) as saves:
    return frozen.choose_step(run, saves, step)


def _vocab_size(eval_set: EvalSet | ChoiceSet) -> int:
  if isinstance(eval_set, ChoiceSet):
    return eval_set.tokenizer.vocab_size
  return eval_set.test.meta['vocab_size']


def _n_tokens(eval_set: EvalSet | ChoiceSet) -> int:
  if isinstance(eval_set, ChoiceSet):
    return eval_set.n_tokens
  if eval_set.validation is eval_set.test:
    return eval_set.test.n_tokens
  return eval_set.validation.n_tokens + eval_set.test.n_tokens


def _config(values: dict[str, Any], folder: paths.Path) -> Config:
  """The config that a folder keeps; its `runs` is relative to the folder."""
  return config_lib.resolve(ml_collections.ConfigDict(values | {'runs': str(paths.resolve(folder, values['runs']))}))


def _relative(folder: paths.Path, name: str) -> RunFolder:
  return RunFolder(paths.resolve(folder, name))
