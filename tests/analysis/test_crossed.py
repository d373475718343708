"""Crossed random effects: against hand formulas and ANOVA, and as often right as they say, on simulated grids of known truth.

Coverages are over 2000 grids: their Monte Carlo error is 0.5 points.
"""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from kdjax.analysis import crossed
from kdjax.analysis.crossed import Effect, Paired, crossed_effect, minimum_detectable_effect, verdict
from tests.analysis.textbook import mean_interval, ratio_interval

GRIDS = 2000
MONTE_CARLO = math.sqrt(0.05 * 0.95 / GRIDS)
MACRO = (30, 50, 100, 30), (0.25,) * 4
DIFFERENCE = (30, 50, 100, 30, 60), (0.25,) * 4 + (-1.0,)
SINGLE = (30,), (1.0,)
# Shares of the seeds, documents and residual in the variance of a set's value.
MIXES = {
  'seeds': (0.9, 0.05, 0.05),
  'documents': (0.05, 0.9, 0.05),
  'equal': (0.45, 0.45, 0.1),
  'residual': (0.05, 0.05, 0.9),
}


def lengths(rng, n: int, kind: str) -> np.ndarray:
  """[documents] bytes; 'log-normal' has the web's spread: the longest of 30 is some 60 times the shortest."""
  return np.round(np.exp(rng.normal(6, 1, n))) + 1 if kind == 'log-normal' else np.full(n, 400.0)


def grid(rng, n_seeds: int, documents, mix: str, effects=None, kind: str = 'log-normal', sizes=None) -> list[Paired]:
  """Sets whose values vary with variance 1, in the mix's shares; half of a seed's shift is common to all sets."""
  seeds, documents_share, residual = MIXES[mix]
  sizes = [lengths(rng, n, kind) for n in documents] if sizes is None else sizes
  effects = np.zeros(len(sizes)) if effects is None else effects
  common_S, sets = rng.normal(size=n_seeds), []
  for x_D, effect in zip(sizes, effects, strict=True):
    concentration = np.sum(x_D**2) / np.sum(x_D) ** 2
    own_S = (common_S + rng.normal(size=n_seeds)) / math.sqrt(2)
    rate_SxD = effect + math.sqrt(seeds * n_seeds) * own_S[:, None]
    rate_SxD = rate_SxD + math.sqrt(documents_share / concentration) * rng.normal(size=len(x_D))
    rate_SxD = rate_SxD + math.sqrt(residual * n_seeds / concentration) * rng.normal(size=(n_seeds, len(x_D)))
    sets.append(Paired(rate_SxD * x_D, x_D))
  return sets


def covered(found: list[Effect], truth: float) -> float:
  return float(np.mean([effect.low <= truth <= effect.high for effect in found]))


# Formulas


def test_a_two_by_two_example_by_hand():
  """Mean squares of seeds 9, documents 4, residual 1."""
  found = crossed_effect([Paired(np.array([[1.0, 2.0], [3.0, 6.0]]), np.ones(2))])
  variance = (9 + 4 - 1) / 4
  half = math.sqrt(stats.t.ppf(0.975, 1) ** 2 * variance)  # both parts have one degree of freedom
  np.testing.assert_allclose(found[:5], (3, 3 - half, 3 + half, math.sqrt(3), 1), rtol=1e-6)
  assert found.p == pytest.approx(2 * stats.t.sf(3 / math.sqrt(3), 1))
  assert found[6:11] == (2, 2, 'seeds and documents', (9 - 1) / 2, (4 - 1) / 2)
  assert found.parts == ((9 / 4, 1), (pytest.approx(3 / 4), pytest.approx(1)))


def anova(y_SxD: np.ndarray) -> tuple[float, float, float]:
  """Classical mean squares of seeds, documents and residual."""
  long = pd.DataFrame([(s, d, y) for (s, d), y in np.ndenumerate(y_SxD)], columns=['s', 'd', 'y'])
  table = anova_lm(ols('y ~ C(s) + C(d)', long).fit())
  return tuple(table['sum_sq'] / table['df'])[:3]


