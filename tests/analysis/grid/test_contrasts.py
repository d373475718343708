"""The contrasts on simulated grids with known effects: which get a verdict, at which level, and what they compare."""

import dataclasses
import re

import numpy as np
import pytest

from benchmarks import statistics as simulated
from kdjax import cli
from kdjax.analysis import crossed
from kdjax.analysis.grid import contrasts
from kdjax.analysis.scores import MEASURES, Scores
from kdjax.config import scales
from kdjax.sweeps import cells as cells_lib
from kdjax.sweeps import comparisons, studies
from kdjax.sweeps import config as grid_config
from kdjax.sweeps.config import GridConfig

CLEAR = 0.5  # bits per byte: an effect that every grid resolves
OWN = simulated.UNIGRAM_ALPHA


def rows(design, effects=simulated.no_effect, regime='mixed', seed=0):
  scores = simulated.SimulatedScores(design, regime, effects, np.random.default_rng(seed))
  return contrasts.test_all(scores, list(design.groups))


def of(found, contrast, where=None, detail=''):
  (row,) = [r for r in found if r['contrast'] == contrast and r['detail'] == detail and where in (None, r['set'])]
  return row


def with_all_contrasts(n_seeds=5):
  """The shipped grid with all contrasts, and with the pair at equal total FLOPs."""
  made = simulated.design(n_seeds)
  grid = dataclasses.replace(made.grid, contrasts=tuple(grid_config.CONTRASTS))
  (setting,) = cells_lib.settings(grid)
  curves = {key: {'0': 2.0, '0.4': 1.9 + 0.01 * k} for k, key in enumerate(made.keys)}
  chosen = dict.fromkeys(made.keys, simulated.ALPHA) | {
    cells_lib.pilot_key(setting, 'unigram'): simulated.UNIGRAM_ALPHA
  }
  groups = cells_lib.validated_groups(grid, chosen, comparisons.reversal_pairs(grid, curves))
  return dataclasses.replace(made, grid=grid, groups=tuple(groups), curves=curves)


def without_pilot(study='size_alpha'):
  grid = cli.load_as(GridConfig, grid_config.problems, f'configs/grid.py:study={study}', {})
  return simulated.Design(grid, tuple(cells_lib.main_groups(grid)), ())


def gain(group, name):
  return -CLEAR * (group.kind == 'distilled')


@pytest.mark.parametrize('n_seeds', [1, 2])
def test_one_or_two_seeds_give_no_verdict_however_clear_the_effect(n_seeds):
  primary = [row for row in rows(simulated.design(n_seeds), gain) if row['primary']]
  assert len(primary) == 4
  for row in primary:
    assert row['verdict'] == 'unresolved: too few seeds'
    assert f'({n_seeds}); a verdict needs 3' in row['answer']


def test_with_five_seeds_a_clear_effect_has_a_verdict_on_primary_tests_alone():
  found = rows(simulated.design(5), gain)
  assert of(found, 'weak_helps', 'in-domain')['verdict'] == 'better'
  assert of(found, 'weak_helps', 'OOD mean')['verdict'] == 'exploratory'  # equally clear, but not declared
  assert of(found, 'size_reverses', 'in-domain')['verdict'] == 'unresolved'
  details = [row for row in found if row['detail']]
  assert details and all(row['verdict'] == 'exploratory' for row in details)


@pytest.mark.parametrize('seed', range(5))
def test_verdict_interval_and_mde_are_of_one_level(seed):
  half = crossed.corrected_level(4)
  for row in rows(simulated.design(5), lambda group, name: -0.05 * (group.kind == 'distilled'), seed=seed):
    assert row['level'] == (half if row['primary'] else 0.95)
    excludes = row['low'] > 0 or row['high'] < 0
    if row['primary']:
      assert (row['verdict'] != 'unresolved') == excludes
      assert (row['p'] < 1 - half) == excludes or row['contrast'] == 'more_than_calibration'
      assert row['p_adjusted'] == pytest.approx(min(1, 4 * row['p']))
    assert row['mde_low'] < row['mde'] < row['mde_high']


def recorded_effects(monkeypatch):
  """The effects behind the rows, by (estimate, low, high), as the contrasts are tested."""
  found, effect_of = {}, contrasts._effect

  def record(*arguments):
    effect = effect_of(*arguments)
    found[effect[:3]] = effect
    return effect

  monkeypatch.setattr(contrasts, '_effect', record)
  return found


