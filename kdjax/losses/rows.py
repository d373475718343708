"""The loss of a chunk of tokens and its gradient with respect to the chunk's logits, also where the vocabulary is sharded.

Each term is a function of a few sums over the vocabulary, taken relative to the row's own maximum. A shard of the vocabulary forms its
sums, one all-gather of those sums (a handful of floats a token) makes every shard know the rows' totals, and the gradient is then
elementwise in exponentials that are still at hand: one pass, no second softmax, no logits sent anywhere.

With s, t the student's and teacher's logits, m their row maxima:

    S1 = sum e^(s-m)    ST = sum e^((s-m)/T)    St = sum e^((t-m')/T)    U = sum e^((t-m')/T) (t - s)
    CE = m + log S1 - s_y
    KL = U / (T St) - (m'/T + log St) + (m/T + log ST)
    d(CE)/ds = softmax(s) - onehot(y)        d(T^2 KL)/ds = T (softmax(s/T) - softmax(t/T))

Equal logits give a KL and a gradient of exactly 0, as both sides go through the same operations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax.config import LossConfig
from kdjax.losses.dense import mixing_weights, top_k_count

MASKED = -1e30  # of a logit that does not exist: finite, so that 0 * (MASKED - MASKED) is 0
TINY = 1e-37  # the least share of a row's mass


class Vocab(NamedTuple):
  """What a shard knows of the vocabulary: its columns are [offset, offset + width) of `size` that exist."""

  size: int
  offset: jax.Array | int = 0
  axis: str | None = None  # the mesh axis over which it is sharded


class TeacherRows(NamedTuple):
  """The teacher's side of a chunk, formed once and shared by all students of a cohort."""

  t_CxV: jax.Array
  e_CxV: jax.Array  # e^((t-m)/T), 0 where not kept
  kept_CxV: jax.Array | None  # None: all
  best_CxV: jax.Array | None  # hard label: where t is this shard's maximum
  stats: dict[str, jax.Array]  # [C], of this shard


def mask_padding(logits_CxV, vocab: Vocab):
  """Logits of columns that no token has become MASKED; free where there is no padding."""
  width = logits_CxV.shape[-1]
  if vocab.axis is None and width <= vocab.size:
    return logits_CxV
  columns = vocab.offset + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
  return jnp.where(columns < vocab.size, logits_CxV, MASKED)


def teacher_rows(t_CxV, loss: LossConfig, vocab: Vocab, diagnostics: bool = True) -> TeacherRows:
  """What a chunk's losses need of the teacher, from its logits [C, V] (or [1, V]: the same for each token)."""
  hard = loss.divergence == 'hard_label'
  temp = 1.0 if hard else loss.temperature
  t_CxV = mask_padding(t_CxV, vocab)
  m_C = t_CxV.max(-1)
  kept_CxV = None if hard else _kept(t_CxV, loss, vocab)
  e_CxV, e1_CxV = _exponentials(t_CxV - m_C[:, None], temp)
  stats = {'tm': m_C, 'ts': e_CxV.sum(-1)}
  if diagnostics:
    stats['te1'] = jnp.sum(e1_CxV * (t_CxV - m_C[:, None]), -1)
    stats['ts1'] = stats['ts'] if temp == 1 else e1_CxV.sum(-1)
  best_CxV = None
  if hard:
    best_CxV = t_CxV == m_C[:, None]
    stats['tbest'] = best_CxV.sum(-1).astype(jnp.float32)
  if kept_CxV is not None:
    stats['trest'] = jnp.sum(jnp.where(kept_CxV, 0, e_CxV), -1)
    e_CxV = jnp.where(kept_CxV, e_CxV, 0)
    stats['tkept'] = e_CxV.sum(-1)
  return TeacherRows(t_CxV, e_CxV, kept_CxV, best_CxV, stats)