def test_with_documents_of_one_length_it_is_the_two_way_anova():
  rng = np.random.default_rng(0)
  y_SxD = rng.normal(size=(4, 1)) + rng.normal(size=7) + rng.normal(size=(4, 7))
  seeds, documents, residual = anova(y_SxD)
  found = crossed_effect([Paired(5 * y_SxD, np.full(7, 5.0))])
  assert seeds > residual and documents > residual
  assert found.estimate == pytest.approx(y_SxD.mean())
  assert found.error == pytest.approx(math.sqrt((seeds + documents - residual) / 28))
  assert (found.seed_variance, found.document_variance) == pytest.approx(
    ((seeds - residual) / 7, (documents - residual) / 4)
  )
  quantiles = stats.t.ppf(0.975, [3, 6]) ** 2
  half = math.sqrt((seeds * quantiles[0] + (documents - residual) * quantiles[1]) / 28)
  assert found.high - found.estimate == pytest.approx(half)
  assert 3 < found.df < 6 and stats.t.ppf(0.975, found.df) * found.error == pytest.approx(half)


def test_the_error_is_never_under_either_mean_square():
  opposed = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])  # all residual
  seeds = np.array([[0.0, 0.1, -0.1], [1.0, 0.9, 1.1]]) - opposed * 0.01
  for y_SxD in (opposed + np.array([[0.0], [0.5]]), opposed + np.array([0.0, 0.1, 0.0]), seeds):
    seeds_ms, documents_ms, residual_ms = anova(y_SxD)
    floor = max(seeds_ms, documents_ms)
    assert seeds_ms + documents_ms - residual_ms < floor
    found = crossed_effect([Paired(y_SxD, np.ones(3))])
    assert found.error == pytest.approx(math.sqrt(floor / 6))


def test_one_seed_is_the_ratio_interval_over_documents():
  y_D = np.array([3.0, -1.0, 4.0, 2.0, 2.5])
  found = crossed_effect([Paired(y_D[None], np.full(5, 2.0))])
  reference = ratio_interval(y_D, np.full(5, 2.0))
  np.testing.assert_allclose(found[:4], reference[:4])
  assert (found.df, found.over, found.n_seeds, found.n_documents) == (pytest.approx(4), 'documents', 1, 5)
  assert found.p == pytest.approx(stats.ttest_1samp(y_D, 0).pvalue)
  assert math.isnan(found.seed_variance) and found.document_variance == pytest.approx(np.var(y_D / 2, ddof=1))


def test_one_seed_with_unlike_documents_is_wider_than_the_ratio_interval():
  y_D, x_D = np.array([3.0, -1.0, 9.0, 2.0, 2.5]), np.array([2.0, 1.0, 8.0, 2.0, 3.0])
  found, reference = crossed_effect([Paired(y_D[None], x_D)]), ratio_interval(y_D, x_D)
  assert found.estimate == pytest.approx(reference.estimate)
  assert found.low < reference.low and reference.high < found.high and found.df < 4


def test_one_seed_of_several_sets_is_the_mean_interval():
  rng = np.random.default_rng(1)
  sets = [Paired(rng.normal(size=(1, n)), np.full(n, 3.0)) for n in (5, 9)]
  found = crossed_effect(sets)
  reference = mean_interval([ratio_interval(each.numerator_SxD[0], each.denominator) for each in sets])
  np.testing.assert_allclose(found[:4], reference[:4])


def test_one_document_is_students_t_over_seeds():
  values = np.array([1.0, 2.0, 4.0, 3.0])
  found = crossed_effect([Paired(values[:, None] * 50, np.array([50.0]))])
  reference = stats.ttest_1samp(values, 0)
  np.testing.assert_allclose(found[1:3], reference.confidence_interval(0.95))
  assert (found.p, found.df, found.over) == (pytest.approx(reference.pvalue), 3, 'seeds')
  assert found.seed_variance == pytest.approx(np.var(values, ddof=1)) and math.isnan(found.document_variance)


