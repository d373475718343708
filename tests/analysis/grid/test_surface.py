"""The gain surface: known ones are found again, by the ridge and by the law, and its intervals cover."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from kdjax.analysis.grid import surface
from kdjax.config.sizes import NAMED
from kdjax.errors import UserError
from kdjax.models import flops

TEACHERS = ('tiny-0.1m', 'tiny-0.3m', 'tiny-1m', 'tiny-3m')
SIZE = {name: float(flops.count_params(config).non_embedding) for name, config in NAMED.items()}
TOKENS = 2_000_000
ALPHAS = (0.2, 0.4, 0.6, 0.8)


def effects(
  gain,
  seed=0,
  teachers=TEACHERS,
  budgets=(500_000, TOKENS),
  alphas=ALPHAS,
  students=('tiny-1m',),
  student_tokens=(TOKENS,),
  error=0.004,
  baseline=lambda n, d: 1.5,
  **columns,
) -> pd.DataFrame:
  """Effects of a grid whose gains are `gain(N_T, D_T, N_S, D_S, alpha)`; half of the noise's variance is the shared baseline's."""
  rng, df, rows = np.random.default_rng(seed), 4.0, []
  for student, tokens in itertools.product(students, student_tokens):
    common = rng.normal()
    for teacher, budget, alpha in itertools.product(teachers, budgets, alphas):
      noise = error * (common + rng.normal()) / math.sqrt(2)
      rows.append(
        {
          'student': student,
          'student_tokens': tokens,
          'teacher': teacher,
          'teacher_tokens': budget,
          'alpha': alpha,
          'cells': f'{student}-{tokens}-{teacher}-{budget}-{alpha}',
          'estimate': -gain(SIZE[teacher], budget, SIZE[student], tokens, alpha) - noise,
          'error': error * math.sqrt(rng.chisquare(df) / df),
          'df': df,
          'baseline': baseline(SIZE[student], tokens),
          'student_params': SIZE[student],
          'teacher_params': SIZE[teacher],
        }
      )
  recipe = {'temperature': 1.0, 'top_k': 0.0, 'mixing': 'normalised', 'arm': 'distilled', 'scenario': ''}
  regime = {'distinct_tokens': 0, 'budget': 'annealed', 'teacher_data': 'iso'}
  measured = {'set': 'in-domain', 'measure': 'bits_per_byte', 'seeds': '43 44 45', 'over': 'seeds and documents'}
  return pd.DataFrame(rows).assign(**recipe | regime | measured | columns)


def parabola(peak, at):
  """A gain with its peak at alpha = at, and 0 at alpha = 0."""
  return lambda alpha: peak * alpha / at * (2 - alpha / at)


def weak_best(n_t, d_t, n_s, d_s, alpha):
  """The weaker the teacher the better, at a low alpha; each factor of e in size costs .01."""
  return parabola(0.04 - 0.01 * math.log(n_t / SIZE['tiny-0.1m']), 0.4)(alpha)


def nothing(*_):
  return 0.0


# What it is fitted on.


def test_gains_have_the_sign_that_is_said():
  assert surface.fit_surface(effects(lambda *_: 0.03, error=0.001), draws=2).cells.gain.min() > 0


def test_other_arms_baselines_losses_and_regimes_are_left_out():
  plain = effects(weak_best)
  others = [
    effects(nothing, temperature=2.0),
    effects(nothing, alphas=(0.4,), budget='trunk'),
    effects(nothing, alphas=(0.2,), teacher_data='disjoint'),
    effects(nothing, arm='unigram'),
    effects(nothing, scenario='logits'),  # against a baseline of equal FLOPs, not of equal tokens
    effects(nothing, set='c4'),
    effects(nothing, measure='ece'),
  ]
  fitted = surface.fit_surface(pd.concat([plain, *others]), draws=2)
  pd.testing.assert_frame_equal(fitted.frame, plain)
  for text in (
    '32 of 80 effects left out: temperature is not 1.0',
    "teacher_data is not 'iso'",
    "budget is not 'annealed'",
  ):
    assert any(text in note for note in fitted.notes), text


def test_effects_without_an_error_are_left_out_and_single_seeds_named():
  frame = effects(weak_best, over='documents')
  frame.loc[3, 'error'] = math.inf
  notes = surface.fit_surface(frame, draws=2).notes
  assert any('1 of 32 effects left out: they have no standard error' in note for note in notes)
  assert any('single-seed' in note for note in notes)


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (lambda frame: frame.assign(set='c4'), "no effects of distilled students on 'in-domain'; there are c4"),
    (lambda frame: frame.iloc[:0], 'no distilled cell has finished'),
    (lambda frame: frame.assign(error=math.inf), 'no effect has a standard error'),
    (lambda frame: frame.assign(mixing='ce_plus_alpha_kd'), "no effects with mixing = 'normalised'"),
  ],
)
def test_effects_that_cannot_be_used_are_named(change, match):
  with pytest.raises(UserError, match=match):
    surface.fit_surface(change(effects(weak_best)))


# The ridge.


def test_the_leave_one_teacher_out_errors_are_those_of_a_plain_loop():
  frame = effects(weak_best, budgets=(TOKENS,))
  fitted = surface.fit_surface(frame, draws=2)
  cells, squares = fitted.cells, []
  for teacher in TEACHERS:
    held = (frame['teacher'] == teacher).to_numpy()
    mean = np.sum((cells.weight * cells.gain)[~held]) / np.sum(cells.weight[~held])
    squares.append(cells.weight[held] * (cells.gain[held] - mean) ** 2)
  expected = math.sqrt(np.concatenate(squares).sum() / cells.weight.sum())
  assert fitted.left_out['the mean gain'] == pytest.approx(expected)
  assert fitted.left_out['no gain'] == pytest.approx(math.sqrt(np.average(cells.gain**2, weights=cells.weight)))
  assert fitted.left_out['surface'] < fitted.left_out['alpha alone']


def test_its_terms_are_those_that_the_data_can_tell_apart():
  """Two budgets: no square; one student: no term; teachers: 1, n, n^2, d, nd; each times alpha and alpha^2, never alpha^0."""
  basis = surface._basis(surface.fit_surface(effects(weak_best), draws=2).cells.x)
  pairs = {(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)}
  assert {tuple(powers) for powers in basis.powers} == {(*pair, 0, 0, alpha) for pair in pairs for alpha in (1, 2)}
  assert basis.penalised.sum() == 8


def test_predictions_off_the_one_value_of_an_axis_are_refused_and_others_flagged():
  fitted = surface.fit_surface(effects(weak_best))
  assert set(fitted.fixed) == {surface.N_S, surface.D_S}
  n, d = SIZE['tiny-1m'], TOKENS
  found = surface.predict(fitted, [(n, 1e6, n, d, 0.4), (1e8, 1e6, n, d, 0.4), (n, 1e6, n, d, 0.9)])
  assert list(found.covered) == [True, False, False]
  assert (found.low < found.gain).all()
  assert (found.gain < found.high).all()
  refusal = surface.refusal(fitted, surface.N_S, 1e9)
  assert refusal == 'the grid has one student size (1.066M): nothing is known of others'
  assert not surface.refusal(fitted, surface.N_S, 1.001 * n)
  assert not surface.refusal(fitted, surface.N_T, 1e9)


def test_intervals_of_linear_surfaces_cover_at_least_nine_times_in_ten():
  """Nominal 95%; four teachers, three seeds. Pointwise, at three places between the grid's points."""
  places = [(3e5, 0.5), (1.5e6, 0.3), (2.5e6, 0.7)]
  gain = lambda n_t, alpha: alpha * (0.02 + 0.008 * (math.log(n_t) - 13) - 0.02 * alpha)
  truth = np.array([gain(*place) for place in places])
  hits = []
  for seed in range(60):
    frame = effects(lambda n_t, d_t, n_s, d_s, alpha: gain(n_t, alpha), seed, budgets=(TOKENS,))
    points = [(n_t, TOKENS, SIZE['tiny-1m'], TOKENS, alpha) for n_t, alpha in places]
    found = surface.predict(surface.fit_surface(frame, draws=150), points)
    hits.append((found.low < truth) & (truth < found.high))
  assert np.mean(hits) >= 0.9


