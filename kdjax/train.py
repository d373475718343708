"""One run of the main job: make sure of the teacher, train the students on the same batches, score everything, say what was gained.

    python -m kdjax.train --config=configs/weak2strong.py
    python -m kdjax.train --config=configs/weak2strong.py:scale=paper --config.student.alpha=0.4 --workdir=runs/mine

Started again, it goes on from the newest good checkpoints; where all is done it only prints the table.
"""

import argparse
import dataclasses
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import cli, distributed, flops, loop, sharding, teachers
from kdjax import config as config_lib
from kdjax.analysis import figures, table
from kdjax.config import AlphaSchedule, Config, LossConfig, StudentConfig, TeacherConfig
from kdjax.data.batches import BatchStream, Windows
from kdjax.data.corpus import Corpus, prepare
from kdjax.errors import UserError
from kdjax.evals import job as jobs
from kdjax.losses import alpha_state
from kdjax.models import Model, build
from kdjax.optimizer import adamw, learning_rate
from kdjax.run import RunFolder, git_commit, read_json, versions, write_json
from kdjax.step import Recipe, Teacher

log = logging.getLogger('kdjax')

SPEEDS = {  # fields that change how fast a result comes, and not what it is
  'attention',
  'remat',
  'scan_unroll',
  'max_seq_len',
  'microbatches',
  'forward_microbatch',
  'chunk_tokens',
  'chunk_megabytes',
}
TARGETS = {'baseline': 'none', 'distilled': 'teacher', 'unigram': 'unigram'}