def test_a_set_of_one_document_beside_others_leaves_seeds_alone():
  rng = np.random.default_rng(2)
  sets = [Paired(rng.normal(size=(4, 6)), np.ones(6)), Paired(rng.normal(size=(4, 1)), np.ones(1))]
  per_seed = (sets[0].numerator_SxD.mean(1) + sets[1].numerator_SxD[:, 0]) / 2
  found = crossed_effect(sets)
  assert found.over == 'seeds'
  np.testing.assert_allclose(found[1:3], stats.ttest_1samp(per_seed, 0).confidence_interval(0.95))


def test_one_seed_and_one_document_say_nothing():
  found = crossed_effect([Paired(np.array([[3.0]]), np.array([2.0]))])
  assert found[:4] == (1.5, -math.inf, math.inf, math.inf) and math.isnan(found.p)
  assert verdict(found, True) == crossed.TOO_FEW
  assert minimum_detectable_effect(found) == math.inf


@pytest.mark.parametrize('shape', [(1, 1), (1, 6), (4, 1), (4, 6)])
def test_equal_arms_differ_by_exactly_nothing(shape):
  found = crossed_effect([Paired(np.zeros(shape), np.arange(1.0, shape[1] + 1))])
  assert found.estimate == 0
  if shape != (1, 1):
    assert (found.low, found.high, found.error, found.p) == (0, 0, 0, 1)
    assert verdict(found, True).startswith('unresolved') and minimum_detectable_effect(found) == 0


def test_one_set_of_nothing_beside_one_with_a_difference():
  rng = np.random.default_rng(3)
  found = crossed_effect([Paired(np.zeros((3, 5)), np.ones(5)), Paired(rng.normal(size=(3, 5)), np.ones(5))])
  assert np.isfinite(found[:6]).all() and found.low < found.estimate < found.high


def test_a_diverged_run_is_not_a_result():
  y_SxD = np.ones((3, 4))
  y_SxD[0, 0] = np.nan
  found = crossed_effect([Paired(y_SxD, np.ones(4))])
  assert math.isnan(found.p) and verdict(found, False) == 'unresolved'


def test_seeds_that_repeat_each_other_leave_the_interval_over_documents():
  y_D, x_D = np.array([3.0, -1.0, 4.0, 2.0]), np.array([2.0, 1.0, 5.0, 4.0])
  found, one = crossed_effect([Paired(np.tile(y_D, (3, 1)), x_D)]), crossed_effect([Paired(y_D[None], x_D)])
  np.testing.assert_allclose(found[:6], one[:6], rtol=1e-6)


def test_a_shift_per_byte_is_all_seed_and_no_residual():
  """Long documents move more with a seed; that is no seed x document interaction."""
  rng = np.random.default_rng(4)
  x_D, shift_S, own_D = lengths(rng, 12, 'log-normal'), rng.normal(size=4), rng.normal(size=12)
  found = crossed_effect([Paired((shift_S[:, None] + own_D) * x_D, x_D)])
  documents = crossed_effect([Paired((own_D * x_D)[None], x_D)])
  assert found.seed_variance == pytest.approx(np.var(shift_S, ddof=1))
  assert found.document_variance == pytest.approx(documents.document_variance)
  assert found.error**2 == pytest.approx(np.var(shift_S, ddof=1) / 4 + documents.error**2)


def test_bytes_may_differ_between_seeds():
  y_SxD, x_SxD = np.array([[1.0, 4.0], [2.0, 3.0]]), np.array([[1.0, 3.0], [2.0, 2.0]])
  found = crossed_effect([Paired(y_SxD, x_SxD)])
  assert found.estimate == 10 / 8
  alike = crossed_effect([Paired(y_SxD, np.tile([1.0, 3.0], (2, 1)))])
  assert alike == crossed_effect([Paired(y_SxD, np.array([1.0, 3.0]))]) != found


