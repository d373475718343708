"""The eval job: scores checkpoints per document, apart from training, on any number of devices.

    python -m kdjax.evaluate --workdir=runs/weak2strong-0123456789ab            the newest checkpoint of each model
    python -m kdjax.evaluate --workdir=runs/weak2strong-0123456789ab --step=500
    python -m kdjax.evaluate --workdir=... --watch                              each new checkpoint, until the run ends

Sets: the in-domain test split, every OOD set, and the multiple-choice tasks of `eval.tasks` (kdjax/evals/choices.py). Each set's evaluation
temperature is fitted, for each model, on documents of the same set that are not scored (the validation split; the validation share of an OOD
set). Documents longer than the window are scored in strided windows (kdjax/evals/windows.py).
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from kdjax import cli, distributed, paths, preemption, sharding
from kdjax.analysis import table
from kdjax.checkpoint import steps_in
from kdjax.config import Config, MeshConfig
from kdjax.data.corpus import Corpus, prepare
from kdjax.errors import TrainingError, UserError
from kdjax.evals.job import Job, evaluate, find, score_missing
from kdjax.run import RunFolder

log = logging.getLogger('kdjax')

POLL = 5.0  # seconds between looks at a watched folder
DELETING = 25  # looks at a checkpoint that could not be read


def main(argv: Sequence[str] | None = None) -> None:
  with distributed.leaving_at_once(), cli.user_errors(resumable=True):
    parser = cli.Parser(
      prog='python -m kdjax.evaluate', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True, help="an experiment's folder, or that of one run in it")
    parser.add_argument('--step', type=cli.count, default=0, help='the checkpoint; default: the newest')
    parser.add_argument(
      '--watch', action='store_true', help='score each new checkpoint until the run ends (needs devices of its own)'
    )
    for axis in sharding.AXES:
      parser.add_argument(f'--{axis}', type=cli.axis, default=-1 if axis == 'fsdp' else 1, help=f'devices along {axis}')
    distributed.add_arguments(parser)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.watch and args.step:
      raise UserError('--step names one checkpoint, --watch takes each new one: give one of the two')
    paths.check(args.workdir)
    distributed.initialize(args, Config().heartbeat_timeout)
    mesh = sharding.make_mesh(MeshConfig(args.replica, args.fsdp, args.tensor), flags='--replica, --fsdp, --tensor')
    with jax.set_mesh(mesh):
      if args.watch:
        watch(paths.of_runs(args.workdir), mesh)
      else:
        job = find(paths.of_runs(args.workdir))
        corpus = _corpus(job)
        evaluate(job, corpus, mesh, step=args.step)
    if jax.process_index() == 0:
      print(table.write(paths.of_runs(args.workdir), args.step))


def watch(workdir: paths.Path, mesh: Mesh) -> None:
  """Scores each new checkpoint of a run until its status says that it is over, then makes the table.

  Raises TrainingError where the run's heartbeat stops, or does not begin.
  """
  job = find(workdir)
  corpus = _corpus(job)
  seen: set[tuple[paths.Path, int]] = set()
  start = time.time()
  while True:
    preemption.check_notice()
    # Both are asked before the scoring, which may take long: what the run does meanwhile is seen the next time.
    beats = [_status(run, 'heartbeat') or 0.0 for run in job.runs]
    over, silent = distributed.from_first_process(
      [
        all(_status(run, 'state') in ('done', 'failed') for run in job.runs),
        time.time() - max(start, *beats) > job.config.heartbeat_timeout,
      ]
    )
    for run in job.runs:
      for at in steps_in(run.checkpoints):
        if (run.path, at) not in seen:
          seen.add((run.path, at))
          _score(job, run, at, corpus, mesh)
    if over:
      evaluate(job, corpus, mesh)
      return
    if silent:
      raise TrainingError(
        f'{workdir}: its trainer has been silent for more than {job.config.heartbeat_timeout} s; giving up'
      )
    time.sleep(min(POLL, job.config.heartbeat_timeout))


def _corpus(job: Job) -> Corpus:
  config = job.config
  return distributed.first_process_first(lambda: prepare(config.data, config.eval, config.runs, origin=job.origin))


def _score(job: Job, run: RunFolder, at: int, corpus: Corpus, mesh: Mesh) -> None:
  try:
    score_missing(job, [(run, at)], corpus, mesh, progress=False)
    log.info('scored %s at step %d', run.path, at)
  except UserError:
    for _ in range(DELETING):  # a folder that is being deleted is listed until it is gone
      if at not in steps_in(run.checkpoints):
        break
      time.sleep(0.2)
    else:
      raise
    log.info('passed over %s at step %d: its trainer has deleted it', run.path, at)


def _status(run: RunFolder, name: str):
  return (run.status() or {}).get(name)


if __name__ == '__main__':
  distributed.watch()
  main()
