"""Find every problem of a config whose fields and types are right, one line each, with the field's name.

Choices and bounds of single fields are declared with them (`schema`, `fields`); here is what relates several.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kdjax.config import fields
from kdjax.config.schema import Config, DataConfig, EvalConfig, TrainingConfig

MAX_STEPS = 10_000_000
LONGEST_NAME = 150  # bytes; a whole file name has at most 255
SET_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]*')  # sets name files
OWN_SETS = ('in-domain', 'validation')  # of every corpus
HARNESS_SETS = 'lm-eval-'  # prefix of the names of sets that the harness scored


def problems(config: Config) -> Iterator[str]:
  """Yield the problems of a config whose fields and types are right. A `LossConfig` has already checked itself."""
  yield from fields.problems(config)
  student, teacher, data = config.student, config.teacher, config.data
  yield from folder_problems('name', config.name)
  if not config.runs.strip():
    yield 'runs: must name a folder'
  for key, value in values(config, ''):
    if key != 'name' and any(re.search(r'[\x00\ud800-\udfff]', text) for text in _texts(value)):
      yield f'{key}: must be UTF-8 text without NUL characters, got {value!r}'
  if data.separator and data.tokenizer in ('bpe', 'bytes'):
    yield f'data.separator: the tokenizer {data.tokenizer} has a separator of its own; leave it empty'
  if not 0 <= student.alpha_schedule.begin <= student.alpha_schedule.end <= 1:
    yield 'student.alpha_schedule: begin and end must satisfy 0 <= begin <= end <= 1'
  if not student.arms:
    yield 'student.arms: needs at least one arm'
  for key, names in (('student.arms', student.arms), ('trackers', config.trackers)):
    if len(set(names)) != len(names):
      yield f'{key}: {", ".join(names)} names one twice'
  for name, section in (('student', student), ('teacher', teacher)):
    yield from section_problems(name, section, data)
  if data.validation_fraction + data.test_fraction >= 1:
    yield 'data: validation_fraction + test_fraction leave no documents for training'
  if '://' in data.cache:
    yield f'data.cache: must be a folder of each host, as ~/.cache/kdjax/stores, got {data.cache}'
  if '://' in config.checkpoint.local:
    yield f'checkpoint.local: must be a folder of each host, as /dev/shm/kdjax, got {config.checkpoint.local}'
  elif bool(config.checkpoint.local.strip()) != bool(config.checkpoint.local_every):
    yield 'checkpoint: local and local_every belong together; set both, as local=/dev/shm/kdjax and local_every=50, or neither'
  elif (
    config.checkpoint.local_every
    and config.checkpoint.every
    and not config.checkpoint.local_every % config.checkpoint.every
  ):
    yield f'checkpoint.local_every: must be below checkpoint.every = {config.checkpoint.every}, got {config.checkpoint.local_every}: none would be written'
  yield from set_problems(config.eval)
  rows, forward = student.batch_size // max(1, student.microbatches), teacher.forward_microbatch
  if 0 < forward < rows and rows % forward:
    yield f'teacher.forward_microbatch: {forward} does not divide student.batch_size / student.microbatches = {rows}'
  if teacher.step > 0 and not teacher.run:
    yield 'teacher.step: there is no teacher.run that it could be a step of'
  if teacher.trunk and teacher.tokens not in teacher.trunk:
    yield f'teacher.trunk: its budgets {", ".join(map(str, teacher.trunk))} lack teacher.tokens = {teacher.tokens}'
  if teacher.trunk and teacher.run:
    yield 'teacher.trunk: teacher.run names a run that exists; say which checkpoint with teacher.step'
  window = config.eval.window or data.seq_len
  for name, section in (('student', student), ('teacher', teacher)):
    if window > section.model.max_seq_len:
      yield f'eval.window: {window} tokens are more than {name}.model.max_seq_len = {section.model.max_seq_len}'
  if config.eval.stride > max(window, 0):
    yield f'eval.stride: {config.eval.stride} is more than the window of {window} tokens'
  for axis in ('replica', 'fsdp', 'tensor'):
    size = getattr(config.mesh, axis)
    if size < 1 and size != -1:
      yield f'mesh.{axis}: must be a number of devices, or -1 for what is left, got {size}'
  if [config.mesh.replica, config.mesh.fsdp, config.mesh.tensor].count(-1) > 1:
    yield 'mesh: only one axis can be -1 (what is left)'


def _texts(value: Any) -> Iterator[str]:
  """Yield the strings in a field's value."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    yield from _texts([*value, *value.values()])
  elif isinstance(value, (list, tuple)):
    for one in value:
      yield from _texts(one)


