"""The intervals: against hand formulas, and as often right as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from kdjax.analysis.statistics import Interval, mean_interval, performance_gap_recovered, ratio_interval


def test_the_ratio_interval_is_the_hand_formula():
  y, x = [3.0, -1.0, 4.0, 2.0], [2.0, 1.0, 5.0, 4.0]
  ratio = 8 / 12
  residuals = [3 - ratio * 2, -1 - ratio, 4 - ratio * 5, 2 - ratio * 4]
  error = math.sqrt(4 / 3 * sum(r * r for r in residuals)) / 12
  half = stats.t.ppf(0.975, 3) * error
  found = ratio_interval(y, x)
  assert found.n == 4
  np.testing.assert_allclose(found[:4], (ratio, ratio - half, ratio + half, error))


def test_with_equal_denominators_it_is_the_students_t_interval():
  y = np.random.default_rng(0).normal(size=20)
  found = ratio_interval(y, np.full(20, 2.0))
  low, high = stats.ttest_1samp(y / 2, 0).confidence_interval(0.95)
  np.testing.assert_allclose(found[:3], (y.mean() / 2, low, high))


def test_the_level_is_the_callers():
  y, x = [3.0, -1.0, 4.0, 2.0], [2.0, 1.0, 5.0, 4.0]
  narrow, wide = ratio_interval(y, x, 0.5), ratio_interval(y, x, 0.99)
  assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_one_document_says_nothing():
  assert ratio_interval([3.0], [2.0]) == Interval(1.5, -math.inf, math.inf, math.inf, 1)


def test_equal_models_differ_by_exactly_nothing():
  assert ratio_interval(np.zeros(5), np.arange(1, 6)) == Interval(0.0, 0.0, 0.0, 0.0, 5)


def clustered(rng, n: int, effect: float) -> tuple[np.ndarray, np.ndarray]:
  """Documents of unlike lengths whose tokens share a shift of their document's own."""
  lengths = rng.integers(20, 400, n)
  shift = rng.normal(effect, 0.3, n)
  return lengths * shift + rng.normal(size=n) * np.sqrt(lengths), lengths.astype(float)


@pytest.mark.parametrize('n', [30, 120])
def test_95_percent_intervals_hold_the_truth_95_percent_of_the_time(n):
  rng = np.random.default_rng(n)
  found = [ratio_interval(*clustered(rng, n, 0.2)) for _ in range(3000)]
  assert np.mean([i.low <= 0.2 <= i.high for i in found]) == pytest.approx(0.95, abs=0.02)


def test_an_interval_over_tokens_would_be_far_too_narrow():
  """Why documents are the unit: the same data with tokens as the unit covers far less than it says."""
  rng, covered = np.random.default_rng(0), []
  for _ in range(400):
    y, x = clustered(rng, 60, 0.2)
    half = 1.96 / math.sqrt(x.sum())  # a token's own noise has variance 1
    covered.append(abs(y.sum() / x.sum() - 0.2) <= half)
  assert np.mean(covered) < 0.6


def test_the_mean_of_sets_is_their_plain_mean_with_satterthwaites_freedom():
  parts = [Interval(1.0, 0, 0, 0.3, 10), Interval(3.0, 0, 0, 0.4, 5)]
  error = math.sqrt(0.09 + 0.16) / 2
  freedom = (0.09 + 0.16) ** 2 / (0.09**2 / 9 + 0.16**2 / 4)
  half = stats.t.ppf(0.975, freedom) * error
  found = mean_interval(parts)
  assert found.n == 15
  np.testing.assert_allclose(found[:4], (2.0, 2 - half, 2 + half, error))


def test_the_mean_of_one_set_is_that_set():
  part = ratio_interval([3.0, -1.0, 4.0, 2.0], [2.0, 1.0, 5.0, 4.0])
  np.testing.assert_allclose(mean_interval([part]), part)


def test_the_mean_of_sets_covers_95_percent():
  rng, covered = np.random.default_rng(2), []
  for _ in range(3000):
    parts = [ratio_interval(*clustered(rng, n, effect)) for n, effect in ((12, 0.1), (40, 0.3), (80, 0.5))]
    found = mean_interval(parts)
    covered.append(found.low <= 0.3 <= found.high)
  assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_a_set_of_one_document_leaves_the_mean_unknown():
  found = mean_interval([ratio_interval([1.0], [1.0]), ratio_interval([1.0, 2.0], [1.0, 1.0])])
  assert (found.estimate, found.low, found.high) == (1.25, -math.inf, math.inf)


def test_the_mean_of_sets_without_variance_is_exact():
  nothing = ratio_interval(np.zeros(3), np.ones(3))
  assert mean_interval([nothing, nothing]) == Interval(0.0, 0.0, 0.0, 0.0, 6)


def test_one_set_without_variance_beside_one_with_it():
  found = mean_interval([ratio_interval(np.zeros(3), np.ones(3)), ratio_interval([1.0, 2.0], [1.0, 1.0])])
  assert np.isfinite(found).all() and found.low < found.estimate < found.high


@pytest.mark.parametrize(
  ('weak', 'strong', 'ceiling', 'gap'),
  [(3.0, 3.0, 2.0, 0.0), (3.0, 2.0, 2.0, 1.0), (3.0, 2.5, 2.0, 0.5), (3.0, 1.5, 2.0, 1.5), (3.0, 3.5, 2.0, -0.5)],
)
def test_the_gap_recovered(weak, strong, ceiling, gap):
  assert performance_gap_recovered(weak, strong, ceiling) == pytest.approx(gap)


@pytest.mark.parametrize(('weak', 'ceiling'), [(2.0, 2.0), (1.9, 2.0)])
def test_the_gap_recovered_is_undefined_where_the_teacher_is_not_the_weaker(weak, ceiling):
  assert math.isnan(performance_gap_recovered(weak, 2.5, ceiling))
