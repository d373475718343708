import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.config import LossConfig
from kdjax.losses.rows import Vocab, _threshold, mixed_rows, teacher_rows, tempered_nll, top_probability
from tests.losses import reference

C, V = 6, 17
KINDS = (
  {},
  {'temperature': 2.0, 'z_loss': 0.1},
  {'temperature': 1.7, 'mixing': 'ce_plus_alpha_kd'},
  {'teacher_top_k': 3, 'temperature': 2.0},
  {'teacher_top_p': 0.7, 'rest': 'other', 'temperature': 0.5},
  {'divergence': 'hard_label'},
)


def rows(student_CxV, teacher_CxV, labels_C, alpha, loss, vocab):
  """(terms, gradient of each token's loss with respect to its logits)."""
  teacher = None if teacher_CxV is None else teacher_rows(teacher_CxV, loss, vocab)
  terms, dz = mixed_rows(student_CxV, labels_C, alpha, teacher, loss, vocab)
  return terms, dz()


def chunk(scale=2.0, v=V, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  student_CxV, teacher_CxV = (scale * jax.random.normal(k, (C, v)) for k in keys[:2])
  return student_CxV, teacher_CxV, jax.random.randint(keys[2], (C,), 0, v)


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_the_gradient_is_the_derivative_of_the_rows_own_loss(kind):
  loss, vocab = LossConfig(**kind), Vocab(V - 2)
  student_CxV, teacher_CxV, labels_C = chunk()
  labels_C = labels_C % vocab.size
  loss_of = lambda s: rows(s, teacher_CxV, labels_C, 0.3, loss, vocab)[0]['loss'].sum()
  _, dz_CxV = rows(student_CxV, teacher_CxV, labels_C, 0.3, loss, vocab)
  np.testing.assert_allclose(dz_CxV, jax.grad(loss_of)(student_CxV), atol=3e-6)
  assert not np.asarray(dz_CxV[:, V - 2 :]).any()
  np.testing.assert_allclose(
    dz_CxV.sum(-1), 2 * loss.z_loss * jax.nn.logsumexp(student_CxV[:, : V - 2], axis=-1), atol=3e-6
  )


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('scale', [1e4, 1e-4])
def test_extreme_logits_give_finite_values_that_are_right(kind, scale):
  loss = LossConfig(**kind)
  student_CxV, teacher_CxV, labels_C = chunk(scale)
  terms, dz_CxV = rows(student_CxV, teacher_CxV, labels_C, 0.3, loss, Vocab(V))
  assert all(np.isfinite(x).all() for x in terms.values()) and np.isfinite(dz_CxV).all()
  for i in range(C):
    s, t = np.asarray(student_CxV[i], np.float64), np.asarray(teacher_CxV[i], np.float64)
    np.testing.assert_allclose(terms['ce'][i], -reference.log_softmax(s)[labels_C[i]], rtol=1e-6, atol=1e-3)
    if loss.rest != 'other' and loss.divergence == 'forward_kl' and loss.teacher_top_k == 0:
      t_T, s_T = reference.log_softmax(t / loss.temperature), reference.log_softmax(s / loss.temperature)
      exact = loss.temperature**2 * np.sum(np.exp(t_T) * (t_T - s_T))
      np.testing.assert_allclose(terms['kd'][i], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_a_teacher_that_is_certain_gives_finite_terms_and_the_gradient_of_a_label(kind):
  loss = LossConfig(**kind)
  student_CxV, _, labels_C = chunk()
  teacher_CxV = 1e4 * jax.nn.one_hot(labels_C, V)
  terms, dz_CxV = rows(student_CxV, teacher_CxV, labels_C, 1.0, loss, Vocab(V))
  assert all(np.isfinite(x).all() for x in terms.values())
  t = loss.temperature
  scale = t**2 if loss.divergence == 'forward_kl' else 1
  log_p_CxV = jax.nn.log_softmax(student_CxV / (t if loss.divergence == 'forward_kl' else 1))
  np.testing.assert_allclose(terms['kd'], -scale * log_p_CxV[jnp.arange(C), labels_C], rtol=1e-5, atol=2e-3)
  np.testing.assert_allclose(terms['teacher_entropy'], 0, atol=1e-6)
  with_kd, without = dz_CxV, rows(student_CxV, teacher_CxV, labels_C, 0.0, loss, Vocab(V))[1]
  if loss.mixing == 'normalised' and not loss.z_loss:
    np.testing.assert_allclose(with_kd, scale / t * (jnp.exp(log_p_CxV) - jax.nn.one_hot(labels_C, V)), atol=3e-6)
  assert np.isfinite(without).all()


def test_the_student_may_give_no_mass_to_the_rest():
  """'other' with a student whose probability of everything but the kept token underflows: large, not infinite."""
  teacher_CxV = jnp.tile(jnp.asarray([2.0, 1.0, 0.0, -1.0]), (C, 1))
  student_CxV = jnp.tile(jnp.asarray([300.0, 0.0, 0.0, 0.0]), (C, 1))
  loss = LossConfig(teacher_top_k=1, rest='other')
  terms, dz_CxV = rows(student_CxV, teacher_CxV, jnp.zeros(C, int), 1.0, loss, Vocab(4))
  assert np.all(np.isfinite(terms['kd'])) and np.all(terms['kd'] > 10)
  assert np.isfinite(dz_CxV).all() and np.all(dz_CxV[:, 0] > 0.1)  # the kept token must give some back


@pytest.mark.parametrize('kind', [{'teacher_top_k': 2}, {'teacher_top_p': 0.5}, {'teacher_top_p': 1 - 1e-7}], ids=str)
def test_where_no_token_is_cut_the_truncated_loss_is_the_whole_one(kind):
  student_CxV, _, labels_C = chunk()
  teacher_CxV = jnp.zeros((C, V))  # all tie, so all stay
  whole = rows(student_CxV, teacher_CxV, labels_C, 1.0, LossConfig(), Vocab(V))
  for rest in ('other', 'renormalise'):
    terms, dz_CxV = rows(student_CxV, teacher_CxV, labels_C, 1.0, LossConfig(rest=rest, **kind), Vocab(V))
    np.testing.assert_allclose(terms['kd'], whole[0]['kd'], rtol=1e-5)
    np.testing.assert_allclose(dz_CxV, whole[1], atol=1e-6)


def test_the_other_bucket_pulls_on_the_rest_as_one_token():
  """A KL of the kept tokens and one bucket is the KL of a vocabulary with the rest summed."""
  student_CxV, teacher_CxV, labels_C = chunk()
  loss = LossConfig(teacher_top_k=4, rest='other', temperature=2.0)
  terms, _ = rows(student_CxV, teacher_CxV, labels_C, 1.0, loss, Vocab(V))
  order = np.argsort(-np.asarray(teacher_CxV), -1)
  bucketed = lambda z: np.concatenate([z[:4], [2.0 * np.log(np.exp(z[4:] / 2.0).sum())]])
  for i in range(C):
    s, t = (bucketed(np.asarray(z[i], np.float64)[order[i]]) for z in (student_CxV, teacher_CxV))
    np.testing.assert_allclose(terms['kd'][i], reference.kd(s, t, LossConfig(temperature=2.0)), rtol=1e-5)


def test_hard_labels_that_tie_share_the_mass():
  student_CxV, teacher_CxV, labels_C = chunk()
  teacher_CxV = jnp.round(teacher_CxV / 4)
  best = np.asarray(teacher_CxV == teacher_CxV.max(-1, keepdims=True))
  assert best.sum(-1).max() > 1
  terms, dz_CxV = rows(student_CxV, teacher_CxV, labels_C, 1.0, LossConfig(divergence='hard_label'), Vocab(V))
  q_CxV = best / best.sum(-1, keepdims=True)
  np.testing.assert_allclose(terms['kd'], -np.sum(q_CxV * jax.nn.log_softmax(student_CxV), -1), rtol=1e-5)
  np.testing.assert_allclose(dz_CxV, jax.nn.softmax(student_CxV) - q_CxV, atol=1e-6)


def test_the_threshold_is_the_kth_largest_value_exactly():
  key = jax.random.key(0)
  ordinary = jax.random.normal(key, (C, 300))
  cases = (
    ordinary,
    -jnp.abs(ordinary),
    1e30 * ordinary,
    1e-30 * ordinary,
    jnp.round(ordinary),
    jnp.where(ordinary > 0, ordinary, -1e30),
  )
  kth = jax.jit(lambda t, k: _threshold(t, jnp.ones_like(t), k, None))
  for t_CxV in cases:
    for k in (1, 2, 50, 299, 300):
      np.testing.assert_array_equal(kth(t_CxV, float(k))[:, 0], np.sort(t_CxV, -1)[:, -k])


def test_the_nucleus_is_the_smallest_top_set_with_the_mass():
  t_CxV = 2 * jax.random.normal(jax.random.key(0), (C, 300))
  q_CxV = np.asarray(jax.nn.softmax(t_CxV), np.float64)
  for p in (0.01, 0.5, 0.9, 0.999):
    kept = np.asarray(t_CxV >= _threshold(t_CxV, jax.nn.softmax(t_CxV), p, None))
    for row, q in zip(kept, q_CxV, strict=True):
      assert q[row].sum() >= p - 1e-6
      assert q[row].sum() - q[row].min() < p
      assert q[row].min() > q[~row].max()


def test_tempered_nll_and_top_probability_are_those_of_a_softmax():
  student_CxV, _, labels_C = chunk(v=V)
  labels_C = labels_C.at[0].set(student_CxV[0, :15].argmax()) % 15
  temperatures_K = jnp.asarray([0.3, 1.0, 2.5])
  nll_KxC = tempered_nll(student_CxV, labels_C, temperatures_K, Vocab(15))
  confidence_C, correct_C = top_probability(student_CxV, labels_C, Vocab(15))
  for i in range(C):
    s = np.asarray(student_CxV[i, :15], np.float64)
    for k, t in enumerate(temperatures_K):
      np.testing.assert_allclose(nll_KxC[k, i], -reference.log_softmax(s / float(t))[labels_C[i]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(confidence_C[i], np.exp(reference.log_softmax(s).max()), rtol=1e-5)
    assert correct_C[i] == (s.argmax() == labels_C[i])
  assert correct_C[0] == 1
