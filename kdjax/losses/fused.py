"""The mixed loss from hidden states and head weights: logits exist for one chunk of tokens at a time, and their gradient with them.

A scan over chunks of tokens forms the teacher's and the students' logits, the loss's rows (kdjax/losses/rows.py) and, in the same pass, the
gradients with respect to the students' hidden states and heads. The backward pass has nothing left to recompute: it scales by the
cotangent. Matrix products: three for a student, one for the teacher, the least there can be. Accumulation is in float32, whatever the
dtypes, so the head's gradient does not depend on the number of chunks.

Limits: the loss is linear in its tokens, with weights normalised by the caller (over all microbatches and devices); reverse mode only;
keep it outside `jax.checkpoint`, which would run it twice.

On a mesh it runs under `shard_map`: tokens over (replica, fsdp), vocabulary over tensor. The loop holds one small all-gather where the
vocabulary is sharded and no collective where it is not; weights are gathered once before it and gradients reduced once after it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kdjax.config import LossConfig
from kdjax.errors import UserError
from kdjax.losses import inputs
from kdjax.losses.chunks import cache_rows, chunk_tokens, evaluation_tokens
from kdjax.losses.rows import Vocab, mixed_rows, teacher_rows, tempered_nll, top_probability
from kdjax.losses.targets import Targets
from kdjax.runtime import sharding


class Student(NamedTuple):
  """One student of a cohort: hidden states [B, T, D], head [D, V], its alpha, and which of the targets it learns from (None: none)."""

  hidden_BxTxD: Any
  head_DxV: Any
  alpha: Any = 0.0
  target: int | None = None


class _Static(NamedTuple):
  """What the compiled program depends on."""

  loss: LossConfig
  vocab_size: int
  chunk: int
  target: tuple[int | None, ...]
  diagnostics: bool
  mesh: Any


def fused_loss(
  hidden_BxTxD,
  head_DxV,
  labels_BxT,
  weights_BxT,
  alpha=0.0,
  targets: Targets | None = None,
  *,
  loss: LossConfig = LossConfig(),
  vocab_size: int | None = None,
  chunk: int | None = None,
  diagnostics: bool = True,
):
  """Weighted sum of the mixed loss over tokens, as `dense_loss` on `hidden @ head`, without the logits.

  Args:
    hidden_BxTxD: the student's hidden states; their dtype is the dtype of the matrix products.
    head_DxV: the student's head; its gradient comes back in its own dtype, accumulated in float32.
    labels_BxT: int, the next tokens; any value where the weight is 0.
    weights_BxT: normalised by the caller, `mask / mask.sum()` for a token mean.
    alpha: the share of the KD term, a (traced) scalar.
    targets: the teacher's side (kdjax/losses/targets.py); None for the LM loss.
    loss: the kind of KD, its temperature, the mixing; all static.
    vocab_size: how many columns are tokens; what is beyond is padding. None: all.
    chunk: tokens a chunk on one device; None: from `loss.chunk_tokens` or the memory budget `loss.chunk_megabytes`.
    diagnostics: also give entropies and top-1 agreement.

  Returns:
    (loss, sums): a scalar, differentiable in hidden and head, and a dict of weighted sums in nats, without gradient.

  Raises:
    UserError: arguments do not fit together, or a label with a nonzero weight is outside the vocabulary. Under `jax.jit` label values
      are unknown, so such a label makes the loss and its gradient NaN.
  """
  student = Student(hidden_BxTxD, head_DxV, alpha, None if targets is None else 0)
  return fused_losses(
    [student],
    labels_BxT,
    weights_BxT,
    [] if targets is None else [targets],
    loss=loss,
    vocab_size=vocab_size,
    chunk=chunk,
    diagnostics=diagnostics,
  )[0]


def fused_losses(
  students: Sequence[Student],
  labels_BxT,
  weights_BxT,
  targets: Sequence[Targets] = (),
  *,
  loss: LossConfig = LossConfig(),
  vocab_size: int | None = None,
  chunk: int | None = None,
  diagnostics: bool = True,
) -> list[tuple[jax.Array, dict[str, jax.Array]]]:
  """The losses of a cohort on the same tokens: each target's logits are formed once a chunk, for all students. See `fused_loss`."""
  sizes = inputs.check_cohort(students, targets, loss, vocab_size, chunk)
  width = sizes['V'][0]
  vocab_size = vocab_size or width
  labels_BxT, weights_BxT = inputs.check_tokens(labels_BxT, weights_BxT, vocab_size, sizes)
  targets = tuple(_fit_vocabulary(target, vocab_size, width) for target in targets)
  mesh = sharding.mesh_in_use()
  n_tokens = labels_BxT.size // (1 if mesh is None else sharding.n_row_shards(mesh))
  columns = width // (1 if mesh is None else mesh.shape['tensor'])
  static = _Static(
    loss=loss,
    vocab_size=vocab_size,
    chunk=chunk or chunk_tokens(loss, n_tokens, columns, len(students)),
    target=tuple(s.target for s in students),
    diagnostics=diagnostics,
    mesh=mesh,
  )
  operands = (labels_BxT, weights_BxT, tuple(jnp.asarray(s.alpha, jnp.float32) for s in students), targets)
  return _losses(static, tuple((s.hidden_BxTxD, s.head_DxV) for s in students), jax.lax.stop_gradient(operands))


