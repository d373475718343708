"""The compiled step: teacher's hidden states, students' forward and backward, the fused mixed loss, the updates.

One call advances every student of a cohort by up to `size` optimizer steps on the same batches. The states are donated; the teacher's
parameters are an argument of their own, in no state, no optimizer and no checkpoint. The number of steps of a call is traced, so that a
call cut short at a checkpoint is the same program: it compiles once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kdjax.config import LossConfig
from kdjax.losses import AlphaState, ModelTargets, Student, UnigramTargets, alpha_at, fused_losses
from kdjax.models import Model
from kdjax.runs.state import Params, TrainState
from kdjax.runtime import sharding

Outputs = tuple[Any, Any]  # a model's hidden states [B, T, D] and head [D, V]
Batch = dict[str, jax.Array]  # tokens, labels, segment_ids: int32 [B, T]; a label of -1 counts for nothing


class Teacher(NamedTuple):
  """What students may learn from: a model's parameters, the unigram log-probabilities [V]; each may be None."""

  params: Params = None
  unigram_V: Any = None


class Recipe(NamedTuple):
  """The static part of a step."""

  student: Model
  teacher: Model | None
  targets: tuple[str, ...]  # per student: 'none', 'teacher' or 'unigram'
  optimizer: optax.GradientTransformation
  learning_rate: Callable[[jax.Array], jax.Array]
  peak_learning_rate: float
  loss: LossConfig
  mask_documents: bool = True
  microbatches: int = 1
  teacher_microbatch: int = 0  # rows; 0: all of the student's microbatch
  teacher_layout: str = 'student'  # one of sharding.LAYOUTS
  size: int = 1  # steps a call


def init_state(recipe: Recipe, alpha: AlphaState, key: jax.Array, params=None) -> TrainState:
  """Return a student before its first step, with the given weights or fresh ones, which are the same for the same key on any mesh."""
  params = recipe.student.init(key) if params is None else params
  zero = jnp.zeros((), jnp.int32)
  return TrainState(params, recipe.optimizer.init(params), zero, alpha, zero, zero)


def state_shardings(recipe: Recipe, state: TrainState, mesh: Mesh) -> TrainState:
  """Shardings of a (possibly abstract) state: the moments as their parameters, scalars everywhere."""
  params = sharding.param_shardings(state.params, mesh)
  everywhere = sharding.replicated(mesh)
  opt_state = optax.tree_utils.tree_map_params(
    recipe.optimizer, lambda _, s: s, state.opt_state, params, transform_non_params=lambda _: everywhere
  )
  scalars = jax.tree.map(lambda _: everywhere, state._replace(params=None, opt_state=None))
  return scalars._replace(params=params, opt_state=opt_state)


