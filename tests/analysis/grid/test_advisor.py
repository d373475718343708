"""The advisor chooses nearly the best arm on known surfaces, and reports when there is nothing to recommend."""

import math

import numpy as np
import pandas as pd
import pytest

from kdjax.analysis.grid import advice, advisor
from kdjax.config.sizes import NAMED, named
from kdjax.errors import UserError
from kdjax.models import flops
from kdjax.sweeps.names import format_count
from tests.analysis.grid.test_surface import SIZE, TEACHERS, TOKENS, effects, nothing, parabola, weak_best

VOCAB, SEQ_LEN = 1024, 128
STUDENT = named('tiny-1m', vocab_size=VOCAB)
PLENTY = 1e18


def saturating(n_t, d_t, n_s, d_s, alpha):
  """The two larger teachers are alike; the smallest is much worse."""
  return parabola(0.04 * (1 - math.exp(-n_t / 3.5e5)), 0.6)(alpha)


def reversing(n_t, d_t, n_s, d_s, alpha):
  """Best at 0.5 million parameters, falling on either side."""
  return parabola(0.04 - 0.015 * math.log(n_t / 5e5) ** 2, 0.5)(alpha)


def advise(frame, budget=PLENTY, student=STUDENT, tokens=TOKENS, draws=400, margin=advisor.MARGIN):
  return advisor.advise(advisor.fit_surface(frame, draws=draws), student, tokens, budget, SEQ_LEN, margin)


def lm_only(gains, error=0.004, student='tiny-1m') -> pd.DataFrame:
  """Make rows of LM-only students. `gains`: tokens as a multiple of the student's -> gain."""
  own = flops.training_flops(STUDENT, SEQ_LEN) * TOKENS
  rows = [
    {'estimate': -gain, 'error': error, 'df': 4.0, 'student_flops': own * share, 'cells': f'lm-{share}'}
    for share, gain in gains.items()
  ]
  common = {'student': student, 'student_tokens': TOKENS, 'student_params': SIZE[student], 'teacher': '', 'alpha': 0.0}
  measured = {
    'set': 'in-domain',
    'measure': 'bits_per_byte',
    'arm': 'flop_matched',
    'scenario': 'logits',
    'distinct_tokens': 0,
  }
  return pd.DataFrame(rows).assign(**common | measured)


def regret(advice, gain) -> float:
  """Return the choice's loss against the best arm of the grid, as a share of the best arm's gain."""
  truth = lambda *point: gain(point[0], point[1], SIZE['tiny-1m'], TOKENS, point[2])
  frame = advice.surface.frame
  best = max(map(truth, frame['teacher_params'], frame['teacher_tokens'], frame['alpha']))
  return 1 - truth(advice.choice.teacher_params, advice.choice.teacher_tokens, advice.choice.alpha) / best


# Known surfaces.


@pytest.mark.parametrize(
  ('gain', 'teachers'),
  [
    (weak_best, ['tiny-0.1m']),
    (reversing, ['tiny-0.3m', 'tiny-1m']),
    (saturating, ['tiny-0.3m', 'tiny-1m', 'tiny-3m']),
  ],
)
@pytest.mark.parametrize('seed', range(3))
def test_the_known_best_teacher_is_found_and_the_true_difference_is_within_the_interval(gain, teachers, seed):
  found = advise(effects(gain, seed))
  assert found.supported, found.reasons
  assert found.choice.teacher in teachers
  option = found.best
  truth = -gain(option.teacher_params, option.teacher_tokens, SIZE['tiny-1m'], TOKENS, option.alpha)
  assert option.low < truth < option.high


@pytest.mark.parametrize('gain', [weak_best, saturating, reversing])
def test_the_choice_loses_little_to_the_best_arm_of_the_grid(gain):
  found = [advise(effects(gain, seed), draws=100) for seed in range(15)]
  assert np.median([regret(each, gain) for each in found if each.supported]) <= 0.1
  assert sum(each.supported for each in found) >= 14


