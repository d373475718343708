"""The mixed loss on whole logits: short, differentiable, in any precision. The reference for the fused loss, and good for small vocabularies.

    L = (1 - alpha) * CE(student, labels) + alpha * T^2 * KL(teacher_T || student_T)

Source: Hinton et al. 2015 (T^2); Lu & Liu 2026 (the mixing and its variants).
"""

import functools

import jax
import jax.numpy as jnp

from kdjax.config import LossConfig
from kdjax.losses import inputs

LEAST = -1e30  # replaces a teacher's logit of -inf: finite, so that 0 times a difference of logits is 0


def dense_loss(
  student_BxTxV,
  labels_BxT,
  weights_BxT,
  alpha=0.0,
  teacher_BxTxV=None,
  *,
  loss: LossConfig = LossConfig(),
  diagnostics: bool = True,
):
  """Weighted sum of the mixed loss over tokens.

  Args:
    student_BxTxV: the student's logits, over the tokens that exist (cut vocabulary padding off before).
    labels_BxT: int, the next tokens; any value where the weight is 0.
    weights_BxT: normalised by the caller, `mask / mask.sum()` for a token mean.
    alpha: the share of the KD term, a scalar.
    teacher_BxTxV: the teacher's logits, or None for the LM loss alone.
    loss: the kind of KD, its temperature and how the two are mixed.
    diagnostics: also return entropies and top-1 agreement.

  Returns:
    (loss, sums): a scalar and a dict of weighted sums in nats (`ce`, `kd`, `student_entropy`, ...), as the fused loss gives.

  Raises:
    UserError: arguments do not fit together, or a label with a nonzero weight is outside the vocabulary. Under `jax.jit` label values
      are unknown, so such a label makes the loss and its gradient NaN.
  """
  labels_BxT, weights_BxT = _check(student_BxTxV, labels_BxT, weights_BxT, alpha, teacher_BxTxV, loss)
  return _loss_and_sums(student_BxTxV, labels_BxT, weights_BxT, alpha, teacher_BxTxV, loss, diagnostics)


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


def _check(student_BxTxV, labels_BxT, weights_BxT, alpha, teacher_BxTxV, loss) -> tuple[jax.Array, jax.Array]:
  """Check the arguments; return labels and weights (losses/inputs.py)."""
  inputs.check_settings(loss)
  sizes: inputs.Sizes = {}
  inputs.check_array('student_BxTxV', student_BxTxV, 'floating', sizes)
  if teacher_BxTxV is not None:
    inputs.check_array('teacher_BxTxV', teacher_BxTxV, 'floating', sizes)
  inputs.check_alpha('alpha', alpha, loss)
  return inputs.check_tokens(labels_BxT, weights_BxT, student_BxTxV.shape[-1], sizes)


@functools.partial(jax.jit, static_argnums=(5, 6), inline=True)  # one program for callers outside a jit too
def _loss_and_sums(student_BxTxV, labels_BxT, weights_BxT, alpha, teacher_BxTxV, loss: LossConfig, diagnostics: bool):
  real_BxT = weights_BxT != 0
  student_BxTxV = jnp.where(real_BxT[..., None], student_BxTxV, 0)
  ce_weight, kd_weight = mixing_weights(alpha, loss, teacher_BxTxV is not None)
  lse_BxT = jax.nn.logsumexp(student_BxTxV, axis=-1)
  picked = jnp.clip(labels_BxT, 0, student_BxTxV.shape[-1] - 1)[..., None]
  terms = {'ce': lse_BxT - jnp.take_along_axis(student_BxTxV, picked, axis=-1)[..., 0]}
  total_BxT = ce_weight * terms['ce']
  if loss.z_loss:
    total_BxT += loss.z_loss * lse_BxT**2
  if teacher_BxTxV is not None:
    teacher_BxTxV = jnp.maximum(jnp.where(real_BxT[..., None], teacher_BxTxV, 0), LEAST)
    terms['kd'] = _kd(student_BxTxV, teacher_BxTxV, lse_BxT, loss)
    total_BxT += kd_weight * terms['kd']
  if diagnostics:
    terms |= _diagnostics(*jax.lax.stop_gradient((student_BxTxV, lse_BxT, teacher_BxTxV)))
  weighted = lambda x_BxT: jnp.sum(jnp.where(real_BxT, x_BxT, 0) * weights_BxT)
  return weighted(total_BxT), {name: jax.lax.stop_gradient(weighted(term)) for name, term in terms.items()}


