"""A config's whole step compiled for devices that are not here, and what the compiled program says: memory, FLOPs, collectives, a roofline.

Memory is the compiler's own account of one device. Seconds are no measurement: FLOPs, bytes in HBM and bytes on the network over the
chips' documented peaks, each alone; a real step is slower than the slowest of them and, badly overlapped, slower than their sum.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import config as config_lib
from kdjax.config import Config, ModelConfig
from kdjax.errors import TrainingError, UserError
from kdjax.losses import alpha_state
from kdjax.losses.fused import HEAD
from kdjax.models import Model, build, flops
from kdjax.models.decoder import compute_dtype
from kdjax.programs.hlo import SLICES, Collective, Program
from kdjax.programs.topology import Slice, slice_devices
from kdjax.runtime import backend, sharding
from kdjax.teachers import frozen
from kdjax.trainer import experiments, preflight
from kdjax.trainer.step import PARTS, Recipe, Teacher, init_state, losses_of, make_step, state_shardings

GIB = 2**30
OTHER = 'other'


@dataclasses.dataclass(frozen=True)
class Report:
  """What one device of the slice holds, computes and sends in one step. Bytes, FLOPs (of all devices together) and seconds."""

  slice: Slice
  mesh: dict[str, int]
  settings: dict[str, Any]
  parameters: dict[str, int]  # of each model
  students: int
  tokens: int  # of a step
  memory: dict[str, float]  # by part
  loss_bytes: float  # of the temporaries: what the loss compiled by itself needs
  flops: dict[str, float]  # 'student', 'teacher': model FLOPs; 'recomputed': what remat adds
  traffic: float  # least bytes that one device reads and writes in HBM: weights and optimizer
  collectives: list[Collective]
  largest: tuple[int, str]  # the largest array of the program, and its bytes
  peak_flops: float  # of one device
  compile_seconds: float

  @property
  def bytes(self) -> float:
    return sum(self.memory.values())

  @property
  def limit(self) -> float:
    return self.slice.chip.hbm_gib * GIB

  @property
  def fits(self) -> bool:
    return self.bytes <= self.limit

  def network(self) -> dict[str, float]:
    """Bytes that one device sends in a step, by the mesh axes that they cross."""
    found: dict[str, float] = {}
    for one in self.collectives:
      axes = ' x '.join(one.axes)
      found[axes] = found.get(axes, 0) + one.total
    return found

  def seconds(self) -> dict[str, float]:
    """Each resource's time by itself: 'compute', 'hbm', and 'network (axes)' for each set of axes whose bandwidth is documented."""
    compute = sum(self.flops.values()) / math.prod(self.mesh.values()) / self.peak_flops
    found = {'compute': compute, 'hbm': self.traffic / self.slice.chip.hbm_bandwidth}
    rates = {axes: self._bandwidth(axes) for axes in self.network()}
    return found | {f'network ({axes})': n / rates[axes] for axes, n in self.network().items() if rates[axes]}

  @property
  def best_seconds(self) -> float:
    """All overlapped: the slowest resource."""
    return max(self.seconds().values())

  @property
  def worst_seconds(self) -> float:
    """Nothing overlapped: all of them, one after the other."""
    return sum(self.seconds().values())

  def mfu(self, seconds: float) -> float:
    useful = self.flops['student'] + self.flops['teacher']
    return useful / (seconds * self.peak_flops * math.prod(self.mesh.values()))

  def _bandwidth(self, axes: str) -> float:
    """Of one device along an axis: a ring on one direction of the torus, both ways; between slices its share of the host's network."""
    return self.slice.chip.dcn_bandwidth if axes == SLICES else 2 * self.slice.chip.link_bandwidth


