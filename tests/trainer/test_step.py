import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import LossConfig
from kdjax.losses import alpha_at
from kdjax.programs import hlo
from kdjax.runs.checksums import checksums
from kdjax.runtime import sharding
from kdjax.trainer import step as step_lib
from kdjax.trainer.step import Teacher
from tests import small

DISTILLED = ('teacher',)
SIZES = {'smaller': 8, 'equal': 16, 'larger': 32}  # the teacher's width; the student's is 16
MESHES = [(1, 8, 1), (2, 4, 1), (1, 2, 4), (2, 2, 2)]


def distilled(**fields):
  return small.recipe(DISTILLED, **fields)


def start(recipe, alphas=(0.4,), on=None):
  teacher = small.teacher_params(recipe, on) if recipe.teacher else Teacher()
  return small.Run(recipe, alphas, teacher, on)


@pytest.mark.parametrize(
  ('shape', 'size'), [((1, 1, 1), 1), ((1, 1, 1), 4), ((2, 2, 2), 4), *((shape, 1) for shape in MESHES)]
)
def test_compiles_once_with_moments_sharded_as_their_parameters(shape, size):
  run = start(distilled(size=size), on=small.mesh(*shape))
  run.go(*((1, 1, 1) if size == 1 else (4, 1, 3)))
  assert run.step._cache_size() == 1
  (state,) = run.states
  adam = next(s for s in state.opt_state if hasattr(s, 'mu'))
  for moments in (adam.mu, adam.nu):
    assert jax.tree.map(lambda p, m: p.sharding == m.sharding, state.params, moments) == jax.tree.map(
      lambda p: True, state.params
    )
  kernel = state.params['blocks']['mlp']['up']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 16 // shape[1], 32 // shape[2])


def test_the_old_state_is_given_up_and_the_teacher_is_not():
  run = start(distilled())
  old = run.states
  run.go(1)
  big = list(jax.tree.leaves(old[0].params))
  assert all(leaf.is_deleted() for leaf in big)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.teacher))


def test_cuts_of_the_calls_change_no_bit():
  cuts = [(4, 4, 4), (1, 3, 2, 4, 2), (3, 1, 4, 1, 1, 2)]
  recipe = distilled(size=4)
  whole = start(recipe)
  expected = whole.go(*cuts[0])
  for cut in cuts[1:]:
    other = start(recipe)
    small.assert_identical(other.go(*cut), expected)
    small.assert_identical(small.host(other.states), small.host(whole.states))


def test_what_follows_the_last_step_of_a_call_is_zero_and_counts_for_nothing():
  run = start(distilled(size=4))
  with jax.set_mesh(run.mesh):
    run.states, metrics = run.step(run.states, run.teacher, run.place(small.batches(0, 4)), 2)
  assert int(run.states[0].step) == 2
  assert all((np.asarray(m)[2:] == 0).all() for m in metrics[0].values())


@pytest.mark.parametrize('microbatches', [4, pytest.param(2, marks=pytest.mark.slow)])
def test_gradient_accumulation_equals_the_whole_batch_however_the_tokens_lie(microbatches):
  batch = {name: jnp.asarray(value[0]) for name, value in small.batches(0, 1).items()}
  per_microbatch = (batch['labels'] >= 0).reshape(-1, microbatches, small.SEQ).sum((0, 2))
  assert len(set(per_microbatch.tolist())) > 1  # else a mean of means would pass
  whole, parts = distilled(), distilled(microbatches=microbatches)
  states = start(whole).states
  teacher = small.teacher_params(whole)
  one = jax.jit(lambda states: _gradients(whole, states, teacher, batch))(states)
  many = jax.jit(lambda states: _gradients(parts, states, teacher, batch))(states)
  small.assert_close(many, one, 1e-6)


def _gradients(recipe, states, teacher, batch, alphas=(0.4,)):
  real = batch['labels'] >= 0
  weights = real / real.sum().astype(jnp.float32)
  return step_lib._gradients(
    recipe, tuple(s.params for s in states), teacher, batch | {'weights': weights}, list(alphas)
  )


