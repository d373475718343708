"""Small models, batches and states for the tests of steps and checkpoints."""

import functools

import jax
import numpy as np

from kdjax.config import AlphaSchedule, LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from kdjax.losses import alpha_state
from kdjax.models import build
from kdjax.runs.state import TrainState
from kdjax.runtime import sharding
from kdjax.trainer.optimizer import adamw, learning_rate
from kdjax.trainer.step import Recipe, Teacher, make_step, state_shardings

ROWS, SEQ, VOCAB = 8, 16, 37
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
TOTAL = 40  # steps of the schedules


def mesh(replica=1, fsdp=1, tensor=1):
  return sharding.make_mesh(MeshConfig(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


@functools.cache
def model(d_model=16, n_layers=2, vocab_size=VOCAB, **fields):
  sizes = {'vocab_size': vocab_size, 'pad_vocab_to': 8, 'd_model': d_model, 'n_layers': n_layers, 'd_ff': 2 * d_model}
  heads = {'n_heads': 4, 'n_kv_heads': 2, 'head_dim': 8, 'max_seq_len': 64}
  return build(ModelConfig(**sizes, **heads, **fields))


LEARNING_RATE, ADAMW = learning_rate(OPTIMIZER, TOTAL), adamw(OPTIMIZER)


def recipe(targets=('none',), student=None, teacher=None, **fields) -> Recipe:
  common = {'optimizer': ADAMW, 'learning_rate': LEARNING_RATE, 'peak_learning_rate': OPTIMIZER.learning_rate}
  return Recipe(
    student=student or model(),
    teacher=(teacher or model(8)) if 'teacher' in targets else teacher,
    targets=targets,
    **common | {'loss': LossConfig(chunk_tokens=32)} | fields,
  )


def alpha(value=0.0, **schedule):
  return alpha_state(value, AlphaSchedule(**schedule), TOTAL)


def batches(first: int, n: int, size: int | None = None, vocab=VOCAB, rows=ROWS) -> dict[str, np.ndarray]:
  """[size, B, T] arrays, a function of the step: two documents a row, some labels missing, more of them in some rows."""
  out: dict[str, list] = {'tokens': [], 'labels': [], 'segment_ids': []}
  for step in range(first, first + n):
    rng = np.random.default_rng(step)
    # A rule to learn: the next token follows from this one, mostly.
    start = rng.integers(0, vocab, (rows, 1))
    stream = (start + 3 * np.arange(SEQ + 1) + (rng.random((rows, SEQ + 1)) < 0.1)) % vocab
    labels = stream[:, 1:].copy()
    labels[rng.random((rows, SEQ)) < np.linspace(0, 0.9, rows)[:, None]] = -1
    out['tokens'].append(stream[:, :-1])
    out['labels'].append(labels)
    out['segment_ids'].append(1 + (np.arange(SEQ) >= rng.integers(1, SEQ, (rows, 1))))
  size = size or n
  fill = lambda x: np.concatenate([x, np.full((size - n, *x.shape[1:]), -1 if x is out['labels'] else 0)])
  return {name: fill(np.stack(value)).astype(np.int32) for name, value in out.items()}


@functools.cache
def weights(model, seed):
  return jax.device_get(jax.jit(model.init)(jax.random.key(seed)))


def state(recipe: Recipe, alpha_=None, seed=1) -> TrainState:
  """A fresh state on the host."""
  params, zero = weights(recipe.student, seed), np.zeros((), np.int32)
  moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(recipe.optimizer.init, params))
  return TrainState(params, moments, zero, alpha() if alpha_ is None else alpha_, zero, zero)


@functools.cache
def compiled_step(recipe: Recipe, on):
  """(step, shardings of a student's state), shared by the tests: compiling is what takes them time."""
  placed = state_shardings(recipe, state(recipe), on)
  return make_step(recipe, [placed] * len(recipe.targets)), placed


class Run:
  """A compiled step with its states, on a mesh."""

  def __init__(self, recipe: Recipe, alphas=(0.0,), teacher: Teacher = Teacher(), on=None):
    self.recipe, self.mesh, self.teacher = recipe, on or mesh(), teacher
    self.step, self.shardings = compiled_step(recipe, self.mesh)
    fresh = [state(recipe, each if isinstance(each, tuple) else alpha(each)) for each in alphas]
    self.states = tuple(jax.device_put(each, self.shardings) for each in fresh)

  def place(self, arrays):
    rows = jax.NamedSharding(self.mesh, jax.P(None, sharding.BATCH_AXES))
    return {name: jax.device_put(value, rows) for name, value in arrays.items()}

  def call(self, first: int, n: int, teacher: Teacher | None = None):
    """Advances by n steps; the metrics of each student, [n] arrays."""
    with jax.set_mesh(self.mesh):
      placed = self.place(batches(first, n, self.recipe.size))
      self.states, metrics = self.step(self.states, self.teacher if teacher is None else teacher, placed, n)
    return [{name: np.asarray(value)[:n] for name, value in m.items()} for m in metrics]

  def go(self, *calls: int, first: int = 0):
    """Several calls of so many steps each; metrics [total] of each student."""
    parts = []
    for n in calls:
      parts.append(self.call(first, n))
      first += n
    return [{k: np.concatenate([p[i][k] for p in parts]) for k in parts[0][i]} for i in range(len(self.states))]


def teacher_params(recipe: Recipe, on=None, seed=9) -> Teacher:
  params = weights(recipe.teacher, seed)
  return Teacher(jax.device_put(params, sharding.param_shardings(params, on or mesh(), recipe.teacher_layout)))


def host(tree):
  """Copies on the host: donated arrays are gone after a call."""
  return jax.tree.map(lambda x: np.array(x), tree)


def assert_identical(a, b):
  """Bit for bit; NaN is NaN."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape), path
    assert x.tobytes() == y.tobytes(), f'{path}: differs by up to {np.abs(x.astype(float) - y.astype(float)).max()}'


def assert_close(a, b, relative):
  """Leaf by leaf, relative to the leaf's greatest value."""
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.abs(x - y).max() <= relative * max(np.abs(y).max(), 1e-30), path
