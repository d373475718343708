"""The mixed loss on whole logits: short, differentiable, in any precision. The reference for the fused loss, and good for small vocabularies.

    L = (1 - alpha) * CE(student, labels) + alpha * T^2 * KL(teacher_T || student_T)

Source: Hinton et al. 2015 (T^2); Lu & Liu 2026 (the mixing and its variants).
"""

import jax
import jax.numpy as jnp

from kdjax.config import LossConfig


def dense_loss(
  student_BxTxV, labels_BxT, weights_BxT, alpha=0.0, teacher_BxTxV=None, *, loss: LossConfig = LossConfig()
):
  """Weighted sum of the mixed loss over tokens.

  Args:
    student_BxTxV: the student's logits, over the tokens that exist (cut vocabulary padding off before).
    labels_BxT: int, the next tokens; any value where the weight is 0.
    weights_BxT: normalised by the caller, `mask / mask.sum()` for a token mean.
    alpha: the share of the KD term, a scalar.
    teacher_BxTxV: the teacher's logits, or None for the LM loss alone.
    loss: the kind of KD, its temperature and how the two are mixed.

  Returns:
    (loss, sums): a scalar and a dict of weighted sums in nats (`ce`, `kd`, `student_entropy`, ...), as the fused loss gives.
  """
  ce_weight, kd_weight = mixing_weights(alpha, loss, teacher_BxTxV is not None)
  log_p = jax.nn.log_softmax(student_BxTxV)
  lse = jax.nn.logsumexp(student_BxTxV, axis=-1)
  real = weights_BxT != 0
  labels = jnp.where(real, labels_BxT, 0)
  terms = {
    'ce': -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0],
    'student_entropy': -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
  }
  total = ce_weight * terms['ce'] + loss.z_loss * lse**2
  if teacher_BxTxV is not None:
    log_q = jax.nn.log_softmax(teacher_BxTxV)
    terms['kd'] = _kd(student_BxTxV, teacher_BxTxV, loss)
    terms['teacher_entropy'] = -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
    terms['agreement'] = (student_BxTxV.argmax(-1) == teacher_BxTxV.argmax(-1)).astype(lse.dtype)
    total = total + kd_weight * terms['kd']
  weighted = lambda x: jnp.sum(jnp.where(real, x, 0) * weights_BxT)
  return weighted(total), {k: jax.lax.stop_gradient(weighted(v)) for k, v in terms.items()}


def mixing_weights(alpha, loss: LossConfig, distilled: bool = True):
  """The weights of CE and KD for this alpha; (1, 0) without a teacher."""
  if not distilled:
    return 1.0, 0.0
  return {
    'normalised': (1.0 - alpha, alpha),
    'ce_plus_alpha_kd': (1.0, alpha),
    'one_minus_alpha_ce_plus_kd': (1.0 - alpha, 1.0),
  }[loss.mixing]


def top_k_count(loss: LossConfig, vocab_size: int) -> int:
  """How many teacher tokens are kept: `teacher_top_k` is a count, or below 1 a share of the vocabulary; 0 keeps all."""
  k = loss.teacher_top_k
  return vocab_size if k == 0 else min(vocab_size, max(1, round(k * vocab_size) if k < 1 else int(k)))


def _kd(student_BxTxV, teacher_BxTxV, loss: LossConfig):
  """The KD term of each token, [B, T]."""
  if loss.kd == 'hard_label':  # CE to the teacher's argmax; tokens that tie share it
    best = teacher_BxTxV == teacher_BxTxV.max(-1, keepdims=True)
    q = best / best.sum(-1, keepdims=True)
    return -jnp.sum(q * jax.nn.log_softmax(student_BxTxV), axis=-1)
  t = loss.temperature
  kept = _kept(teacher_BxTxV, loss)
  log_p = jax.nn.log_softmax(student_BxTxV / t)
  log_q = jax.nn.log_softmax(teacher_BxTxV / t)
  if loss.rest == 'renormalise':
    log_q = jax.nn.log_softmax(jnp.where(kept, teacher_BxTxV / t, -jnp.inf))
  kl = jnp.sum(jnp.where(kept, jnp.exp(log_q) * (jnp.where(kept, log_q, 0) - log_p), 0), axis=-1)
  if loss.rest == 'other':
    log_q_rest, log_p_rest = (jax.nn.logsumexp(jnp.where(kept, -jnp.inf, x), axis=-1) for x in (log_q, log_p))
    some = jnp.isfinite(log_q_rest)  # nothing is left over where all tokens are kept
    log_q_rest, log_p_rest = jnp.where(some, log_q_rest, 0), jnp.where(some, log_p_rest, 0)
    kl = kl + jnp.where(some, jnp.exp(log_q_rest) * (log_q_rest - log_p_rest), 0)
  return t**2 * kl


def _kept(teacher_BxTxV, loss: LossConfig):
  """Which tokens the truncated teacher keeps: at least the k-th largest logit, and the smallest top set with mass >= p. Ties stay."""
  vocab = teacher_BxTxV.shape[-1]
  descending = -jnp.sort(-teacher_BxTxV, axis=-1)
  kept = teacher_BxTxV >= descending[..., top_k_count(loss, vocab) - 1, None]
  if loss.teacher_top_p < 1:
    mass_before = jnp.cumsum(jax.nn.softmax(descending), axis=-1) - jax.nn.softmax(descending)
    last = jnp.sum(mass_before < loss.teacher_top_p, axis=-1, keepdims=True) - 1
    kept &= teacher_BxTxV >= jnp.take_along_axis(descending, last, axis=-1)
  return kept
