"""Check the arguments of a loss. An error is one line: the argument, what it must be and what it is.

Shapes and dtypes are checked at every call, also while `jax.jit` traces. Values are checked if they are concrete, which they are outside of
`jax.jit`. Inside it a label outside the vocabulary sets its token's weight to NaN, and thereby the loss and the gradient: a plausible number
would be worse. Tokens of weight 0 may have any label.

An argument's name ends in its dimensions, and equal letters are equal sizes: `hidden_BxTxD` is [B, T, D].
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.config import LossConfig
from kdjax.errors import UserError

DIMENSIONS = re.compile(r'_([A-Z][a-z]?(?:x[A-Z][a-z]?)*)$')
PARTS_OF_TARGETS = ('tokenwise', 'shared', 'vocab_axis', 'specs', 'chunk_logits')
KINDS = {'floating': 'floating-point numbers', 'integer': 'integers', 'number': 'numbers'}
Sizes = dict[str, tuple[int, str]]  # dimension -> its size, and the argument that set it


def check_cohort(students: Any, targets: Any, loss: Any, vocab_size: Any, chunk: Any) -> Sizes:
  """Check all arguments of the fused loss except labels and weights; return the sizes that labels and weights must have."""
  check_settings(loss, vocab_size, chunk)
  for name, value in (('students', students), ('targets', targets)):
    if not isinstance(value, Sequence):
      raise UserError(f'{name}: expected a list, got {_describe(value)}')
  if not students:
    raise UserError('students: at least one is needed')
  sizes: Sizes = {}
  for k, student in enumerate(students):
    _check_student(f'students[{k}].' if len(students) > 1 else '', student, len(targets), loss, sizes)
  for k, target in enumerate(targets):
    _check_targets(f'targets[{k}]' if len(targets) > 1 else 'targets', target, sizes)
  width = sizes['V'][0]
  if vocab_size is not None and vocab_size > width:
    raise UserError(f'loss: the vocabulary has {vocab_size} tokens but the head only {width} columns')
  return sizes


def check_tokens(labels_BxT, weights_BxT, vocab_size: int, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
  """Check and return labels and weights; a nonzero weight becomes NaN if its label is outside the vocabulary."""
  check_array('labels_BxT', labels_BxT, 'integer', sizes)
  check_array('weights_BxT', weights_BxT, 'number', sizes)
  labels, weights = _concrete(labels_BxT), _concrete(weights_BxT)
  if labels is not None and weights is not None:
    _check_labels(labels, weights != 0, vocab_size, 'give a token without a label the weight 0')
  labels_BxT, weights_BxT = _widen(labels_BxT), jnp.asarray(weights_BxT)
  if not jnp.issubdtype(weights_BxT.dtype, jnp.floating):
    weights_BxT = weights_BxT.astype(jnp.float32)
  outside_BxT = (labels_BxT < 0) | (labels_BxT >= vocab_size)
  return labels_BxT, jnp.where(outside_BxT & (weights_BxT != 0), jnp.nan, weights_BxT)


def check_evaluated(labels_BxT, temperatures_K, vocab_size: int, sizes: Sizes) -> None:
  """Check the labels (below 0: padding) and the temperatures of an evaluation."""
  check_array('labels_BxT', labels_BxT, 'integer', sizes)
  if (labels := _concrete(labels_BxT)) is not None:
    _check_labels(labels, labels >= 0, vocab_size, 'a label below 0 marks padding')
  if temperatures_K is not None:
    temperatures_K = np.asarray(temperatures_K) if isinstance(temperatures_K, Sequence) else temperatures_K
    check_array('temperatures_K', temperatures_K, 'number', {})
    known = _concrete(temperatures_K)
    if known is not None and not (np.isfinite(known) & (known > 0)).all():
      raise UserError(f'temperatures_K: must be above 0, got {", ".join(f"{t:g}" for t in known)}')


def mark_unlabelled(values: dict[str, jax.Array], labels_BxT, vocab_size: int) -> dict[str, jax.Array]:
  """Set values that depend on a label beyond the vocabulary to NaN."""
  beyond_BxT = _widen(labels_BxT) >= vocab_size
  marked = {'ce': beyond_BxT, 'nll_at': beyond_BxT[..., None]}
  return {name: jnp.where(marked[name], jnp.nan, x) if name in marked else x for name, x in values.items()}


def check_alpha(name: str, alpha: Any, loss: LossConfig) -> None:
  """Check that alpha is a scalar and, if its value is concrete, in range."""
  is_array = hasattr(alpha, 'shape') and hasattr(alpha, 'dtype')
  if not (alpha.shape == () and _is_kind(alpha.dtype, 'number') if is_array else isinstance(alpha, int | float)):
    raise UserError(f'{name}: expected a scalar, got {_describe(alpha)}')
  known = _concrete(alpha)
  most = np.inf if loss.mixing == 'ce_plus_alpha_kd' else 1
  if known is not None and not 0 <= known <= most:
    raise UserError(f'{name}: must be {"at least 0" if most > 1 else "in [0, 1]"}, got {float(known):g}')


def check_settings(loss: Any, vocab_size: Any = None, chunk: Any = None) -> None:
  """Check the static arguments."""
  if not isinstance(loss, LossConfig):
    raise UserError(f'loss: expected a LossConfig, got {_describe(loss)}')
  for name, value in (('vocab_size', vocab_size), ('chunk', chunk)):
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
      raise UserError(f'{name}: must be a whole number above 0, or None, got {_describe(value)}')


def check_array(name: str, value: Any, kind: str, sizes: Sizes) -> None:
  """Check an array's rank, sizes and dtype; add new sizes to `sizes`."""
  match = DIMENSIONS.search(name)
  assert match, f'{name} names no dimensions'
  dimensions = match[1].split('x')
  if not hasattr(value, 'shape') or not hasattr(value, 'dtype'):
    raise UserError(f'{name}: expected an array [{", ".join(dimensions)}], got {_describe(value)}')
  if len(value.shape) != len(dimensions):
    raise UserError(f'{name}: expected an array [{", ".join(dimensions)}], got {_describe(value)}')
  if not _is_kind(value.dtype, kind):
    raise UserError(f'{name}: expected {KINDS[kind]}, got {value.dtype}')
  for dimension, size in zip(dimensions, value.shape, strict=True):
    wanted, where = sizes.setdefault(dimension, (size, name))
    if size != wanted:
      raise UserError(f'{name}: its {dimension} is {size}, but that of {where} is {wanted}')