def test_the_mde_is_that_of_the_rows_own_effect_at_the_rows_own_level(monkeypatch):
  effects = recorded_effects(monkeypatch)
  found = rows(simulated.design(5), lambda group, name: -0.05 * (group.kind == 'distilled'))
  assert {row['primary'] for row in found} == {True, False} and len({row['level'] for row in found}) == 2
  for row in found:
    effect = effects[row['estimate'], row['low'], row['high']]
    mde = crossed.minimum_detectable_effect(effect, level=row['level'])
    assert row['mde'] == pytest.approx(mde)
    assert (row['mde_low'], row['mde_high']) == pytest.approx(crossed.mde_range(effect, mde))


@pytest.mark.parametrize('n_seeds', [3, 5])
def test_no_effect_beyond_its_mde_is_unresolved(n_seeds):
  beyond = 0
  for seed in range(12):
    gains = lambda group, name, seed=seed: -0.01 * seed * (group.kind == 'distilled')
    for row in rows(simulated.design(n_seeds), gains, seed=seed):
      if row['primary'] and abs(row['estimate']) > row['mde']:
        beyond += 1
        assert row['verdict'] in ('better', 'worse')
  assert beyond > 5


def test_each_weak_teacher_has_a_row_beside_the_pooled_one():
  only = lambda group, name: -CLEAR * (group.kind == 'distilled' and group.source.name == 'tiny-0.1m-512k')
  found = rows(simulated.design(5), only)
  for contrast, where in (('weak_helps', 'in-domain'), ('more_than_calibration', 'OOD mean')):
    own = {r['detail']: r for r in found if r['contrast'] == contrast and r['set'] == where and r['detail']}
    assert set(own) == {'tiny-0.1m-102.4k', 'tiny-0.1m-512k', 'tiny-0.3m-102.4k'}
    assert own['tiny-0.1m-512k']['high'] < 0 < own['tiny-0.1m-102.4k']['high']


@pytest.mark.parametrize('seed', range(10))
def test_a_control_that_harms_is_no_evidence_for_teachers(seed):
  found = rows(simulated.design(5), lambda group, name: CLEAR * (group.kind == 'unigram'), seed=seed)
  assert of(found, 'more_than_calibration')['verdict'] != 'better'


@pytest.mark.parametrize(
  ('teachers', 'control', 'verdict'),
  [(-CLEAR, 0.0, 'better'), (-CLEAR, -CLEAR, 'unresolved'), (-CLEAR, -2 * CLEAR, 'worse'), (CLEAR, 2 * CLEAR, 'worse')],
)
def test_more_than_calibration_takes_a_gain_and_more_of_it_than_the_control_has(teachers, control, verdict):
  effects = lambda group, name: teachers * (group.kind == 'distilled') + control * (group.kind == 'unigram')
  assert of(rows(simulated.design(5), effects), 'more_than_calibration')['verdict'] == verdict


def with_unigram_at(design, alphas):
  """The design with unigram groups at further alphas, before the one that the pilot chose."""
  (own,) = [g for g in design.groups if g.kind == 'unigram']
  more = [at_alpha(design.grid, own, alpha) for alpha in alphas]
  return dataclasses.replace(design, groups=tuple(more) + design.groups)


def at_alpha(grid, group, alpha):
  """A unigram group at another alpha."""
  cells = tuple(cells_lib._unigram(grid, group.setting, alpha, cell.seed) for cell in group.cells)
  return dataclasses.replace(group, alpha=alpha, cells=cells)


def unigram_alphas(row):
  """The alphas of the unigram cells that a row reads."""
  return set(re.findall(r'_unigram_a([\d.]+)_', row['cells']))


def test_the_control_is_the_one_at_its_own_validated_alpha():
  design = with_unigram_at(simulated.design(5), (0.1, 0.6))
  strong = lambda group, name: gain(group, name) - 3 * CLEAR * (group.kind == 'unigram' and group.alpha != OWN)
  row = of(rows(design, strong), 'more_than_calibration')
  assert row['verdict'] == 'better'  # although the control gains more at the alphas that were not chosen
  own = lambda group, name: gain(group, name) - CLEAR / 2 * (group.kind == 'unigram' and group.alpha == OWN)
  row = of(rows(design, own), 'more_than_calibration')
  assert unigram_alphas(row) == {f'{OWN:g}'} and f'unigram at alpha {OWN:g}' in row['right']