def test_the_same_seeds_cross_all_sets():
  """Shifts that cancel between sets leave the mean sure, and their difference twice as unsure."""
  rng = np.random.default_rng(5)
  shift_Sx1, noise = rng.normal(size=(5, 1)), lambda: 1e-6 * rng.normal(size=(5, 20))
  sets = [Paired(shift_Sx1 + noise(), np.ones(20)), Paired(-shift_Sx1 + noise(), np.ones(20))]
  alone = crossed_effect(sets[:1])
  assert crossed_effect(sets).error < 1e-5
  assert crossed_effect(sets, [1, -1]).error == pytest.approx(2 * alone.error, rel=1e-4)


def test_documents_of_different_sets_are_independent():
  rng = np.random.default_rng(6)
  own = [rng.normal(size=n) for n in (20, 30)]
  sets = [Paired(np.tile(each, (3, 1)), np.ones(len(each))) for each in own]
  variances = [np.var(each, ddof=1) / len(each) for each in own]
  assert crossed_effect(sets, [1, -1]).error == pytest.approx(math.sqrt(sum(variances)))
  assert crossed_effect(sets).error == pytest.approx(math.sqrt(sum(variances)) / 2)


def test_the_parts_of_several_sets_add_up():
  """Variance by hand: over the seeds' own weighted sums, and each set's document less its residual mean square."""
  rng = np.random.default_rng(7)
  weights, ys = np.array([0.5, 0.5, -1.0]), []
  shift_Sx1 = rng.normal(size=(4, 1))
  for n in (6, 9, 12):
    ys.append(n / 6 * shift_Sx1 + rng.normal(size=(4, n)) + 3 * rng.normal(size=n))
  seeds = np.var(sum(w * y.mean(1) for w, y in zip(weights, ys, strict=True)), ddof=1) / 4
  squares = [anova(y) for y in ys]
  rest = sum(w**2 * (m[1] - m[2]) / y.size for w, y, m in zip(weights, ys, squares, strict=True))
  found = crossed_effect([Paired(y, np.ones(y.shape[1])) for y in ys], weights)
  assert rest > 0 and found.error == pytest.approx(math.sqrt(seeds + rest))
  assert found.document_variance == pytest.approx(
    sum(w**2 * (m[1] - m[2]) / 4 for w, m in zip(weights, squares, strict=True))
  )


def test_sets_of_other_seeds_are_refused():
  sets = [Paired(np.zeros((n, 2)), np.ones(2)) for n in (2, 3)]
  with pytest.raises(ValueError, match='same seeds'):
    crossed_effect(sets)


def test_every_set_needs_its_weight():
  with pytest.raises(ValueError, match='mismatch'):
    crossed_effect([Paired(np.zeros((2, 2)), np.ones(2))] * 2, [1.0])


def test_the_unit_of_length_changes_nothing_but_the_unit():
  rng = np.random.default_rng(8)
  (one,) = grid(rng, 4, [10], 'equal')
  found = crossed_effect([one])
  scaled = crossed_effect([Paired(one.numerator_SxD * 3, one.denominator * 6)])
  np.testing.assert_allclose(scaled[:4], np.asarray(found[:4]) / 2)
  np.testing.assert_allclose(scaled[4:6], found[4:6])


@pytest.mark.parametrize('kind', ['log-normal', 'equal'])
def test_the_document_variance_is_unbiased_for_unlike_lengths(kind):
  """In expectation, by the quadratic form's trace, where all documents have variance 1 per byte."""
  share_D = lengths(np.random.default_rng(9), 15, kind)
  share_D /= share_D.sum()
  deviation_DxD = np.eye(15) - share_D  # a document's own ratio less the set's
  factor_D, df = crossed._leverage(share_D)
  expected = np.sum(factor_D * (15 * share_D) ** 2 * np.diag(deviation_DxD @ deviation_DxD.T)) / 15
  assert expected == pytest.approx(np.sum(share_D**2))
  assert df == pytest.approx(14) if kind == 'equal' else 1 < df < 14


