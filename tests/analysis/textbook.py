"""Cochran's intervals over documents (Sampling Techniques, 6.4): what kdjax/analysis/crossed.py is where documents are of one length."""

from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
  """An estimate and its two-sided interval; `error` is the standard error."""

  estimate: float
  low: float
  high: float
  error: float
  n: int


def ratio_interval(numerator, denominator, level: float = 0.95) -> Interval:
  """`sum(numerator) / sum(denominator)` over documents, e.g. differences of nats over bytes.

  Args:
    numerator, denominator: [documents]; the denominators are positive.
    level: of the interval; with fewer than two documents it is the whole line.
  """
  y, x = np.asarray(numerator, float), np.asarray(denominator, float)
  n, ratio = len(y), y.sum() / x.sum()
  if n < 2:
    return Interval(ratio, -np.inf, np.inf, np.inf, n)
  residual = y - ratio * x
  error = np.sqrt(n / (n - 1) * np.sum(residual**2)) / x.sum()
  half = stats.t.ppf((1 + level) / 2, n - 1) * error
  return Interval(ratio, ratio - half, ratio + half, error, n)


def mean_interval(parts: list[Interval], level: float = 0.95) -> Interval:
  """The plain mean of independent estimates (a macro-average over sets), with Satterthwaite's degrees of freedom."""
  k, variances = len(parts), np.asarray([p.error**2 for p in parts])
  estimate, variance = float(np.mean([p.estimate for p in parts])), variances.sum() / k**2
  n = sum(p.n for p in parts)
  if not np.isfinite(variance):
    return Interval(estimate, -np.inf, np.inf, np.inf, n)
  if variance == 0:
    return Interval(estimate, estimate, estimate, 0.0, n)
  freedom = variances.sum() ** 2 / np.sum(variances**2 / np.asarray([p.n - 1 for p in parts]))
  half = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(variance)
  return Interval(estimate, estimate - half, estimate + half, float(np.sqrt(variance)), n)