# The law.

SUPERVISED = (0.8, 1200.0, 0.5, 900.0, 0.45, 0.6)  # E, A, a, B, b, g: of this form, with constants of ours
DISTILLED = (2.0, 20.0, 1.3, 0.1, 300.0, 0.42, 200.0, 0.4, 0.8)  # c0, c1, d1, f1, A', a', B', b', g'
CURVE = 0.02


def supervised(n, d):
  e, a, p, b, q, g = SUPERVISED
  return e + (a / n**p + b / d**q) ** g


def student_loss(n_t, d_t, n_s, d_s, alpha):
  c0, c1, d1, f1, a, p, b, q, g = DISTILLED
  teacher, alone = supervised(n_t, d_t), supervised(n_s, d_s)
  gap = (1 + (teacher / (alone * d1)) ** (1 / f1)) ** (-c1 * f1)
  law = teacher + teacher**-c0 * gap * (a / n_s**p + b / d_s**q) ** g
  return alone + alpha * (law - alone) - CURVE * alpha * (1 - alpha)


def law_gain(n_t, d_t, n_s, d_s, alpha):
  return supervised(n_s, d_s) - student_loss(n_t, d_t, n_s, d_s, alpha)


LAW_BUDGETS = (500_000, 2_000_000, 8_000_000)
LAW_GRID = {
  'budgets': LAW_BUDGETS,
  'alphas': (0.3, 0.6, 1.0),
  'students': ('tiny-0.3m', 'tiny-1m', 'tiny-3m'),
  'student_tokens': (1_000_000, 4_000_000, 16_000_000),
  'error': 0.003,
  'baseline': supervised,
}
LOSSES = {(name, budget): supervised(SIZE[name], budget) for name in TEACHERS for budget in LAW_BUDGETS}


def test_data_of_the_law_are_predicted_by_the_law_within_a_few_percent():
  fitted = surface.fit_surface(effects(law_gain, **LAW_GRID), teacher_losses=LOSSES, draws=4)
  assert fitted.kind == 'law'  # the data suffice, and it predicts better
  assert any('left-out teachers: ridge' in note for note in fitted.notes)
  points = [(2e5, 1e6, 6e5, 2e6, 0.5), (2e6, 4e6, 2e6, 8e6, 0.8), (5e5, 1.5e6, 1e6, 4e6, 1.0)]
  found = surface.predict(fitted, points).gain
  truth, alone = (
    np.array(losses) for losses in zip(*((student_loss(*p), supervised(*p[2:4])) for p in points), strict=True)
  )
  np.testing.assert_allclose(alone - found, truth, rtol=0.02)
  np.testing.assert_allclose(found, alone - truth, atol=0.15 * np.abs(alone - truth).max())


def test_too_little_for_the_law_is_said():
  one_student = surface.fit_surface(
    effects(law_gain, **LAW_GRID | {'students': ('tiny-1m',)}), teacher_losses=LOSSES, draws=4
  )
  no_losses = surface.fit_surface(effects(law_gain, **LAW_GRID), draws=4)
  assert one_student.kind == no_losses.kind == 'ridge'
  assert any('student size, 1 of 3 distinct values' in note for note in one_student.notes)
  assert any("teachers' own losses are not all known" in note for note in no_losses.notes)
