"""Truncated distillation against transformers' samplers and PyTorch's KL: the same kept tokens, loss and gradient.

transformers cuts top-p from softmax(logits / temperature), and breaks ties in its own order; there are no ties here.
"""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from jax import value_and_grad

from kdjax.config import LossConfig
from kdjax.losses import LogitTargets, fused_loss

if os.environ.get('KDJAX_REQUIRE_PARITY') == '1':
  import torch
  from transformers import TopKLogitsWarper, TopPLogitsWarper
else:
  reason = 'the reference implementations are not installed (the [parity] extra)'
  torch = pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)
  TopKLogitsWarper, TopPLogitsWarper = transformers.TopKLogitsWarper, transformers.TopPLogitsWarper

N, V = 6, 50


def theirs(student, teacher, loss):
  """Return (T^2 KL summed over the tokens, its gradient), computed by torch."""
  s = torch.tensor(student, dtype=torch.float64, requires_grad=True)
  t = torch.tensor(teacher, dtype=torch.float64) / loss.temperature
  cut = torch.zeros_like(t, dtype=torch.bool)
  if loss.teacher_top_p < 1:
    cut |= TopPLogitsWarper(loss.teacher_top_p)(None, t) == -float('inf')
  if loss.teacher_top_k:
    cut |= TopKLogitsWarper(int(loss.teacher_top_k))(None, t) == -float('inf')
  log_p, log_q = torch.log_softmax(s / loss.temperature, -1), torch.log_softmax(t, -1)
  if loss.rest == 'other':  # a vocabulary of the kept tokens plus one
    bucket = lambda x: torch.cat(
      [x.masked_fill(cut, -float('inf')), x.masked_fill(~cut, -float('inf')).logsumexp(-1, True)], -1
    )
    log_p, log_q = bucket(log_p), bucket(log_q)
    log_p = log_p.masked_fill(log_q == -float('inf'), 0)
  else:
    log_q = torch.log_softmax(t.masked_fill(cut, -float('inf')), -1)
  kl = loss.temperature**2 * torch.nn.functional.kl_div(log_p, log_q.exp(), reduction='sum')
  kl.backward()
  return kl.item(), s.grad.numpy()


def ours(student, teacher, loss):
  shaped = lambda x: jnp.asarray(x, jnp.float32)[None]
  labels, weights = jnp.zeros((1, N), int), jnp.ones((1, N))
  value = lambda s: fused_loss(s, jnp.eye(V), labels, weights, 1.0, LogitTargets(shaped(teacher)), loss=loss)[0]
  kl, grad = value_and_grad(value)(shaped(student))
  return float(kl), np.asarray(grad[0])


@pytest.mark.parametrize('rest', ['renormalise', 'other'])
@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(
  'cut', [{'teacher_top_p': 0.6}, {'teacher_top_p': 0.9}, {'teacher_top_p': 0.9, 'teacher_top_k': 5.0}], ids=str
)
def test_the_truncated_loss_is_that_of_transformers_and_torch(cut, temperature, rest):
  student, teacher = 2 * np.random.default_rng(0).normal(size=(2, N, V))
  loss = LossConfig(temperature=temperature, rest=rest, **cut)
  (kl, grad), (exact, exact_grad) = ours(student, teacher, loss), theirs(student, teacher, loss)
  np.testing.assert_allclose(kl, exact, rtol=1e-5)
  np.testing.assert_allclose(grad, exact_grad, rtol=1e-5, atol=1e-5)