def token_losses(
  hidden_BxTxD,
  head_DxV,
  labels_BxT,
  temperatures_K=None,
  targets: Targets | None = None,
  *,
  loss: LossConfig = LossConfig(),
  vocab_size: int | None = None,
  chunk: int | None = None,
) -> dict[str, jax.Array]:
  """Evaluation: per-token arrays [B, T] from the same rows as the training loss, without gradient.

  Args:
    hidden_BxTxD, head_DxV, labels_BxT, targets, loss, vocab_size, chunk: as for `fused_loss`.
    temperatures_K: evaluation temperatures; 'nll_at' [B, T, K] holds the negative log-likelihood under softmax(logits / temperature).

  Returns:
    'ce', 'student_entropy', 'confidence' (the greatest probability), 'correct' (the label is the top-1) and with targets 'kd',
    'teacher_entropy', 'agreement'; in nats, float32. Padding labels (< 0) give values to be masked by the caller.

  Raises:
    UserError: arguments do not fit together, or a label is beyond the vocabulary. Under `jax.jit` label values are unknown, so a token
      with such a label gets NaN for 'ce' and 'nll_at'.
  """
  student = Student(hidden_BxTxD, head_DxV, target=None if targets is None else 0)
  sizes = inputs.check_cohort([student], [] if targets is None else [targets], loss, vocab_size, chunk)
  width = sizes['V'][0]
  vocab_size = vocab_size or width
  inputs.check_evaluated(labels_BxT, temperatures_K, vocab_size, sizes)
  fitted = None if targets is None else _fit_vocabulary(targets, vocab_size, width)
  mesh = sharding.mesh_in_use()
  n_tokens = labels_BxT.size // (1 if mesh is None else sharding.n_row_shards(mesh))
  columns = width // (1 if mesh is None else mesh.shape['tensor'])
  chunk = chunk or evaluation_tokens(loss, n_tokens, columns)
  static = _Static(loss, vocab_size, chunk, (None if fitted is None else 0,), True, mesh)
  temperatures_K = jnp.asarray(() if temperatures_K is None else temperatures_K, jnp.float32)
  operands = labels_BxT, temperatures_K, fitted
  values = _on_mesh(_token_scan, static, ((hidden_BxTxD, head_DxV),), operands, _token_specs)
  return inputs.mark_unlabelled(values, labels_BxT, vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(static: _Static, models, operands):
  return _on_mesh(functools.partial(_loss_scan, with_gradients=False), static, models, operands, _loss_specs)[0]


def _losses_forward(static: _Static, models, operands):
  return _on_mesh(functools.partial(_loss_scan, with_gradients=True), static, models, operands, _loss_specs)


def _losses_backward(static: _Static, gradients, cotangents):
  scaled = [
    ((dx * ct).astype(dx.dtype), (dw * ct).astype(dw.dtype))  # the product in float32
    for (dx, dw), (ct, _) in zip(gradients, cotangents, strict=True)
  ]
  return tuple(scaled), None


_losses.defvjp(_losses_forward, _losses_backward)


def _on_mesh(scan, static: _Static, models, operands, specs):
  """Run `scan` on this device, or each device's share of it under shard_map."""
  if static.mesh is None:
    return scan(static, models, operands)
  in_specs, out_specs = specs(models, operands, scan)
  return jax.shard_map(
    functools.partial(scan, static), mesh=static.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )(models, operands)


ROWS, HEAD = P(sharding.BATCH_AXES), P('fsdp', 'tensor')


def _target_specs(targets):
  """Specs of a Targets value: those of its leaves, in its own structure."""
  tokenwise, shared = targets.specs(sharding.BATCH_AXES, 'tensor')
  is_spec = lambda x: isinstance(x, P)
  leaves = jax.tree.leaves((tokenwise, shared), is_leaf=is_spec)
  return jax.tree.unflatten(jax.tree.structure(targets), leaves)


def _loss_specs(models, operands, scan):
  model_specs = tuple((ROWS, HEAD) for _ in models)
  _, _, alphas, targets = operands
  in_specs = (model_specs, (ROWS, ROWS, tuple(P() for _ in alphas), tuple(_target_specs(t) for t in targets)))
  losses = [(P(), P()) for _ in models]
  return in_specs, (losses, model_specs if scan.keywords['with_gradients'] else ())


def _token_specs(models, operands, scan):
  _, _, targets = operands
  return (((ROWS, HEAD),), (ROWS, P(), None if targets is None else _target_specs(targets))), ROWS


def _loss_scan(static: _Static, models, operands, *, with_gradients: bool):
  """[(loss, sums)] and, with gradients, ((dX, dW), ...) of this device's tokens and columns."""
  labels_BxT, weights_BxT, alphas, targets = operands
  vocab = _vocab(static, models[0][1].shape[1])
  heads = [_gathered_head(static, x.dtype, w) for x, w in models]
  tokens = _chunks(static.chunk, labels_BxT, weights_BxT, [x for x, _ in models], [t.tokenwise for t in targets])

  def body(carry, chunk):
    sums, dws = carry
    labels_C, weights_C, hidden, tokenwise = chunk
    # A token of weight 0 may be anything, NaN too: a gradient of 0 times that must not reach the head.
    hidden = [jnp.where(weights_C[:, None] != 0, x_CxD, 0) for x_CxD in hidden]
    t_CxV = [target.chunk_logits(part, target.shared) for target, part in zip(targets, tokenwise, strict=True)]
    s_CxV = [jnp.dot(x_CxD, w, preferred_element_type=jnp.float32) for x_CxD, w in zip(hidden, heads, strict=True)]
    rows = functools.partial(_rows, static, vocab, alphas, with_gradients)
    # A sharded row needs the other shards: its one all-gather is for the whole chunk.
    block = labels_C.size if vocab.axis else cache_rows(*s_CxV[0].shape)
    new_sums, dz_nxRxV = _in_blocks(rows, block, (labels_C, weights_C), s_CxV, t_CxV)
    new_sums = jax.tree.map(lambda x: x.sum(0), new_sums)
    # Cast here, not in a block: there a CPU's narrow floats cost more than the cache gains.
    dz_CxV = [dz.reshape(s_CxV[0].shape).astype(x.dtype) for dz, x in zip(dz_nxRxV, hidden, strict=False)]
    sums = new_sums if sums is None else jax.tree.map(jnp.add, sums, new_sums)
    dxs = [jnp.dot(dz, w.T, preferred_element_type=jnp.float32) for dz, w in zip(dz_CxV, heads, strict=False)]
    products = [
      jnp.dot(x_CxD.T, dz, preferred_element_type=jnp.float32) for x_CxD, dz in zip(hidden, dz_CxV, strict=False)
    ]
    return (sums, jax.tree.map(jnp.add, dws, products)), dxs

  dws = [jnp.zeros(head.shape, jnp.float32) for head in heads] if with_gradients else []
  first = jax.tree.map(lambda x: x[0], tokens)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda c: body((None, dws), c)[0][0], first)
  )
  (sums, dws), dxs = jax.lax.scan(body, (zeros, dws), tokens)
  if static.mesh is not None:
    sums = jax.lax.psum(sums, sharding.BATCH_AXES)
  losses = [(terms.pop('loss'), terms) for terms in sums]
  if not with_gradients:
    return losses, ()
  gradients = []
  for (x_BxTxD, w_DxV), dx_nxCxD, dw_DxV in zip(models, dxs, dws, strict=True):
    dx_NxD = dx_nxCxD.reshape(-1, dx_nxCxD.shape[-1])[: labels_BxT.size]
    if static.mesh is not None:
      dx_NxD = jax.lax.psum(dx_NxD, 'tensor')
      dw_DxV = jax.lax.psum_scatter(jax.lax.psum(dw_DxV, 'replica'), 'fsdp', scatter_dimension=0, tiled=True)
    gradients.append((dx_NxD.reshape(x_BxTxD.shape).astype(x_BxTxD.dtype), dw_DxV.astype(w_DxV.dtype)))
  return losses, tuple(gradients)