def mixed_rows(
  s_CxV, labels_C, alpha, teacher: TeacherRows | None, loss: LossConfig, vocab: Vocab, *, diagnostics: bool = True
):
  """Terms of each token and the gradient of the mixed loss.

  Args:
    s_CxV: the student's logits, float32, this shard's columns.
    labels_C: the next tokens, as ids of the whole vocabulary.
    alpha: scalar.
    teacher: from `teacher_rows`, or None for the LM loss.
    diagnostics: also give both entropies and the top-1 agreement.

  Returns:
    (terms, dz): a dict of [C] arrays in nats with 'loss' and 'ce' (and 'kd', ...), equal on all shards; and a function that gives
    dL/ds, [C, V] of this shard.
  """
  temp = loss.temperature
  ce_weight, kd_weight = mixing_weights(alpha, loss, teacher is not None)
  s_CxV = mask_padding(s_CxV, vocab)
  m_C = s_CxV.max(-1)
  distils = teacher is not None and loss.divergence == 'forward_kl'
  eT_CxV, e1_CxV = _exponentials(s_CxV - m_C[:, None], temp if distils else 1.0)
  y_C, has_y_C = _local(labels_C, vocab, s_CxV.shape[-1])
  stats = {'m': m_C, 's1': e1_CxV.sum(-1)}
  stats['sy'] = jnp.where(has_y_C, jnp.take_along_axis(s_CxV, y_C[:, None], -1)[:, 0], 0)
  if diagnostics:
    stats['e1'] = jnp.sum(e1_CxV * (s_CxV - m_C[:, None]), -1)
  if distils and temp != 1:
    stats['sT'] = eT_CxV.sum(-1)
  if teacher is not None:
    stats |= {k: jnp.broadcast_to(v, m_C.shape) for k, v in teacher.stats.items()}
    if distils:
      stats['u'] = jnp.sum(teacher.e_CxV * (teacher.t_CxV - s_CxV), -1)
      if loss.rest == 'other' and teacher.kept_CxV is not None:
        stats['srest'] = jnp.sum(jnp.where(teacher.kept_CxV, 0, eT_CxV), -1)
    else:
      assert teacher.best_CxV is not None
      stats['sbest'] = jnp.sum(jnp.where(teacher.best_CxV, s_CxV, 0), -1)
    if diagnostics:  # the student's best logit among the teacher's best: agreement without an argmax
      stats['agree'] = jnp.where(teacher.t_CxV == teacher.stats['tm'][:, None], s_CxV, 2 * MASKED).max(-1)

  row, mine = _merge(stats, temp if distils else 1.0, vocab.axis)
  lse_C = row['m'] + jnp.log(row['s1'])
  terms = {'ce': lse_C - row['sy']}
  total_C = ce_weight * terms['ce']
  if loss.z_loss:
    total_C += loss.z_loss * lse_C**2
  if teacher is not None:
    terms['kd'] = _forward_kl(row, loss) if distils else lse_C - row['sbest'] / row['tbest']
    total_C += kd_weight * terms['kd']
  if diagnostics:
    terms['student_entropy'] = jnp.log(row['s1']) - row['e1'] / row['s1']
    if teacher is not None:
      terms['teacher_entropy'] = jnp.log(row['ts1']) - row['te1'] / row['ts1']
      terms['agreement'] = row['agree']
  terms['loss'] = total_C

  def dz_CxV():
    columns = jax.lax.broadcasted_iota(jnp.int32, s_CxV.shape, 1)
    onehot_CxV = (columns == jnp.where(has_y_C, y_C, -1)[:, None]).astype(jnp.float32)
    p_CxV = e1_CxV * (mine['m'] / row['s1'])[:, None]
    grad_CxV = ce_weight * (p_CxV - onehot_CxV)
    if loss.z_loss:
      grad_CxV += (2 * loss.z_loss * lse_C)[:, None] * p_CxV
    if teacher is None:
      return grad_CxV
    if not distils:
      q_CxV = teacher.best_CxV * (mine['best'] / row['tbest'])[:, None]
      return grad_CxV + kd_weight * (p_CxV - q_CxV)
    theirs_C = row['ts' if loss.rest == 'other' or teacher.kept_CxV is None else 'tkept']
    student_CxV = eT_CxV
    if loss.rest == 'other' and teacher.kept_CxV is not None:  # the rest's tokens share the gradient of the one bucket
      ratio_C = jnp.where(row['trest'] > 0, _share(row['trest'], row['ts']) / _share(row['srest'], row['sT']), 0)
      student_CxV = eT_CxV * jnp.where(teacher.kept_CxV, 1.0, 1.0 - ratio_C[:, None])
    # softmax(s/T) - softmax(t/T) as f (a e^s - b e^t), where equal models have a = b = 1 and so exactly 0, whatever the compiler
    # does to the parts: of a difference of other products a fused multiply-add would round only one.
    most_C = jnp.maximum(mine['d'], mine['td'])
    a_C, b_C = jnp.exp((mine['d'] - most_C) / temp), jnp.exp((mine['td'] - most_C) / temp) * (row['sT'] / theirs_C)
    difference_CxV = a_C[:, None] * student_CxV - b_C[:, None] * teacher.e_CxV
    difference_CxV *= (jnp.exp(most_C / temp) / row['sT'])[:, None]
    return grad_CxV + (kd_weight * temp) * difference_CxV

  return terms, dz_CxV


