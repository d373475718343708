"""The advisor: the best teacher and alpha of known surfaces are found, and where there is nothing to be found it says so."""

import math

import pytest

from kdjax import flops
from kdjax.analysis import advisor
from kdjax.errors import UserError
from kdjax.grids.cells import count
from kdjax.models.named import NAMED, named
from tests.analysis.test_surface import SIZE, TEACHERS, TOKENS, effects, nothing, parabola, weak_best

VOCAB, SEQ_LEN = 1024, 128
STUDENT = named('tiny-1m', vocab_size=VOCAB)
PLENTY = 1e18


def saturating(n_t, d_t, n_s, d_s, alpha):
  """The two larger teachers are alike; the smallest is much worse."""
  return parabola(0.04 * (1 - math.exp(-n_t / 3.5e5)), 0.6)(alpha)


def reversing(n_t, d_t, n_s, d_s, alpha):
  """Best at 0.5 million parameters, falling on either side."""
  return parabola(0.04 - 0.015 * math.log(n_t / 5e5) ** 2, 0.5)(alpha)


def advise(frame, budget=PLENTY, student=STUDENT, tokens=TOKENS, draws=400):
  return advisor.advise(advisor.fit(frame, draws=draws), student, tokens, budget, SEQ_LEN)


# Known surfaces.


@pytest.mark.parametrize(
  ('gain', 'teachers', 'alphas'),
  [(weak_best, ['tiny-0.1m'], (0.3, 0.5)), (reversing, ['tiny-0.3m', 'tiny-1m'], (0.4, 0.6))],
)
@pytest.mark.parametrize('seed', range(3))
def test_the_known_best_teacher_and_alpha_are_found_and_the_true_gain_is_within_the_interval(
  gain, teachers, alphas, seed
):
  advice = advise(effects(gain, seed))
  assert advice.supported, advice.reasons
  assert advice.best.teacher in teachers
  assert advice.choice.teacher in teachers
  assert alphas[0] <= advice.best.alpha <= alphas[1]
  option = advice.best
  truth = gain(option.teacher_params, option.teacher_tokens, SIZE['tiny-1m'], TOKENS, option.alpha)
  assert option.low < truth < option.high


@pytest.mark.parametrize('seed', range(3))
def test_where_the_gain_saturates_the_cheapest_of_the_equals_is_chosen(seed):
  advice = advise(effects(saturating, seed, error=0.002))
  assert advice.supported, advice.reasons
  assert advice.choice.teacher in ('tiny-0.3m', 'tiny-1m')  # not the weakest, which is worse, nor the dearest
  assert advice.choice.cost() <= advice.best.cost()


def test_where_the_gain_reverses_the_strongest_teacher_is_told_from_the_best():
  advice = advise(effects(reversing))
  strongest = [option for option in advice.options if option.teacher == 'tiny-3m' and not option.extrapolated]
  assert strongest
  assert all(option.high < advice.best.low for option in strongest)


def test_the_best_alpha_may_rise_with_the_teachers_strength():
  rising = lambda n_t, d_t, n_s, d_s, alpha: parabola(0.03, 0.4 + 0.1 * math.log(n_t / 5e5))(alpha)
  best = {o.teacher: o.alpha for o in advise(effects(rising, error=0.002)).options if not o.extrapolated}
  assert best['tiny-0.1m'] < 0.4 < best['tiny-3m']


def test_the_range_of_alphas_holds_the_best_and_narrows_with_the_noise():
  wide, narrow = (advise(effects(reversing, error=error)).best for error in (0.004, 0.0005))
  assert narrow.alphas[0] <= narrow.alpha <= narrow.alphas[1]
  assert narrow.alphas[1] - narrow.alphas[0] < wide.alphas[1] - wide.alphas[0]


def test_the_same_effects_give_the_same_advice():
  frame = effects(weak_best)
  assert advise(frame).options == advise(frame).options


# Nothing to be found.


