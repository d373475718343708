"""The eval job: scores checkpoints per document, apart from training, on any number of devices.

    python -m kdjax.evaluate --workdir=runs/weak2strong-0123456789ab            the newest checkpoint of each model
    python -m kdjax.evaluate --workdir=runs/weak2strong-0123456789ab --step=500
    python -m kdjax.evaluate --workdir=... --watch                              each new checkpoint, until the run ends

Sets: the in-domain test split and every OOD set. Each set's evaluation temperature is fitted, for each model, on documents of the same set
that are not scored (the validation split; the validation share of an OOD set). Documents longer than the window are scored in strided windows
(kdjax/evals/windows.py).
"""

import argparse
import dataclasses
import logging
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from kdjax import cli, distributed, sharding, teachers
from kdjax import config as config_lib
from kdjax.analysis import table
from kdjax.checkpoint import Checkpoints
from kdjax.config import Config, MeshConfig
from kdjax.data.corpus import Corpus, EvalSet, prepare
from kdjax.errors import TrainingError, UserError
from kdjax.evals import results
from kdjax.evals.score import TEMPERATURES, Scored, expected_calibration_error, fit_temperature, score
from kdjax.metrics import Progress
from kdjax.run import RunFolder, read_json

log = logging.getLogger('kdjax')

VERSION = 1  # of what a result means; part of its fingerprint
IN_DOMAIN = 'in-domain'
POLL = 5.0  # seconds between looks at a watched folder


@dataclasses.dataclass(frozen=True)
class Job:
  """The models to score: run folders, the teacher first, and the config and teacher they share."""

  config: Config
  runs: list[RunFolder]
  teacher: RunFolder | None


def main(argv: Sequence[str] | None = None) -> None:
  with cli.user_errors():
    parser = argparse.ArgumentParser(prog='python -m kdjax.evaluate', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', required=True, help="an experiment's folder, or that of one run in it")
    parser.add_argument('--step', type=int, default=0, help='the checkpoint; default: the newest')
    parser.add_argument('--watch', action='store_true', help='score each new checkpoint until the run ends (needs devices of its own)')
    for axis in sharding.AXES:
      parser.add_argument(f'--{axis}', type=int, default=-1 if axis == 'fsdp' else 1, help=f'devices along {axis}')
    distributed.add_arguments(parser)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    distributed.initialize(args, 100)
    mesh = sharding.make_mesh(MeshConfig(args.replica, args.fsdp, args.tensor))
    with jax.set_mesh(mesh):
      if args.watch:
        watch(pathlib.Path(args.workdir), mesh)
        return
      job = find(pathlib.Path(args.workdir))
      corpus = distributed.first_process_first(lambda: prepare(job.config.data, job.config.eval, job.config.runs))
      evaluate(job, corpus, mesh, step=args.step)
    if jax.process_index() == 0:
      print(table.write(pathlib.Path(args.workdir)))


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


def watch(workdir: pathlib.Path, mesh: Mesh) -> None:
  """Scores each new checkpoint of a run until its status says that it is over.

  Raises TrainingError where the run's heartbeat stops.
  """
  job = find(workdir)
  corpus = prepare(job.config.data, job.config.eval, job.config.runs)
  seen: set[tuple[pathlib.Path, int]] = set()
  while True:
    over = all((run.status() or {}).get('state') in ('done', 'failed') for run in job.runs)
    for run in job.runs:
      if not run.checkpoints.is_dir():
        continue
      saves = Checkpoints(run.checkpoints, read_only=True)
      steps = saves.steps()
      saves.close()
      for at in steps:
        if (run.path, at) not in seen:
          evaluate(dataclasses.replace(job, runs=[run]), corpus, mesh, step=at, progress=False)
          log.info('scored %s at step %d', run.path, at)
          seen.add((run.path, at))
    if over:
      return
    for run in job.runs:
      _check_heartbeat(run, job.config.heartbeat_timeout)
    time.sleep(POLL)


def _check_heartbeat(run: RunFolder, timeout: float) -> None:
  status = run.status() or {}
  if status.get('state') == 'running' and time.time() - status.get('heartbeat', 0) > timeout:
    raise TrainingError(f'{run.path}: its trainer has been silent for more than {timeout:.0f} s; giving up')


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


if __name__ == '__main__':
  main()