@pytest.mark.slow
def test_accumulated_gradients_of_bfloat16_weights_are_summed_in_float32():
  student = small.model(param_dtype='bfloat16', dtype='float32')
  batch = {name: jnp.asarray(value[0]) for name, value in small.batches(0, 1, rows=64).items()}
  recipe = small.recipe(student=student)
  states = start(recipe).states
  wide = [s._replace(params=jax.tree.map(lambda x: x.astype('float32'), s.params)) for s in states]
  exact, _ = _gradients(small.recipe(), wide, Teacher(), batch)
  error = {}
  for n in (1, 16):
    got, _ = jax.jit(lambda states, n=n: _gradients(recipe._replace(microbatches=n), states, Teacher(), batch))(states)
    off = jax.tree.map(lambda g, e: float(jnp.linalg.norm(g.astype('float32') - e) / jnp.linalg.norm(e)), got, exact)
    error[n] = max(jax.tree.leaves(off))
  assert error[16] < 1.5 * error[1]


@pytest.mark.parametrize('rows', [2, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 4))])
def test_the_teachers_microbatch_changes_nothing(rows):
  batch = {name: jnp.asarray(value[0]) for name, value in small.batches(0, 1).items()}
  whole, parts = distilled(), distilled(teacher_microbatch=rows)
  states, teacher = start(whole).states, small.teacher_params(whole)
  expected = jax.jit(lambda states: _gradients(whole, states, teacher, batch))(states)
  small.assert_close(jax.jit(lambda states: _gradients(parts, states, teacher, batch))(states), expected, 1e-6)