def tempered_nll(s_CxV, labels_C, temperatures_K, vocab: Vocab):
  """Negative log-likelihood [K, C] of the labels at each of K evaluation temperatures, `softmax(s / temperature)`."""
  s_CxV = mask_padding(s_CxV, vocab)
  y_C, has_y_C = _local(labels_C, vocab, s_CxV.shape[-1])
  sy_C = jnp.where(has_y_C, jnp.take_along_axis(s_CxV, y_C[:, None], -1)[:, 0], 0)
  m_C = s_CxV.max(-1)

  def at(temperature):
    row, _ = _merge(
      {'m': m_C, 'sT': jnp.exp((s_CxV - m_C[:, None]) / temperature).sum(-1), 'sy': sy_C}, temperature, vocab.axis
    )
    return (row['m'] - row['sy']) / temperature + jnp.log(row['sT'])

  return jax.lax.map(at, temperatures_K)


def top_probability(s_CxV, labels_C, vocab: Vocab):
  """(the greatest probability [C], 1.0 where the label has it [C]): what calibration needs."""
  s_CxV = mask_padding(s_CxV, vocab)
  y_C, has_y_C = _local(labels_C, vocab, s_CxV.shape[-1])
  sy_C = jnp.where(has_y_C, jnp.take_along_axis(s_CxV, y_C[:, None], -1)[:, 0], 0)
  m_C = s_CxV.max(-1)
  row, _ = _merge({'m': m_C, 's1': jnp.exp(s_CxV - m_C[:, None]).sum(-1), 'sy': sy_C}, 1.0, vocab.axis)
  return 1 / row['s1'], (row['sy'] == row['m']).astype(jnp.float32)


def _exponentials(d_CxV, temperature: float):
  """(e^(d/T), e^d). The compiler turns powers of an exponential back into exponentials, so at T != 1 there are two of them."""
  e1_CxV = jnp.exp(d_CxV)
  return (e1_CxV if temperature == 1 else jnp.exp(d_CxV / temperature)), e1_CxV


def _local(labels_C, vocab: Vocab, width: int):
  """(column of the label in this shard, whether it is there)."""
  y_C = labels_C - vocab.offset
  has_y_C = (y_C >= 0) & (y_C < width)
  return jnp.where(has_y_C, y_C, 0), has_y_C


def _merge(stats: dict[str, jax.Array], temperature, axis: str | None):
  """Every shard's sums -> (the rows' totals, how this shard stands to the rows' maxima), with one all-gather."""
  stacked_kxC = jnp.stack(list(stats.values()))
  gathered_nxkxC = stacked_kxC[None] if axis is None else jax.lax.all_gather(stacked_kxC, axis)
  part = {name: gathered_nxkxC[:, i] for i, name in enumerate(stats)}
  m_C = part['m'].max(0)
  d_nxC = part['m'] - m_C
  scale_nxC, scaleT_nxC = jnp.exp(d_nxC), jnp.exp(d_nxC / temperature)
  row = {'m': m_C, 'sy': part['sy'].sum(0)}
  mine = {'m': jnp.exp(stats['m'] - m_C), 'd': stats['m'] - m_C}
  if 's1' in part:
    row['s1'] = jnp.sum(part['s1'] * scale_nxC, 0)
  if 'e1' in part:
    row['e1'] = jnp.sum((part['e1'] + d_nxC * part['s1']) * scale_nxC, 0)
  if 'sT' in part:
    row['sT'] = jnp.sum(part['sT'] * scaleT_nxC, 0)
  else:
    row['sT'] = row['s1']
  if 'srest' in part:
    row['srest'] = jnp.sum(part['srest'] * scaleT_nxC, 0)
  if 'tm' in part:
    tm_C = part['tm'].max(0)
    td_nxC = part['tm'] - tm_C
    tscale_nxC, tscaleT_nxC = jnp.exp(td_nxC), jnp.exp(td_nxC / temperature)
    mine |= {'td': stats['tm'] - tm_C, 'best': (stats['tm'] == tm_C).astype(jnp.float32)}
    row['tm'] = tm_C
    for name in part.keys() & {'ts', 'tkept', 'trest', 'u'}:
      row[name] = jnp.sum(part[name] * tscaleT_nxC, 0)
    if 'te1' in part:
      row['ts1'] = jnp.sum(part['ts1'] * tscale_nxC, 0)
      row['te1'] = jnp.sum((part['te1'] + td_nxC * part['ts1']) * tscale_nxC, 0)
    top_nxC = part['tm'] == tm_C
    for name in part.keys() & {'tbest', 'sbest'}:
      row[name] = jnp.sum(jnp.where(top_nxC, part[name], 0), 0)
    if 'agree' in part:
      row['agree'] = (jnp.where(top_nxC, part['agree'], 2 * MASKED).max(0) == m_C).astype(jnp.float32)
  return row, mine