def test_one_document_that_is_nearly_all_is_nearly_one_document():
  rng = np.random.default_rng(23)
  rate_SxD, x_D = rng.normal(size=(1, 5)), np.array([1e5, 1.0, 1.0, 1.0, 1.0])
  found, like = (crossed_effect([Paired(rate_SxD * x, x)]) for x in (x_D, np.ones(5)))
  assert found.df == 1 and found.high - found.low > 2 * (like.high - like.low)


# p values and verdicts


@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('level', [0.5, 0.95, 0.993])
def test_p_and_interval_agree_at_every_level(mix, level):
  rng = np.random.default_rng(10)
  for _ in range(20):
    sets = grid(rng, 3, (8, 12), mix, (1.0, 2.0))
    found = crossed_effect(sets, level=level)
    assert (found.p < 1 - level) == (found.low > 0 or found.high < 0)
    edge = crossed_effect(sets, level=1 - found.p)  # touches zero
    assert min(abs(edge.low), abs(edge.high)) < 1e-6 * (edge.high - edge.low)


@pytest.mark.parametrize('n_seeds', [2, 3, 40])
def test_p_falls_with_the_effect_and_never_breaks(n_seeds):
  (one,) = grid(np.random.default_rng(11), n_seeds, [10], 'equal')
  noise_SxD = one.numerator_SxD - crossed_effect([one]).estimate * one.denominator
  sizes = (0.0, 1e-6, 1.0, 3.0, 10.0, 1e2, 1e4, 1e8, 1e12)
  ps = [crossed_effect([Paired(noise_SxD + size * one.denominator, one.denominator)]).p for size in sizes]
  assert ps[0] == pytest.approx(1) and (np.diff(ps) <= 0).all() and 0 <= ps[-1] < 1e-6 and np.diff(ps[:6]).all()


@pytest.mark.parametrize(
  ('estimate', 'half', 'lower_is_better', 'word'),
  [
    (-1.0, 0.9, True, 'better'),
    (-1.0, 0.9, False, 'worse'),
    (1.0, 0.9, True, 'worse'),
    (1.0, 0.9, False, 'better'),
    (1.0, 1.1, True, 'unresolved'),
    (1.0, math.nan, True, 'unresolved'),
  ],
)
def test_a_verdict_says_whether_the_interval_excludes_zero(estimate, half, lower_is_better, word):
  effect = Effect(estimate, estimate - half, estimate + half, 1, 2, 0.01, 3, 4, 'seeds', 0, 0)
  assert verdict(effect, lower_is_better) == word


@pytest.mark.parametrize('n_seeds', [1, 2])
def test_one_or_two_seeds_give_no_verdict(n_seeds):
  effect = Effect(-1.0, -1.1, -0.9, 0.01, 2, 1e-9, n_seeds, 400, 'seeds and documents', 0, 0)
  assert verdict(effect, True) == crossed.TOO_FEW


def test_the_corrected_level_is_bonferronis():
  assert crossed.corrected_level(1) == crossed.corrected_level(0) == pytest.approx(0.95)
  assert crossed.corrected_level(4) == pytest.approx(0.9875)


def test_accuracy_is_an_effect_with_items_as_documents():
  rng = np.random.default_rng(12)
  arm, baseline = rng.random((3, 200)) < 0.6, rng.random((3, 200)) < 0.5
  found = crossed_effect([Paired(arm.astype(float) - baseline, np.ones(200))])
  assert found.estimate == pytest.approx(arm.mean() - baseline.mean())
  assert found.low < 0.1 < found.high


# Simulated grids


@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize(('documents', 'weights'), [SINGLE, ((100,), (1.0,)), MACRO, DIFFERENCE])
def test_95_percent_intervals_hold_the_truth_at_least_93_percent_of_the_time(documents, weights, mix):
  rng, effects = np.random.default_rng(sum(documents)), np.linspace(1, 2, len(documents))
  for n_seeds in (3, 5, 10):
    found = [crossed_effect(grid(rng, n_seeds, documents, mix, effects), weights) for _ in range(GRIDS)]
    assert covered(found, effects @ np.asarray(weights)) >= 0.93, n_seeds


