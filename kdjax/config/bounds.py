"""Check the fields of config sections that validate themselves, with one line for each mistake.

Library calls can build such a section of `schema` directly, so its constructor rejects wrong values. Command-line configs go through the same
checks: `reading` collects the problems of each section, so that all mistakes are reported at once.
"""

import math
import numbers
from collections.abc import Iterator
from typing import Any

LOSS_CHOICES = {
  'kd': ('forward_kl', 'hard_label'),
  'mixing': ('normalised', 'ce_plus_alpha_kd', 'one_minus_alpha_ce_plus_kd'),
  'rest': ('renormalise', 'other'),
}
MIXINGS = LOSS_CHOICES['mixing']


def loss_problems(loss: Any) -> Iterator[str]:
  """Yield the problems of a `LossConfig`, as 'field: problem'."""
  for name, known in LOSS_CHOICES.items():
    if not isinstance(value := getattr(loss, name), str) or value not in known:
      yield f'{name}: unknown value {value!r}; known: {", ".join(known)}'
  numeric = ('temperature', 'teacher_top_k', 'teacher_top_p', 'z_loss', 'chunk_tokens', 'chunk_megabytes')
  wrong = [problem for name in numeric for problem in _number_problems(loss, name)]
  yield from wrong or _loss_range_problems(loss)


def _number_problems(loss: Any, name: str) -> Iterator[str]:
  """Reject other types, traced values and arrays: these fields are static, and each new value compiles a new program."""
  value, whole = getattr(loss, name), name.startswith('chunk')
  kind = numbers.Integral if whole else numbers.Real
  if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
    yield f'{name}: expected a {"whole " * whole}number, got {value!r}'


def _loss_range_problems(loss: Any) -> Iterator[str]:
  if loss.temperature <= 0:
    yield f'temperature: must be above 0, got {loss.temperature:g}'
  k = float(loss.teacher_top_k)
  if k < 0 or (k > 1 and not k.is_integer()):
    yield f'teacher_top_k: must be 0 (all), a share in (0, 1) or a whole number, got {k:g}'
  if not 0 < loss.teacher_top_p <= 1:
    yield f'teacher_top_p: must be in (0, 1], got {loss.teacher_top_p:g}'
  for name in ('z_loss', 'chunk_tokens', 'chunk_megabytes'):
    if (value := getattr(loss, name)) < 0:
      yield f'{name}: must not be below 0, got {value:g}'
  if loss.kd == 'hard_label' and (loss.teacher_top_k or loss.teacher_top_p < 1 or loss.temperature != 1):
    yield 'kd: hard_label has no temperature, top-k or top-p; leave them at their defaults'