def _rows(static: _Static, vocab: Vocab, alphas, with_gradients: bool, tokens, s_CxV, t_CxV):
  """([weighted sums], [dL/ds]) of each student for some rows of logits, in float32."""
  labels_C, weights_C = tokens
  teachers = [teacher_rows(t, static.loss, vocab, static.diagnostics) for t in t_CxV]
  sums, gradients = [], []
  for k, s in enumerate(s_CxV):
    target = static.target[k]
    teacher = None if target is None else teachers[target]
    terms, dz = mixed_rows(s, labels_C, alphas[k], teacher, static.loss, vocab, diagnostics=static.diagnostics)
    sums.append({name: jnp.sum(jnp.where(weights_C != 0, term, 0) * weights_C) for name, term in terms.items()})
    if with_gradients:
      gradients.append(weights_C[:, None] * jnp.where(weights_C[:, None] != 0, dz(), 0))
  return sums, gradients


def _in_blocks(rows, block: int, tokens, s_CxV, t_CxV):
  """`rows(tokens, s, t)` over a chunk, a few rows at a time where that keeps what lies between the products in a core's cache.

  The results have a leading axis over the blocks. On CPU each sum over the vocabulary is a pass over its operands. On accelerators the
  compiler fuses them, and the chunk goes whole.
  """
  n_rows = s_CxV[0].shape[0]
  if block == n_rows:
    return jax.tree.map(lambda x: x[None], rows(tokens, s_CxV, t_CxV))
  cut = lambda x: x.reshape(-1, block, *x.shape[1:])
  shared = [t.shape[0] != n_rows for t in t_CxV]  # one row for all tokens: a unigram's
  mapped = [None if one else cut(t) for t, one in zip(t_CxV, shared, strict=True)]

  def step(part):
    tokens, s, t = part
    return rows(tokens, s, [whole if one else x for x, whole, one in zip(t, t_CxV, shared, strict=True)])

  return jax.lax.map(step, (jax.tree.map(cut, tokens), [cut(s) for s in s_CxV], mapped))


