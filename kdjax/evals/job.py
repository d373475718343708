"""The eval job's work: what there is to score in a folder, and scoring what has not been scored yet."""

import dataclasses
import os
import pathlib
from typing import Any

import ml_collections
from jax.sharding import Mesh

from kdjax import config as config_lib
from kdjax import teachers
from kdjax.checkpoint import Checkpoints
from kdjax.config import Config
from kdjax.data.corpus import Corpus, EvalSet
from kdjax.errors import UserError
from kdjax.evals import results
from kdjax.evals.score import TEMPERATURES, Scored, expected_calibration_error, fit_temperature, score
from kdjax.metrics import Progress
from kdjax.run import RunFolder, read_json

VERSION = 1  # of what a result means; part of its fingerprint
IN_DOMAIN = 'in-domain'


@dataclasses.dataclass(frozen=True)
class Job:
  """The models to score: run folders, the teacher first, and the config and teacher they share."""

  config: Config
  runs: list[RunFolder]
  teacher: RunFolder | None


def find(workdir: pathlib.Path) -> Job:
  """What a folder holds: an experiment, or one run. Raises UserError where it is neither."""
  experiment = read_json(workdir / 'experiment.json')
  if experiment is not None:
    config = _config(experiment['resolved'], workdir)
    teacher = _relative(workdir, experiment['teacher']) if experiment['teacher'] else None
    students = [_relative(workdir, name) for name in experiment['students']]
    return Job(config, ([teacher] if teacher else []) + students, teacher)
  run = read_json(workdir / 'run.json')
  if run is None:
    raise UserError(f'{workdir} is neither an experiment nor a run: it has no experiment.json and no run.json')
  return Job(_config(run['resolved'], workdir), [RunFolder(workdir)], None)


def evaluate(job: Job, corpus: Corpus, mesh: Mesh, step: int = 0, progress: bool = True) -> None:
  """Scores what has not been scored yet: each run's checkpoint (`step`, else the newest) on each set."""
  sets = {IN_DOMAIN: EvalSet(corpus.validation, corpus.test), **corpus.ood}
  window = job.config.eval.window or job.config.data.seq_len
  stride = job.config.eval.stride or max(1, window // 2)
  teacher, teacher_name = None, ''
  todo = [(run, name) for run in job.runs for name in sets]
  total = sum(_n_tokens(s) for s in sets.values()) * len(job.runs)
  bar = Progress('evaluation', total, unit='token', enabled=progress)
  loaded: tuple[str, Scored] | None = None
  for run, name in todo:
    at = _step(run, step)
    if job.teacher and not teacher_name:
      teacher_name = f'{job.teacher.path.name}@{_step(job.teacher, 0)}'
    own = job.teacher is not None and run.path == job.teacher.path
    key = {
      'version': VERSION,
      'validation': sets[name].validation.fingerprint,
      'test': sets[name].test.fingerprint,
      'window': window,
      'stride': stride,
      'teacher': '' if own else teacher_name,
      'tokenizer': corpus.tokenizer.fingerprint,
    }
    file = results.path(run.results, at, name, config_lib.fingerprint(key))
    if file.exists():
      bar.update(_n_tokens(sets[name]))
      continue
    if job.teacher and teacher is None:
      model, params, *_ = teachers.load(job.teacher, job.config.teacher.dtype, mesh)
      teacher = Scored(model, params)
    if loaded is None or loaded[0] != f'{run.path}@{at}':
      model, params, *_ = teachers.load(run, 'float32', mesh, at)
      loaded = f'{run.path}@{at}', Scored(model, params)
    reference = None if own else teacher
    arguments = dict(window=window, stride=stride, batch_size=job.config.eval.batch_size, mesh=mesh, progress=bar)
    validation = score(loaded[1], None, sets[name].validation, TEMPERATURES, **arguments)
    fitted = fit_temperature(validation, TEMPERATURES)
    scored = score(loaded[1], reference, sets[name].test, [fitted], **arguments)
    scored['nll_fitted'] = [values[0] for values in scored.pop('nll_at')]
    meta = {
      **key, 'run': str(run.path), 'arm': run.name, 'step': at, 'set': name, 'temperature': fitted, 'fitted_on': len(validation),
      'ece': expected_calibration_error(scored), 'windows': f'strided: {window} tokens, each new one scores {stride}',
    }  # fmt: skip
    if run.writes:
      results.write(file, scored, meta)
  bar.close()


def _step(run: RunFolder, step: int) -> int:
  saves = Checkpoints(run.checkpoints, read_only=True)
  try:
    return teachers.final_step(run, saves, step)
  finally:
    saves.close()


def _n_tokens(eval_set: EvalSet) -> int:
  return eval_set.validation.n_tokens + eval_set.test.n_tokens


def _config(values: dict[str, Any], folder: pathlib.Path) -> Config:
  """The config that a folder keeps; its `runs` is relative to the folder."""
  return config_lib.resolve(ml_collections.ConfigDict(values | {'runs': os.path.normpath(folder / values['runs'])}))


def _relative(folder: pathlib.Path, name: str) -> RunFolder:
  return RunFolder(os.path.normpath(folder / name))
