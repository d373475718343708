import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax.config import LossConfig
from kdjax.losses import dense_loss
from kdjax.losses.dense import top_k_count
from tests.losses import reference

KINDS = {
  'kl': LossConfig(),
  'kl T=2': LossConfig(temperature=2.0),
  'kl T=0.5, z-loss': LossConfig(temperature=0.5, z_loss=0.1),
  'ce_plus_alpha_kd T=4': LossConfig(temperature=4.0, mixing='ce_plus_alpha_kd'),
  'one_minus_alpha_ce_plus_kd': LossConfig(mixing='one_minus_alpha_ce_plus_kd'),
  'top-k': LossConfig(teacher_top_k=3, temperature=2.0),
  'top-k share, other': LossConfig(teacher_top_k=0.3, rest='other'),
  'top-p': LossConfig(teacher_top_p=0.7, temperature=2.0),
  'top-p, other': LossConfig(teacher_top_p=0.7, rest='other', temperature=0.5),
  'both, other': LossConfig(teacher_top_k=4, teacher_top_p=0.8, rest='other', temperature=2.0),
  'hard label': LossConfig(divergence='hard_label'),
}


def logits(b=2, t=3, v=9, seed=0):
  rng = np.random.default_rng(seed)
  student, teacher = rng.normal(size=(2, b, t, v)) * 2
  weights = np.array([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0]])
  return student, teacher, rng.integers(0, v, (b, t)), weights / weights.sum()


@pytest.mark.parametrize('loss', KINDS.values(), ids=KINDS)
def test_value_and_gradient_follow_the_formula_in_float64(loss):
  student_BxTxV, teacher_BxTxV, labels, weights = logits()
  step = 1e-5
  for alpha in (0.3, 1.0):
    with jax.enable_x64(True):
      (value, sums), grad = jax.value_and_grad(
        lambda s, alpha=alpha: dense_loss(s, labels, weights, alpha, teacher_BxTxV, loss=loss), has_aux=True
      )(jnp.asarray(student_BxTxV))
      assert value.dtype == grad.dtype == jnp.float64
      value, grad, sums = jax.device_get((value, grad, sums))
    exact = lambda s, alpha=alpha: reference.total(s, labels, weights, alpha, teacher_BxTxV, loss)
    np.testing.assert_allclose(value, exact(student_BxTxV), rtol=1e-12)
    for i in np.ndindex(student_BxTxV.shape):
      moved = np.zeros_like(student_BxTxV)
      moved[i] = step
      slope = (exact(student_BxTxV + moved) - exact(student_BxTxV - moved)) / (2 * step)
      np.testing.assert_allclose(grad[i], slope, rtol=1e-6, atol=1e-9)
    kd = [reference.kd(student_BxTxV[i], teacher_BxTxV[i], loss) for i in np.ndindex(labels.shape)]
    np.testing.assert_allclose(sums['kd'], np.dot(kd, weights.ravel()), rtol=1e-12)


def test_without_a_teacher_it_is_the_cross_entropy_whatever_alpha_is():
  student_BxTxV, _, labels, weights = logits()
  with jax.enable_x64(True):
    losses = [dense_loss(jnp.asarray(student_BxTxV), labels, weights, alpha)[0] for alpha in (0.0, 0.7)]
  exact = reference.total(student_BxTxV, labels, weights, 0, None, LossConfig())
  np.testing.assert_allclose(np.asarray(losses), exact, rtol=1e-12)


def test_the_temperature_is_squared_and_so_the_gradient_keeps_its_size():
  """Hinton et al.: near T = infinity, T^2 KL tends to half the squared distance of centred logits over V."""
  student_BxTxV, teacher_BxTxV, labels, weights = logits()
  hot = LossConfig(temperature=1e4)
  with jax.enable_x64(True):
    value = dense_loss(jnp.asarray(student_BxTxV), labels, weights, 1.0, jnp.asarray(teacher_BxTxV), loss=hot)[0]
  difference = student_BxTxV - teacher_BxTxV
  difference -= difference.mean(-1, keepdims=True)
  np.testing.assert_allclose(value, np.sum(weights * np.mean(difference**2, -1) / 2), rtol=1e-3)


