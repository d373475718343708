"""Train teacher and students, evaluate them, print the table of gains.

    python -m kdjax.train --config=configs/weak2strong.py
    python -m kdjax.train --config=configs/weak2strong.py:scale=paper --config.student.alpha=0.4 --workdir=runs/mine

The students of a run see the same batches. A restart resumes from the newest good checkpoints; if everything is done, it only prints the table.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from kdjax import cli
from kdjax import config as config_lib
from kdjax.analysis import figures, table
from kdjax.config import Config
from kdjax.data.corpus import Corpus, prepare
from kdjax.data.wanted import Origin
from kdjax.errors import UserError
from kdjax.runs import trackers
from kdjax.runs.folder import RunFolder
from kdjax.runtime import backend, distributed, environment, logs, profiling, sharding
from kdjax.scoring import choices
from kdjax.scoring import job as jobs
from kdjax.storage import paths
from kdjax.storage.paths import read_json, write_json
from kdjax.teachers import by_name
from kdjax.trainer import experiments, preflight


def main(argv: Sequence[str] | None = None) -> None:
  with distributed.leaving_at_once(), cli.user_errors(resumable=True):
    parser = cli.Parser(
      prog='python -m kdjax.train', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--profile', metavar='STEPS', help='trace these steps of the students: FIRST-LAST, or how many')
    parser.add_argument('--workdir', help="the run's folder; default: <runs>/<config>-<hash>")
    distributed.add_arguments(parser)
    config, args = cli.parse(parser, sys.argv[1:] if argv is None else argv, cli.load_config)
    window = profiling.parse_window(args.profile) if args.profile else None
    if config.deterministic:
      environment.set_deterministic()
    paths.check_writable(args.workdir or config.runs)
    distributed.initialize(args, config.heartbeat_timeout)
    run(config, paths.runs_path(args.workdir) if args.workdir else None, profile=window)


def run(
  config: Config,
  workdir: paths.Path | None = None,
  progress: bool = True,
  profile: profiling.Window | None = None,
) -> paths.Path:
  """Train, evaluate and print; return the experiment's folder."""
  backend.devices()
  trackers.check_trackers(config.trackers)
  config = by_name.adopt_models(config)
  name = f'{config.name}-{config_lib.fingerprint(experiments.experiment_identity(config))}'
  folder = paths.runs_path(workdir) if workdir else paths.runs_path(config.runs) / name
  origin = _claim_experiment(folder, config)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh), logs.log_to(folder):
    corpus = distributed.first_process_first(lambda: prepare(config.data, config.eval, config.runs, progress, origin))
    # Report an unreadable task before training, not after it.
    choices.read_tasks(config.eval.tasks, config.eval.max_items, kept=corpus.tasks)
    teacher = experiments.teacher_folder(config, corpus)
    preflight.check_run(config, corpus, mesh)
    write_experiment(folder, config, teacher, corpus)  # before training, for an eval job with --watch
    experiments.train_teacher(config, corpus, teacher, mesh, progress)
    experiments.train_students(students(config, folder), corpus, teacher, mesh, progress, profile)
    jobs.evaluate(jobs.find_job(folder), corpus, mesh, progress=progress)
  if jax.process_index() == 0:
    print(table.write_table(folder))
    print(f'\nfigure: {figures.write_figure(folder)}')
  return folder


def students(config: Config, folder: paths.Path) -> list[experiments.Arm]:
  return [experiments.Arm(config, arm, RunFolder(folder / 'students' / arm), arm) for arm in config.student.arms]


def write_experiment(folder: paths.Path, config: Config, teacher: RunFolder | None, corpus: Corpus) -> None:
  """Write experiment.json, from which the eval job and the report find everything. Paths are relative to the folder."""
  if jax.process_index() == 0:
    origin = (read_json(folder / 'experiment.json') or {}).get('origin', {})
    if origin.get('corpus') != corpus.folder.name:  # a restart from another folder may not find the text
      origin = experiments.record_origin(corpus, folder)
    known = {
      'config': experiments.experiment_identity(config),
      'resolved': experiments.record_config(config, folder),
      'teacher': paths.relative(teacher.path, folder) if teacher else None,
      'students': [paths.relative(student.folder.path, folder) for student in students(config, folder)],
      'origin': origin,
    }
    write_json(folder / 'experiment.json', known)


def _claim_experiment(folder: paths.Path, config: Config) -> Origin:
  """Raise UserError, before any work, if the folder holds another experiment. Returns the recorded origin of its text."""
  if (folder / 'run.json').exists():
    raise UserError(f'{folder} is the folder of one run, not of an experiment; use another --workdir')
  known = read_json(folder / 'experiment.json')
  if known is not None:
    RunFolder(folder).compare(known['config'], experiments.experiment_identity(config))
  return Origin(corpus=(known or {}).get('origin', {}).get('corpus', ''))


if __name__ == '__main__':
  distributed.watch()
  main()
