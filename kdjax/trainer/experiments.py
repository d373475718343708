"""From configs to trained models: what defines a run, which teacher it needs, which students train side by side.

`train` and `grid` are made of these: a teacher is trained once and found again by its fingerprint; students that differ in their targets and
alpha alone are one cohort on the same batches.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import config as config_lib
from kdjax import machine
from kdjax.config import (
  AlphaSchedule,
  Config,
  DataConfig,
  LossConfig,
  ModelConfig,
  StudentConfig,
  TeacherConfig,
  TrainingConfig,
  fields,
)
from kdjax.data.batches import BatchStream, Windows
from kdjax.data.corpus import Corpus
from kdjax.data.roles import Roles
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.losses import alpha_state
from kdjax.models import Model, build, flops
from kdjax.runs.folder import RunFolder
from kdjax.runtime.profiling import Window
from kdjax.storage import paths
from kdjax.teachers import by_name, frozen
from kdjax.trainer import loop
from kdjax.trainer.cohort import Cohort, Member
from kdjax.trainer.optimizer import adamw, learning_rate, phases_overrun
from kdjax.trainer.step import Recipe, Teacher

log = logging.getLogger('kdjax')

TARGETS = {'baseline': 'none', 'distilled': 'teacher', 'unigram': 'unigram'}


@dataclasses.dataclass(frozen=True)
class Arm:
  """One student: its config, which of the config's arms it is, the folder it trains in, what a progress bar calls it."""

  config: Config
  name: str  # baseline | distilled | unigram
  folder: RunFolder
  label: str


def experiment_identity(config: Config) -> dict[str, Any]:
  """Return what an experiment's results depend on: the config without names, places, speeds and saving."""
  kept = {name: fields.identity(getattr(config, name)) for name in ('teacher', 'student', 'loss')}
  kept['data'] = _data_identity(config)
  kept['student']['arms'] = sorted(config.student.arms)
  if any(TARGETS[arm] != 'none' for arm in config.student.arms):
    kept['loss'] |= nucleus_identity(config.loss)
  for name, section in (('teacher', trained_section(config.teacher)), ('student', config.student)):
    kept[name]['optimizer'] |= schedule_identity(section, config.data)
  if 'distilled' not in config.student.arms:
    del kept['teacher']
  return kept


def run_identity(
  config: Config, section: TrainingConfig, model: ModelConfig, arm: str, teacher: str, init: str = ''
) -> dict[str, Any]:
  """Return what defines one model's training run: run.json records it and later starts compare it. `init`: the initial weights, if not fresh.

  The baseline's and the teacher's do not depend on the loss's KD part, so that configs which differ there share them.
  """
  target = TARGETS.get(arm, 'none')
  alpha, schedule, loss = 0.0, AlphaSchedule(), _arm_loss(config, learns=False)
  if isinstance(section, StudentConfig) and target != 'none':
    alpha, schedule, loss = section.alpha, section.alpha_schedule, _arm_loss(config, learns=True)
  identity = {
    'arm': arm,
    'model': fields.identity(model),
    'data': _data_identity(config),
    **{key: getattr(section, key) for key in ('seed', 'tokens', 'batch_size')},
    'slice': list(section.slice),
    'optimizer': fields.identity(section.optimizer) | schedule_identity(section, config.data),
    'target': {'teacher': teacher, 'unigram': 'unigram'}.get(target, 'none'),
    'alpha': alpha,
    'alpha_schedule': fields.identity(schedule),
    'loss': fields.identity(loss) | nucleus_identity(loss),
  }
  return identity | ({'init': init} if init else {})


def nucleus_identity(loss: LossConfig) -> dict[str, str]:
  """Return a mark for runs whose nucleus older versions cut at temperature 1; empty if the result is the same."""
  return {'nucleus': 'tempered'} if loss.teacher_top_p < 1 and loss.temperature != 1 else {}


def schedule_identity(section: TrainingConfig, data: DataConfig) -> dict[str, str]:
  """Return a mark for runs whose learning rates differ from older versions, because warm-up and decay exceed the run; empty otherwise."""
  return {'phases': 'fitted'} if phases_overrun(section.optimizer, config_lib.n_steps(section, data)) else {}


def teacher_key(config: Config) -> str:
  """Return a hash that identifies a teacher's training run before a tokenizer is known. Checkpoints of one trunk are of one run."""
  section = trained_section(config.teacher)
  return config_lib.fingerprint(run_identity(config, section, section.model, 'teacher', ''), 8)


def student_key(config: Config, arm: str) -> str:
  """Return a hash that identifies a student's training run."""
  teacher = f'{teacher_key(config)}@{frozen.teacher_step(config)}' if TARGETS[arm] == 'teacher' else ''
  section = config.student
  return config_lib.fingerprint(run_identity(config, section, section.model, arm, teacher, section.init), 8)


