"""Choose the two teachers that a test of reversal compares: the one with the largest value on an axis, and a reference with less.

The reference is fixed before any tested run. With a pilot it is the teacher whose student did best on the validation split with the pilot's
seed. Without a pilot it is declared: the teacher of the student's own size (or number of tokens), else the next below the largest.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from kdjax.models import flops
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps.cells import Setting, Source
from kdjax.sweeps.config import GridConfig

Curves = Mapping[str, Mapping[str, float]]  # the pilot's: pilot_key -> alpha -> bits per byte on the validation split


def plain_sources(grid: GridConfig, setting: Setting) -> list[Source]:
  """List the teachers with default targets (T = 1, all logits, normalised, the student's documents), weakest first: by size, then by tokens."""
  plain = {'temperature': 1.0, 'top_k': 0.0, 'mixing': 'normalised', 'teacher_data': 'iso'}
  found = [s for s in cells_lib.sources(grid, setting) if s == dataclasses.replace(s, **plain)]  # type: ignore[arg-type]
  return sorted(found, key=lambda s: (size(grid, s), s.teacher_tokens))


def size(grid: GridConfig, source: Source) -> int:
  return flops.count_params(cells_lib.sized(grid, source.teacher)).non_embedding


def by_size(sources: Sequence[Source]) -> list[Source]:
  """List the teachers of the largest budget, smallest first."""
  most = max((s.teacher_tokens for s in sources), default=0)
  return [s for s in sources if s.teacher_tokens == most]


def by_budget(sources: Sequence[Source]) -> list[list[Source]]:
  """List the budgets of each teacher size, smallest first."""
  teachers = dict.fromkeys(s.teacher for s in sources)
  return [sorted((s for s in sources if s.teacher == t), key=lambda s: s.teacher_tokens) for t in teachers]


def size_pair(setting: Setting, sources: Sequence[Source], curves: Curves | None) -> tuple[Source, Source] | None:
  """Return (largest teacher, reference) at the largest budget; None if there is nothing to compare. `curves`: None without a pilot."""
  return _pair(setting, by_size(sources), curves, lambda s: s.teacher == setting.student)


def budget_pair(setting: Setting, sources: Sequence[Source], curves: Curves | None) -> tuple[Source, Source] | None:
  """Return (most tokens, reference) of one teacher size."""
  return _pair(setting, sources, curves, lambda s: s.teacher_tokens == setting.student_tokens)


def reversal_pairs(grid: GridConfig, curves: Curves | None) -> list[tuple[Setting, Source, Source]]:
  """List the pairs of `size_pair` to compare at equal total FLOPs too; with the declared reference if `curves` is None (before the pilot)."""
  if 'reversal_at_equal_flops' not in grid.contrasts or not grid.controls.flop_matched:
    return []
  settings = cells_lib.settings(grid)
  found = [(setting, size_pair(setting, plain_sources(grid, setting), curves)) for setting in settings]
  return [(setting, *pair) for setting, pair in found if pair]


def _pair(setting: Setting, sources: Sequence[Source], curves: Curves | None, own: Callable[[Source], bool]):
  if len(sources) < 2:
    return None
  *less, most = sources
  reference = _declared(less, own) if curves is None else _best(setting, less, curves)
  return (most, reference) if reference else None


def _declared(less: Sequence[Source], own: Callable[[Source], bool]) -> Source:
  return next((source for source in less if own(source)), less[-1])


def _best(setting: Setting, less: Sequence[Source], curves: Curves) -> Source | None:
  """Return the teacher with the fewest bits per byte at any alpha above 0."""
  lowest: dict[Source, float] = {}
  for source in less:
    values = [
      v for alpha, v in curves.get(cells_lib.pilot_key(setting, source), {}).items() if float(alpha) > 0 and v == v
    ]
    lowest |= {source: min(values)} if values else {}
  return min(lowest, key=lambda source: lowest[source]) if lowest else None
