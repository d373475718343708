import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import LossConfig
from kdjax.errors import UserError
from kdjax.losses import (
  LogitTargets,
  ModelTargets,
  Student,
  UnigramTargets,
  dense_loss,
  fused_loss,
  fused_losses,
  token_losses,
)
from tests.losses import reference
from tests.losses.reference import ALPHAS, assert_close, assert_same_bits, f64, masks, problem, relative_error

B, T, V = 2, 11, 24
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
KINDS = (
  *({'temperature': t} for t in TEMPERATURES),
  *({'temperature': t, 'teacher_top_k': 3} for t in (0.5, 2.0)),
  *({'temperature': t, 'teacher_top_k': 0.2, 'rest': 'other'} for t in (1.0, 4.0)),
  *({'temperature': t, 'teacher_top_p': 0.7} for t in (1.0, 4.0)),
  *({'temperature': t, 'teacher_top_p': 0.7, 'rest': 'other'} for t in (0.5, 2.0)),
  *({'temperature': t, 'teacher_top_k': 5, 'teacher_top_p': 0.8, 'rest': 'other'} for t in (1.0, 4.0)),
  {'teacher_top_k': 0.3, 'teacher_top_p': 0.6},
  {'mixing': 'ce_plus_alpha_kd', 'temperature': 2.0},
  {'mixing': 'one_minus_alpha_ce_plus_kd', 'temperature': 3.0},
  {'z_loss': 0.01, 'temperature': 1.7},
  {'divergence': 'hard_label'},
  {'divergence': 'hard_label', 'mixing': 'ce_plus_alpha_kd', 'z_loss': 0.01},
)


def value_and_grad(loss, targets, chunk=None, **kwargs):
  """Jitted ((loss, sums), (d hidden, d head)) of (hidden, head, targets, labels, weights, alpha)."""

  def f(x, w, targets, labels, weights, alpha):
    return fused_loss(x, w, labels, weights, alpha, targets, loss=loss, chunk=chunk, **kwargs)

  return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))


def dense_value_and_grad(loss, x, w, teacher_BxTxV, labels, weights, alpha, preferred=None):
  def f(x, w):
    student_BxTxV = jnp.dot(x, w, preferred_element_type=preferred)
    return dense_loss(student_BxTxV, labels, weights, alpha, teacher_BxTxV, loss=loss)

  return jax.value_and_grad(f, (0, 1), has_aux=True)(x, w)


def targets_of(kind, xt, wt):
  """(targets, their logits [B, T, V] in NumPy float64)."""
  if kind == 'unigram':
    log_probs_V = jax.nn.log_softmax(3 * wt[0])
    return UnigramTargets(log_probs_V), np.broadcast_to(
      np.asarray(log_probs_V, np.float64), (*xt.shape[:2], wt.shape[1])
    )
  if kind == 'logits':
    logits_BxTxV = jnp.dot(xt, wt)
    return LogitTargets(logits_BxTxV), np.asarray(logits_BxTxV, np.float64)
  return ModelTargets(xt, wt), np.asarray(xt, np.float64) @ np.asarray(wt, np.float64)


def compare_with_dense(loss, targets_kind='model', chunk=5):
  x, w, xt, wt, labels = problem(B, T, v=V)
  targets, teacher_BxTxV = targets_of(targets_kind, xt, wt)
  fused = value_and_grad(loss, targets, chunk)
  cases = list(itertools.product(masks(B, T), ALPHAS))
  with jax.enable_x64(True):

    def dense(weights, alpha):
      return dense_value_and_grad(loss, *f64((x, w)), jnp.asarray(teacher_BxTxV), labels, weights, alpha)

    all_weights, alphas = (f64(jnp.stack([jnp.asarray(case[i], jnp.float32) for case in cases])) for i in range(2))
    exact = jax.device_get(jax.vmap(dense)(all_weights, alphas))
  for k, (weights, alpha) in enumerate(cases):
    got = fused(x, w, targets, labels, weights, alpha)
    assert_close(got, jax.tree.map(lambda a, k=k: a[k], exact), note=f'alpha {alpha}, weights {weights}')


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_it_equals_the_dense_loss_in_float64(kind):
  compare_with_dense(LossConfig(**kind))


@pytest.mark.parametrize('targets', ['unigram', 'logits'])
@pytest.mark.parametrize(
  'kind', [{'temperature': 2.0}, {'teacher_top_p': 0.7, 'rest': 'other'}, {'divergence': 'hard_label'}], ids=str
)
def test_it_equals_the_dense_loss_for_targets_that_are_no_model(kind, targets):
  compare_with_dense(LossConfig(**kind), targets)


@pytest.mark.parametrize('chunk', [1, 4, B * T, 64])
def test_the_chunk_changes_nothing(chunk):
  compare_with_dense(LossConfig(temperature=2.0, teacher_top_p=0.7, rest='other'), chunk=chunk)


