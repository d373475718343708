"""What is told before the first model is trained, not after: models that cannot be made, that do not go together, that do not fit."""

import logging
import math

import jax
from jax.sharding import Mesh

from kdjax.config import Config, TrainingConfig
from kdjax.data.corpus import Corpus
from kdjax.errors import UserError
from kdjax.models import Model, build
from kdjax.models.attention import check_backend
from kdjax.runtime import backend, environment, sharding
from kdjax.teachers import by_name, frozen

log = logging.getLogger('kdjax')


def check_run(config: Config, corpus: Corpus, mesh: Mesh) -> None:
  """Raise UserError for a model that cannot be made, or does not fit the mesh: before the first one is trained, not after."""
  if config.student.init:  # before its vocabulary is looked at: that another tokenizer is meant is what is to be told
    by_name.check_named_run(config.student.init, 'student.init', config, corpus.tokenizer)
  n_tokens = by_name.student_vocab_size(config, corpus.tokenizer)
  student = build(frozen.set_vocabulary(config.student.model, corpus.tokenizer, 'student', n_tokens))
  teacher = None
  if 'distilled' in config.student.arms:
    known = frozen.set_vocabulary(config.teacher.model, corpus.tokenizer, 'teacher')
    teacher = build(frozen.match_student(known, student.config))
  check_models(config, mesh, student, teacher)
  check_memory(config, mesh, student, teacher)
  if config.deterministic and backend.name() == 'gpu' and not environment.is_deterministic():
    log.warning(
      'warning: XLA_FLAGS names a file, which kdjax does not edit; add --%s=true to that file, or two runs of one config differ in their last bits',
      environment.DETERMINISTIC,
    )


def check_models(
  config: Config, mesh: Mesh, student: Model, teacher: Model | None, teacher_learns: bool = True
) -> None:
  """The same for models that are made already; `teacher_learns`: the teacher's own training is part of what is to fit."""
  data_parallel = sharding.n_row_shards(mesh)
  sections: dict[str, tuple[TrainingConfig, Model]] = {'student': (config.student, student)}
  if teacher is not None:
    sections['teacher'] = (config.teacher, teacher)
  sizes = {}
  for name, (section, model) in sections.items():
    check_backend(model.config.attention)
    sharding.param_shardings(model.abstract(), mesh)
    sizes[name] = model.config.vocab_size
    rows = section.batch_size // section.microbatches
    if rows % data_parallel and not (name == 'teacher' and (config.teacher.run or not teacher_learns)):
      raise UserError(
        f"mesh: replica x fsdp = {data_parallel} does not divide the {name}'s batch_size / microbatches = {rows}; "
        f'change --config.{name}.batch_size or --config.mesh.*'
      )
  if teacher is not None:
    layout, rows = config.teacher.layout, config.student.batch_size // config.student.microbatches
    sharding.param_shardings(teacher.abstract(), mesh, layout)
    axes = sharding.row_axes(layout)
    across = math.prod(mesh.shape[axis] for axis in axes)
    name = 'teacher.forward_microbatch' if config.teacher.forward_microbatch else 'student.batch_size / microbatches'
    if (config.teacher.forward_microbatch or rows) % across:
      raise UserError(
        f'mesh: {" x ".join(axes)} = {across} does not divide {name} = {config.teacher.forward_microbatch or rows}; change it, '
        '--config.mesh.*, or --config.teacher.layout'
      )
  if len(set(sizes.values())) > 1:
    raise UserError(
      f"the teacher's vocabulary ({sizes['teacher']} tokens) is not the student's ({sizes['student']}); distillation needs the same one: "
      f'--config.student.model.vocab_size={sizes["teacher"]}'
    )


def check_memory(config: Config, mesh: Mesh, student: Model, teacher: Model | None, limit: int = 0) -> None:
  """Raise UserError if what stays in memory all the time is more than a device has (`limit` bytes; 0: as the device says, if it does).

  Activations come on top: `python -m kdjax.aot` knows them.
  """
  limit = limit or (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit', 0)
  if not limit:
    return

  def held(shapes, layout: str = 'student') -> int:
    return sharding.local_bytes(shapes, sharding.param_shardings(shapes, mesh, layout))

  learns = lambda model: 3 * held(model.abstract())  # the weights and AdamW's two moments
  count = len(config.student.arms)
  together = {f'{count} students and their optimizers': count * learns(student)}
  situations = [together]
  if teacher is not None:
    shapes = jax.eval_shape(lambda p: frozen.to_dtype(p, config.teacher.dtype), teacher.abstract())
    together[f'the teacher in {config.teacher.dtype}'] = held(shapes, config.teacher.layout)
    if not config.teacher.run:
      situations.append({'the teacher and its optimizer': learns(teacher)})
  for needs in situations:
    if sum(needs.values()) > limit:
      told = ' and '.join(f'{n / 2**30:.1f} GiB for {what}' for what, n in needs.items())
      raise UserError(
        f'the models do not fit: {told} on each device, which has {limit / 2**30:.1f} GiB; use more devices (--config.mesh.fsdp), smaller '
        'models, fewer arms, or --config.teacher.dtype=int8'
      )