def test_without_the_control_more_than_calibration_is_not_tested():
  design = simulated.design(5)
  other = [g for g in design.groups if g.kind != 'unigram']
  untested = of(rows(dataclasses.replace(design, groups=tuple(other))), 'more_than_calibration')
  assert untested['verdict'] == 'not tested' and 'unigram control' in untested['answer']


@pytest.mark.parametrize('study', [study for study in studies.STUDIES if study not in ('main', 'mechanism')])
def test_without_a_pilot_the_control_is_at_the_least_alpha_that_a_teacher_is_tested_at(study):
  design = without_pilot(study)
  least = min(design.grid.declared_alpha)
  assert len({g.alpha for g in design.groups if g.kind == 'unigram'}) > 1
  decided_by_the_control = lambda group, name: gain(group, name) - CLEAR / 2 * (group.kind == 'unigram')
  found = [row for row in rows(design, decided_by_the_control) if row['contrast'] == 'more_than_calibration']
  tested = [row for row in found if row['verdict'] != 'not tested']
  for row in tested:
    assert unigram_alphas(row) == {f'{least:g}'} and f'unigram at alpha {least:g}' in row['right']
  # A setting without a weaker teacher than its student has nothing to compare with the control.
  weak = {s.key for s in cells_lib.settings(design.grid) if has_weak_teacher(design, s)}
  assert len({(row['student'], row['student_tokens']) for row in tested}) == len(weak)


def has_weak_teacher(design, setting):
  kinds = {
    cells_lib.relationship(setting.student, setting.student_tokens, g.source)
    for g in design.groups
    if g.kind == 'distilled' and g.setting == setting
  }
  return 'weak-to-strong' in kinds


def test_at_equal_total_flops_pairs_are_compared_and_lm_only_is_a_third_arm():
  better_with_tokens = lambda group, name: (
    -CLEAR * (group.kind == 'equal_compute') - 2 * CLEAR * (group.kind == 'flop_matched')
  )
  found = [r for r in rows(with_all_contrasts(), better_with_tokens) if r['contrast'] == 'reversal_at_equal_flops']
  home = {r['detail']: r for r in found if r['set'] == 'in-domain'}
  assert len(home) == 3
  assert home['']['estimate'] == pytest.approx(CLEAR, abs=0.2)
  assert 'its student on' in home['']['right']
  assert home['tiny-1m-512k less LM-only']['estimate'] == pytest.approx(2 * CLEAR, abs=0.2)
  cheap = next(r for name, r in home.items() if name not in ('', 'tiny-1m-512k less LM-only'))
  assert cheap['estimate'] == pytest.approx(CLEAR, abs=0.2)


def test_equal_teachers_do_not_reverse_at_equal_flops_for_their_baselines_sake():
  """The LM-only student of the stronger teacher is better because it has more tokens; this is not a reversal of the teachers."""
  more_text = lambda group, name: -CLEAR * (group.kind == 'flop_matched' and group.source.teacher == 'tiny-1m')
  row = of(rows(with_all_contrasts(), more_text), 'reversal_at_equal_flops', 'in-domain')
  assert row['low'] < 0 < row['high']


@pytest.mark.parametrize('study', ['size_alpha', 'teacher_budget'])
def test_without_a_pilot_reversal_is_tested_at_declared_alphas_with_five_seeds(study):
  found = rows(without_pilot(study))
  for contrast in ('size_reverses', *(['budget_reverses'] if study == 'teacher_budget' else [])):
    row = of(found, contrast, 'in-domain')
    assert row['primary'] and row['verdict'] != 'not tested' and row['n_seeds'] == 5
    assert 'declared reference' in row['right']
  alphas = dict(zip(without_pilot(study).grid.teacher, without_pilot(study).grid.declared_alpha, strict=True))
  largest = max(alphas, key=lambda name: float(name.removeprefix('tiny-').removesuffix('m')))
  assert f'_a{alphas[largest]:g}_' in of(found, 'size_reverses', 'in-domain')['cells']


def after_the_pilot(grid):
  """A grid's groups, with the validated ones of an invented pilot."""
  keys = tuple(dict.fromkeys(group.pilot_key for group in cells_lib.pilot_groups(grid) if group.kind != 'baseline'))
  curves = {key: {'0': 2.0, f'{simulated.ALPHA:g}': 1.9} for key in keys}
  drawn = {group.pilot_key: group.draw for group in cells_lib.pilot_groups(grid) if group.draw}
  unigram = {key: simulated.UNIGRAM_ALPHA for key in keys if key.endswith('/unigram')}
  chosen = dict.fromkeys(keys, simulated.ALPHA) | unigram | drawn
  validated = cells_lib.validated_groups(grid, chosen, comparisons.reversal_pairs(grid, curves))
  return simulated.Design(grid, (*cells_lib.main_groups(grid), *validated), keys, curves)


