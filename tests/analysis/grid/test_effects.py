"""The table of arms on simulated grids: its errors, its columns, and what the advisor reads in it."""

import numpy as np
import pandas as pd
import pytest

from benchmarks import statistics as simulated
from kdjax.analysis import crossed
from kdjax.analysis.crossed import Paired
from kdjax.analysis.grid import advisor, effects
from kdjax.analysis.scores import MEASURES
from kdjax.config import ModelConfig
from kdjax.models import flops
from kdjax.sweeps import cells as cells_lib

BITS = MEASURES['bits_per_byte']
NOISE = {'in-domain': 0.3, 'dialogue': 0.2, 'reference': 0.5, 'code': 0.1}  # of each run's last checkpoints


class ScoresOfArms(simulated.SimulatedScores):
  """What kdjax.analysis.grid.effects asks of a grid's results beside what contrasts do; bits per byte is all that was measured."""

  def check_comparable(self, left, right, free):
    pass

  def measured(self, cell, name, measure):
    return measure is BITS

  def meta(self, run, name):
    return {'ece': 0.1}

  def difference(self, left, right, name, measure):
    return Paired(self.mean(left, name, measure) - self.mean(right, name, measure), self._size[name])

  def value(self, cells, name, measure):
    return float(self.mean(cells, name, measure).sum() / self._size[name].sum() / len(cells[0]))


class NoisyScores(ScoresOfArms):
  """Three checkpoints of each run; the noise of a weighted value is the weighted sum of the sets'."""

  def checkpoint_spreads(self, coefficients, weights, measure):
    noise = sum(weight * NOISE[name] for name, weight in weights.items())
    return [abs(coefficient) * noise for coefficient in coefficients.values()], 3


def scores_of(made, truth=simulated.no_effect, kind=ScoresOfArms):
  return kind(made, 'mixed', truth, np.random.default_rng(0))


def table(made, scores) -> pd.DataFrame:
  """The rows of every arm against its baseline, as `effects.build` collects them."""
  groups = [group for group in made.groups if group.kind != 'baseline']
  return pd.DataFrame([row for g in groups for row in effects._rows(scores, g, list(g.baseline), g.scenario)])


def test_one_seeds_error_is_that_of_the_documents_and_of_both_runs_checkpoints():
  made = simulated.design(1)
  scores = scores_of(made, kind=NoisyScores)
  group = next(group for group in made.groups if group.kind == 'distilled')
  found = {row['set']: row for row in effects._rows(scores, group, list(group.baseline), '') if row['measure'] != 'ece'}
  assert set(found) == {*NOISE, 'OOD mean'}
  ood = [name for name in NOISE if name != 'in-domain']
  for name, row in found.items():
    names = ood if name == 'OOD mean' else [name]
    documents = crossed.crossed_effect([scores.difference([group.cells], [group.baseline], n, BITS) for n in names])
    noise = np.mean([NOISE[n] for n in names])
    assert row['estimate'] == documents.estimate and row['over'] == 'documents and checkpoints'
    assert row['error'] ** 2 == pytest.approx(documents.error**2 + 2 * noise**2)  # the arm's run and its baseline's


def test_several_seeds_show_the_noise_themselves():
  made = simulated.design(3)
  pd.testing.assert_frame_equal(table(made, scores_of(made, kind=NoisyScores)), table(made, scores_of(made)))


def test_the_table_of_arms_has_no_verdicts():
  made = simulated.design(5)
  found = table(made, scores_of(made, simulated.all_gain_alike))
  assert 'verdict' not in found
  text = ' '.join(str(value) for name in found.select_dtypes(exclude='number') for value in found[name].unique())
  assert not any(word in text.split() for word in ('better', 'worse', 'unresolved'))


def test_flop_matched_arms_are_options_of_the_advisor():
  """Their rows name the teacher whose FLOPs they spent, and are of a student without one."""
  made = simulated.design(5)
  grid = made.grid
  helps = lambda group, name: -0.2 * (group.kind == 'distilled') - 0.1 * (group.kind == 'flop_matched')
  found = table(made, scores_of(made, helps))
  assert (found[found['arm'] == 'flop_matched']['teacher'] != '').all()
  (setting,) = cells_lib.settings(grid)
  student: ModelConfig = cells_lib.sized(grid, setting.student)
  seq_len = grid.base.data.seq_len
  advice = advisor.advise(advisor.fit_surface(found, draws=20), student, setting.student_tokens, 1e18, seq_len)
  alone = {option.student_tokens: option for option in advice.options if not option.teacher}
  matched = [group for group in made.groups if group.kind == 'flop_matched']
  assert set(alone) == {group.cells[0].config.student.tokens for group in matched}
  for tokens, option in alone.items():
    assert option.cost() == pytest.approx(flops.training_flops(student, seq_len) * tokens)
    assert option.gain == pytest.approx(0.1, abs=0.06)
