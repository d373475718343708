"""Score checkpoints per document, apart from training, on any number of devices.

    python -m kdjax.evaluate --workdir=runs/weak2strong-0123456789ab            the newest checkpoint of each model
    python -m kdjax.evaluate --workdir=runs/weak2strong-0123456789ab --step=500
    python -m kdjax.evaluate --workdir=... --watch                              each new checkpoint, until the run ends

Sets: the in-domain test split, every OOD set, and the multiple-choice tasks of `eval.tasks` (kdjax/scoring/choices.py). Each model's evaluation
temperature for a set is fitted on documents of that set that are not scored (the validation split; the validation share of an OOD set).
Documents longer than the window are scored in strided windows (kdjax/scoring/windows.py).
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from kdjax import cli
from kdjax.analysis import table
from kdjax.config import Config, MeshConfig
from kdjax.data.corpus import Corpus, prepare
from kdjax.errors import TrainingError, UserError
from kdjax.runs.checkpoint import steps_in
from kdjax.runs.folder import Pulse, RunFolder
from kdjax.runtime import distributed, preemption, sharding
from kdjax.scoring.job import Job, evaluate, find_job, score_missing
from kdjax.storage import paths

log = logging.getLogger('kdjax')

OVER = ('done', 'failed')  # states
POLL = 5.0  # seconds between looks at a watched folder
PATIENCE = 3600.0  # seconds: a launcher restarts a lost machine's processes within minutes, a spot machine may take longer to come back
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
    parser.add_argument(
      '--patience',
      type=cli.positive,
      default=PATIENCE,
      metavar='SECONDS',
      help='how long --watch waits for a trainer that was preempted, or has lost its machine, to resume; default: %(default)g',
    )
    for axis in sharding.AXES:
      parser.add_argument(f'--{axis}', type=cli.axis, default=-1 if axis == 'fsdp' else 1, help=f'devices along {axis}')
    distributed.add_arguments(parser)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.watch and args.step:
      raise UserError('--step names one checkpoint, --watch takes each new one: give one of the two')
    paths.check_writable(args.workdir)
    distributed.initialize(args, Config().heartbeat_timeout)
    mesh = sharding.make_mesh(MeshConfig(args.replica, args.fsdp, args.tensor), flags='--replica, --fsdp, --tensor')
    with jax.set_mesh(mesh):
      if args.watch:
        watch(paths.runs_path(args.workdir), mesh, args.patience)
      else:
        job = find_job(paths.runs_path(args.workdir))
        corpus = _corpus(job)
        evaluate(job, corpus, mesh, step=args.step)
    if jax.process_index() == 0:
      print(table.write_table(paths.runs_path(args.workdir), args.step))


def watch(workdir: paths.Path, mesh: Mesh, patience: float = PATIENCE) -> None:
  """Score each new checkpoint of a run until its status is done or failed, then write the table.

  Args:
    patience: seconds to wait for heartbeats that have stopped or not yet started, whatever the status.

  Raises TrainingError if they stay away longer.
  """
  job = find_job(workdir)
  corpus = _corpus(job)
  seen: set[tuple[paths.Path, int]] = set()
  pulse, reported = Pulse(), False
  while True:
    preemption.check_notice()
    # Both are asked before the scoring, which may take long: what the run does meanwhile is seen the next time.
    silence = pulse.silence([run.heartbeat() for run in job.runs])
    over, silent, given_up = distributed.from_first_process(
      [
        all(_state(run) in OVER for run in job.runs),
        silence > job.config.heartbeat_timeout,
        silence > patience,
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
    if silent and not reported:
      states = ', '.join(sorted({_state(run) or 'not started' for run in job.runs} - set(OVER)))
      log.warning(
        '%s: its trainer (%s) has been silent for %.0f s; waiting up to %g s for it to resume',
        workdir,
        states,
        silence,
        patience,
      )
    if given_up:
      raise TrainingError(
        f'{workdir}: its trainer has been silent for more than {patience:g} s; start it again, or wait longer with --patience'
      )
    reported = silent
    time.sleep(min(POLL, job.config.heartbeat_timeout, patience))


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


def _state(run: RunFolder) -> str | None:
  return (run.status() or {}).get('state')


if __name__ == '__main__':
  distributed.watch()
  main()