def _check_student(name: str, student: Any, n_targets: int, loss: LossConfig, sizes: Sizes) -> None:
  """Check one student; `name` is the prefix of its arguments' names. Students of a cohort may differ in their width D."""
  if not all(hasattr(student, field) for field in ('hidden_BxTxD', 'head_DxV', 'alpha', 'target')):
    raise UserError(f'{name.rstrip(".") or "students[0]"}: expected a Student(hidden, head), got {_describe(student)}')
  own = dict(sizes)
  check_array(f'{name}hidden_BxTxD', student.hidden_BxTxD, 'floating', own)
  check_array(f'{name}head_DxV', student.head_DxV, 'floating', own)
  sizes |= {dimension: own[dimension] for dimension in 'BTV'}
  check_alpha(f'{name}alpha', student.alpha, loss)
  if student.target is not None and not 0 <= student.target < n_targets:
    raise UserError(f'{name}target: must be an index of the {n_targets} targets, got {student.target}')


def _check_targets(name: str, targets: Any, sizes: Sizes) -> None:
  """Check one element of the targets. Its width and vocabulary may differ from the students': `fused` fits the vocabulary."""
  if isinstance(targets, type) or not all(hasattr(targets, part) for part in PARTS_OF_TARGETS):
    wrap = 'wrap logits as LogitTargets(logits), a model as ModelTargets(hidden, head)'
    raise UserError(f'{name}: expected Targets, got {_describe(targets)}; {wrap}')
  own = {dimension: sizes[dimension] for dimension in 'BT'}
  for field in dataclasses.fields(targets) if dataclasses.is_dataclass(targets) else ():
    if DIMENSIONS.search(field.name):
      check_array(f'{name}.{field.name}', getattr(targets, field.name), 'floating', own)
  batch = own['B'][0], own['T'][0]
  for leaf in jax.tree.leaves(targets.tokenwise):
    if leaf.shape[:2] != batch:
      raise UserError(f'{name}: expected arrays per token of shape {[*batch, "..."]}, got {list(leaf.shape)}')


def _check_labels(labels_BxT: np.ndarray, counts_BxT: np.ndarray, vocab_size: int, advice: str) -> None:
  wrong_BxT = counts_BxT & ((labels_BxT < 0) | (labels_BxT >= vocab_size))
  if wrong_BxT.any():
    first = tuple(int(i) for i in np.argwhere(wrong_BxT)[0])
    raise UserError(
      f'labels_BxT: {wrong_BxT.sum()} of {wrong_BxT.size} are outside the vocabulary of {vocab_size} tokens, '
      f'first {labels_BxT[first]} at {list(first)}; {advice}'
    )


def _widen(labels_BxT) -> jax.Array:
  """Convert labels to a dtype that holds any vocabulary size."""
  labels_BxT = jnp.asarray(labels_BxT)
  return labels_BxT.astype(jnp.promote_types(labels_BxT.dtype, jnp.int32))


def _concrete(value: Any) -> np.ndarray | None:
  """Convert a concrete value to NumPy; None if it is traced or not fully on this process."""
  if isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array) and not value.is_fully_addressable):
    return None
  return np.asarray(value)


def _is_kind(dtype, kind: str) -> bool:
  if kind == 'number':
    return _is_kind(dtype, 'floating') or _is_kind(dtype, 'integer') or dtype == np.bool_
  return jnp.issubdtype(dtype, jnp.floating if kind == 'floating' else jnp.integer)


def _describe(value: Any) -> str:
  if hasattr(value, 'shape') and hasattr(value, 'dtype'):
    return f'an array of {value.dtype}{list(value.shape)}'
  return repr(value) if isinstance(value, str | int | float | None) else f'a {type(value).__name__}'