@pytest.mark.parametrize(
  'spec',
  [
    'configs/evidence.py',
    *(f'configs/grid.py:study={study},scale={scale}' for study in studies.STUDIES for scale in scales.SCALES),
  ],
)
def test_every_arm_that_a_primary_test_reads_has_five_seeds(spec, monkeypatch):
  grid = cli.load_as(GridConfig, grid_config.problems, spec, {})
  tested, test_one = [], contrasts._test

  def record(arms, contrast, where, terms, *arguments, **options):
    row = test_one(arms, contrast, where, terms, *arguments, **options)
    if row['primary']:
      tested.append((contrast, where))
      for _, groups in terms:
        assert groups and all(len({cell.seed for cell in cells}) >= 5 for cells in groups)
    return row

  monkeypatch.setattr(contrasts, '_test', record)
  primary = [row for row in rows(after_the_pilot(grid)) if row['primary']]
  assert set(tested) == grid_config.primary_tests(grid) and len(primary) == grid_config.n_primary(grid)
  assert all(row['n_seeds'] >= 5 and row['verdict'] != 'not tested' for row in primary)


def test_arms_are_compared_on_the_seeds_that_all_of_them_have():
  grid = dataclasses.replace(without_pilot().grid, include=('seed=43|44|45', 'teacher=tiny-0.3m&alpha=0.4'))
  row = of(rows(simulated.Design(grid, tuple(cells_lib.main_groups(grid)), ())), 'size_reverses', 'in-domain')
  assert row['n_seeds'] == 3


@pytest.mark.parametrize(('seeds', 'words'), [('shared', 'of these teacher runs'), ('paired', '')])
def test_a_statement_is_of_the_teacher_runs_unless_each_seed_has_its_own(seeds, words):
  design = simulated.design(5)
  design = dataclasses.replace(design, grid=dataclasses.replace(design.grid, teacher_seed=seeds))
  answer = of(rows(design, gain), 'weak_helps', 'in-domain')['answer']
  assert words in answer and ('teacher runs' in answer) == bool(words)


# One seed: the noise of the last checkpoints.


class OneSeed(simulated.SimulatedScores):
  """A grid of one seed whose runs have three checkpoints; the noise of each run is known."""

  def checkpoint_spreads(self, coefficients, weights, measure):
    return [abs(c) * 0.3 for c in coefficients.values()], 3


def test_one_seeds_contrasts_have_the_noise_of_every_run_behind_them():
  design = simulated.design(1)
  draw = lambda kind: contrasts.test_all(
    kind(design, 'mixed', simulated.no_effect, np.random.default_rng(0)), list(design.groups)
  )
  plain, noisy = (of(draw(kind), 'weak_helps', 'in-domain') for kind in (simulated.SimulatedScores, OneSeed))
  runs = [1 / 3, 1 / 3, 1 / 3, 1.0]  # three weak teachers and the baseline
  assert noisy['error'] ** 2 == pytest.approx(plain['error'] ** 2 + 0.09 * np.square(runs).sum())
  assert noisy['over'] == 'documents and checkpoints' and noisy['estimate'] == plain['estimate']


def test_checkpoint_spreads_are_of_the_weighted_value():
  """Computed by hand: one run, two sets, three checkpoints."""
  scores = object.__new__(Scores)
  values = {('a', 0): 1.0, ('a', 1): 2.0, ('a', 2): 4.0, ('b', 0): 3.0, ('b', 1): 3.0, ('b', 2): 0.0}
  scores.checkpoints = lambda run: 3
  scores._ratio = lambda run, name, measure, back: values[name, back]
  (spread,), n = scores.checkpoint_spreads({'run': -2.0}, {'a': 0.5, 'b': 0.5}, MEASURES['bits_per_byte'])
  assert n == 3 and spread == pytest.approx(2 * np.std([2.0, 2.5, 2.0], ddof=1))
  scores.checkpoints = lambda run: 1
  assert scores.checkpoint_spreads({'run': 1.0}, {'a': 1.0}, MEASURES['bits_per_byte']) is None