def teacher_folder(config: Config, corpus: Corpus) -> RunFolder | None:
  """Return the teacher's run folder: the one that the config names, or where its own teacher is or will be. None if no arm has a teacher."""
  section = config.teacher
  if 'distilled' not in config.student.arms:
    return None
  if section.run:
    return by_name.check_named_run(section.run, 'teacher.run', config, corpus.tokenizer, section.step)
  model, identity = _teacher(config, corpus)
  # By content too: where the text behind a path has changed, so has the teacher.
  content = [corpus.tokenizer.fingerprint, corpus.train.fingerprint]
  return frozen.locate_teacher(config.runs, model, config_lib.fingerprint([identity, content]))


def train_teacher(config: Config, corpus: Corpus, folder: RunFolder | None, mesh: Mesh, progress: bool = True) -> None:
  """Train the config's own teacher, or import the one it names, unless that is done."""
  if folder is None:
    return
  if config.teacher.run:
    by_name.import_run(config.teacher.run, config, mesh)
    return
  model, identity = _teacher(config, corpus)
  section = trained_section(config.teacher)
  members = [_member(config, corpus, section, folder, identity, 'teacher')]
  cohort = _cohort(config, section, corpus, model, members)
  loop.train_cohort(dataclasses.replace(cohort, progress=progress), mesh)


def train_students(
  arms: Sequence[Arm],
  corpus: Corpus,
  teacher_folder: RunFolder | None,
  mesh: Mesh,
  progress: bool = True,
  profile: Window | None = None,
) -> None:
  """Train a cohort of students side by side on the same batches. Their configs may differ in `student.alpha` and its schedule alone."""
  config = arms[0].config
  assert all(cohort_key(arm.config) == cohort_key(config) for arm in arms), 'these students are no cohort'
  section = config.student
  n_tokens = by_name.student_vocab_size(config, corpus.tokenizer)
  model = build(frozen.set_vocabulary(section.model, corpus.tokenizer, 'student', n_tokens))
  supervision = _load_supervision(config, corpus, model, {TARGETS[arm.name] for arm in arms}, teacher_folder, mesh)
  initial, init = None, ''
  if section.init:
    begun_with = by_name.import_run(section.init, config, mesh)
    init = by_name.identify_weights(begun_with)
    initial = functools.partial(by_name.load_weights, begun_with, model, mesh)
  members = []
  for arm in arms:
    identity = run_identity(arm.config, arm.config.student, model.config, arm.name, supervision.name, init)
    members.append(_member(arm.config, corpus, arm.config.student, arm.folder, identity, arm.label))
  cohort = _cohort(config, section, corpus, model, members, supervision)
  loop.train_cohort(dataclasses.replace(cohort, profile=profile, initial=initial, progress=progress), mesh)


class _Supervision(NamedTuple):
  """What students learn from besides text.

  Attributes:
    model: of the teacher; None without one.
    name: tells the teacher's distributions apart: its weights, their step, and the student's vocabulary if that cuts part of it off.
    weights: their fingerprint.
  """

  model: Model | None = None
  teacher: Teacher = Teacher()
  name: str = ''
  weights: str = ''


def _load_supervision(
  config: Config, corpus: Corpus, student: Model, targets: set[str], folder: RunFolder | None, mesh: Mesh
) -> _Supervision:
  supervision = _Supervision()
  if folder and 'teacher' in targets:
    section = config.teacher
    model, params, step, weights = frozen.load_teacher(
      folder, section.dtype, mesh, frozen.teacher_step(config), section.model, section.layout
    )
    cut = f'/{student.config.vocab_size}' if model.config.vocab_size > student.config.vocab_size else ''
    model, params = frozen.fit_to_student(model, params, student.config, mesh, section.layout)
    supervision = _Supervision(model, Teacher(params), f'{weights}@{step}{cut}', weights)
  if 'unigram' in targets:
    log_probs = frozen.unigram_log_probs(_windows(config, config.student, corpus), student.config.padded_vocab_size)
    placed = jax.device_put(log_probs, NamedSharding(mesh, P('tensor')))
    supervision = supervision._replace(teacher=supervision.teacher._replace(unigram_V=placed))
  return supervision


def record_config(config: Config, folder: paths.Path) -> dict[str, Any]:
  """The config as a folder keeps it: its paths are relative to the folder."""
  return config_lib.as_dict(config) | {'runs': paths.relative(config.runs, folder)}


def record_origin(corpus: Corpus, folder: paths.Path) -> dict[str, str]:
  """Return where a run found its text: the current folder (relative to `folder`), to which the config's paths refer, and the corpus's name."""
  return {'folder': paths.relative(os.getcwd(), folder), 'corpus': corpus.folder.name}


def _member(
  config: Config,
  corpus: Corpus,
  section: TrainingConfig,
  folder: RunFolder,
  identity: dict[str, Any],
  label: str,
) -> Member:
  schedule = AlphaSchedule(**identity['alpha_schedule'])
  alpha = alpha_state(identity['alpha'], schedule, config_lib.n_steps(section, config.data))
  notes = {
    'resolved': record_config(config, folder.path),
    'origin': record_origin(corpus, folder.path),
    'versions': machine.versions(),
    'git': machine.git_commit(),
  }
  return Member(folder, identity, alpha, label, notes)


