"""The mixed loss of one token at a time in plain NumPy float64, from the formulas, and the problems that the tests share."""

import math

import jax
import jax.numpy as jnp
import numpy as np

ALPHAS = (0.0, 0.2, 0.5, 1.0)


def log_softmax(z_V):
  z_V = np.asarray(z_V, np.float64)
  return z_V - z_V.max() - math.log(np.exp(z_V - z_V.max()).sum())


def kept(teacher_V, loss):
  """Indices of the teacher's tokens that truncation keeps; no ties here."""
  order = np.argsort(-teacher_V)
  k = loss.teacher_top_k
  count = len(order) if k == 0 else max(1, round(k * len(order)) if k < 1 else int(k))
  if loss.teacher_top_p < 1:
    mass = np.exp(log_softmax(teacher_V / loss.temperature))[order]
    n, total = 0, 0.0
    while total < loss.teacher_top_p and n < len(order):
      total, n = total + mass[n], n + 1
    count = min(count, n)
  return order[:count]


def kd(student_V, teacher_V, loss):
  if loss.divergence == 'hard_label':
    return -log_softmax(student_V)[np.argmax(teacher_V)]
  t = loss.temperature
  p, q = np.exp(log_softmax(student_V / t)), np.exp(log_softmax(teacher_V / t))
  keep = kept(teacher_V, loss)
  rest = np.setdiff1d(np.arange(len(p)), keep)
  if loss.rest == 'renormalise':
    q = q / q[keep].sum()
  total = sum(q[i] * math.log(q[i] / p[i]) for i in keep)
  if loss.rest == 'other' and len(rest):
    total += q[rest].sum() * math.log(q[rest].sum() / p[rest].sum())
  return t**2 * total


def token(student_V, label, alpha, teacher_V, loss):
  """The mixed loss of one token."""
  log_p = log_softmax(student_V)
  z = loss.z_loss * (student_V.max() + math.log(np.exp(student_V - student_V.max()).sum())) ** 2
  if teacher_V is None:
    return -log_p[label] + z
  weights = {
    'normalised': (1 - alpha, alpha),
    'ce_plus_alpha_kd': (1, alpha),
    'one_minus_alpha_ce_plus_kd': (1 - alpha, 1),
  }[loss.mixing]
  return weights[0] * -log_p[label] + weights[1] * kd(student_V, teacher_V, loss) + z


def total(student_BxTxV, labels_BxT, weights_BxT, alpha, teacher_BxTxV, loss):
  """The weighted sum over tokens."""
  return sum(
    weights_BxT[i]
    * token(student_BxTxV[i], labels_BxT[i], alpha, None if teacher_BxTxV is None else teacher_BxTxV[i], loss)
    for i in np.ndindex(labels_BxT.shape)
    if weights_BxT[i]
  )


def problem(b=2, t=11, d=8, dt=12, v=24, dtype=jnp.float32, seed=0):
  """(hidden, head, teacher's hidden, teacher's head, labels); teacher and student differ enough for the KL to be well conditioned."""
  keys = jax.random.split(jax.random.key(seed), 5)
  shapes = ((b, t, d), (d, v), (b, t, dt), (dt, v))
  x, w, xt, wt = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
  return *(a.astype(dtype) for a in (x, w, xt, wt)), jax.random.randint(keys[4], (b, t), 0, v)


def masks(b, t):
  """Normalised token weights: all tokens, some, one row gone, one token left."""
  everything, row, one = np.ones((b, t)), np.ones((b, t)), np.zeros((b, t))
  some = np.random.default_rng(1).random((b, t)) < 0.6
  row[0], one[-1, 2] = 0, 1
  return [jnp.asarray(m / m.sum(), jnp.float32) for m in (everything, some, row, one)]


def f64(tree):
  """The same values in float64; inside `jax.enable_x64`."""
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x.astype(jnp.float32)), jnp.float64), tree)


def relative_error(value, exact):
  """|value - exact| / |exact| as norms over all entries, in float64."""
  value, exact = (np.asarray(x).astype(np.float64) for x in (value, exact))
  return np.linalg.norm(value - exact) / max(np.linalg.norm(exact), 1e-300)


def assert_close(value, exact, tolerance=1e-6, note=''):
  """Norm-wise, leaf by leaf; what is exactly 0 must be exactly 0."""
  assert jax.tree.structure(value) == jax.tree.structure(exact)
  for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(value), jax.tree.leaves(exact), strict=True):
    error = relative_error(got, want)
    assert error <= tolerance, f'{jax.tree_util.keystr(path)}: relative error {error:.2e} {note}'


def assert_same_bits(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), (
      f'{jax.tree_util.keystr(path)} differs by {np.abs(x - y).max()}'
    )
