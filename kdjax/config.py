"""The config: frozen dataclasses, checked once, every mistake reported at once.

A config file's `get_config(arg)` returns an ml-collections `ConfigDict` that starts from `default()`, so that each field below can be
overridden on the command line (`--config.student.alpha=0.4`). `kdjax.cli` reads the command line; `resolve` turns the ConfigDict into the
dataclasses here. Inside the library no ConfigDict travels.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from kdjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama-3.1's stretching of the low rotary frequencies (factor 1 leaves them as they are)."""

  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_len: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder. Sizes are counts; `vocab_size` counts the tokens that exist, `padded_vocab_size` the rows of the weights."""

  vocab_size: int = 0  # 0: the tokenizer's
  pad_vocab_to: int = 128
  d_model: int = 128
  n_layers: int = 5
  d_ff: int = 384
  n_heads: int = 4
  n_kv_heads: int = 4
  head_dim: int = 32
  max_seq_len: int = 8192
  tied: bool = True
  qk_norm: bool = False
  rope_theta: float = 500_000.0
  rope_scaling: RopeScaling = RopeScaling()
  norm_eps: float = 1e-5
  dtype: str = 'auto'  # of the computation: bfloat16 on accelerators, float32 on CPU
  param_dtype: str = 'float32'
  attention: str = 'auto'  # xla | cudnn | splash
  remat: str = 'none'  # none | full | dots
  scan_unroll: int = 1

  @property
  def padded_vocab_size(self) -> int:
    return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with decoupled decay, global-norm clipping, and warm-up into a cosine or a WSD schedule."""

  learning_rate: float = 3e-4
  schedule: str = 'cosine'  # cosine | wsd
  warmup_fraction: float = 0.05
  decay_fraction: float = 0.2  # wsd: the share of the steps in the final decay
  final_fraction: float = 0.1  # of the peak, at the last step
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class AlphaSchedule:
  """How the KD share moves from `student.alpha` to `final` over the steps [begin, end), as fractions of the run."""

  kind: str = 'constant'  # constant | linear | cosine | lr (follows the learning rate's shape)
  final: float = 0.0
  begin: float = 0.0
  end: float = 1.0


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """`L = (1 - alpha) * CE + alpha * T^2 * KL(teacher_T || student_T)` and the paper's variants of it."""

  kd: str = 'forward_kl'  # forward_kl | hard_label
  temperature: float = 1.0
  mixing: str = 'normalised'  # normalised | ce_plus_alpha_kd | one_minus_alpha_ce_plus_kd
  teacher_top_k: float = 0.0  # 0: all; >= 1: that many tokens; in (0, 1): that share of the vocabulary
  teacher_top_p: float = 1.0
  rest: str = 'renormalise'  # of the teacher's mass outside top-k / top-p: renormalise | other (one bucket)
  z_loss: float = 0.0
  chunk_tokens: int = 0  # 0: from chunk_megabytes
  chunk_megabytes: int = 0  # 0: 256 on CPU, 4096 on accelerators


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
  """The teacher: trained here from this section, or read from `run` (the folder of a finished run)."""

  model: ModelConfig = ModelConfig()
  run: str = ''
  step: int = 0  # of `run`: which checkpoint; 0: the last
  seed: int = 42
  tokens: int = 1_000_000
  batch_size: int = 8
  microbatches: int = 1
  slice: tuple[float, float] = (0.0, 1.0)  # of the training documents
  optimizer: OptimizerConfig = OptimizerConfig()
  dtype: str = 'auto'  # of its weights inside the student's step
  forward_microbatch: int = 0  # rows of one teacher forward pass inside the step; 0: the student's microbatch