@pytest.mark.parametrize('kind', [{}, {'temperature': 2.0}, {'teacher_top_k': 4, 'rest': 'other'}], ids=str)
def test_in_bfloat16_the_error_is_at_most_twice_the_dense_one(kind):
  """Against the dense loss on bfloat16 hidden states and head with float32 logits, the better one of the dense versions."""
  loss = LossConfig(**kind)
  x, w, xt, wt, labels = problem(2, 32, 32, 64, 96, jnp.bfloat16)
  w, wt = w / 4, wt / 8
  weights = masks(2, 32)[1]
  fused = value_and_grad(loss, None, chunk=8)
  dense_loss_of = jax.jit(functools.partial(dense_value_and_grad, loss), static_argnames='preferred')
  teacher_BxTxV = jnp.dot(xt, wt, preferred_element_type=jnp.float32)
  for alpha in ALPHAS:
    (got, sums), grads = fused(x, w, ModelTargets(xt, wt), labels, weights, alpha)
    (dense, dense_sums), dense_grads = dense_loss_of(x, w, teacher_BxTxV, labels, weights, alpha, preferred=jnp.float32)
    with jax.enable_x64(True):
      exact = dense_loss_of(*f64((x, w)), f64(xt) @ f64(wt), labels, f64(weights), jnp.float32(alpha))
      (exact, exact_sums), exact_grads = jax.device_get(exact)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2
    for mine, theirs, right in zip(grads, dense_grads, exact_grads, strict=True):
      assert relative_error(mine, right) <= 2 * relative_error(theirs, right)
    assert (
      relative_error(got, exact) <= 2 * relative_error(dense, exact) + 1e-6
    )  # both are right to float32's last digits
    for name in ('ce', 'kd', 'student_entropy', 'teacher_entropy'):
      assert (
        relative_error(sums[name], exact_sums[name]) <= 2 * relative_error(dense_sums[name], exact_sums[name]) + 1e-6
      )


def test_the_heads_gradient_is_as_exact_with_512_chunks_as_with_one():
  x, w, xt, wt, labels = problem(1, 512, 32, 32, 64, jnp.bfloat16)
  weights = jnp.full((1, 512), 1 / 512)
  error = {}
  for chunk in (512, 1):
    _, (_, dw) = value_and_grad(LossConfig(), None, chunk)(x, w, ModelTargets(xt, wt), labels, weights, 0.4)
    with jax.enable_x64(True):
      _, (_, exact) = dense_value_and_grad(LossConfig(), *f64((x, w)), f64(xt) @ f64(wt), labels, f64(weights), 0.4)
      error[chunk] = relative_error(dw, jax.device_get(exact))
  assert error[512] < 0.01
  assert error[1] <= 1.2 * error[512]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('kind', [{}, {'teacher_top_k': 7, 'teacher_top_p': 0.8, 'rest': 'other'}], ids=str)
def test_equal_models_have_a_kl_and_a_gradient_of_exactly_zero(kind, dtype):
  losses = [LossConfig(temperature=t, **kind) for t in (0.5, 1.0, 1.7, 2.0, 3.0)]

  @jax.jit
  def all_temperatures(x, w, xt, wt, labels, weights):
    return [value_and_grad(loss, None, 16)(x, w, ModelTargets(xt, wt), labels, weights, 1.0) for loss in losses]

  for seed in range(12):
    x, w, _, _, labels = problem(1, 61, 32, v=517, dtype=dtype, seed=seed)
    w = w * (0.02 + 0.1 * seed)
    weights = jnp.full((1, 61), 1 / 61)
    results = all_temperatures(x, w, x.copy(), w.copy(), labels, weights)
    for loss, ((value, sums), grads) in zip(losses, results, strict=True):
      assert value == sums['kd'] == 0, (loss.temperature, seed)
      assert not any(np.asarray(g).any() for g in grads), (loss.temperature, seed)
      assert np.isclose(sums['agreement'], 1)


def test_alpha_0_is_the_language_model_alone_bit_for_bit():
  kinds = (
    {},
    {'temperature': 2.0},
    {'temperature': 3.0, 'mixing': 'ce_plus_alpha_kd'},
    {'temperature': 1.7, 'teacher_top_k': 4, 'rest': 'other', 'z_loss': 0.1},
    {'divergence': 'hard_label', 'z_loss': 0.1},
  )
  x, w, xt, wt, labels = problem(2, 37, 16, v=101)
  weights = masks(2, 37)[1]
  for kind in kinds:
    f = value_and_grad(LossConfig(**kind), None, 16)
    (value, sums), grads = f(x, w, ModelTargets(xt, wt), labels, weights, 0.0)
    (alone, alone_sums), alone_grads = f(x, w, None, labels, weights, 0.0)
    assert_same_bits((value, grads), (alone, alone_grads))
    assert_same_bits({k: sums[k] for k in alone_sums}, alone_sums)