@pytest.mark.parametrize('n_seeds', [2, 3])
@pytest.mark.parametrize('mix', ['seeds', 'equal'])
def test_few_seeds_and_many_like_documents_cover_too(mix, n_seeds):
  """The hardest case: three seeds that agree by chance, beside a sure estimate over documents. Satterthwaite: 92%."""
  rng = np.random.default_rng(13)
  found = [crossed_effect(grid(rng, n_seeds, MACRO[0], mix, kind='equal'), MACRO[1]) for _ in range(GRIDS)]
  assert covered(found, 0.0) >= 0.93
  tail = 0.05 / 4  # of each of four primary tests
  assert np.mean([effect.p < tail for effect in found]) <= tail + 3 * math.sqrt(tail / GRIDS)


def test_few_documents_and_many_seeds_cover_too():
  """Degrees of freedom must not be S - 1 = 9 where three documents decide."""
  rng = np.random.default_rng(14)
  found = [crossed_effect(grid(rng, 10, [3], 'documents', kind='equal')) for _ in range(GRIDS)]
  assert covered(found, 0.0) >= 0.93 and np.median([effect.df for effect in found]) < 4


def test_one_seed_covers_over_documents_where_the_ratio_interval_does_not():
  rng, found, plain = np.random.default_rng(15), [], []
  for _ in range(GRIDS):
    x_D = lengths(rng, 30, 'log-normal')
    y_D = (0.3 + rng.normal(size=30)) * x_D
    found.append(crossed_effect([Paired(y_D[None], x_D)]))
    plain.append(ratio_interval(y_D, x_D))
  assert covered(found, 0.3) >= 0.93 + 3 * MONTE_CARLO
  assert covered(plain, 0.3) < 0.95 - 3 * MONTE_CARLO


def test_an_interval_over_tokens_would_be_far_too_narrow():
  """Why documents are the unit: where a document's tokens share a shift, tokens as the unit cover far less than they say."""
  rng, over_tokens, over_documents = np.random.default_rng(0), [], []
  for _ in range(400):
    x_D = rng.integers(20, 400, 60).astype(float)
    y_D = x_D * rng.normal(0.2, 0.3, 60) + rng.normal(size=60) * np.sqrt(x_D)
    half = 1.96 / math.sqrt(x_D.sum())  # a token's own noise has variance 1
    over_tokens.append(abs(y_D.sum() / x_D.sum() - 0.2) <= half)
    over_documents.append(crossed_effect([Paired(y_D[None], x_D)]))
  assert np.mean(over_tokens) < 0.6 and covered(over_documents, 0.2) > 0.9


@pytest.mark.parametrize('mix', ['seeds', 'documents'])
def test_either_source_alone_would_be_far_too_narrow(mix):
  """Why crossed: t over seeds knows nothing of other documents, an interval over documents nothing of other seeds."""
  rng, over_seeds, over_documents = np.random.default_rng(16), [], []
  for _ in range(400):
    (one,) = grid(rng, 5, [60], mix)
    per_seed = Paired(one.numerator_SxD.sum(1, keepdims=True), one.denominator.sum(keepdims=True))
    over_seeds.append(crossed_effect([per_seed]))
    over_documents.append(crossed_effect([Paired(one.numerator_SxD.mean(0, keepdims=True), one.denominator)]))
  assert covered(over_documents if mix == 'seeds' else over_seeds, 0.0) < 0.7


