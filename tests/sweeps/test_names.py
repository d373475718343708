"""Names: short for display, exact as keys."""

import decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kdjax.sweeps import cells
from kdjax.sweeps.names import Setting, Source, format_count, format_exact, format_exact_count, pilot_key

SIZES = {'k': 10**3, 'M': 10**6, 'B': 10**9, 'T': 10**12}


def read(text: str) -> decimal.Decimal:
  return decimal.Decimal(text[:-1]) * SIZES[text[-1]] if text[-1] in SIZES else decimal.Decimal(text)


@pytest.mark.parametrize(
  ('n', 'short', 'exact'),
  [
    (999, '999', '999'),
    (51_200, '51.2k', '51.2k'),
    (1_024_000, '1.024M', '1.024M'),
    (1_000_000, '1M', '1M'),
    (1_000_001, '1M', '1.000001M'),
    (16_384_000, '16.38M', '16.384M'),
    (50e9, '50B', '50B'),
    (2e12, '2T', '2T'),
  ],
)
def test_counts(n, short, exact):
  assert (format_count(n), format_exact_count(n)) == (short, exact)


@given(st.integers(0, 10**15))
@example(10**12 - 1)
def test_an_exact_count_reads_back_and_is_the_short_one_where_that_does(n):
  assert read(format_exact_count(n)) == n
  assert read(format_count(n)) != n or format_exact_count(n) == format_count(n)


@given(st.floats(0, 1))
@example(1 / 3)
@example(0.1234567)
@example(1e-5)
def test_an_exact_number_reads_back_and_is_six_digits_where_they_do(x):
  assert float(format_exact(x)) == x
  assert float(f'{x:g}') != x or format_exact(x) == f'{x:g}'


@pytest.mark.parametrize(
  ('one', 'other'),
  [
    ({'student_tokens': 1_000_000}, {'student_tokens': 1_000_001}),
    ({'distinct_tokens': 1_000_000}, {'distinct_tokens': 1_000_400}),
    ({'teacher_tokens': 20_000_000}, {'teacher_tokens': 20_001_000}),
    ({'temperature': 1.5}, {'temperature': 1.5000001}),
    ({'top_k': 123_456.0}, {'top_k': 123_456.0 + 0.5}),
    ({'top_k': 1_000_000.0}, {'top_k': 1_000_001.0}),
  ],
  ids=str,
)
def test_settings_and_sources_that_share_a_name_share_no_key(one, other):
  key = lambda student_tokens=1, distinct_tokens=0, **source: (
    Setting('s', student_tokens, distinct_tokens),
    Source('t', **{'teacher_tokens': 1} | source),
  )
  names = [[part.name for part in key(**fields)] for fields in (one, other)]
  assert names[0] == names[1]
  assert pilot_key(*key(**one)) != pilot_key(*key(**other))


def test_cells_of_settings_that_share_a_name_have_ids_of_their_own():
  from tests.sweeps.test_cells import grid

  close = (1_000_000, 1_000_001)
  found = cells.cells_of(
    cells.main_groups(grid(student_tokens=close, teacher_tokens=close, alpha=(0.0, 0.4, 0.4000001)))
  )
  assert len({cell.id for cell in found}) == len(found) == 2 * 3 * (1 + 3 * 2 * 2)
  groups = cells.pilot_groups(grid(student_tokens=close, teacher_tokens=close))
  keys = {group.pilot_key for group in groups if group.kind == 'distilled'}
  assert len(keys) == 2 * 3 * 2