@dataclasses.dataclass(frozen=True)
class StudentConfig:
  """The student: the baseline (alpha = 0), the distilled one and the controls differ in nothing but their targets."""

  model: ModelConfig = ModelConfig()
  alpha: float = 0.4
  alpha_schedule: AlphaSchedule = AlphaSchedule()
  arms: tuple[str, ...] = ('baseline', 'distilled', 'unigram')
  seed: int = 43
  tokens: int = 1_000_000
  batch_size: int = 8  # sequences a step, over all devices
  microbatches: int = 1
  slice: tuple[float, float] = (0.0, 1.0)
  optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Text -> documents -> splits -> tokens on disk -> windows."""

  source: str = 'embedded:speeches'  # or a path or glob: .txt, .jsonl, each also .gz, .xz, .zst
  text_field: str = 'text'
  tokenizer: str = 'bpe'  # bpe (trained on the training split) | bytes | the path of a `tokenizers` JSON file
  vocab_size: int = 2048  # of the bpe that is trained
  separator: str = ''  # token that starts each document; '': guessed from the tokenizer's own names
  validation_fraction: float = 0.08
  test_fraction: float = 0.16
  split_seed: int = 0
  seq_len: int = 128
  mask_documents: bool = True
  distinct_tokens: int = 0  # 0: all of the slice
  cache: str = ''  # where token stores live; '': <runs>/stores
  prefetch: int = 4
  threads: int = 2


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """What the eval job scores."""

  ood: dict[str, str] = dataclasses.field(
    default_factory=lambda: {
      'dialogue': 'embedded:dialogue',
      'code': 'embedded:code',
      'reference': 'embedded:reference',
    }
  )
  ood_text_field: str = 'text'
  ood_validation_fraction: float = 0.25  # of a set's documents: where its evaluation temperature is fitted
  max_bytes: int = 400_000  # of a set; 0: all
  max_validation_bytes: int = 0  # of the documents where a temperature is fitted; 0: as max_bytes
  max_document_bytes: int = 0  # longer ones are cut to their first bytes: more documents for the same work; 0: never
  window: int = 0  # tokens of context; 0: data.seq_len
  stride: int = 0  # tokens scored by a window after the first; 0: half the window
  batch_size: int = 32
  every: int = 0  # steps between in-run validation passes; 0: ten in a run
  every_batches: int = 8


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  every: int = 0  # steps; 0: ten in a run
  keep: int = 2  # the newest
  keep_period: int = 0  # and each multiple of this for good; 0: none but the last


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; one of them may be -1: what is left."""

  replica: int = 1
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = 'weak2strong'
  scale: str = 'laptop'
  runs: str = 'runs'  # where run folders, teachers and token stores live
  data: DataConfig = DataConfig()
  teacher: TeacherConfig = TeacherConfig()
  student: StudentConfig = StudentConfig()
  loss: LossConfig = LossConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()
  steps_per_call: int = 1
  max_skipped: int = 20  # non-finite steps in a row before the run stops
  deterministic: bool = True  # on GPU: XLA's deterministic reductions
  heartbeat_timeout: int = 60  # seconds after which a silent owner of a folder counts as gone


MIXINGS = ('normalised', 'ce_plus_alpha_kd', 'one_minus_alpha_ce_plus_kd')
ARMS = ('baseline', 'distilled', 'unigram')
CHOICES = {
  'scale': ('laptop', 'colab', 'paper'),
  'model.dtype': ('auto', 'float32', 'bfloat16'),
  'model.param_dtype': ('float32', 'bfloat16'),
  'model.attention': ('auto', 'xla', 'cudnn', 'splash'),
  'model.remat': ('none', 'full', 'dots'),
  'optimizer.schedule': ('cosine', 'wsd'),
  'alpha_schedule.kind': ('constant', 'linear', 'cosine', 'lr'),
  'loss.kd': ('forward_kl', 'hard_label'),
  'loss.mixing': MIXINGS,
  'loss.rest': ('renormalise', 'other'),
  'teacher.dtype': ('auto', 'float32', 'bfloat16'),
}