def _teacher(config: Config, corpus: Corpus) -> tuple[Model, dict[str, Any]]:
  """(model, what defines its run) of the teacher that the config describes."""
  model = build(frozen.set_vocabulary(config.teacher.model, corpus.tokenizer, 'teacher'))
  return model, run_identity(config, trained_section(config.teacher), model.config, 'teacher', '')


def trained_section(section: TeacherConfig) -> TeacherConfig:
  """The run that a teacher comes from: its own, or the trunk of which it is a checkpoint."""
  return dataclasses.replace(section, tokens=max(section.trunk)) if section.trunk else section


def cohort_key(config: Config) -> Config:
  """All that students of one cohort share."""
  student = dataclasses.replace(config.student, alpha=0.0, alpha_schedule=AlphaSchedule(), arms=())
  return dataclasses.replace(config, student=student)


def _cohort(
  config: Config,
  section: TrainingConfig,
  corpus: Corpus,
  model: Model,
  members: list[Member],
  supervision: _Supervision = _Supervision(),
) -> Cohort:
  """The cohort of models that a section of the config trains."""
  name = 'teacher' if isinstance(section, TeacherConfig) else 'student'
  total = config_lib.n_steps(section, config.data)
  windows = _windows(config, section, corpus)
  stream = BatchStream(windows, section.batch_size, section.seed)
  _warn_of_epochs(name, section, stream, total)
  targets = tuple(TARGETS.get(member.config['arm'], 'none') for member in members)
  fingerprints = {'data': stream.fingerprint, 'tokenizer': corpus.tokenizer.fingerprint}
  return Cohort(
    title=name if len(members) == 1 else f'{len(members)} {name}s',
    config=config,
    section=section,
    members=tuple(members),
    recipe=make_recipe(config, section, model, targets, supervision.model),
    teacher=supervision.teacher,
    stream=stream,
    validation=Windows(corpus.validation, config.data.seq_len, mask_documents=config.data.mask_documents),
    keep_steps=trunk_steps(config) if name == 'teacher' else (),
    fingerprints=fingerprints | ({'teacher': supervision.weights} if supervision.weights else {}),
    tokenizer=corpus.tokenizer,
    facts={
      'parameters': model.n_params,
      'non_embedding': flops.count_params(model.config).non_embedding,
      'tokens': total * section.batch_size * config.data.seq_len,
      'steps': total,
      'distinct_tokens': windows.n_tokens,
      'epochs': total / stream.steps_per_epoch,
      'xz9_bits_per_byte': corpus.xz9_bits_per_byte,
      **({'text_lost': corpus.losses} if corpus.losses else {}),
    },
  )


def make_recipe(
  config: Config,
  section: TrainingConfig,
  model: Model,
  targets: tuple[str, ...],
  teacher_model: Model | None = None,
) -> Recipe:
  """The step of models that train side by side by a section of the config; `targets`: a value of TARGETS for each."""
  optimizer, total = section.optimizer, config_lib.n_steps(section, config.data)
  return Recipe(
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
    teacher_layout=config.teacher.layout if teacher_model else 'student',
    size=config.steps_per_call,
  )


def trunk_steps(config: Config) -> tuple[int, ...]:
  """Steps of the teacher's trunk whose checkpoints are teachers themselves; () where it has none."""
  section = config.teacher
  return tuple(config_lib.n_steps(dataclasses.replace(section, tokens=tokens), config.data) for tokens in section.trunk)


def _arm_loss(config: Config, learns: bool) -> LossConfig:
  """The loss of a model that learns from a teacher, or the LM part of it."""
  return config.loss if learns else LossConfig(z_loss=config.loss.z_loss)


def _windows(config: Config, section: TrainingConfig, corpus: Corpus) -> Windows:
  data = config.data
  return Windows(corpus.train, data.seq_len, section.slice, data.distinct_tokens, data.mask_documents)


def _data_identity(config: Config) -> dict[str, Any]:
  kept = fields.identity(config.data)
  end = _end_token(config.data.tokenizer, config.data.separator)
  return kept | ({'end': end} if end else {})


def _end_token(tokenizer: str, separator: str) -> str:
  """Return the end token of documents if it differs from their first token (older runs used one for both); '' if it cannot be read here."""
  if tokenizer in ('bpe', 'bytes') or separator:
    return ''
  try:
    roles = _roles(tokenizer)
  except UserError:  # raised again when the corpus is built
    return ''
  return roles.end if roles.closes else ''


@functools.cache
def _roles(tokenizer: str) -> Roles:
  return Tokenizer.from_file(tokenizer).roles


def _warn_of_epochs(name: str, section: TrainingConfig, stream: BatchStream, total: int) -> None:
  epochs = total / stream.steps_per_epoch
  if epochs > 1 and jax.process_index() == 0:
    log.warning(
      'note: the %s sees %s distinct tokens %.1f times (%s tokens in all); set fewer tokens or more text for a single epoch',
      name, f'{stream.windows.n_tokens:,}', epochs, f'{section.tokens:,}',
    )  # fmt: skip