@pytest.mark.parametrize('n_seeds', [3, 5])
@pytest.mark.parametrize('mix', ['seeds', 'equal', 'documents'])
def test_four_primary_contrasts_on_pure_noise_rarely_give_a_verdict(mix, n_seeds):
  """Tests the whole procedure: effects at the corrected level, verdicts. The family-wise error is at most 5% plus 3 Monte Carlo errors."""
  rng, n, wrong = np.random.default_rng(17), 800, 0
  in_domain, ood, both = [1.0, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3], [-1.0, 1 / 3, 1 / 3, 1 / 3]
  contrasts = [(0, 4, in_domain), (0, 4, both), (1, 0, in_domain), (3, 0, ood)]
  for _ in range(n):
    sizes = [lengths(rng, n_documents, 'log-normal') for n_documents in (40, 30, 50, 30)]
    arms = [[one.numerator_SxD for one in grid(rng, n_seeds, (), mix, sizes=sizes)] for _ in range(5)]
    words = []
    for left, right, weights in contrasts:
      used = [k for k, weight in enumerate(weights) if weight]
      sets = [Paired(arms[left][k] - arms[right][k], sizes[k]) for k in used]
      effect = crossed_effect(sets, [weights[k] for k in used], crossed.corrected_level(len(contrasts)))
      words.append(verdict(effect, True))
    wrong += any(word != 'unresolved' for word in words)
  assert wrong / n <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)