def _token_scan(static: _Static, models, operands):
  labels_BxT, temperatures_K, targets = operands
  ((x_BxTxD, w_DxV),) = models
  vocab = _vocab(static, w_DxV.shape[1])
  head_DxV = _gathered_head(static, x_BxTxD.dtype, w_DxV)
  tokens = _chunks(static.chunk, labels_BxT, None, [x_BxTxD], [] if targets is None else [targets.tokenwise])

  def body(_, chunk):
    labels_C, _, (x_CxD,), tokenwise = chunk
    s_CxV = jnp.dot(x_CxD, head_DxV, preferred_element_type=jnp.float32)
    t_CxV = [] if targets is None else [targets.chunk_logits(tokenwise[0], targets.shared)]
    block = labels_C.size if vocab.axis else cache_rows(*s_CxV.shape)
    values = _in_blocks(functools.partial(_token_rows, static, vocab, temperatures_K), block, labels_C, [s_CxV], t_CxV)
    return None, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), values)

  _, out = jax.lax.scan(body, None, tokens)
  shape = labels_BxT.shape
  return {k: v.reshape(-1, *v.shape[2:])[: labels_BxT.size].reshape(*shape, *v.shape[2:]) for k, v in out.items()}


def _token_rows(static: _Static, vocab: Vocab, temperatures_K, labels_C, s_CxV, t_CxV):
  """Each token's values [C] (or [C, K]) for some rows of logits."""
  (s_CxV,) = s_CxV
  teacher = teacher_rows(t_CxV[0], static.loss, vocab) if t_CxV else None
  terms, _ = mixed_rows(s_CxV, labels_C, 0.0, teacher, static.loss, vocab)
  del terms['loss']
  terms['confidence'], terms['correct'] = top_probability(s_CxV, labels_C, vocab)
  if temperatures_K.size:
    terms['nll_at'] = tempered_nll(s_CxV, labels_C, temperatures_K, vocab).T
  return terms


