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
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from kdjax import cli, distributed, sharding
from kdjax.analysis import table
from kdjax.checkpoint import Checkpoints
from kdjax.config import MeshConfig
from kdjax.data.corpus import prepare
from kdjax.errors import TrainingError
from kdjax.evals.job import evaluate, find
from kdjax.run import RunFolder

log = logging.getLogger('kdjax')

POLL = 5.0  # seconds between looks at a watched folder


def main(argv: Sequence[str] | None = None) -> None:
  with cli.user_errors():
    parser = argparse.ArgumentParser(
      prog='python -m kdjax.evaluate', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True, help="an experiment's folder, or that of one run in it")
    parser.add_argument('--step', type=int, default=0, help='the checkpoint; default: the newest')
    parser.add_argument(
      '--watch', action='store_true', help='score each new checkpoint until the run ends (needs devices of its own)'
    )
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


if __name__ == '__main__':
  main()