def test_on_noise_the_data_do_not_support_an_answer():
  advice = [advise(effects(nothing, seed), draws=200) for seed in range(40)]
  assert sum(a.supported for a in advice) <= 2
  text = advisor.format(next(a for a in advice if not a.supported))
  assert 'The data do not support an answer:' in text
  assert 'Use ' not in text


@pytest.mark.parametrize('n', [1, 2])
def test_fewer_than_three_teachers_are_refused_with_the_reason_and_what_would_help(n):
  advice = advise(effects(weak_best, teachers=TEACHERS[:n], budgets=(TOKENS,)))
  assert not advice.supported
  assert advice.choice is None
  assert f'the grid has {n} teacher' in advice.reasons[0]
  assert any('more teachers' in run for run in advice.runs)
  text = advisor.format(advice)
  assert 'it takes 3' in text
  assert 'nan' not in text


def test_equal_teachers_are_said_to_be_equal():
  advice = advise(effects(lambda *point: parabola(0.03, 0.5)(point[4])))
  assert not advice.supported or 'Caution: left-out teachers' in advisor.format(advice)


# What lies outside.


def test_what_lies_outside_the_grid_is_flagged_and_not_recommended():
  advice = advise(effects(weak_best, teachers=TEACHERS[1:]))
  outside = [option for option in advice.options if option.teacher in ('tiny-0.1m', 'tiny-10m')]
  assert outside
  assert all(option.extrapolated for option in outside)
  assert advice.options[0].teacher == 'tiny-0.1m'  # promises most
  assert advice.best.teacher == advice.choice.teacher == 'tiny-0.3m'
  assert any('tiny-0.1m' in run and 'outside what the grid covers' in run for run in advice.runs)
  assert 'OUTSIDE THE DATA: not recommended' in advisor.format(advice)


def test_sizes_and_budgets_must_have_been_seen_together():
  full = effects(weak_best)
  corner = full[(full['teacher'] != 'tiny-3m') | (full['teacher_tokens'] == 500_000)]
  extrapolated = {(o.teacher, o.teacher_tokens): o.extrapolated for o in advise(corner).options}
  assert extrapolated['tiny-3m', 2_000_000]
  assert not extrapolated['tiny-3m', 500_000]
  assert not extrapolated['tiny-1m', 2_000_000]


def test_where_only_what_lies_outside_fits_the_budget_there_is_no_answer():
  frame = effects(weak_best, teachers=TEACHERS[1:])
  cheapest = min(option.cost() for option in advise(frame).options)
  advice = advise(frame, 1.001 * cheapest)
  assert all(option.extrapolated for option in advice.options)
  assert not advice.supported
  assert 'outside what the grid covers' in advice.reasons[-1]


@pytest.mark.parametrize(
  ('student', 'tokens', 'word'), [('tiny-3m', TOKENS, 'student size'), ('tiny-1m', 50 * TOKENS, 'student tokens')]
)
def test_of_other_students_than_the_grids_one_nothing_is_known(student, tokens, word):
  advice = advise(effects(weak_best), student=named(student, vocab_size=VOCAB), tokens=tokens)
  assert not advice.supported
  assert word in advice.reasons[0]
  assert 'nothing is known of others' in advice.reasons[0]
  assert not advice.options


def test_a_grid_of_one_budget_and_one_alpha_speaks_of_these_alone():
  advice = advise(effects(weak_best, budgets=(TOKENS,), alphas=(0.4,)))
  assert {(option.teacher_tokens, option.alpha) for option in advice.options} == {(TOKENS, 0.4)}
  assert 'nothing is known of other values: teacher budget 2M' in advisor.format(advice)
  assert 'a second and a third alpha: all cells have 0.4' in advice.runs


def test_a_grid_of_one_teacher_size_speaks_of_it_alone():
  advice = advise(effects(weak_best, teachers=('tiny-1m',), budgets=(500_000, 1_000_000, TOKENS)))
  assert {option.teacher for option in advice.options} == {'tiny-1m'}


# Costs.