def folder_problems(key: str, name: str) -> Iterator[str]:
  """Check the name of a folder in `runs`: a path could lead out of it."""
  if not name.strip() or name in ('.', '..'):
    yield f'{key}: must name a folder, got {name!r}'
  elif re.search(r'[/\\\x00-\x1f\x7f\ud800-\udfff]', name):
    yield f'{key}: must be the name of one folder, without "/", "\\" and control characters, got {name!r}; set its location in `runs`'
  elif len(name.encode()) > LONGEST_NAME:
    yield f'{key}: must have at most {LONGEST_NAME} bytes, got {len(name.encode())}'


def set_problems(evals: EvalConfig) -> Iterator[str]:
  """Check the names of sets: they identify results and name files."""
  for section, names in (('ood', evals.ood), ('tasks', evals.tasks)):
    for name in names:
      if name in OWN_SETS:
        yield f'eval.{section}.{name}: that is the name of a set of data.source; choose another'
      if not SET_NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        kind = {'ood': 'set', 'tasks': 'task'}[section]
        yield (
          f'eval.{section}: the {kind} name {name!r} is invalid; use at most {LONGEST_NAME} letters, digits, "_", "-" and ".", '
          'with a letter or digit first'
        )
      if name.startswith(HARNESS_SETS):
        yield f'eval.{section}.{name}: names that begin with {HARNESS_SETS} are reserved for results of kdjax.harness; choose another'
  for name, path in evals.tasks.items():
    if name in evals.ood:
      yield f'eval.tasks.{name}: eval.ood has a set of that name; take another'
    if not path.strip():
      yield f'eval.tasks.{name}: must name a file of JSON lines, got {path!r}'


def section_problems(name: str, section: TrainingConfig, data: DataConfig) -> Iterator[str]:
  optimizer, model = section.optimizer, section.model
  if model.n_kv_heads > 0 and model.n_heads % model.n_kv_heads:
    yield f'{name}.model.n_kv_heads: {model.n_kv_heads} does not divide {name}.model.n_heads = {model.n_heads}'
  if model.head_dim % 2:
    yield f'{name}.model.head_dim: must be even (rotary positions turn pairs), got {model.head_dim}'
  if data.seq_len > section.model.max_seq_len:
    yield f'data.seq_len: {data.seq_len} tokens are more than {name}.model.max_seq_len = {section.model.max_seq_len}'
  if section.batch_size > 0 and section.microbatches > 0 and section.batch_size % section.microbatches:
    yield f'{name}.microbatches: {section.microbatches} does not divide {name}.batch_size = {section.batch_size}'
  if section.tokens > MAX_STEPS * section.batch_size * data.seq_len > 0:
    yield f'{name}.tokens: {section.tokens:g} are more than {MAX_STEPS:,} steps of {section.batch_size} x {data.seq_len} tokens'
  if section.tokens < section.batch_size * data.seq_len:
    yield f'{name}.tokens: {section.tokens} is less than one step of {section.batch_size} x {data.seq_len} tokens'
  if not 0 <= section.slice[0] < section.slice[1] <= 1:
    yield f'{name}.slice: must satisfy 0 <= from < to <= 1, got {section.slice}'
  if optimizer.schedule == 'wsd' and optimizer.warmup_fraction + optimizer.decay_fraction > 1:
    yield f'{name}.optimizer: warmup_fraction + decay_fraction are more than the whole run'


def values(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from values(value, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, value