@pytest.mark.parametrize('seed', range(3))
def test_where_the_gain_saturates_the_cheapest_within_the_margin_is_chosen(seed):
  level = lambda n_t, d_t, n_s, d_s, alpha: parabola(0.04 * (1 - math.exp(-n_t / 2.2e5)), 0.6)(alpha)
  found = advise(effects(level, seed, error=0.001))
  assert found.choice.teacher == 'tiny-1m'  # 'tiny-0.3m' loses a fifth, 'tiny-3m' costs more
  assert found.choice.cost() <= found.best.cost()
  assert found.choice.gain >= 0.95 * found.best.gain
  none = advise(effects(level, seed, error=0.001), margin=0.0)
  assert none.choice.gain == none.best.gain


def test_a_strong_measured_arm_in_the_interior_is_advised_whatever_the_surface_makes_of_it():
  """One teacher that helps between two that do not: the surface is not smooth, but the result is clear."""
  peak = lambda n_t, d_t, n_s, d_s, alpha: 0.096 if abs(n_t / SIZE['tiny-0.3m'] - 1) < 0.1 and alpha == 0.4 else 0.0
  found = advise(effects(peak, budgets=(TOKENS,), error=0.0035))
  assert found.supported, found.reasons
  assert (found.choice.teacher, found.choice.alpha, found.choice.measured) == ('tiny-0.3m', 0.4, True)
  assert found.choice.difference == pytest.approx(-0.096, abs=0.01)


def test_the_surface_promises_no_more_than_the_best_measured_arm():
  found = advise(effects(reversing, error=0.001, teachers=('tiny-0.1m', 'tiny-1m', 'tiny-3m')))
  between = [option for option in found.options if not option.measured and not option.extrapolated]
  bound = max(option.gain for option in found.options if option.measured)
  assert between and all(option.gain <= bound for option in between)


def test_repeated_arms_are_averaged_by_their_precision():
  frame = pd.concat([effects(weak_best, 0, error=0.004), effects(weak_best, 1, error=0.001)])
  found = advise(frame)
  assert len([o for o in found.options if o.measured]) == len(frame) / 2
  truth = -weak_best(SIZE['tiny-0.1m'], TOKENS, SIZE['tiny-1m'], TOKENS, 0.4)
  (option,) = [
    o for o in found.options if (o.teacher, o.teacher_tokens, o.alpha) == ('tiny-0.1m', TOKENS, 0.4) and o.measured
  ]
  assert option.difference == pytest.approx(truth, abs=0.003)


def test_the_same_effects_give_the_same_advice():
  frame = effects(weak_best)
  assert advise(frame).options == advise(frame).options


# More tokens instead.


def test_more_tokens_are_advised_where_they_help_more():
  frame = pd.concat([effects(weak_best), lm_only({1.5: 0.05, 3.0: 0.09})])
  found = advise(frame)
  assert found.supported and not found.choice.teacher
  assert found.choice.student_tokens == 3 * TOKENS
  text = advice.format_advice(found)
  assert 'No teacher: train the LM-only student on 6M tokens.' in text and 'Cost: ' in text
  cheaper = advise(frame, budget=2 * found.student_flops)
  assert cheaper.choice.student_tokens == 1.5 * TOKENS


def test_a_teacher_is_advised_where_more_tokens_help_less_and_the_comparison_is_printed():
  found = advise(pd.concat([effects(weak_best), lm_only({1.1: 0.005, 4.0: 0.01})]))
  assert found.choice.teacher == 'tiny-0.1m'
  assert 0 < found.lm_only_gain < 0.01
  assert f'{-found.lm_only_gain:+.4f} bits per byte' in advice.format_advice(found)