@pytest.mark.parametrize('size', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_alpha_0_beside_a_teacher_is_the_lm_only_program_bit_for_bit(size):
  alone = start(small.recipe(size=size), (0.0,))
  beside = start(distilled(size=size), (0.0,))
  expected = alone.go(*[size] * (20 // size))
  got = beside.go(*[size] * (20 // size))
  for name in ('ce', 'loss', 'grad_norm'):
    small.assert_identical(got[0][name], expected[0][name])
  small.assert_identical(small.host(beside.states), small.host(alone.states))
  assert expected[0]['ce'][-1] < expected[0]['ce'][0] - 0.1  # it learns, so there was something to compare


def test_a_cohorts_member_takes_the_step_that_it_would_take_alone():
  alphas, targets = (0.0, 0.4, 0.9, 0.4), ('none', 'teacher', 'teacher', 'unigram')
  together = small.Run(small.recipe(targets), alphas, _with_unigram(small.recipe(DISTILLED)))
  alone = [
    small.Run(small.recipe((target,)), (a,), together.teacher) for target, a in zip(targets, alphas, strict=True)
  ]
  for at in range(4):
    before = small.host(together.states)
    got = together.call(at, 1)
    for k, lone in enumerate(alone):
      lone.states = (jax.device_put(before[k], lone.shardings),)
      (expected,) = lone.call(at, 1)
      for name in ('loss', 'ce', 'grad_norm'):
        np.testing.assert_allclose(got[k][name], expected[name], rtol=1e-6)
      small.assert_close(together.states[k].opt_state, lone.states[0].opt_state, 1e-6)
      small.assert_close(together.states[k].params, lone.states[0].params, 1e-6)


def _with_unigram(recipe):
  counts = np.ones(40)
  counts[: small.VOCAB] += np.arange(small.VOCAB)
  return small.teacher_params(recipe)._replace(unigram_V=jnp.log(jnp.asarray(counts / counts.sum(), jnp.float32)))


def test_alpha_is_of_the_state_and_compiles_nothing_anew():
  kinds = [{}, {'kind': 'linear', 'final': 0.1}, {'kind': 'cosine', 'final': 0.9}, {'kind': 'lr'}]
  states = [small.host(small.alpha(0.5, **kind)) for kind in kinds]
  run = start(distilled(), (states[0],))
  run.call(0, 1)
  compiled = run.step._cache_size()  # the step is shared with other tests
  for state in states:
    placed = jax.device_put((state, np.int32(3)), (run.shardings.alpha, run.shardings.step))
    run.states = (run.states[0]._replace(alpha=placed[0], step=placed[1]),)
    (metrics,) = run.call(0, 1)
    rate = run.recipe.learning_rate(jnp.asarray(3))
    expected = float(alpha_at(jax.device_put(state), 3, rate / run.recipe.peak_learning_rate))
    assert metrics['alpha'][0] == pytest.approx(expected, rel=1e-6)
    assert metrics['loss'][0] == pytest.approx(
      (1 - expected) * metrics['ce'][0] + expected * metrics['kd'][0], rel=1e-5
    )
  assert run.step._cache_size() == compiled


def test_a_step_that_is_not_finite_leaves_its_student_alone_and_is_counted():
  run = start(small.recipe(('none', 'teacher'), size=2), (0.0, 0.4))
  broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), run.teacher)
  run.go(2)
  before = small.host(run.states)
  metrics = run.call(2, 2, teacher=broken)
  baseline, student = small.host(run.states)
  assert not np.isfinite(metrics[1]['loss']).any()
  assert metrics[1]['skipped_in_row'].tolist() == [1, 2]
  small.assert_identical((student.params, student.opt_state), (before[1].params, before[1].opt_state))
  assert (int(student.step), int(student.skipped), int(student.skipped_in_row)) == (4, 2, 2)
  # The other student never notices.
  assert np.isfinite(metrics[0]['loss']).all()
  assert int(baseline.skipped) == 0
  assert not np.array_equal(baseline.params['embed']['embedding'], before[0].params['embed']['embedding'])
  # And it goes on.
  metrics = run.call(4, 2)
  assert np.isfinite(metrics[1]['loss']).all()
  assert metrics[1]['skipped'].tolist() == [2, 2]
  assert metrics[1]['skipped_in_row'].tolist() == [0, 0]
  assert not np.array_equal(
    small.host(run.states)[1].params['embed']['embedding'], student.params['embed']['embedding']
  )


@pytest.mark.parametrize('value', [np.inf, np.nan])
def test_broken_weights_are_kept_as_they_are_and_every_step_is_counted(value):
  run = start(small.recipe())
  (state,) = run.states
  state.params['blocks']['mlp']['down']['kernel'] = jnp.full_like(
    state.params['blocks']['mlp']['down']['kernel'], value
  )
  before = small.host(state.params)
  (metrics,) = run.go(1, 1)
  small.assert_identical(small.host(run.states[0].params), before)
  assert metrics['skipped'].tolist() == [1, 2]


def test_a_batch_without_a_single_label_moves_nothing_but_decay():
  run = start(small.recipe())
  empty = {**small.batches(0, 1), 'labels': np.full((1, small.ROWS, small.SEQ), -1, np.int32)}
  with jax.set_mesh(run.mesh):
    run.states, metrics = run.step(run.states, run.teacher, run.place(empty), 1)
  assert float(metrics[0]['loss'][0]) == 0
  assert float(metrics[0]['grad_norm'][0]) == 0
  assert int(run.states[0].skipped) == 0


def test_the_teacher_is_in_no_state_and_no_buffer_of_it_is_shared():
  recipe = distilled(teacher=small.model(32, n_layers=3))
  run = start(recipe)
  known = checksums(run.teacher.params)
  run.go(1, 1, 1)
  assert checksums(run.teacher.params) == known
  shapes = {leaf.shape for leaf in jax.tree.leaves(run.teacher.params)}
  assert not shapes & {leaf.shape for leaf in jax.tree.leaves(run.states)}
  pointer = lambda x: x.addressable_data(0).unsafe_buffer_pointer()
  assert not {pointer(x) for x in jax.tree.leaves(run.teacher)} & {pointer(x) for x in jax.tree.leaves(run.states)}


def test_no_gradient_reaches_the_teacher():
  recipe = distilled()
  run = start(recipe)
  batch = {name: jnp.asarray(value[0]) for name, value in small.batches(0, 1).items()}
  batch['weights'] = (batch['labels'] >= 0) / batch['labels'].size
  loss = lambda teacher: step_lib._loss(recipe, tuple(s.params for s in run.states), teacher, batch, [0.5])[0]
  gradient = jax.jit(jax.grad(loss))(run.teacher)
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))
  assert float(loss(run.teacher)) != float(loss(jax.tree.map(lambda x: 2 * x, run.teacher)))


@pytest.mark.parametrize(
  'width', [pytest.param(w, id=name, marks=[pytest.mark.slow] * (name != 'smaller')) for name, w in SIZES.items()]
)
def test_losses_on_any_mesh_are_those_on_one_device(width):
  recipe = distilled(teacher=small.model(width))
  (expected,) = start(recipe).go(*[1] * 10)
  for shape in ((1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)):
    (got,) = start(recipe, on=small.mesh(*shape)).go(*[1] * 10)
    for name in ('loss', 'ce', 'kd', 'grad_norm', 'tokens'):
      np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, err_msg=f'{name} on {shape}')
    np.testing.assert_allclose(got['loss'][0], expected['loss'][0], rtol=1e-6)