def main(argv: Sequence[str] | None = None) -> None:
  with distributed.leaving_at_once(), cli.user_errors():
    parser = argparse.ArgumentParser(
      prog='python -m kdjax.train', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', help="the run's folder; default: <runs>/<config>-<hash>")
    distributed.add_arguments(parser)
    config, args = cli.parse(parser, sys.argv[1:] if argv is None else argv)
    assert config is not None
    if config.deterministic:
      cli.set_deterministic()
    distributed.initialize(args, config.heartbeat_timeout)
    try:
      run(config, pathlib.Path(args.workdir) if args.workdir else None)
    except loop.Preempted as e:
      log.info('%s', e)


def run(config: Config, workdir: pathlib.Path | None = None, progress: bool = True) -> pathlib.Path:
  """Trains, evaluates and prints; returns the experiment's folder."""
  folder = workdir or pathlib.Path(config.runs) / f'{config.name}-{config_lib.fingerprint(experiment(config))}'
  _claim_experiment(folder, config)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    corpus = distributed.first_process_first(lambda: prepare(config.data, config.eval, config.runs, progress))
    check(config, corpus, mesh)
    teacher = teacher_folder(config, corpus)
    write_experiment(folder, config, teacher)  # before training, for an eval job that watches
    train_teacher(config, corpus, teacher, mesh, progress)
    train_students(config, folder, corpus, teacher, mesh, progress)
    jobs.evaluate(jobs.find(folder), corpus, mesh, progress=progress)
  if jax.process_index() == 0:
    print(table.write(folder))
    print(f'\nfigure: {figures.write(folder)}')
  return folder


def experiment(config: Config) -> dict[str, Any]:
  """What an experiment's results depend on: the config less its name, places, speeds and schedules of saving."""
  values = config_lib.as_dict(config)
  kept = {key: values[key] for key in ('teacher', 'student', 'loss')} | {'data': _data_identity(config)}
  kept['student']['arms'] = sorted(config.student.arms)
  if 'distilled' not in config.student.arms:
    del kept['teacher']
  return _without_speeds(kept)


def run_config(
  config: Config, section: TeacherConfig | StudentConfig, model: Model, arm: str, teacher: str
) -> dict[str, Any]:
  """What defines one model's training run: the value that run.json keeps and compares.

  The baseline's and the teacher's do not depend on the loss's KD part, so that configs which differ there share them.
  """
  target = TARGETS.get(arm, 'none')
  learns = isinstance(section, StudentConfig) and target != 'none'
  identity = {
    'arm': arm,
    'model': dataclasses.asdict(model.config),
    'data': _data_identity(config),
    **{key: getattr(section, key) for key in ('seed', 'tokens', 'batch_size')},
    'slice': list(section.slice),
    'optimizer': dataclasses.asdict(section.optimizer),
    'target': {'teacher': teacher, 'unigram': 'unigram'}.get(target, 'none'),
    'alpha': section.alpha if learns else 0.0,  # type: ignore[union-attr]
    'alpha_schedule': dataclasses.asdict(section.alpha_schedule if learns else AlphaSchedule()),  # type: ignore[union-attr]
    'loss': dataclasses.asdict(_arm_loss(config, learns)),
  }
  return _without_speeds(identity)


def check(config: Config, corpus: Corpus, mesh: Mesh) -> None:
  """Raises UserError for a model that cannot be made, or does not fit the mesh: before the first one is trained, not after."""
  data_parallel = mesh.shape['replica'] * mesh.shape['fsdp']
  sections: dict[str, TeacherConfig | StudentConfig] = {'student': config.student}
  if 'distilled' in config.student.arms:
    sections['teacher'] = config.teacher
  sizes = {}
  for name, section in sections.items():
    model = build(teachers.with_vocabulary(section.model, corpus.tokenizer, name))
    sharding.param_shardings(model.abstract(), mesh)
    sizes[name] = model.config.vocab_size
    rows = section.batch_size // section.microbatches
    if rows % data_parallel and not (name == 'teacher' and config.teacher.run):
      raise UserError(
        f"mesh: replica x fsdp = {data_parallel} does not divide the {name}'s batch_size / microbatches = {rows}; "
        f'change --config.{name}.batch_size or --config.mesh.*'
      )
  if len(set(sizes.values())) > 1:
    raise UserError(
      f"the teacher's vocabulary ({sizes['teacher']} tokens) is not the student's ({sizes['student']}); "
      'distillation needs the same one'
    )


def teacher_folder(config: Config, corpus: Corpus) -> RunFolder | None:
  """The teacher's run folder: the one that the config names, or where its own teacher is or will be. None where no arm has one."""
  section = config.teacher
  if 'distilled' not in config.student.arms:
    return None
  if section.run:
    teacher = RunFolder(section.run)
    teachers.check(teacher, section, corpus.tokenizer)
    return teacher
  model, identity = _teacher(config, corpus)
  return teachers.folder_of(config.runs, model, config_lib.fingerprint(identity))


def train_teacher(config: Config, corpus: Corpus, folder: RunFolder | None, mesh: Mesh, progress: bool = True) -> None:
  """Trains the config's own teacher, if it is not there yet."""
  if folder is None or config.teacher.run:
    return
  model, identity = _teacher(config, corpus)
  members = [_member(config, config.teacher, folder, identity)]
  loop.fit(_cohort(config, 'teacher', corpus, model, members, progress=progress), mesh)


def train_students(
  config: Config,
  folder: pathlib.Path,
  corpus: Corpus,
  teacher_folder: RunFolder | None,
  mesh: Mesh,
  progress: bool = True,
) -> None:
  """Trains the students, one an arm, side by side on the same batches."""
  section = config.student
  model = build(teachers.with_vocabulary(section.model, corpus.tokenizer, 'student'))
  teacher_model, teacher, fingerprints, name = None, Teacher(), {}, ''
  if teacher_folder:
    step = config.teacher.step if config.teacher.run else 0
    teacher_model, params, step, weights = teachers.load(teacher_folder, config.teacher.dtype, mesh, step)
    name = f'{weights}@{step}'
    teacher = Teacher(params)
    fingerprints['teacher'] = weights
  if 'unigram' in section.arms:
    log_probs = teachers.unigram_log_probs(_windows(config, section, corpus), model.config.padded_vocab_size)
    teacher = teacher._replace(unigram_V=jax.device_put(log_probs, NamedSharding(mesh, P('tensor'))))
  members = [
    _member(config, section, run_folder, run_config(config, section, model, run_folder.name, name))
    for run_folder in student_folders(config, folder)
  ]
  loop.fit(_cohort(config, 'student', corpus, model, members, teacher_model, teacher, fingerprints, progress), mesh)


def student_folders(config: Config, folder: pathlib.Path) -> list[RunFolder]:
  return [RunFolder(folder / 'students' / arm) for arm in config.student.arms]


def write_experiment(folder: pathlib.Path, config: Config, teacher: RunFolder | None) -> None:
  """experiment.json: what the eval job and the report find their way by. Paths are relative to the folder."""
  if jax.process_index() == 0:
    known = {
      'config': experiment(config),
      'resolved': _resolved(config, folder),
      'teacher': os.path.relpath(teacher.path, folder) if teacher else None,
      'students': [os.path.relpath(student.path, folder) for student in student_folders(config, folder)],
    }
    write_json(folder / 'experiment.json', known)


def _claim_experiment(folder: pathlib.Path, config: Config) -> None:
  """Refuses, before any work, a folder that holds another experiment."""
  known = read_json(folder / 'experiment.json')
  if known is not None:
    RunFolder(folder).compare(known['config'], experiment(config))


def _resolved(config: Config, folder: pathlib.Path) -> dict[str, Any]:
  return config_lib.as_dict(config) | {'runs': os.path.relpath(config.runs, folder)}


def _member(
  config: Config, section: TeacherConfig | StudentConfig, folder: RunFolder, identity: dict[str, Any]
) -> loop.Member:
  schedule = AlphaSchedule(**identity['alpha_schedule'])
  alpha = alpha_state(identity['alpha'], schedule, config_lib.n_steps(section, config.data))
  notes = {'resolved': _resolved(config, folder.path), 'versions': versions(), 'git': git_commit()}
  return loop.Member(folder, identity, alpha, notes)


def _teacher(config: Config, corpus: Corpus) -> tuple[Model, dict[str, Any]]:
  """(model, what defines its run) of the teacher that the config describes."""
  model = build(teachers.with_vocabulary(config.teacher.model, corpus.tokenizer, 'teacher'))
  return model, run_config(config, config.teacher, model, 'teacher', '')


def _cohort(
  config: Config,
  name: str,
  corpus: Corpus,
  model: Model,
  members: list[loop.Member],
  teacher_model: Model | None = None,
  teacher: Teacher = Teacher(),
  fingerprints: dict[str, str] | None = None,
  progress: bool = True,
) -> loop.Cohort:
  """The cohort of the config's section `name` ('teacher' or 'student')."""
  section: TeacherConfig | StudentConfig = getattr(config, name)
  total = config_lib.n_steps(section, config.data)
  windows = _windows(config, section, corpus)
  stream = BatchStream(windows, section.batch_size, section.seed)
  _warn_of_epochs(name, section, stream, total)
  optimizer = section.optimizer
  targets = tuple(TARGETS.get(member.config['arm'], 'none') for member in members)
  recipe = Recipe(
    student=model,
    teacher=teacher_model,
    targets=targets,
    optimizer=adamw(optimizer),
    learning_rate=learning_rate(optimizer, total),
    peak_learning_rate=optimizer.learning_rate,
    loss=_arm_loss(config, any(target != 'none' for target in targets)),
    mask_documents=config.data.mask_documents,
    microbatches=section.microbatches,
    teacher_microbatch=config.teacher.forward_microbatch if teacher_model else 0,
    size=config.steps_per_call,
  )
  return loop.Cohort(
    title=name if len(members) == 1 else f'{len(members)} {name}s',
    members=tuple(members),
    recipe=recipe,
    teacher=teacher,
    seed=section.seed,
    stream=stream,
    validation=Windows(corpus.validation, config.data.seq_len, mask_documents=config.data.mask_documents),
    total_steps=total,
    checkpoint_every=config.checkpoint.every or max(1, total // 10),
    eval_every=config.eval.every or max(1, total // 10),
    eval_batches=config.eval.every_batches,
    keep=config.checkpoint.keep,
    keep_period=config.checkpoint.keep_period,
    max_skipped=config.max_skipped,
    heartbeat_timeout=config.heartbeat_timeout,
    fingerprints={'data': stream.fingerprint, 'tokenizer': corpus.tokenizer.fingerprint, **(fingerprints or {})},
    facts={
      'parameters': model.n_params,
      'non_embedding': flops.count_params(model.config).non_embedding,
      'tokens': total * section.batch_size * config.data.seq_len,
      'steps': total,
      'distinct_tokens': windows.n_tokens,
      'epochs': total / stream.steps_per_epoch,
      'xz9_bits_per_byte': corpus.xz9_bits_per_byte,
    },
    threads=config.data.threads,
    prefetch=config.data.prefetch,
    progress=progress,
  )


def _arm_loss(config: Config, learns: bool) -> LossConfig:
  """The loss of a model that learns from a teacher, or the LM part of it."""
  return config.loss if learns else LossConfig(z_loss=config.loss.z_loss)


def _windows(config: Config, section: TeacherConfig | StudentConfig, corpus: Corpus) -> Windows:
  data = config.data
  return Windows(corpus.train, data.seq_len, section.slice, data.distinct_tokens, data.mask_documents)


def _data_identity(config: Config) -> dict[str, Any]:
  values = dataclasses.asdict(config.data)
  return {key: value for key, value in values.items() if key not in ('cache', 'prefetch', 'threads')}


def _without_speeds(value: Any) -> Any:
  """Nested dicts less the fields that change how fast a result comes, and not what it is."""
  if not isinstance(value, dict):
    return value
  return {key: _without_speeds(inner) for key, inner in value.items() if key not in SPEEDS}


def _warn_of_epochs(name: str, section: TeacherConfig | StudentConfig, stream: BatchStream, total: int) -> None:
  epochs = total / stream.steps_per_epoch
  if epochs > 1 and jax.process_index() == 0:
    log.warning(
      'note: the %s sees %s distinct tokens %.1f times (%s tokens in all); set fewer tokens or more text for a single epoch',
      name, f'{stream.windows.n_tokens:,}', epochs, f'{section.tokens:,}',
    )  # fmt: skip


if __name__ == '__main__':
  main()