def test_where_no_lm_only_student_was_matched_the_text_says_so():
  found = advise(effects(weak_best))
  assert found.lm_only_gain is None
  assert 'its gain was not measured' in advice.format_advice(found)
  assert any('controls.flop_matched' in run for run in found.runs)


def test_lm_only_students_of_another_size_do_not_count():
  found = advise(pd.concat([effects(weak_best), lm_only({3.0: 0.5}, student='tiny-3m')]))
  assert all(option.teacher for option in found.options)


# Nothing to be found.


@pytest.mark.parametrize('gain', [nothing, lambda *point: -0.03 * point[4]])
def test_on_noise_and_on_harm_the_data_do_not_support_an_answer(gain):
  found = [advise(effects(gain, seed), draws=200) for seed in range(40)]
  assert sum(a.supported for a in found) <= 3
  text = advice.format_advice(next(a for a in found if not a.supported))
  assert 'The data do not support an answer:' in text
  assert 'Use ' not in text


@pytest.mark.parametrize('n', [1, 2])
def test_with_fewer_than_three_teachers_only_measured_arms_are_advised(n):
  found = advise(effects(weak_best, teachers=TEACHERS[:n], budgets=(TOKENS,)))
  assert found.choice.teacher == 'tiny-0.1m'
  assert all(option.measured for option in found.options)
  assert any('more teachers' in run for run in found.runs)
  assert 'nan' not in advice.format_advice(found)


# What lies outside.


def test_what_lies_outside_the_grid_is_flagged_and_not_recommended():
  found = advise(effects(weak_best, teachers=TEACHERS[1:]))
  outside = [option for option in found.options if option.teacher in ('tiny-0.1m', 'tiny-10m')]
  assert outside
  assert all(option.extrapolated for option in outside)
  assert found.options[0].teacher == 'tiny-0.1m'  # has the largest predicted gain
  assert found.best.teacher == found.choice.teacher == 'tiny-0.3m'
  assert any('tiny-0.1m' in run and 'outside the range that the grid covers' in run for run in found.runs)
  assert 'OUTSIDE THE DATA: not recommended' in advice.format_advice(found)


def test_sizes_and_budgets_must_have_been_seen_together():
  full = effects(weak_best)
  corner = full[(full['teacher'] != 'tiny-3m') | (full['teacher_tokens'] == 500_000)]
  extrapolated = {(o.teacher, o.teacher_tokens): o.extrapolated for o in advise(corner).options}
  assert extrapolated['tiny-3m', 2_000_000]
  assert not extrapolated['tiny-3m', 500_000]
  assert not extrapolated['tiny-1m', 2_000_000]


@pytest.mark.parametrize(
  ('student', 'tokens', 'word'), [('tiny-3m', TOKENS, 'student size'), ('tiny-1m', 50 * TOKENS, 'student tokens')]
)
def test_of_other_students_than_the_grids_one_nothing_is_known(student, tokens, word):
  found = advise(effects(weak_best), student=named(student, vocab_size=VOCAB), tokens=tokens)
  assert not found.supported
  assert word in found.reasons[0]
  assert 'nothing is known of others' in found.reasons[0]
  assert not found.options


def test_a_grid_of_one_budget_and_one_alpha_speaks_of_these_alone():
  found = advise(effects(weak_best, budgets=(TOKENS,), alphas=(0.4,)))
  assert {(option.teacher_tokens, option.alpha) for option in found.options} == {(TOKENS, 0.4)}
  assert 'other values are unknown: teacher budget 2M' in advice.format_advice(found)
  assert 'a second and a third alpha: all cells have 0.4' in found.runs


def test_a_grid_of_one_teacher_size_speaks_of_it_alone():
  found = advise(effects(weak_best, teachers=('tiny-1m',), budgets=(500_000, 1_000_000, TOKENS)))
  assert {option.teacher for option in found.options} == {'tiny-1m'}


# Costs.