def test_a_cotangent_scales_bfloat16_gradients_without_rounding_itself():
  x, w, xt, wt, labels = problem(dtype=jnp.bfloat16)
  weights = masks(B, T)[0]
  f = lambda w, scale: scale * fused_loss(x, w, labels, weights, 0.4, ModelTargets(xt, wt), chunk=8)[0]
  whole, third = (np.asarray(jax.grad(f)(w, jnp.float32(s)), np.float64) for s in (1.0, 1 / 3))
  assert abs(np.vdot(third, whole) / np.vdot(whole, whole) - 1 / 3) < 1e-4  # 1/3 in bfloat16 is off by 7e-4


def test_padding_of_the_vocabulary_is_never_given_mass():
  """Columns beyond the vocabulary hold anything, teacher's and student's may be of different number, and nothing changes."""
  x, w, xt, wt, labels = problem(v=V)
  weights = masks(B, T)[1]
  huge = lambda key, d, n: 1e3 * jax.random.normal(jax.random.key(key), (d, n))
  for kind in (
    {'temperature': 2.0},
    {'teacher_top_k': 0.3, 'teacher_top_p': 0.9, 'rest': 'other'},
    {'divergence': 'hard_label'},
  ):
    f = value_and_grad(LossConfig(z_loss=0.1, **kind), None, 5, vocab_size=V)
    results = []
    for fill, teacher_padding in ((0, 8), (1, 8), (1, 3)):
      padded = jnp.concatenate([w, fill * huge(1, 8, 8)], 1)
      teacher = ModelTargets(xt, jnp.concatenate([wt, fill * huge(2, 12, teacher_padding)], 1))
      (value, sums), (dx, dw) = f(x, padded, teacher, labels, weights, 0.4)
      assert not np.asarray(dw[:, V:]).any()
      results.append((value, sums, dx, dw))
    for other in results[1:]:
      assert_same_bits(results[0], other)
    with jax.enable_x64(True):
      teacher_BxTxV = f64(xt) @ f64(wt)
      exact = dense_value_and_grad(
        LossConfig(z_loss=0.1, **kind), *f64((x, w)), teacher_BxTxV, labels, f64(weights), jnp.float32(0.4)
      )
      exact = jax.device_get(exact)
    assert_close(((results[0][0], results[0][1]), (results[0][2], results[0][3][:, :V])), exact)


def test_another_vocabulary_is_an_error_that_names_both_sizes():
  x, w, xt, wt, labels = problem(v=V)
  few = [ModelTargets(xt, wt[:, :20]), UnigramTargets(wt[0, :20]), LogitTargets(jnp.zeros((B, T, 20)))]
  for targets in few:
    with pytest.raises(UserError, match=rf'20 columns.*{V} tokens'):
      fused_loss(x, w, labels, masks(B, T)[0], 0.4, targets)
  with pytest.raises(UserError, match=rf'40 tokens.*{V} columns'):
    fused_loss(x, w, labels, masks(B, T)[0], 0.4, vocab_size=40)


@pytest.mark.parametrize(
  'kind', [{'temperature': 2.0}, {'teacher_top_p': 0.7, 'rest': 'other'}, {'divergence': 'hard_label'}], ids=str
)
def test_tokens_of_weight_0_do_not_count_whatever_they_hold(kind):
  """Labels that are no token, a teacher or a student that is not finite there: nothing reaches the loss or any gradient."""
  x, w, xt, wt, labels = problem(v=V)
  weights = masks(B, T)[1]
  out_BxT = weights == 0
  f = value_and_grad(LossConfig(**kind), None, 5)
  clean = f(x, w, ModelTargets(xt, wt), labels, weights, 0.4)
  for label, filler in ((-1, jnp.nan), (2**31 - 1, jnp.inf), (-(2**31), -jnp.inf)):
    broken = jnp.where(out_BxT[..., None], filler, xt)
    assert_same_bits(clean, f(x, w, ModelTargets(broken, wt), jnp.where(out_BxT, label, labels), weights, 0.4))
    assert_same_bits(clean, f(jnp.where(out_BxT[..., None], filler, x), w, ModelTargets(xt, wt), labels, weights, 0.4))
  assert not np.asarray(clean[1][0])[out_BxT].any()


