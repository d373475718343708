"""Paired effects over seeds and documents at once: crossed random effects.

Every seed is scored on the same documents, so a difference between two arms moves for two reasons: another seed, other
documents. On one set, with a shift of each seed and of each document (Searle, Casella & McCulloch, Variance Components, 4),

  Var(mean) = seed/S + document/D + residual/(S*D), estimated without bias by (MS_seed + MS_doc - MS_res) / (S*D),

and never taken to be under MS_seed/(S*D) or MS_doc/(S*D). A weighted sum of sets (a macro average, a difference of
differences) has the same seeds in all of them: its MS_seed is of each seed's own weighted sum. Documents of different sets
are independent: their parts add.

A set's value is a ratio of sums (nats per byte), linearised. Where documents differ in length, three things keep the
interval honest; where they do not, each is the classical formula:
- a seed's shift is per byte, so it leaves a document in proportion to its length; else seed x length passes for residual;
- a long document pulls the ratio towards itself, and its residual is enlarged for that (HC2, MacKinnon & White 1985);
- a few long documents are fewer documents: degrees of freedom are Kish's (1965) effective number less 1. D - 1 covers
  91-93% for 95% of 30 documents with log-normal lengths; those of Bell & McCaffrey (2002) cover 98% and are a fifth wider.

The two parts of the variance have their own t quantiles (Cochran & Cox 1957, 4.14; Graybill & Wang 1980):
half^2 = t(S-1)^2 * seeds + t(documents)^2 * rest. Satterthwaite's single df takes three seeds that agree by chance for
many, and covers 92-94% for 95% at S = 3, and worse in the tails that a corrected test uses: 97.3% for 99.3%.

A verdict, its interval and its minimum detectable effect share one level: 1 - 0.05/m for one of m primary tests
(Bonferroni), so a verdict states exactly whether the printed interval excludes 0. One or two seeds give no verdict.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

ALPHA = 0.05  # the probability of any false verdict in a family of tests without effects
POWER = 0.8
MIN_SEEDS = 3  # with fewer, the variance between seeds is unknown or has one degree of freedom
TOO_FEW = 'unresolved: too few seeds'
QUADRATURE = (
  64  # points for each part of a variance, to integrate a power over the sampling distribution of its estimate
)
SMALLEST_TAIL = 1e-100  # quantiles overflow beyond it


class Paired(NamedTuple):
  """One set, arm and baseline paired by seed and document: the estimate is the ratio of the sums."""

  numerator_SxD: np.ndarray  # the arm less its baseline: nats, bits, or 0/1 of an item
  denominator: np.ndarray  # [D] or [S, D], their sum positive: bytes, tokens, or ones


class Effect(NamedTuple):
  """An estimate with its two-sided interval, and what that interval generalises over.

  The variances are of one seed and of one document of each set; nan where unknown. With one seed, the documents' holds
  the residual too, and so does the seeds' with one document.
  """

  estimate: float
  low: float
  high: float
  error: float  # standard error
  df: float  # of the t quantile that the interval has; nan where nothing varies, or nothing is known
  p: float  # of no effect, two-sided; nan where there is nothing to test with
  n_seeds: int
  n_documents: int  # of all sets
  over: str  # 'seeds and documents' | 'documents' | 'seeds' | 'documents and checkpoints'
  seed_variance: float
  document_variance: float
  parts: tuple[tuple[float, float], ...] = ()  # (variance, df) of each estimated part of error^2


def crossed_effect(sets: Sequence[Paired], weights: Sequence[float] | None = None, level: float = 0.95) -> Effect:
  """The weighted sum of the sets' ratios, with an interval over the seeds and documents that there are.

  With one seed it is over documents; where a set has a single document, over seeds; with neither, the whole line.

  Args:
    sets: the same seeds in the same order in each; the documents are each set's own.
    weights: one a set, by default their plain mean. 1/K, ..., 1/K, -1 is a difference of differences.
    level: of the interval.
  Raises:
    ValueError: the sets differ in their number of seeds.
  """
  weight_K = np.full(len(sets), 1 / len(sets)) if weights is None else np.asarray(weights, float)
  spreads = [_spread(each) for each in sets]
  if len({len(each.shift_S) for each in spreads}) != 1:
    raise ValueError('the sets of one effect need the same seeds')
  estimate = float(weight_K @ np.asarray([each.ratio for each in spreads]))
  shift_S = weight_K @ np.asarray([each.shift_S for each in spreads])
  documents_K, residual_K, df_K, length_K = np.asarray([each[2:] for each in spreads], float).T
  document_variance = float(weight_K**2 @ np.maximum(documents_K - residual_K, 0))
  documents_K, residual_K = weight_K**2 * documents_K / length_K, weight_K**2 * residual_K / length_K
  documents, residual = float(documents_K.sum()), float(residual_K.sum())
  # Satterthwaite's, over sets; that the residual was estimated too costs little, with (S-1)(D-1) df.
  df = documents**2 / np.sum(documents_K**2 / df_K) if documents > 0 else np.nan
  n_seeds, n_documents = len(spreads[0].shift_S), int(length_K.sum())
  if n_seeds == 1:
    interval, parts = _interval(estimate, [documents], [df], level)
    return Effect(estimate, *interval, 1, n_documents, 'documents', np.nan, document_variance, parts)
  seeds = float(np.var(shift_S, ddof=1)) / n_seeds
  if (length_K == 1).any():
    interval, parts = _interval(estimate, [seeds], [n_seeds - 1], level)
    return Effect(estimate, *interval, n_seeds, n_documents, 'seeds', n_seeds * seeds, np.nan, parts)
  rest = max(documents - residual, documents - seeds, 0.0)  # so the sum is under neither mean square
  interval, parts = _interval(estimate, [seeds, rest], [n_seeds - 1, df], level)
  between = n_seeds * max(seeds - residual, 0.0)
  return Effect(estimate, *interval, n_seeds, n_documents, 'seeds and documents', between, document_variance, parts)


class _Spread(NamedTuple):
  """One set's ratio, and its mean squares on the scale of one document; nan with one document."""

  ratio: float
  shift_S: np.ndarray  # each seed's linearised ratio, less the set's
  documents: float  # MS_doc / S
  residual: float  # MS_res / S; 0 with one seed, which leaves the residual within `documents`
  df: float  # of `documents`
  n_documents: int