# Fields by their full name, or by their last part where it means the same wherever it stands.
POSITIVE = (
  'd_model',
  'n_layers',
  'd_ff',
  'n_heads',
  'n_kv_heads',
  'head_dim',
  'pad_vocab_to',
  'scan_unroll',
  'norm_eps',
  'rope_theta',
  'factor',
  'low_freq_factor',
  'high_freq_factor',
  'learning_rate',
  'eps',
  'clip_norm',
  'batch_size',
  'microbatches',
  'loss.temperature',
  'data.seq_len',
  'data.vocab_size',
  'data.threads',
  'eval.every_batches',
  'checkpoint.keep',
  'steps_per_call',
  'max_skipped',
  'heartbeat_timeout',
)
NOT_NEGATIVE = (
  'weight_decay',
  'forward_microbatch',
  'vocab_size',
  'loss.z_loss',
  'loss.chunk_tokens',
  'loss.chunk_megabytes',
  'teacher.step',
  'data.distinct_tokens',
  'data.prefetch',
  'eval.max_bytes',
  'eval.max_document_bytes',
  'eval.max_validation_bytes',
  'eval.window',
  'eval.stride',
  'eval.every',
  'checkpoint.every',
  'checkpoint.keep_period',
)


def default() -> ml_collections.ConfigDict:
  """Every field with its default: where a config file starts."""
  return ml_collections.ConfigDict(as_dict(Config()), convert_dict=True)


def as_dict(config: Any) -> dict[str, Any]:
  """A (nested) config dataclass as plain dicts; tuples stay."""
  return dataclasses.asdict(config)


def set_model(section: ml_collections.ConfigDict, model: ModelConfig) -> None:
  """Puts a named model into a config's `teacher` or `student` section."""
  section.model = ml_collections.ConfigDict(as_dict(model))


def parse_arg(arg: str | None, **known: tuple[str, ...]) -> dict[str, str]:
  """`scale=paper` after a config file's colon -> {'scale': 'paper'}; a missing key gets its first known value."""
  values = {key: choices[0] for key, choices in known.items()}
  for part in filter(None, (arg or '').split(',')):
    key, _, value = part.partition('=')
    if key not in known:
      raise ConfigError([f"unknown argument '{key}' after the config file's colon{_nearest(key, known)}"])
    if value not in known[key]:
      raise ConfigError([f"unknown {key} '{value}'; known: {', '.join(known[key])}"])
    values[key] = value
  return values


def override(config: ml_collections.ConfigDict, overrides: Mapping[str, str]) -> list[str]:
  """Applies `{'student.alpha': '0.4'}` in place; returns the problems instead of raising at the first."""
  problems = []
  fields = dict(_leaves(Config, ''))
  for key, text in overrides.items():
    annotation = fields.get(key)
    parent, _, leaf = key.rpartition('.')
    if annotation is None and str(fields.get(parent)).startswith('dict'):
      annotation = str  # a mapping's values are free: --config.eval.ood.NAME=SOURCE
    if annotation is None:
      problems.append(f'--config.{key}: no such field{_nearest(key, fields)}')
      continue
    try:
      value = _parse(text, annotation)
    except ValueError:
      problems.append(f'--config.{key}: expected {_type_name(annotation)}, got {text!r}')
      continue
    node = config
    for name in parent.split('.') if parent else ():
      if not isinstance(
        node.get(name), ml_collections.ConfigDict
      ):  # the config file left the section out, or spoilt it
        with node.unlocked(), node.ignore_type():
          node[name] = ml_collections.ConfigDict()
      node = node[name]
    with node.unlocked(), node.ignore_type():
      node[leaf] = value
  return problems


def resolve(config: ml_collections.ConfigDict) -> Config:
  """The ConfigDict as frozen dataclasses, checked. Raises ConfigError with every problem found."""
  problems: list[str] = []
  built = _build(Config, config.to_dict(), '', problems)
  wrong = [
    problem.partition(':')[0] for problem in problems
  ]  # these have their default in `built`, so they say nothing more
  problems += [problem for problem in _problems(built) if not any(key in problem for key in wrong)]
  if problems:
    raise ConfigError(problems)
  return built