def test_nothing_above_the_budget_is_proposed_and_the_students_own_training_counts():
  frame = effects(weak_best)
  costs = sorted(option.cost() for option in advise(frame).options)
  budget = costs[len(costs) // 2]
  advice = advise(frame, budget)
  assert {option.cost() for option in advice.options} == {cost for cost in costs if cost <= budget}
  assert advice.over_budget == len(costs) - len(advice.options) > 0
  assert "which must hold the student's own training" in advisor.format(advice)
  student = flops.training_flops(STUDENT, SEQ_LEN) * TOKENS
  assert "student's own training costs" in advise(frame, 0.9 * student).reasons[0]
  assert 'no teacher fits: the cheapest' in advise(frame, 1.001 * student).reasons[0]


def test_costs_are_the_ledgers():
  advice = advise(effects(weak_best))
  for option in advice.options:
    teacher = named(option.teacher, vocab_size=VOCAB)
    expected = flops.ledger(STUDENT, teacher, TOKENS, option.teacher_tokens, SEQ_LEN)
    assert option.ledger == expected
    assert option.cost(True) == expected.student + expected.logits
    assert option.cost() == expected.student + expected.logits + expected.pretraining
    assert option.teacher_params == flops.count_params(teacher).non_embedding
  choice, all_of_it = advice.choice, {'count_logits': True, 'count_pretraining': True}
  teacher = named(choice.teacher, vocab_size=VOCAB)
  matched = flops.matched_tokens(STUDENT, teacher, TOKENS, choice.teacher_tokens, SEQ_LEN, **all_of_it)
  assert f'would spend as much on {count(matched)} tokens' in advisor.format(advice)


# What it says, and what it is asked.


def test_the_text_says_what_it_was_fitted_on_and_how_well_it_predicts():
  advice = advise(effects(weak_best))
  text, errors = advisor.format(advice), advice.surface.left_out
  assert 'a ridge surface on 32 effects (32 cells, seeds 43 44 45) of 8 teachers' in text
  assert f'{errors["surface"]:.4f}; of predicting no gain {errors["no gain"]:.4f}' in text
  assert 'Use tiny-0.1m (106.8k parameters)' in text
  assert 'nan' not in text


def test_a_student_without_a_vocabulary_is_refused():
  with pytest.raises(UserError, match='vocab_size is 0'):
    advise(effects(weak_best), student=named('tiny-1m'), draws=2)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('50B', 50 * 10**9),
    ('1.7b', 1_700_000_000),
    ('300M', 300_000_000),
    ('1e21', 10**21),
    ('2.5k', 2500),
    ('1_000', 1000),
    (' 3T ', 3 * 10**12),
  ],
)
def test_counts_are_exact(text, expected):
  assert advisor.parse_count(text, '--tokens') == expected


@pytest.mark.parametrize(
  'text', ['', 'B', '50X', 'fifty', '-1B', '0', '1.5', '1,7B', '5BB', 'nan', 'inf', '1e999999999']
)
def test_what_is_no_count_is_refused_with_the_options_name(text):
  with pytest.raises(UserError, match='--tokens: '):
    advisor.parse_count(text, '--tokens')


def test_students_are_named_or_sized():
  assert advisor.parse_student('tiny-1m', 512) == named('tiny-1m', vocab_size=512)
  assert advisor.parse_student('1.7B', 512) == NAMED['llama3-1.7b']  # which has a vocabulary of its own
  assert advisor.parse_student('300M', 512) == NAMED['qwen3-0.3b']
  assert advisor.parse_student('1.1B', 512) == NAMED['llama3-1.7b']  # outside its embedding
  with pytest.raises(UserError, match='no known model has 77B parameters; name one of'):
    advisor.parse_student('77B', 512)
  with pytest.raises(UserError, match="unknown name 'tinny-1m'"):
    advisor.parse_student('tinny-1m', 512)
  with pytest.raises(UserError, match='more than one known model has 1M; name one of tiny-1m, tiny-qwen-1m'):
    advisor.parse_student('1M', 512)