def _spread(one: Paired) -> _Spread:
  y_SxD = np.asarray(one.numerator_SxD, float)
  x_SxD = np.broadcast_to(np.asarray(one.denominator, float), y_SxD.shape)
  n_seeds, n_documents = y_SxD.shape
  ratio = float(y_SxD.sum() / x_SxD.sum())
  e_SxD = (y_SxD - ratio * x_SxD) / x_SxD.mean()
  shift_S = e_SxD.mean(1)
  if n_documents == 1:
    return _Spread(ratio, shift_S, np.nan, np.nan, np.nan, 1)
  e_SxD = e_SxD - shift_S[:, None] * x_SxD / x_SxD.mean(1, keepdims=True)
  mean_D = e_SxD.mean(0)
  factor_D, df = _leverage(x_SxD.sum(0) / x_SxD.sum())
  residual = factor_D @ np.sum((e_SxD - mean_D) ** 2, 0) / (n_seeds * max(n_seeds - 1, 1))
  return _Spread(ratio, shift_S, float(factor_D @ mean_D**2), float(residual), df, n_documents)


def _leverage(share_D: np.ndarray) -> tuple[np.ndarray, float]:
  """Factors [documents] that make factor @ residual^2 a variance of one document, and the degrees of freedom of that.

  Unbiased where all documents have one variance per byte. With equal shares: 1/(D - 1) each, and D - 1.

  Args:
    share_D: each document's share of the bytes.
  """
  concentration = share_D @ share_D
  kept_D = 1 - 2 * share_D + concentration  # of a document's own variance, in its deviation from the ratio
  return 1 / (kept_D * len(share_D)), max(float(1 / concentration) - 1, 1.0)


def _interval(
  estimate: float, variances: Sequence[float], dfs: Sequence[float], level: float
) -> tuple[tuple[float, float, float, float, float], tuple[tuple[float, float], ...]]:
  """Return an effect's (low, high, error, df, p) and its parts. The variance is a sum of estimated parts, each with its own df."""
  parts = tuple((float(variance), float(df)) for variance, df in zip(variances, dfs, strict=True) if variance != 0)
  variance_K, df_K = np.asarray(parts, float).reshape(-1, 2).T
  error = math.sqrt(variance_K.sum())
  if math.isnan(error):
    return (-math.inf, math.inf, math.inf, math.nan, math.nan), ()
  if error == 0:
    return (estimate, estimate, 0.0, math.nan, float(estimate == 0)), ()
  share_K = variance_K / error**2
  quantile = lambda tail: math.sqrt(share_K @ special.stdtrit(df_K, tail) ** 2)
  wide, df = quantile((1 - level) / 2), float(df_K[0])
  if len(parts) > 1:
    df = float(special.stdtridf((1 + level) / 2, wide))
  p = _p(abs(estimate) / error, df_K, quantile)
  return (estimate - wide * error, estimate + wide * error, error, df, p), parts


def _p(statistic: float, df_K: np.ndarray, quantile) -> float:
  """Twice the tail whose quantile is the statistic; it lies between those of the parts' own t distributions."""
  tails = special.stdtr(df_K, -statistic)
  low, high = tails.min(), tails.max()
  if low == high or high < SMALLEST_TAIL:
    return float(2 * high)
  above = lambda log_tail: quantile(math.exp(log_tail)) - statistic
  low, high = math.log(max(low * 0.99, SMALLEST_TAIL)), math.log(min(high * 1.01, 0.5))
  return float(2 * math.exp(optimize.brentq(above, low, high))) if above(low) > 0 else 0.0