def _forward_kl(row, loss: LossConfig):
  """T^2 KL(teacher_T || student_T) [C] from the rows' totals."""
  temp = loss.temperature
  truncated = 'tkept' in row
  total_C = row['ts'] if not truncated or loss.rest == 'other' else row['tkept']
  log_ratio_C = (row['m'] / temp + jnp.log(row['sT'])) - (row['tm'] / temp + jnp.log(total_C))
  if not truncated or loss.rest == 'renormalise':
    return temp**2 * (row['u'] / (temp * total_C) + log_ratio_C)
  kl_C = row['u'] / (temp * total_C) + row['tkept'] / total_C * log_ratio_C
  q_C, p_C = _share(row['trest'], total_C), _share(row['srest'], row['sT'])
  return temp**2 * (kl_C + jnp.where(row['trest'] > 0, q_C * (jnp.log(q_C) - jnp.log(p_C)), 0))


def _share(part_C, whole_C):
  return jnp.maximum(part_C / whole_C, TINY)


def _kept(t_CxV, loss: LossConfig, vocab: Vocab):
  """Mark the tokens that the truncated teacher keeps (the rule: losses/dense.py); None: all."""
  count = top_k_count(loss, vocab.size)
  kept_CxV = None
  if count < vocab.size:
    kept_CxV = t_CxV >= _threshold(t_CxV, jnp.ones_like(t_CxV), float(count), vocab.axis)
  if loss.teacher_top_p < 1:
    m_C = t_CxV.max(-1) if vocab.axis is None else jax.lax.pmax(t_CxV.max(-1), vocab.axis)
    e_CxV = jnp.exp((t_CxV - m_C[:, None]) / loss.temperature)
    whole_C = e_CxV.sum(-1) if vocab.axis is None else jax.lax.psum(e_CxV.sum(-1), vocab.axis)
    nucleus_CxV = t_CxV >= _threshold(t_CxV, e_CxV / whole_C[:, None], loss.teacher_top_p, vocab.axis)
    kept_CxV = nucleus_CxV if kept_CxV is None else kept_CxV & nucleus_CxV
  return kept_CxV


def _threshold(t_CxV, mass_CxV, least: float, axis: str | None):
  """The largest x [C, 1] for which the mass of {t >= x} is at least `least`: exact, without a sort, over a sharded vocabulary as well.

  Builds the float's bit pattern from the top, in the order in which unsigned integers sort like floats.
  """

  def mass_from(key_C):
    sign = jnp.uint32(0x80000000)
    bits_C = jnp.where(key_C & sign, key_C ^ sign, ~key_C)
    x_C = jax.lax.bitcast_convert_type(bits_C, jnp.float32)
    mass_C = jnp.sum(jnp.where(t_CxV >= x_C[:, None], mass_CxV, 0), -1)
    return (mass_C if axis is None else jax.lax.psum(mass_C, axis)), x_C

  whole_C, _ = mass_from(jnp.full(t_CxV.shape[:1], 0x00800000, jnp.uint32))  # from the lowest finite float: everything
  need_C = jnp.minimum(least, whole_C)

  def set_bit(i, key_C):
    tried_C = key_C | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
    return jnp.where(mass_from(tried_C)[0] >= need_C, tried_C, key_C)

  key_C = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(t_CxV.shape[:1], jnp.uint32))
  return mass_from(key_C)[1][:, None]