@pytest.mark.parametrize('layout', ['fsdp', 'replicated'])
@pytest.mark.parametrize('shape', [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_a_teacher_laid_out_otherwise_than_its_student_teaches_the_same(layout, shape):
  (expected,) = start(distilled()).go(*[1] * 5)
  run = start(distilled(teacher_layout=layout), on=small.mesh(*shape))
  (got,) = run.go(*[1] * 5)
  for name in ('loss', 'kd', 'grad_norm'):
    np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, err_msg=name)
  assert run.step._cache_size() == 1
  kernel = run.teacher.params['blocks']['mlp']['up']['kernel']
  _, fsdp, tensor = shape
  parts = fsdp * tensor if layout == 'fsdp' else 1
  assert kernel.sharding.shard_shape(kernel.shape) == (kernel.shape[0], kernel.shape[1] // parts, kernel.shape[2])


def test_fresh_weights_are_the_same_on_any_mesh():
  recipe = small.recipe()
  init = lambda key: step_lib.init_state(recipe, small.alpha(), key)
  sums = []
  for shape in ((1, 1, 1), (2, 2, 2)):
    with jax.set_mesh(small.mesh(*shape)):
      placed = step_lib.state_shardings(recipe, jax.eval_shape(init, jax.random.key(1)), small.mesh(*shape))
      sums.append(checksums(jax.jit(init, out_shardings=placed)(jax.random.key(1))))
  assert sums[0] == sums[1]


# What the compiler made of the whole step.

WIDE = 1024  # tokens in the vocabulary
N_ROWS = 64
N_TOKENS = N_ROWS * small.SEQ


@functools.cache
def compiled(chunk: int, shape=(1, 1, 1)) -> hlo.Program:
  """What the compiler made of a cohort's step, for one device of the mesh."""
  recipe = small.recipe(
    ('none', 'teacher'),
    student=small.model(vocab_size=WIDE),
    teacher=small.model(8, vocab_size=WIDE),
    loss=LossConfig(chunk_tokens=chunk),
  )
  run = start(recipe, (0.0, 0.4), small.mesh(*shape))
  with jax.set_mesh(run.mesh):
    batch = run.place(small.batches(0, 1, rows=N_ROWS))
    return hlo.Program(run.step.lower(run.states, run.teacher, batch, 1).compile().as_text())


@pytest.mark.parametrize('shape', [(1, 1, 1), pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2), (1, 2, 4)])
def test_no_array_of_the_compiled_step_has_the_size_of_tokens_times_vocabulary(shape):
  replica, fsdp, tensor = shape
  whole = N_TOKENS // (replica * fsdp) * WIDE // tensor  # one device's share: even that is too much
  assert compiled(N_TOKENS // (replica * fsdp) // 8, shape).largest_array()[0] < 4 * whole / 2


def test_the_search_for_whole_logits_finds_them():
  assert compiled(N_TOKENS).largest_array()[0] >= 4 * N_TOKENS * WIDE


@pytest.mark.parametrize('shape', [pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2), (1, 2, 4)])
def test_the_losss_loop_gathers_no_whole_array(shape):
  chunk = N_TOKENS // (shape[0] * shape[1]) // 8
  sizes = dict(zip(sharding.AXES, shape, strict=True))
  found = [one for one in compiled(chunk, shape).collectives(sizes) if one.loop]
  assert any(one.kind == 'all-gather' for one in found)  # the layers' own: the search finds what there is
  # The loss's loop: nothing where the vocabulary is whole, else one small gather a chunk.
  in_loss = [one for one in found if 'shard_map/while' in one.source]
  assert len(in_loss) <= (shape[2] > 1) * 2  # the scan and its first turn
  assert all(one.bytes <= 4 * 16 * shape[2] * chunk for one in in_loss), in_loss