def verdict(effect: Effect, lower_is_better: bool) -> str:
  """Return 'better' or 'worse' if the effect's interval excludes 0, else 'unresolved'; TOO_FEW with one or two seeds."""
  if effect.n_seeds < MIN_SEEDS:
    return TOO_FEW
  if not (effect.low > 0 or effect.high < 0):  # also where they are nan
    return 'unresolved'
  return 'better' if (effect.estimate < 0) == lower_is_better else 'worse'


def corrected_level(n_tests: int) -> float:
  """Return the level of each of n intervals so that all cover at once at least 95% of the time (Bonferroni)."""
  return 1 - ALPHA / max(n_tests, 1)


def power(difference: float, parts: Sequence[tuple[float, float]], level: float = 0.95) -> float:
  """Return the probability that an interval at `level` excludes 0 on the right side, for a true difference.

  Args:
    difference: in the estimate's unit.
    parts: (true variance, df) of each part of the squared standard error, as in `Effect.parts`.
    level: of the interval.
  """
  error = math.sqrt(sum(variance for variance, _ in parts))
  return _power(difference / error, _half_widths(parts, level) / error)


def _power(errors: float, halves: np.ndarray) -> float:
  """Do the same with difference and half widths in standard errors, averaged over the half widths."""
  return float(np.mean(special.ndtr(abs(errors) - halves)))


def _half_widths(parts: Sequence[tuple[float, float]], level: float) -> np.ndarray:
  """Return equally likely half widths of intervals, over the sampling distribution of each variance's estimate."""
  midpoints = (np.arange(QUADRATURE) + 0.5) / QUADRATURE
  squared = np.zeros(1)
  for variance, df in parts:
    ratio = special.chdtri(df, 1 - midpoints) / df if math.isfinite(df) else np.ones(1)
    squared = (squared[:, None] + special.stdtrit(df, (1 + level) / 2) ** 2 * variance * ratio).ravel()
  return np.sqrt(squared)


def minimum_detectable_effect(effect: Effect, power_wanted: float = POWER, level: float = 0.95) -> float:
  """Return the true effect, in the estimate's unit, that a new experiment of this size resolves at `level` with that power.

  It uses the estimated variances as the true ones; `mde_range` gives the resulting uncertainty.
  """
  if effect.error == 0 or math.isinf(effect.error):
    return effect.error
  halves = _half_widths(effect.parts, level) / effect.error
  short_of = lambda errors: _power(errors, halves) - power_wanted
  highest = 2.0
  while short_of(highest) < 0:
    highest *= 2
  return effect.error * float(optimize.brentq(short_of, 0.0, highest, xtol=1e-4))


def mde_range(effect: Effect, mde: float, level: float = 0.95) -> tuple[float, float]:
  """Return an interval for the minimum detectable effect, because the standard error behind it is an estimate.

  It comes from the chi-square interval of error^2, with Satterthwaite's degrees of freedom.
  """
  if effect.error == 0 or math.isinf(effect.error):
    return mde, mde
  variance_K, df_K = np.asarray(effect.parts, float).T
  df = variance_K.sum() ** 2 / np.sum(variance_K**2 / df_K)
  if math.isinf(df):
    return mde, mde
  low, high = (math.sqrt(df / special.chdtri(df, tail)) for tail in ((1 - level) / 2, (1 + level) / 2))
  return mde * low, mde * high


def checkpoint_noise(values: Sequence[float]) -> float:
  """Standard deviation over a run's last checkpoints (Heineman et al. 2025); nan of fewer than two.

  A floor for the noise between seeds, not a measure of it; a trend over the checkpoints counts as noise.
  """
  return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def with_checkpoint_noise(
  effect: Effect, spreads: Sequence[float], n: int | None = None, level: float = 0.95
) -> Effect:
  """Add the checkpoint noise of each run to the error of an effect of one seed.

  Args:
    effect: of one seed, over documents.
    spreads: the `checkpoint_noise` of each run, times the run's coefficient in the estimate.
    n: checkpoints behind each of them; by default they count as known exactly.
    level: of the interval.
  Raises:
    ValueError: the effect is of several seeds, which show the noise themselves.
  """
  if effect.n_seeds != 1:
    raise ValueError(f'checkpoint noise is for effects of one seed; this one has {effect.n_seeds}')
  known = math.inf if n is None else n - 1
  documents = math.nan if math.isinf(effect.error) else effect.error**2
  variances, dfs = [documents, float(np.square(spreads).sum())], [effect.df, known]
  (low, high, error, df, p), parts = _interval(effect.estimate, variances, dfs, level)
  over = 'documents and checkpoints'
  return effect._replace(low=low, high=high, error=error, df=df, p=p, over=over, parts=parts)