def compile_step(config: Config, slice_: Slice, vocab_size: int = 0) -> Report:
  """Compile the step that `train` would run for the config's students on the slice.

  Args:
    vocab_size: tokens of a model whose config leaves them to the tokenizer.

  Raises:
    UserError: a mesh, batch or model that does not fit the slice, no TPU compiler, a program that the compiler finds too large.
  """
  there = slice_devices(slice_)
  with backend.compiling_for('tpu'):
    mesh = sharding.make_mesh(config.mesh, there)
    student = build(_with_vocabulary(config.student.model, vocab_size))
    targets = tuple(experiments.TARGETS[arm] for arm in config.student.arms)
    teacher = build(_with_vocabulary(config.teacher.model, vocab_size)) if 'teacher' in targets else None
    if teacher and (config.teacher.run or config.student.init):  # `train` cuts their tables to the shared tokenizer
      shared = min(student.config.vocab_size, teacher.config.vocab_size)
      student = build(frozen.restrict_tokens(student.config, shared))
      teacher = build(frozen.match_student(teacher.config, student.config))
    preflight.check_models(config, mesh, student, teacher, teacher_learns=False)
    recipe = experiments.make_recipe(config, config.student, student, targets, teacher)
    states, placed = _states(config, recipe, mesh)
    teacher_side = _teacher(config, recipe, mesh)
    batches = _batches(config, recipe, mesh)
    start = time.perf_counter()
    step = make_step(recipe, placed)
    compiled = _compiled(lambda: step.lower(states, teacher_side, batches, 1), mesh)
    seconds = time.perf_counter() - start
    loss_bytes = _loss_bytes(recipe, states, teacher_side, batches, mesh)
  shape = {axis: mesh.shape[axis] for axis in sharding.AXES}
  program = Program(compiled.as_text())
  memory, traffic = _memory(compiled.memory_analysis(), states, teacher_side, config.student.microbatches)
  kind = there[0].device_kind
  peak = flops.peak_flops(kind)
  assert peak is not None, f'kdjax/models/flops.py has no peak for {kind}'
  return Report(
    slice=slice_,
    mesh=shape,
    settings={
      'remat': student.config.remat,
      'microbatches': config.student.microbatches,
      'batch_size': config.student.batch_size,
      'seq_len': config.data.seq_len,
    },
    parameters={'student': student.n_params} | ({'teacher': teacher.n_params} if teacher else {}),
    students=len(targets),
    tokens=config.student.batch_size * config.data.seq_len,
    memory=memory,
    loss_bytes=loss_bytes,
    flops=_flops(config, student, teacher, len(targets)),
    traffic=traffic,
    collectives=program.collectives(shape),
    largest=program.largest_array(),
    peak_flops=peak,
    compile_seconds=seconds,
  )


def part(collective: Collective) -> str:
  """Which part of the step asked for it."""
  return next((name for name in PARTS if re.search(rf'\b{name}\b', collective.source)), OTHER)


def _with_vocabulary(model: ModelConfig, vocab_size: int) -> ModelConfig:
  if model.vocab_size:
    return model
  if not vocab_size:
    raise UserError(
      'the models leave their vocabulary to a tokenizer, which is not read here; say how large it is with --vocab-size'
    )
  return dataclasses.replace(model, vocab_size=vocab_size)


def _states(config: Config, recipe: Recipe, mesh: Mesh):
  """(the cohort's states, their shardings), abstract. Outside the mesh's context, which would put shardings of its own on them."""
  schedule = config.student.alpha_schedule
  alpha = alpha_state(config.student.alpha, schedule, config_lib.n_steps(config.student, config.data))
  shapes = jax.eval_shape(lambda key: init_state(recipe, alpha, key), jax.random.key(0))
  placed = state_shardings(recipe, shapes, mesh)
  states = sharding.abstract(shapes, placed)
  return (states,) * len(recipe.targets), [placed] * len(recipe.targets)


def _teacher(config: Config, recipe: Recipe, mesh: Mesh) -> Teacher:
  found = Teacher()
  if recipe.teacher is not None:
    shapes = jax.eval_shape(lambda p: frozen.to_dtype(p, config.teacher.dtype), recipe.teacher.abstract())
    found = found._replace(
      params=sharding.abstract(shapes, sharding.param_shardings(shapes, mesh, recipe.teacher_layout))
    )
  if 'unigram' in recipe.targets:
    width = jax.ShapeDtypeStruct((recipe.student.config.padded_vocab_size,), jnp.float32)
    found = found._replace(unigram_V=sharding.abstract(width, NamedSharding(mesh, P('tensor'))))
  return found