def test_the_teacher_gets_no_gradient_and_costs_one_product():
  x, w, xt, wt, labels = problem(v=V)
  weights = masks(B, T)[0]

  def f(x, w, targets, alpha, weights):
    return fused_loss(x, w, labels, weights, alpha, targets, chunk=8)[0]

  for targets in (ModelTargets(xt, wt), UnigramTargets(jax.nn.log_softmax(wt[0])), LogitTargets(xt @ wt)):
    dx, *others = jax.grad(f, (0, 2, 3, 4))(x, w, targets, 0.4, weights)
    assert np.asarray(dx).any()
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(others))
  jaxpr = str(jax.make_jaxpr(jax.value_and_grad(f, (0, 1, 2)))(x, w, ModelTargets(xt, wt), 0.4, weights))
  assert jaxpr.count('dot_general') == 4  # both models' logits, the gradients of hidden states and head


def test_a_new_alpha_or_mask_compiles_nothing_anew():
  x, w, xt, wt, labels = problem(v=V)
  f = value_and_grad(LossConfig(temperature=2.0), None, 5)
  for alpha, weights in zip(ALPHAS, masks(B, T), strict=True):
    f(x, w, ModelTargets(xt, wt), labels, weights, jnp.float32(alpha))
  assert f._cache_size() == 1


def test_a_cohort_gives_each_student_what_it_gets_alone():
  _, _, xt, wt, labels = problem(v=V)
  unigram = jax.nn.log_softmax(wt[0])
  weights = masks(B, T)[1]
  targets = [ModelTargets(xt, wt), UnigramTargets(unigram)]
  setups = [(0.2, 0), (0.0, 0), (0.7, None), (0.4, 1), (1.0, 0)]
  models = [problem(d=8 + k % 2, v=V, seed=k)[:2] for k in range(len(setups))]
  loss = LossConfig(temperature=2.0, teacher_top_k=0.5, rest='other', z_loss=0.01)

  @jax.jit
  def together(models):
    def f(models):
      students = [Student(*model, *setup) for model, setup in zip(models, setups, strict=True)]
      results = fused_losses(students, labels, weights, targets, loss=loss, chunk=5)
      return sum(value for value, _ in results), results

    return jax.value_and_grad(f, has_aux=True)(models)

  (_, results), gradients = together(models)
  alone = jax.jit(
    lambda model, alpha, targets: jax.value_and_grad(
      lambda m: fused_loss(*m, labels, weights, alpha, targets, loss=loss, chunk=5), has_aux=True
    )(model)
  )
  for model, (alpha, target), result, gradient in zip(models, setups, results, gradients, strict=True):
    assert_close((result, gradient), alone(model, alpha, None if target is None else targets[target]))


def dense_tokens(x, w, xt, wt, labels, loss, temperatures):
  """What `token_losses` must give, token by token in NumPy float64."""
  student_BxTxV, teacher_BxTxV = (np.asarray(h, np.float64) @ np.asarray(k, np.float64) for h, k in ((x, w), (xt, wt)))
  out = {}
  for i in np.ndindex(labels.shape):
    s, t, y = student_BxTxV[i], teacher_BxTxV[i], labels[i]
    log_p, log_q = reference.log_softmax(s), reference.log_softmax(t)
    values = {
      'ce': -log_p[y],
      'student_entropy': -np.sum(np.exp(log_p) * log_p),
      'confidence': np.exp(log_p.max()),
      'correct': s.argmax() == y,
      'kd': reference.kd(s, t, loss),
      'teacher_entropy': -np.sum(np.exp(log_q) * log_q),
      'agreement': s.argmax() == t.argmax(),
      'nll_at': np.array([-reference.log_softmax(s / temperature)[y] for temperature in temperatures]),
    }
    for name, value in values.items():
      out.setdefault(name, np.zeros((*labels.shape, *np.shape(value))))[i] = value
  return out


def test_token_losses_are_the_dense_values_of_each_token():
  x, w, xt, wt, labels = problem(v=V)
  labels = labels.at[0, :3].set((x @ w).argmax(-1)[0, :3])  # some are right
  temperatures = (0.5, 1.0, 1.7)
  loss = LossConfig(temperature=2.0, teacher_top_p=0.8, rest='other')
  padded = lambda w: jnp.pad(w, ((0, 0), (0, 8)), constant_values=50.0)
  got = token_losses(x, padded(w), labels, temperatures, ModelTargets(xt, padded(wt)), loss=loss, vocab_size=V, chunk=5)
  exact = dense_tokens(x, w, xt, wt, np.asarray(labels), loss, temperatures)
  assert 3 <= exact['correct'].sum() < labels.size
  for name, value in exact.items():
    np.testing.assert_allclose(got[name], value, rtol=2e-6, atol=3e-6, err_msg=name)
  assert got.keys() == exact.keys()
  alone = token_losses(x, w, labels, chunk=5)
  assert alone.keys() == {'ce', 'student_entropy', 'confidence', 'correct'}
  assert_close({k: got[k] for k in alone}, alone)
