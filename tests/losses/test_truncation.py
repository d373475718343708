"""Top-k and top-p of the teacher against the definition: kept tokens, values and gradients, on one device and on a mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from kdjax.config import LossConfig, MeshConfig
from kdjax.losses import LogitTargets, dense_loss, fused_loss
from kdjax.runtime import sharding
from tests.losses import truncation

FOUR = (
  2.0,
  1.0,
  0.0,
  -1.0,
)  # as probabilities, at T = 1: .644 .237 .087 .032; at 2: .455 .276 .167 .102; at 4: .350 .273 .212 .165
HAND = [  # temperature, p, size of the nucleus of FOUR
  (0.5, 0.6, 1), (0.5, 0.9, 2), (0.5, 0.99, 3),
  (1.0, 0.6, 1), (1.0, 0.65, 2), (1.0, 0.9, 3),
  (2.0, 0.45, 1), (2.0, 0.6, 2), (2.0, 0.9, 4),
  (4.0, 0.3, 1), (4.0, 0.6, 2), (4.0, 0.8, 3),
]  # fmt: skip
B, T, V = 2, 4, 32
LABELS = np.zeros((B, T), np.int32)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
CUTS = ({'teacher_top_p': 0.7}, {'teacher_top_p': 0.8, 'teacher_top_k': 3})
WEIGHTS = np.random.default_rng(7).uniform(0.5, 1.5, (B, T))


def dense(student_BxTxV, teacher_BxTxV, loss):
  """Return (sum of WEIGHTS * KD, its gradient) of the dense loss in float64."""
  with jax.enable_x64(True):
    f = jax.jit(jax.value_and_grad(lambda s, t: dense_loss(s, LABELS, jnp.asarray(WEIGHTS), 1.0, t, loss=loss)[0]))
    return jax.device_get(f(jnp.asarray(student_BxTxV), jnp.asarray(teacher_BxTxV)))


def fused(student_BxTxV, teacher_BxTxV, loss, mesh=None):
  """Return the same for the fused loss in float32: the logits are the hidden states, and the head is the identity."""
  place = lambda x: x if mesh is None else jax.device_put(x, NamedSharding(mesh, jax.P(sharding.BATCH_AXES)))
  weights = jnp.asarray(WEIGHTS, jnp.float32)
  f = jax.jit(
    jax.value_and_grad(
      lambda s, t: fused_loss(s, jnp.eye(V), LABELS, weights, 1.0, LogitTargets(t), loss=loss, chunk=3)[0]
    )
  )
  return jax.device_get(f(*(place(jnp.asarray(x, jnp.float32)) for x in (student_BxTxV, teacher_BxTxV))))


def problem(seed=0):
  return 2 * np.random.default_rng(seed).normal(size=(2, B, T, V))


def expected(student_BxTxV, teacher_BxTxV, loss):
  kept_of = lambda t_V: _kept(truncation.softmax(t_V / loss.temperature), loss)
  out = [
    truncation.kd_and_gradient(s, t, loss.temperature, kept_of(t), loss.rest)
    for s, t in zip(student_BxTxV.reshape(-1, V), teacher_BxTxV.reshape(-1, V), strict=True)
  ]
  kd, grad = zip(*out, strict=True)
  return np.dot(kd, WEIGHTS.ravel()), WEIGHTS[..., None] * np.reshape(grad, (B, T, V))


def _kept(q_V, loss):
  k = loss.teacher_top_k
  count = V if k == 0 else round(k * V) if k < 1 else int(k)
  return truncation.nucleus(q_V, loss.teacher_top_p) & truncation.largest(q_V, count)


@pytest.mark.parametrize(('temperature', 'p', 'count'), HAND)
def test_the_nucleus_is_cut_at_the_temperature_by_hand(temperature, p, count):
  q_V = truncation.softmax(np.asarray(FOUR) / temperature)
  assert truncation.nucleus(q_V, p).tolist() == [True] * count + [False] * (4 - count)
  loss = LossConfig(temperature=temperature, teacher_top_p=p)
  student, teacher = jnp.zeros((1, 1, 4)), jnp.asarray(FOUR).reshape(1, 1, 4)
  exact = temperature**2 * (np.log(4) + sum(q * np.log(q) for q in q_V[:count] / q_V[:count].sum()))
  one = jnp.ones((1, 1))
  for kd in (
    dense_loss(student, one.astype(int), one, 1.0, teacher, loss=loss)[0],
    fused_loss(student, jnp.eye(4), one.astype(int), one, 1.0, LogitTargets(teacher), loss=loss)[0],
  ):
    np.testing.assert_allclose(kd, exact, rtol=3e-6)


@pytest.mark.parametrize('rest', ['renormalise', 'other'])
@pytest.mark.parametrize('temperature', TEMPERATURES)
def test_values_and_gradients_are_those_of_the_definition(temperature, rest):
  student_BxTxV, teacher_BxTxV = problem()
  for cut in CUTS if temperature == 2 else CUTS[:1]:
    loss = LossConfig(temperature=temperature, rest=rest, **cut)
    kd, grad_BxTxV = expected(student_BxTxV, teacher_BxTxV, loss)
    for got, tolerance in (
      (dense(student_BxTxV, teacher_BxTxV, loss), 1e-9),
      (fused(student_BxTxV, teacher_BxTxV, loss), 2e-5),
    ):
      np.testing.assert_allclose(got[0], kd, rtol=tolerance, err_msg=str(loss))
      np.testing.assert_allclose(got[1], grad_BxTxV, rtol=tolerance, atol=tolerance, err_msg=str(loss))


@pytest.mark.parametrize('shape', [(1, 2, 4), (1, 1, 8)], ids=str)
def test_a_sharded_vocabulary_cuts_the_same_tokens(shape):
  student_BxTxV, teacher_BxTxV = problem(1)
  mesh = sharding.make_mesh(MeshConfig(*shape))
  for rest, temperature in itertools.product(('renormalise', 'other'), (0.5, 4.0)):
    loss = LossConfig(temperature=temperature, rest=rest, teacher_top_p=0.8, teacher_top_k=9)
    kd, grad_BxTxV = expected(student_BxTxV, teacher_BxTxV, loss)
    with jax.set_mesh(mesh):
      got = fused(student_BxTxV, teacher_BxTxV, loss, mesh)
    np.testing.assert_allclose(got[0], kd, rtol=2e-5)
    np.testing.assert_allclose(got[1], grad_BxTxV, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('cut', [{'teacher_top_k': 2}, {'teacher_top_p': 0.5}], ids=str)
def test_all_ties_with_the_last_token_kept_stay(cut):
  """Three tokens tie for second place: top-2 keeps four. Likewise, a nucleus of .5 keeps .3 + 3 x .2."""
  probabilities = np.asarray([0.3, 0.2, 0.2, 0.2, 0.06, 0.04])
  temperature = 2.0
  teacher = temperature * np.log(probabilities)
  student = np.random.default_rng(0).normal(size=6)
  kept = np.arange(6) < 4
  loss = LossConfig(temperature=temperature, **cut)
  exact, _ = truncation.kd_and_gradient(student, teacher, temperature, kept, 'renormalise')
  one = jnp.ones((1, 1))
  shaped = lambda x: jnp.asarray(x, jnp.float32).reshape(1, 1, 6)
  value, _ = dense_loss(shaped(student), one.astype(int), one, 1.0, shaped(teacher), loss=loss)
  np.testing.assert_allclose(value, exact, rtol=1e-5)
  targets = LogitTargets(shaped(teacher))
  value, _ = fused_loss(shaped(student), jnp.eye(6), one.astype(int), one, 1.0, targets, loss=loss)
  np.testing.assert_allclose(value, exact, rtol=1e-5)