def test_tokens_of_weight_0_count_for_nothing_even_with_labels_that_are_none():
  student_BxTxV, teacher_BxTxV, labels, weights = logits()
  f = jax.value_and_grad(lambda s, y: dense_loss(s, y, weights, 0.4, teacher_BxTxV)[0])
  value, grad = f(jnp.asarray(student_BxTxV), jnp.asarray(labels))
  for garbage in (-1, 2**31 - 1):
    other, other_grad = f(jnp.asarray(student_BxTxV), jnp.where(weights != 0, labels, garbage))
    reference.assert_same_bits((value, grad), (other, other_grad))
  assert np.all(np.asarray(grad)[weights == 0] == 0)


@pytest.mark.parametrize('rest', ['renormalise', 'other'])
def test_the_gradient_is_finite_where_truncation_keeps_every_token(rest):
  student = jnp.asarray(logits()[0], jnp.float32)
  teacher = jnp.zeros_like(student)  # all tie, so all stay
  loss = LossConfig(teacher_top_k=2, rest=rest)
  value, grad = jax.value_and_grad(
    lambda s: dense_loss(s, jnp.zeros((2, 3), int), jnp.full((2, 3), 1 / 6), 1.0, teacher, loss=loss)[0]
  )(student)
  full, full_grad = jax.value_and_grad(
    lambda s: dense_loss(s, jnp.zeros((2, 3), int), jnp.full((2, 3), 1 / 6), 1.0, teacher)[0]
  )(student)
  np.testing.assert_allclose(value, full, rtol=1e-6)
  np.testing.assert_allclose(grad, full_grad, atol=1e-7)


def test_the_sums_are_those_of_entropies_and_agreement():
  student_BxTxV, teacher_BxTxV, labels, weights = logits()
  _, sums = dense_loss(jnp.asarray(student_BxTxV), labels, weights, 0.4, jnp.asarray(teacher_BxTxV))
  entropy = lambda z: sum(
    w * -np.sum(np.exp(reference.log_softmax(r)) * reference.log_softmax(r))
    for w, r in zip(weights.ravel(), z.reshape(-1, 9), strict=True)
  )
  np.testing.assert_allclose(sums['student_entropy'], entropy(student_BxTxV), rtol=1e-5)
  np.testing.assert_allclose(sums['teacher_entropy'], entropy(teacher_BxTxV), rtol=1e-5)
  np.testing.assert_allclose(
    sums['agreement'], np.sum(weights * (student_BxTxV.argmax(-1) == teacher_BxTxV.argmax(-1))), rtol=1e-6
  )


def test_top_k_is_a_count_or_a_share_of_the_vocabulary():
  counts = {
    k: top_k_count(dataclasses.replace(LossConfig(), teacher_top_k=k), 50) for k in (0, 1, 3, 80, 0.1, 0.001, 0.99)
  }
  assert counts == {0: 50, 1: 1, 3: 3, 80: 50, 0.1: 5, 0.001: 1, 0.99: 50}


def test_without_truncation_it_costs_no_more_than_optax():
  """Counted by the compiler: no sort, and no more floating-point operations or exponentials for the value and the gradient."""
  student, teacher = (jnp.asarray(x, jnp.float32) for x in logits(v=512)[:2])
  labels, weights = jnp.zeros((2, 3), int), jnp.full((2, 3), 1 / 6)

  def textbook(s, t):
    ce = optax.softmax_cross_entropy_with_integer_labels(s, labels)
    kl = optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(s / 2), jax.nn.log_softmax(t / 2))
    return jnp.sum(weights * (0.6 * ce + 0.4 * 4 * kl))

  ours = lambda s, t, **kind: dense_loss(s, labels, weights, 0.4, t, loss=LossConfig(temperature=2.0, **kind))[0]
  np.testing.assert_allclose(ours(student, teacher), textbook(student, teacher), rtol=1e-5)
  compiled = lambda f: jax.jit(jax.value_and_grad(f)).lower(student, teacher).compile()
  mine, theirs = compiled(ours), compiled(textbook)
  for count in ('flops', 'transcendentals'):
    assert mine.cost_analysis()[count] <= 1.1 * theirs.cost_analysis()[count], count
  sorts = lambda **kind: compiled(functools.partial(ours, **kind)).as_text().count(' sort(')
  assert sorts() == sorts(teacher_top_k=5.0) == 0 < sorts(teacher_top_p=0.9)