def test_nothing_above_the_budget_is_proposed_and_the_students_own_training_counts():
  frame = effects(weak_best)
  costs = sorted(option.cost() for option in advise(frame).options)
  budget = costs[len(costs) // 2]
  found = advise(frame, budget)
  assert {option.cost() for option in found.options} == {cost for cost in costs if cost <= budget}
  assert found.over_budget == len(costs) - len(found.options) > 0
  assert "for the student's own training" in advice.format_advice(found)
  student = flops.training_flops(STUDENT, SEQ_LEN) * TOKENS
  assert "student's own training costs" in advise(frame, 0.9 * student).reasons[0]
  assert 'no option fits: the cheapest' in advise(frame, 1.001 * student).reasons[0]


def test_costs_are_the_ledgers():
  found = advise(effects(weak_best))
  for option in found.options:
    teacher = named(option.teacher, vocab_size=VOCAB)
    expected = flops.ledger(STUDENT, teacher, TOKENS, option.teacher_tokens, SEQ_LEN)
    assert option.ledger == expected
    assert option.cost(True) == expected.student + expected.logits
    assert option.cost() == expected.student + expected.logits + expected.pretraining
    assert option.teacher_params == flops.count_params(teacher).non_embedding
  choice, all_of_it = found.choice, {'count_logits': True, 'count_pretraining': True}
  teacher = named(choice.teacher, vocab_size=VOCAB)
  matched = flops.matched_tokens(STUDENT, teacher, TOKENS, choice.teacher_tokens, SEQ_LEN, **all_of_it)
  assert f'of the same cost would train on {format_count(matched)} tokens' in advice.format_advice(found)


# What it says, and what it is asked.


def test_the_text_says_what_it_was_fitted_on_and_has_the_sign_of_every_table():
  found = advise(effects(weak_best))
  text, errors = advice.format_advice(found), found.surface.left_out
  assert 'a ridge surface on 32 effects (32 cells, seeds 43 44 45) of 8 teachers' in text
  assert f'{errors["surface"]:.4f}; of predicting no gain {errors["no gain"]:.4f}' in text
  assert 'Use tiny-0.1m (106.8k parameters)' in text
  assert f'{found.choice.difference:+.4f} bits per byte [' in text and found.choice.difference < 0
  assert 'below 0: better' in text and 'nan' not in text


def test_a_student_without_a_vocabulary_and_a_margin_that_is_no_share_are_refused():
  with pytest.raises(UserError, match='vocab_size is 0'):
    advise(effects(weak_best), student=named('tiny-1m'), draws=2)
  with pytest.raises(UserError, match=r'in \[0, 1\), got 1\.5'):
    advise(effects(weak_best), draws=2, margin=1.5)


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
  assert advice.parse_count(text, '--tokens') == expected


@pytest.mark.parametrize(
  'text', ['', 'B', '50X', 'fifty', '-1B', '0', '1.5', '1,7B', '5BB', 'nan', 'inf', '1e999999999']
)
def test_what_is_no_count_is_refused_with_the_options_name(text):
  with pytest.raises(UserError, match='--tokens: '):
    advice.parse_count(text, '--tokens')


def test_students_are_named_or_sized():
  assert advice.parse_student('tiny-1m', 512) == named('tiny-1m', vocab_size=512)
  assert advice.parse_student('1.7B', 512) == NAMED['llama3-1.7b']  # it has its own vocabulary
  assert advice.parse_student('300M', 512) == NAMED['qwen3-0.3b']
  assert advice.parse_student('1.1B', 512) == NAMED['llama3-1.7b']  # outside its embedding
  with pytest.raises(UserError, match='no known model has 77B parameters; name one of'):
    advice.parse_student('77B', 512)
  with pytest.raises(UserError, match="unknown name 'tinny-1m'"):
    advice.parse_student('tinny-1m', 512)
  with pytest.raises(UserError, match='more than one known model has 1M; name one of tiny-1m, tiny-qwen-1m'):
    advice.parse_student('1M', 512)
