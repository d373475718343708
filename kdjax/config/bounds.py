"""Check the fields of config sections that validate themselves, with one line for each mistake.

Library calls can build such a section of `schema` directly, so its constructor rejects wrong values. Command-line configs go through the same
checks: `reading` collects the problems of each section, so that all mistakes are reported at once.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterator
from typing import Any

from kdjax.config import fields


def loss_problems(loss: Any) -> Iterator[str]:
  """Yield the problems of a `LossConfig`, as 'field: problem'."""
  numeric = {each.name: each.type is int for each in dataclasses.fields(loss) if each.type in (int, float)}
  wrong = {name: problem for name, whole in numeric.items() for problem in _number_problems(loss, name, whole)}
  found = (problem for problem in fields.problems(loss) if problem.partition(':')[0] not in wrong)
  yield from (*wrong.values(), *found)
  if not wrong:
    yield from _loss_range_problems(loss)


def _number_problems(loss: Any, name: str, whole: bool) -> Iterator[str]:
  """Reject other types, traced values and arrays: these fields are static, and each new value compiles a new program."""
  value, kind = getattr(loss, name), numbers.Integral if whole else numbers.Real
  if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
    yield f'{name}: expected a {"whole " * whole}number, got {value!r}'


def _loss_range_problems(loss: Any) -> Iterator[str]:
  k = float(loss.teacher_top_k)
  if k < 0 or (k > 1 and not k.is_integer()):
    yield f'teacher_top_k: must be 0 (all), a share in (0, 1) or a whole number, got {k:g}'
  if loss.divergence == 'hard_label' and (loss.teacher_top_k or loss.teacher_top_p < 1 or loss.temperature != 1):
    yield 'divergence: hard_label has no temperature, top-k or top-p; leave them at their defaults'