def _kd(student_BxTxV, teacher_BxTxV, lse_BxT, loss: LossConfig):
  """Compute the KD term of each token, [B, T]; `lse_BxT` normalises the student at temperature 1."""
  if loss.divergence == 'hard_label':  # CE to the teacher's argmax; tokens that tie share it
    best = teacher_BxTxV == teacher_BxTxV.max(-1, keepdims=True)
    return lse_BxT - jnp.sum(jnp.where(best, student_BxTxV, 0), axis=-1) / best.sum(-1)
  s_BxTxV, t_BxTxV = student_BxTxV / loss.temperature, teacher_BxTxV / loss.temperature
  lse_p_BxT = lse_BxT if loss.temperature == 1 else jax.nn.logsumexp(s_BxTxV, axis=-1)
  kept = _kept(t_BxTxV, loss)
  shared = t_BxTxV if kept is None or loss.rest == 'other' else jnp.where(kept, t_BxTxV, -jnp.inf)
  lse_q_BxT = jax.nn.logsumexp(shared, axis=-1)
  q_BxTxV = jnp.exp(t_BxTxV - lse_q_BxT[..., None])
  kl_BxTxV = q_BxTxV * ((t_BxTxV - s_BxTxV) + (lse_p_BxT - lse_q_BxT)[..., None])
  if kept is None:
    return loss.temperature**2 * kl_BxTxV.sum(-1)
  kl_BxT = jnp.sum(jnp.where(kept, kl_BxTxV, 0), axis=-1)
  if loss.rest == 'other':
    log_q_BxT, log_p_BxT = (jax.nn.logsumexp(jnp.where(kept, -jnp.inf, x), axis=-1) for x in (t_BxTxV, s_BxTxV))
    some = jnp.isfinite(log_q_BxT)  # False if all tokens are kept, so nothing is left over
    log_q_BxT, log_p_BxT = jnp.where(some, log_q_BxT - lse_q_BxT, 0), jnp.where(some, log_p_BxT - lse_p_BxT, 0)
    kl_BxT += jnp.where(some, jnp.exp(log_q_BxT) * (log_q_BxT - log_p_BxT), 0)
  return loss.temperature**2 * kl_BxT


def _kept(t_BxTxV, loss: LossConfig):
  """Mark the tokens that the truncated teacher keeps, given its logits divided by the temperature; None: all.

  Top-k keeps logits of at least the k-th largest. Top-p keeps the smallest top set with mass >= p. With both, a token must be in both sets.
  Ties are kept.
  """
  vocab = t_BxTxV.shape[-1]
  t_BxTxV = jax.lax.stop_gradient(t_BxTxV)
  least = []
  if (count := top_k_count(loss, vocab)) < vocab:
    least.append(
      jax.lax.top_k(t_BxTxV, count)[0].min(-1, keepdims=True)
    )  # min, because XLA's CPU backend turns a slice of top_k into a full sort
  if loss.teacher_top_p < 1:
    descending = jnp.sort(t_BxTxV, axis=-1, descending=True)
    mass = jax.nn.softmax(descending, axis=-1)
    last = jnp.sum(jnp.cumsum(mass, axis=-1) - mass < loss.teacher_top_p, axis=-1, keepdims=True) - 1
    least.append(jnp.take_along_axis(descending, last, axis=-1))
  return jnp.all(jnp.stack([t_BxTxV >= x for x in least]), axis=0) if least else None


def _diagnostics(student_BxTxV, lse_BxT, teacher_BxTxV):
  """Compute each token's entropies and top-1 agreement. If tokens tie for the teacher's best, any of them agrees."""
  entropy = lambda z, lse: -jnp.sum(jnp.exp(z - lse[..., None]) * (z - lse[..., None]), axis=-1)
  terms = {'student_entropy': entropy(student_BxTxV, lse_BxT)}
  if teacher_BxTxV is not None:
    best = teacher_BxTxV == teacher_BxTxV.max(-1, keepdims=True)
    agrees_BxT = jnp.where(best, student_BxTxV, -jnp.inf).max(-1) == student_BxTxV.max(-1)
    terms['teacher_entropy'] = entropy(teacher_BxTxV, jax.nn.logsumexp(teacher_BxTxV, axis=-1))
    terms['agreement'] = agrees_BxT.astype(lse_BxT.dtype)
  return terms