def _batches(config: Config, recipe: Recipe, mesh: Mesh) -> dict[str, Any]:
  shape = (recipe.size, config.student.batch_size, config.data.seq_len)
  rows = NamedSharding(mesh, P(None, sharding.BATCH_AXES))
  one = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
  return {'tokens': one, 'labels': one, 'segment_ids': one}


def _compiled(lower: Callable[[], Any], mesh: Mesh):
  try:
    with jax.set_mesh(mesh):
      return lower().compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    needs = re.search(r'Used ([\d.]+\w) of ([\d.]+\w) hbm', str(e)) or re.search(
      r'([\d.]+\w) exceeds[^\d]*([\d.]+\w)', str(e)
    )
    how = f'{needs[1]} of {needs[2]}' if needs else (str(e).splitlines() or [''])[0][:160]
    raise TooLarge(f"the step's temporaries do not fit into a device's memory ({how})") from None


class TooLarge(TrainingError):
  """The compiler itself found that a program does not fit; it gives no account of one."""


def _memory(analysis, states, teacher: Teacher, microbatches: int) -> tuple[dict[str, float], float]:
  """(bytes of one device by part, the least that it reads and writes in a step)."""
  local = lambda tree: sharding.local_bytes(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
  student, optimizer, theirs = (
    float(local([s.params for s in states])),
    float(local([s.opt_state for s in states])),
    float(local(teacher)),
  )
  arguments = float(analysis.argument_size_in_bytes)
  outputs = float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes)  # the states are donated
  memory = {
    'student weights': student,
    'optimizer': optimizer,
    'teacher weights': theirs,
    'batch and scalars': arguments - student - optimizer - theirs + outputs,
    'temporaries': float(analysis.temp_size_in_bytes),
    'code': float(analysis.generated_code_size_in_bytes),
  }
  return memory, 2 * (student + optimizer) + microbatches * (2 * student + theirs)


def _loss_bytes(recipe: Recipe, states, teacher: Teacher, batches, mesh: Mesh) -> float:
  """Temporaries of the loss and its gradients, compiled by themselves on one microbatch."""
  _, rows, length = batches['labels'].shape
  rows //= recipe.microbatches
  by_row = NamedSharding(mesh, P(sharding.BATCH_AXES))

  def of(model: Model, params):
    """Abstract hidden states and head."""
    hidden = jax.ShapeDtypeStruct((rows, length, model.config.d_model), compute_dtype(model.config), sharding=by_row)
    return hidden, sharding.abstract(jax.eval_shape(model.head, params), NamedSharding(mesh, HEAD))

  def loss(models, theirs, unigram_V, labels, weights):
    losses = losses_of(recipe, models, theirs, unigram_V, [0.5] * len(models), labels, weights)
    return sum(value for value, _ in losses)

  models = [of(recipe.student, s.params) for s in states]
  theirs = of(recipe.teacher, teacher.params) if recipe.teacher else None
  labels, weights = (jax.ShapeDtypeStruct((rows, length), dtype, sharding=by_row) for dtype in (jnp.int32, jnp.float32))
  gradient = jax.jit(jax.grad(loss))
  compiled = _compiled(lambda: gradient.lower(models, theirs, teacher.unigram_V, labels, weights), mesh)
  return float(compiled.memory_analysis().temp_size_in_bytes)


def _flops(config: Config, student: Model, teacher: Model | None, students: int) -> dict[str, float]:
  tokens, length = config.student.batch_size * config.data.seq_len, config.data.seq_len
  forward = flops.forward_flops(student.config, length)
  head = 2.0 * student.config.d_model * student.config.padded_vocab_size
  again = {'full': forward - head, 'none': 0.0}.get(student.config.remat)
  if again is None:  # 'dots' keeps the products and recomputes the attention
    again = forward - flops.forward_flops(student.config, length, attention=False)
  return {
    'student': students * tokens * flops.training_flops(student.config, length),
    'teacher': tokens * flops.forward_flops(teacher.config, length) if teacher else 0.0,
    'recomputed': students * tokens * again,
  }
