"""Truncated distillation of one token, from the definition: sort, cumulate, cut. In plain NumPy float64, independent of kdjax and of
tests/losses/reference.py.
"""

import numpy as np


def softmax(z_V):
  e_V = np.exp(z_V - np.max(z_V))
  return e_V / e_V.sum()


def nucleus(q_V, p):
  """Mark the smallest set of the likeliest tokens with mass at least p, and all ties with its last token."""
  total = 0.0
  for q in sorted(q_V, reverse=True):
    total += q
    if total >= p:
      return q_V >= q
  return np.ones(len(q_V), bool)


def largest(q_V, k):
  """Mark the k likeliest tokens, and all ties with the k-th."""
  return q_V >= sorted(q_V, reverse=True)[k - 1]


def kd_and_gradient(student_V, teacher_V, temperature, kept_V, rest):
  """Return (T^2 KL, its gradient with respect to the student's logits) for a teacher truncated to the marked tokens."""
  p_V, q_V = softmax(student_V / temperature), softmax(teacher_V / temperature)
  if rest == 'renormalise':
    q_V = np.where(kept_V, q_V, 0) / q_V[kept_V].sum()
  kl = sum(q * np.log(q / p) for q, p in zip(q_V[kept_V], p_V[kept_V], strict=True))
  pulled_V = q_V.copy()
  if rest == 'other' and not kept_V.all():
    q_rest, p_rest = q_V[~kept_V].sum(), p_V[~kept_V].sum()
    kl += q_rest * np.log(q_rest / p_rest)
    pulled_V[~kept_V] = (
      p_V[~kept_V] * q_rest / p_rest
    )  # the bucket's gradient is shared among its tokens in proportion to the student's probabilities
  return temperature**2 * kl, temperature * (p_V - pulled_V)