def _vocab(static: _Static, columns: int) -> Vocab:
  if static.mesh is None or static.mesh.shape['tensor'] == 1:
    return Vocab(static.vocab_size)
  return Vocab(static.vocab_size, jax.lax.axis_index('tensor') * columns, 'tensor')


def _gathered_head(static: _Static, dtype, head_DxV):
  """The head in the dtype of the products, with all its rows: gathered once, after the cast, before the scan."""
  head_DxV = head_DxV.astype(dtype)
  return head_DxV if static.mesh is None else jax.lax.all_gather(head_DxV, 'fsdp', axis=0, tiled=True)


def _chunks(chunk: int, labels_BxT, weights_BxT, hidden, tokenwise):
  """Tokens [B, T, ...] -> [n, C, ...], the last chunk filled up with weight 0."""
  n_tokens = labels_BxT.size
  n_chunks = -(-n_tokens // chunk)

  def cut(x):
    x_Nx = x.reshape(n_tokens, *x.shape[2:])
    padding = [(0, n_chunks * chunk - n_tokens)] + [(0, 0)] * (x_Nx.ndim - 1)
    return jnp.pad(x_Nx, padding).reshape(n_chunks, chunk, *x_Nx.shape[1:])

  weights_BxT = jnp.ones(labels_BxT.shape, jnp.float32) if weights_BxT is None else weights_BxT
  return cut(labels_BxT), cut(weights_BxT.astype(jnp.float32)), [cut(x) for x in hidden], jax.tree.map(cut, tokenwise)


def _fit_vocabulary(targets: Targets, vocab_size: int, width: int) -> Targets:
  """Targets with the student's number of columns: those beyond are cut off, missing padding is added.

  Columns are all that can be seen here: that both sides have the same tokens is for the caller to know (kdjax/train.py compares the
  tokenizers' fingerprints and the sizes). Raises UserError if the teacher has fewer columns than there are tokens.
  """
  leaves, tree = jax.tree.flatten(targets)
  axes = jax.tree.leaves(targets.vocab_axis)
  fitted = []
  for leaf, axis in zip(leaves, axes, strict=True):
    if axis >= 0 and leaf.shape[axis] != width:
      if leaf.shape[axis] < vocab_size:
        raise UserError(
          f"loss: the teacher's vocabulary has {leaf.shape[axis]} columns, the student's {vocab_size} tokens: not the same one"
        )
      keep = jax.lax.slice_in_dim(leaf, 0, min(width, leaf.shape[axis]), axis=axis)
      padding = [(0, width - keep.shape[axis] if i == axis else 0) for i in range(leaf.ndim)]
      leaf = jnp.pad(keep, padding)
    fitted.append(leaf)
  return jax.tree.unflatten(tree, fitted)