def make_step(recipe: Recipe, shardings: Sequence[TrainState]):
  """`step(states, teacher, batches, n) -> (states, metrics)`, jitted.

  Args of the returned function:
    states: a tuple of TrainStates, one a student; donated.
    teacher: Teacher.
    batches: arrays [size, B, T].
    n: how many of the batches to take, 1 <= n <= size.

  Metrics are one dict a student of float32 arrays [size]; those beyond n are 0.
  """

  def run(states, teacher, batches, n):
    if recipe.size == 1:
      states, metrics = one_step(recipe, states, teacher, jax.tree.map(lambda x: x[0], batches))
      return states, jax.tree.map(lambda x: x[None], metrics)

    def body(i, carry):
      states, metrics = carry
      batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)
      states, new = one_step(recipe, states, teacher, batch)
      return states, jax.tree.map(lambda all_, x: all_.at[i].set(x), metrics, new)

    shapes = jax.eval_shape(
      functools.partial(one_step, recipe), states, teacher, jax.tree.map(lambda x: x[0], batches)
    )[1]
    empty = jax.tree.map(lambda x: jnp.zeros((recipe.size, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, n, body, (states, empty))

  return jax.jit(run, donate_argnums=0, out_shardings=(tuple(shardings), None))


# The named scopes of a step, by which a profile or kdjax/aot.py tells its parts.
PARTS = ('teacher', 'student', 'loss', 'update')


def one_step(recipe: Recipe, states: tuple[TrainState, ...], teacher: Teacher, batch: Batch):
  """One optimizer step of every student on one batch."""
  rate = [recipe.learning_rate(s.step) for s in states]
  alphas = [alpha_at(s.alpha, s.step, r / recipe.peak_learning_rate) for s, r in zip(states, rate, strict=True)]
  real_BxT = batch['labels'] >= 0
  n_tokens = real_BxT.sum()
  weights_BxT = real_BxT / jnp.maximum(n_tokens, 1).astype(jnp.float32)  # over all microbatches and devices
  params = tuple(s.params for s in states)
  gradients, sums = _gradients(recipe, params, teacher, batch | {'weights': weights_BxT}, alphas)
  with jax.named_scope('update'):
    out = [_update(recipe, *each) for each in zip(states, gradients, sums, rate, strict=True)]
  metrics = [
    m | {'learning_rate': r, 'alpha': a, 'tokens': n_tokens.astype(jnp.float32)}
    for (_, m), r, a in zip(out, rate, alphas, strict=True)
  ]
  return tuple(s for s, _ in out), metrics


def _gradients(recipe: Recipe, params, teacher: Teacher, batch: Batch, alphas):
  """(gradients, sums) of each student over the whole batch, one microbatch after the other."""
  gradient = jax.grad(functools.partial(_loss, recipe), has_aux=True)
  if recipe.microbatches == 1:
    return gradient(params, teacher, batch, alphas)
  # Row r goes to microbatch r % M: with rows sharded over devices each microbatch has its share of every device.
  split = lambda x: x.reshape(-1, recipe.microbatches, *x.shape[1:]).swapaxes(0, 1)
  microbatches = jax.tree.map(split, batch)

  def body(total, microbatch):
    return jax.tree.map(jnp.add, total, gradient(params, teacher, microbatch, alphas)), None

  shapes = jax.eval_shape(gradient, params, teacher, jax.tree.map(lambda x: x[0], microbatches), alphas)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)  # a sum of bfloat16 gradients too is float32
  total = jax.lax.scan(body, zeros, microbatches)[0]
  return jax.tree.map(lambda x, like: x.astype(like.dtype), total, shapes)


def _loss(recipe: Recipe, params, teacher: Teacher, batch: Batch, alphas):
  """Sum of the students' losses (their parameters are disjoint, so each gets its own gradient) and their weighted sums."""
  segment_ids = batch['segment_ids'] if recipe.mask_documents else None
  theirs = None
  if recipe.teacher is not None and 'teacher' in recipe.targets:
    with jax.named_scope('teacher'):
      theirs = _teacher_hidden(recipe, teacher, batch['tokens'], segment_ids), recipe.teacher.head(teacher.params)
  with jax.named_scope('student'):
    ours = [(recipe.student.hidden(p, batch['tokens'], segment_ids), recipe.student.head(p)) for p in params]
  with jax.named_scope('loss'):
    losses = losses_of(recipe, ours, theirs, teacher.unigram_V, alphas, batch['labels'], batch['weights'])
  return sum(loss for loss, _ in losses), [sums | {'loss': jax.lax.stop_gradient(loss)} for loss, sums in losses]


def losses_of(recipe: Recipe, ours: Sequence[Outputs], theirs: Outputs | None, unigram_V, alphas, labels, weights):
  """(loss, sums) of each student, from what the models give: `ours` the students', `theirs` the teacher's."""
  known: dict[str, Any] = {}
  if theirs is not None:
    known['teacher'] = ModelTargets(*theirs)
  if 'unigram' in recipe.targets:
    known['unigram'] = UnigramTargets(unigram_V)
  known = jax.lax.stop_gradient(known)
  names = list(known)
  students = [
    Student(*output, alpha, names.index(target) if target != 'none' else None)
    for output, alpha, target in zip(ours, alphas, recipe.targets, strict=True)
  ]
  vocab_size = recipe.student.config.vocab_size
  return fused_losses(students, labels, weights, list(known.values()), loss=recipe.loss, vocab_size=vocab_size)


def _teacher_hidden(recipe: Recipe, teacher: Teacher, tokens_BxT, segment_ids_BxT):
  """The teacher's hidden states [B, T, D], no gradient, `teacher_microbatch` rows at a time."""
  model, rows = recipe.teacher, recipe.teacher_microbatch
  assert model is not None
  with sharding.rows_over(sharding.row_axes(recipe.teacher_layout)):
    if not rows or rows >= tokens_BxT.shape[0]:
      hidden_BxTxD = model.hidden(teacher.params, tokens_BxT, segment_ids_BxT)
    else:
      parts = tokens_BxT.shape[0] // rows
      split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
      inputs = jax.tree.map(split, (tokens_BxT, segment_ids_BxT))
      hidden = jax.lax.map(lambda part: model.hidden(teacher.params, *part), inputs)
      hidden_BxTxD = hidden.swapaxes(0, 1).reshape(*tokens_BxT.shape, -1)
  return sharding.constrain(hidden_BxTxD)  # over the student's rows, whatever the teacher's were


def _update(recipe: Recipe, state: TrainState, gradients, sums, rate):
  """Apply the optimizer's update, or skip it if the loss or a gradient is not finite."""
  norm = optax.global_norm(gradients)
  finite = jnp.isfinite(norm) & jnp.isfinite(sums['loss'])
  updates, opt_state = recipe.optimizer.update(gradients, state.opt_state, state.params)
  moved = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), state.params, updates)
  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  new = TrainState(
    params=keep(moved, state.params),
    opt_state=keep(opt_state, state.opt_state),
    step=state.step + 1,
    alpha=state.alpha,
    skipped=state.skipped + ~finite,
    skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
  )
  counts = {'skipped': new.skipped, 'skipped_in_row': new.skipped_in_row}
  return new, sums | {'grad_norm': norm} | {k: v.astype(jnp.float32) for k, v in counts.items()}