def resolved(rng, effect: float, n_seeds: int, documents, mix: str, level: float, n: int = GRIDS // 2) -> float:
  """Estimate how often the effect is resolved in the right direction, at a true standard error of 1."""
  found = [crossed_effect(grid(rng, n_seeds, documents, mix, [effect], 'equal'), level=level) for _ in range(n)]
  return float(np.mean([verdict(e, False) == 'better' for e in found]))


def true_effect(n_seeds: int, n_documents: int, mix: str) -> Effect:
  """Return an effect of 0 with the true variances of `grid` instead of estimates."""
  seeds, documents, residual = MIXES[mix]
  parts = ((seeds + residual, n_seeds - 1), (documents, n_documents - 1))
  return Effect(0.0, 0.0, 0.0, 1.0, math.nan, 1.0, n_seeds, n_documents, 'seeds and documents', 0.0, 0.0, parts)


@pytest.mark.parametrize('n_seeds', [3, 5, 10])
@pytest.mark.parametrize('mix', ['seeds', 'equal', 'documents'])
@pytest.mark.parametrize('n_tests', [1, 4])
def test_the_minimum_detectable_effect_is_found_four_times_in_five_at_its_level(mix, n_seeds, n_tests):
  rng, level = np.random.default_rng(18), crossed.corrected_level(n_tests)
  mde = minimum_detectable_effect(true_effect(n_seeds, 40, mix), level=level)
  assert resolved(rng, mde, n_seeds, [40], mix, level) == pytest.approx(0.8, abs=0.05)


def seeds_alone(n_seeds: int) -> Effect:
  """Return an effect over seeds whose standard error is known to be 1."""
  return Effect(0.0, 0.0, 0.0, 1.0, n_seeds - 1, 1.0, n_seeds, 1, 'seeds', 1.0, math.nan, ((1.0, n_seeds - 1),))


@pytest.mark.parametrize('n_seeds', [3, 5, 20])
@pytest.mark.parametrize('level', [0.95, 0.9875])
def test_the_minimum_detectable_effect_is_the_noncentral_t_tests(n_seeds, level):
  """Against SciPy's noncentral t: the probability of the wrong direction is negligible."""
  known = special.nctdtrinc(n_seeds - 1, 0.2, stats.t.ppf((1 + level) / 2, n_seeds - 1))
  assert minimum_detectable_effect(seeds_alone(n_seeds), level=level) == pytest.approx(known, rel=0.01)


def test_more_power_or_a_surer_level_needs_a_greater_effect():
  effect = seeds_alone(5)
  assert minimum_detectable_effect(effect) < minimum_detectable_effect(effect, power_wanted=0.9)
  assert minimum_detectable_effect(effect) < minimum_detectable_effect(effect, level=0.99)


def test_the_range_of_the_minimum_detectable_effect_is_the_standard_deviations_own_interval():
  """Simulated: the range contains the effect for the true error with its nominal probability."""
  rng, true = np.random.default_rng(24), minimum_detectable_effect(seeds_alone(5))
  holds = []
  for _ in range(GRIDS):
    found = crossed_effect([Paired(rng.normal(0, math.sqrt(5), (5, 1)), np.ones(1))])
    low, high = crossed.mde_range(found, minimum_detectable_effect(found))
    holds.append(low <= true <= high)
  assert np.mean(holds) == pytest.approx(0.95, abs=3 * MONTE_CARLO)


def test_power_is_the_share_of_experiments_that_resolve():
  rng, parts = np.random.default_rng(25), ((0.7, 4.0), (0.3, 39.0))
  n = 200_000
  half2 = sum(stats.t.ppf(0.975, df) ** 2 * variance * rng.chisquare(df, n) / df for variance, df in parts)
  resolves = 3.0 + rng.normal(size=n) > np.sqrt(half2)
  assert crossed.power(3.0, parts) == pytest.approx(resolves.mean(), abs=0.005)


# Checkpoints, bootstrap


def test_checkpoint_noise_is_the_standard_deviation():
  assert crossed.checkpoint_noise([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt(7 / 3))
  assert math.isnan(crossed.checkpoint_noise([1.0]))


def test_checkpoint_noise_adds_to_the_error_of_one_seed():
  effect = crossed_effect([Paired(np.array([[3.0, -1.0, 4.0, 2.0]]), np.ones(4))])
  found = crossed.with_checkpoint_noise(effect, (0.3, 0.4))
  assert found.error == pytest.approx(math.sqrt(effect.error**2 + 0.25))
  half = math.sqrt((stats.t.ppf(0.975, 3) * effect.error) ** 2 + stats.norm.ppf(0.975) ** 2 * 0.25)
  assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
  assert found.over == 'documents and checkpoints' and effect.p < found.p < 1
  few = crossed.with_checkpoint_noise(effect, (0.3, 0.4), n=3)
  assert few.error == pytest.approx(found.error) and few.low < found.low


def test_no_checkpoint_noise_changes_nothing_but_the_name():
  effect = crossed_effect([Paired(np.array([[3.0, -1.0, 4.0, 2.0]]), np.ones(4))])
  found = crossed.with_checkpoint_noise(effect, (0.0, 0.0))
  np.testing.assert_allclose(found[:6], effect[:6])
  assert found.over == 'documents and checkpoints' and len(found.parts) == 1


def test_the_checkpoint_noise_of_many_runs_is_one_part_of_the_error():
  effect = crossed_effect([Paired(np.array([[3.0, -1.0, 4.0, 2.0]]), np.ones(4))])
  found = crossed.with_checkpoint_noise(effect, [0.1] * 20, n=3)
  assert len(found.parts) == 2 and found.error == pytest.approx(math.sqrt(effect.error**2 + 0.2))
  assert minimum_detectable_effect(found) > minimum_detectable_effect(effect)


def test_checkpoint_noise_does_not_make_one_document_a_sample():
  effect = crossed_effect([Paired(np.array([[3.0]]), np.ones(1))])
  assert crossed.with_checkpoint_noise(effect, (0.1, 0.1)).high == math.inf


def test_checkpoint_noise_is_not_for_several_seeds():
  effect = crossed_effect([Paired(np.eye(3), np.ones(3))])
  with pytest.raises(ValueError, match='this one has 3'):
    crossed.with_checkpoint_noise(effect, (0.1, 0.1))


def test_checkpoint_noise_covers_where_documents_alone_do_not():
  """Arm and baseline of one seed, each with training noise of a known SD; five checkpoints of each show it."""
  rng, plain, found = np.random.default_rng(20), [], []
  for _ in range(GRIDS // 2):
    x_D = lengths(rng, 40, 'equal')
    y_D = (np.diff(rng.normal(size=2)) + rng.normal(size=40)) * x_D
    plain.append(crossed_effect([Paired(y_D[None], x_D)]))
    noise = [crossed.checkpoint_noise(rng.normal(size=5)) for _ in range(2)]
    found.append(crossed.with_checkpoint_noise(plain[-1], noise, n=5))
  assert covered(plain, 0.0) < 0.5 and covered(found, 0.0) >= 0.93