def fingerprint(value: Any, length: int = 12) -> str:
  """Hex hash of a JSON-able value (dataclasses welcome); the same everywhere."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = as_dict(value)
  text = json.dumps(value, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()[:length]


def n_steps(section: TeacherConfig | StudentConfig, data: DataConfig) -> int:
  """Optimizer steps that spend `section.tokens`."""
  return max(1, round(section.tokens / (section.batch_size * data.seq_len)))


def _leaves(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
  """(dotted name, annotation) of each leaf field."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    annotation = hints[field.name]
    if dataclasses.is_dataclass(annotation):
      yield from _leaves(typing.cast(type, annotation), f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, annotation


def _build(cls: type, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
  """The dataclass of a section; a field that is wrong adds a problem and keeps its default."""
  hints = typing.get_type_hints(cls)
  known = {field.name for field in dataclasses.fields(cls)}
  problems += [f'{prefix}{key}: no such field{_nearest(key, known)}' for key in values if key not in known]
  built = {}
  for name in known & values.keys():
    annotation, value = hints[name], values[name]
    if dataclasses.is_dataclass(annotation):
      if isinstance(value, Mapping):
        built[name] = _build(typing.cast(type, annotation), value, f'{prefix}{name}.', problems)
      else:
        problems.append(f'{prefix}{name}: expected a section with fields, got {value!r}')
      continue
    try:
      built[name] = _convert(value, annotation)
    except ValueError:
      problems.append(f'{prefix}{name}: expected {_type_name(annotation)}, got {value!r}')
  return cls(**built)


def _convert(value: Any, annotation: Any) -> Any:
  """A value from a config file as the field's type; ValueError where it is of another."""
  origin = typing.get_origin(annotation)
  if origin is tuple:
    arguments = typing.get_args(annotation)
    if not isinstance(value, tuple | list):
      raise ValueError
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
      raise ValueError
    return tuple(_convert(v, kind) for v, kind in zip(value, kinds, strict=True))
  if origin is dict:
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
      raise ValueError
    return dict(value)
  if annotation is float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
      raise ValueError
    return float(value)
  if annotation is int and isinstance(value, float) and value.is_integer():
    return int(value)  # 1e9 tokens
  if isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
    return value
  raise ValueError


def _parse(text: str, annotation: Any) -> Any:
  """A command line's text as the field's type."""
  if annotation is str:
    return text
  if annotation is bool:
    return (
      {'true': True, 'false': False, '1': True, '0': False}[text.lower()]
      if text.lower() in ('true', 'false', '1', '0')
      else _bad()
    )
  if annotation is int:
    return _convert(float(text) if any(c in text.lower() for c in '.e') else int(text), int)
  if annotation is float:
    return _convert(float(text), float)
  kinds = typing.get_args(annotation)
  items = [item.strip().strip('\'"') for item in text.strip().strip('()[]').split(',') if item.strip()]
  return _convert(tuple(_parse(item, kinds[0]) for item in items), annotation)


def _bad() -> typing.NoReturn:
  raise ValueError


def _type_name(annotation: Any) -> str:
  known: dict[Any, str] = {
    int: 'a whole number',
    float: 'a number',
    str: 'text',
    bool: 'true or false',
    tuple[float, float]: 'two numbers',
    tuple[str, ...]: 'a list of names',
    dict[str, str]: 'entries (.NAME=TEXT)',
  }
  return known[annotation]


def _nearest(key: str, known: typing.Iterable[str]) -> str:
  near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  return f'; did you mean {near[0]}?' if near else ''


def _problems(config: Config) -> Iterator[str]:
  """What is wrong with a config whose fields and types are right."""
  flat = dict(_values(config, ''))
  for key, value in flat.items():
    choices = next((c for name, c in CHOICES.items() if key == name or key.endswith('.' + name)), None)
    if choices and value not in choices:
      yield f'{key}: unknown value {value!r}; known: {", ".join(choices)}'
    leaf = key.rpartition('.')[2]
    if leaf.endswith('seed') and not 0 <= value < 2**32:
      yield f'{key}: must be at least 0 and below 2^32, got {value}'
    if (leaf in NOT_NEGATIVE or key in NOT_NEGATIVE) and value < 0:
      yield f'{key}: must not be below 0, got {value:g}'
    if (leaf in POSITIVE or key in POSITIVE) and value <= 0:
      yield f'{key}: must be above 0, got {value:g}'
  student, teacher, data, loss = config.student, config.teacher, config.data, config.loss
  for key, alpha in (('student.alpha', student.alpha), ('student.alpha_schedule.final', student.alpha_schedule.final)):
    if not 0 <= alpha <= 1:
      yield f'{key}: must be in [0, 1], got {alpha:g}'
  if not 0 <= student.alpha_schedule.begin <= student.alpha_schedule.end <= 1:
    yield 'student.alpha_schedule: begin and end must satisfy 0 <= begin <= end <= 1'
  if loss.teacher_top_k < 0 or (loss.teacher_top_k > 1 and not loss.teacher_top_k.is_integer()):
    yield f'loss.teacher_top_k: must be 0 (all), a share in (0, 1) or a whole number, got {loss.teacher_top_k:g}'
  if not 0 < loss.teacher_top_p <= 1:
    yield f'loss.teacher_top_p: must be in (0, 1], got {loss.teacher_top_p:g}'
  if loss.kd == 'hard_label' and (loss.teacher_top_k or loss.teacher_top_p < 1 or loss.temperature != 1):
    yield 'loss.kd: hard_label has no temperature, top-k or top-p; leave them at their defaults'
  if not student.arms or len(set(student.arms)) != len(student.arms) or set(student.arms) - set(ARMS):
    yield f'student.arms: must be different ones of {", ".join(ARMS)}, got {", ".join(student.arms) or "none"}'
  for name, section in (('student', student), ('teacher', teacher)):
    yield from _section_problems(name, section, data)
  for key in ('validation_fraction', 'test_fraction'):
    if not 0 < getattr(data, key) < 1:
      yield f'data.{key}: must be between 0 and 1, got {getattr(data, key):g}'
  if data.validation_fraction + data.test_fraction >= 1:
    yield 'data: validation_fraction + test_fraction leave no documents for training'
  if not 0 < config.eval.ood_validation_fraction < 1:
    yield f'eval.ood_validation_fraction: must be between 0 and 1, got {config.eval.ood_validation_fraction:g}'
  rows, forward = student.batch_size // max(1, student.microbatches), teacher.forward_microbatch
  if 0 < forward < rows and rows % forward:
    yield f'teacher.forward_microbatch: {forward} does not divide student.batch_size / student.microbatches = {rows}'
  if teacher.step > 0 and not teacher.run:
    yield 'teacher.step: there is no teacher.run that it could be a step of'
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


def _section_problems(name: str, section: TeacherConfig | StudentConfig, data: DataConfig) -> Iterator[str]:
  optimizer, model = section.optimizer, section.model
  if model.n_kv_heads > 0 and model.n_heads % model.n_kv_heads:
    yield f'{name}.model.n_kv_heads: {model.n_kv_heads} does not divide {name}.model.n_heads = {model.n_heads}'
  if model.head_dim % 2:
    yield f'{name}.model.head_dim: must be even (rotary positions turn pairs), got {model.head_dim}'
  if data.seq_len > section.model.max_seq_len:
    yield f'data.seq_len: {data.seq_len} tokens are more than {name}.model.max_seq_len = {section.model.max_seq_len}'
  if section.batch_size > 0 and section.microbatches > 0 and section.batch_size % section.microbatches:
    yield f'{name}.microbatches: {section.microbatches} does not divide {name}.batch_size = {section.batch_size}'
  if section.tokens < section.batch_size * data.seq_len:
    yield f'{name}.tokens: {section.tokens} is less than one step of {section.batch_size} x {data.seq_len} tokens'
  if not 0 <= section.slice[0] < section.slice[1] <= 1:
    yield f'{name}.slice: must satisfy 0 <= from < to <= 1, got {section.slice}'
  for key in ('warmup_fraction', 'decay_fraction', 'final_fraction'):
    if not 0 <= getattr(optimizer, key) <= 1:
      yield f'{name}.optimizer.{key}: must be in [0, 1], got {getattr(optimizer, key):g}'
  for key in ('b1', 'b2'):
    if not 0 <= getattr(optimizer, key) < 1:
      yield f'{name}.optimizer.{key}: must be in [0, 1), got {getattr(optimizer, key):g}'
  if optimizer.schedule == 'wsd' and optimizer.warmup_fraction + optimizer.decay_fraction > 1:
    yield f'{name}.optimizer: warmup_fraction + decay_fraction are more than the whole run'


def _values(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from _values(value, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, value
