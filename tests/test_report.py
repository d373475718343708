"""The report of a finished tiny grid: its tables against the result files, its figures and page, and what it refuses."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from kdjax import report
from kdjax.analysis.crossed import Paired, crossed_effect
from kdjax.analysis.grid import effects
from kdjax.analysis.scores import Scores
from kdjax.errors import UserError
from kdjax.scoring import results
from kdjax.sweeps import cells, runner
from kdjax.sweeps import config as grid_config


@pytest.fixture(scope='module')
def folder(tiny_grid, tmp_path_factory):
  copy = tmp_path_factory.mktemp('report') / 'grid'
  shutil.copytree(tiny_grid[2], copy, symlinks=True)
  return copy


@pytest.fixture(scope='module')
def grid(folder):
  return report.load_grid(folder)


@pytest.fixture(scope='module')
def tables(grid, folder):
  return effects.build_tables(grid, folder)


def groups(grid, folder):
  return [g for phase, found in runner.phases(grid, folder) if phase != 'pilot' for g in found]


def documents(folder, scores, cell, name):
  return results.read_result(folder / runner.newest_step(scores[cell.id])[name])[0]


def test_the_grid_is_read_back_as_it_was(tiny_grid, grid):
  assert runner.grid_identity(grid) == runner.grid_identity(tiny_grid[1])


def test_effects_are_the_paired_differences_of_the_result_files(grid, folder, tables):
  scores = runner.read_scores(grid, folder)
  checked = 0
  for group in groups(grid, folder):
    if group.kind == 'baseline':
      continue
    rows = tables.effects[
      (tables.effects['cells'] == ' '.join(c.id for c in group.cells)) & (tables.effects['measure'] == 'bits_per_byte')
    ]
    rows = rows[rows['scenario'] == group.scenario]
    for name in ('in-domain', 'far', 'further'):
      mine, theirs = ([documents(folder, scores, c, name) for c in side] for side in (group.cells, group.baseline))
      numerator = np.array([(a['nll'] - b['nll']) / math.log(2) for a, b in zip(mine, theirs, strict=True)])
      expected = crossed_effect([Paired(numerator, mine[0]['bytes'].to_numpy(float))])
      (row,) = rows[rows['set'] == name].to_dict('records')
      assert row['estimate'] == pytest.approx(expected.estimate, abs=1e-12)
      assert (row['low'], row['high']) == pytest.approx((expected.low, expected.high))
      assert row['value'] - row['baseline'] == pytest.approx(row['estimate'], abs=1e-9)
      assert row['n_seeds'] == 2 and row['over'] == 'seeds and documents'
      checked += 1
  assert checked == 3 * (2 + 3 + 1)  # distilled and unigram in both phases, tuned and FLOP-matched in the second


def test_differences_by_difficulty_add_up_to_those_of_the_whole(grid, folder, tables):
  scores = runner.read_scores(grid, folder)
  group = next(g for g in groups(grid, folder) if g.kind == 'distilled')
  rows = tables.effects[tables.effects['cells'] == ' '.join(c.id for c in group.cells)].query("set == 'far'")
  table = documents(folder, scores, group.cells[0], 'far')
  tokens = np.stack(table['difficulty_tokens'].to_list()).sum(0)
  by_bin = rows[rows['measure'].str.startswith('difficulty')].sort_values('measure')['estimate'].to_numpy()
  (whole,) = rows.query("measure == 'bits_per_byte'")['estimate']
  assert len(by_bin) == len(tokens) and (tokens > 0).all()
  assert by_bin @ tokens / table['bytes'].sum() / math.log(2) == pytest.approx(whole, abs=1e-9)


def test_documents_that_are_training_text_too_are_told(grid, folder, tmp_path):
  copy = tmp_path / 'grid'
  shutil.copytree(folder, copy, symlinks=True)
  corpus = json.loads((copy / 'corpus.json').read_text())
  assert set(corpus['counts']) >= {'in-domain', 'far', 'further'}
  assert not any('training text' in warning for warning in effects.build_tables(grid, copy).warnings)
  corpus['counts']['far'] |= {'in_training_split': 3, 'read': 9}
  (copy / 'corpus.json').write_text(json.dumps(corpus))
  told = effects.build_tables(grid, copy).warnings
  assert 'set far: 3 of its 9 documents are training text too; they are not scored' in told


def test_ood_means_are_plain_means_over_the_sets(tables):
  keys = ['cells', 'scenario', 'measure']
  for measure in ('bits_per_byte', 'bits_per_byte_fitted', 'entropy', 'top1'):
    rows = tables.effects[tables.effects['measure'] == measure]
    means = rows[rows['set'].isin(['far', 'further'])].groupby(keys)['estimate'].mean()
    whole = rows[rows['set'] == 'OOD mean'].set_index(keys)['estimate']
    np.testing.assert_allclose(whole.loc[means.index], means, atol=1e-12)


def test_every_declared_contrast_is_answered(grid, tables):
  assert set(tables.contrasts['contrast']) >= {'weak_helps', 'ood_more', 'more_than_calibration', 'beats_tuned'}
  for row in tables.contrasts.to_dict('records'):
    assert row['verdict'] in ('unresolved: too few seeds', 'exploratory', 'not tested')  # two seeds give no verdict
    assert row['primary'] == ((row['contrast'], row['set']) in grid_config.primary_tests(grid) and not row['detail'])
    assert row['answer'] and row['question'].endswith('?')
    if row['verdict'] != 'not tested':
      assert row['low'] <= row['estimate'] <= row['high']
      assert row['mde_low'] < row['mde'] < row['mde_high']
      assert row['level'] == (pytest.approx(0.9875) if row['primary'] else 0.95)


def test_the_table_of_arms_has_no_verdicts(tables):
  assert 'verdict' in tables.contrasts and not {'verdict', 'answer', 'primary'} & set(tables.effects)


def test_a_contrast_is_the_difference_of_its_sides(grid, folder, tables):
  scores = Scores(grid, folder)
  (row,) = tables.contrasts.query("contrast == 'weak_helps' and set == 'in-domain'").to_dict('records')
  (group,) = [g for g in groups(grid, folder) if g.kind == 'distilled' and g.phase == 'validated']
  same = tables.effects.query(
    "validated and arm == 'distilled' and set == 'in-domain' and measure == 'bits_per_byte' and scenario == ''"
  )
  assert row['estimate'] == pytest.approx(same['estimate'].item())
  assert scores.has([group])


def test_baselines_of_equal_flops_are_compared_too(tables):
  rows = tables.effects.query("arm == 'distilled' and scenario == 'logits' and measure == 'bits_per_byte'")
  assert set(rows['set']) == {'in-domain', 'far', 'further', 'OOD mean'}


def test_arms_that_are_not_paired_are_refused_naming_the_field(grid, folder, tmp_path):
  copy = tmp_path / 'grid'
  shutil.copytree(folder, copy)
  group = next(g for g in groups(grid, folder) if g.kind == 'distilled')
  path = copy / 'cells' / group.cells[0].id / 'run.json'
  for field, change in (
    ('init', lambda v: v['fingerprints'].update(init='2-other')),
    ('data', lambda v: v['fingerprints'].update(data='other')),
    ('tokens', lambda v: v['config'].update(tokens=1)),
    ('optimizer', lambda v: v['config']['optimizer'].update(learning_rate=9.0)),
    ('seed', lambda v: v['config'].update(seed=9)),
  ):
    value = json.loads((folder / 'cells' / group.cells[0].id / 'run.json').read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=f'must not be compared: .*{field}'):
      effects.build_tables(grid, copy)


def test_mixed_code_versions_are_a_visible_warning(grid, folder, tmp_path):
  copy = tmp_path / 'grid'
  shutil.copytree(folder, copy)
  path = next((copy / 'cells').glob('*_lm_s43*')) / 'run.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'git': 'another'}))
  assert any('mixed code versions' in warning for warning in effects.build_tables(grid, copy).warnings)


def test_an_unfinished_arm_is_left_out_and_told(grid, folder, tmp_path):
  copy = tmp_path / 'grid'
  shutil.copytree(folder, copy)
  job = next(j for j in runner.list_jobs(grid, folder) if j.phase == 'validated' and j.teacher)
  shutil.rmtree(copy / 'jobs' / job.id)
  built = effects.build_tables(grid, copy)
  assert any('are not finished' in warning for warning in built.warnings)
  assert 'not tested' in set(built.contrasts['verdict'])


def test_a_grid_without_a_pilot_says_so(grid):
  skipped = dataclasses.replace(grid, pilot=dataclasses.replace(grid.pilot, skip=True))
  assert cells.pilot_groups(skipped) == [] and cells.validated_groups(skipped, {}) == []


def test_the_report_is_written_whole(grid, folder, tables):
  text = report.write_report(grid, folder, tables)
  out = folder / 'report'
  for name in ('effects', 'contrasts', 'teachers'):
    saved = pd.read_parquet(out / f'{name}.parquet')
    assert len(saved) == len(pd.read_csv(out / f'{name}.csv')) == len(getattr(tables, name))
  assert (out / 'report.html').stat().st_size > 1_000_000
  assert list((out / 'figures').glob('*.png')) and list((out / 'figures').glob('*.svg'))
  assert 'weak_helps' in text and str(out / 'report.html') in text


def test_a_folder_that_is_no_grid_is_refused(tmp_path):
  with pytest.raises(UserError, match='is no grid'):
    report.load_grid(tmp_path)


def test_advice_says_what_it_lacks(grid, tables, capsys, folder):
  with pytest.raises(SystemExit) as e:
    report.main([f'--grid={folder}', '--advise', '--student=tiny-1m'])
  assert e.value.code == 2
  assert '--tokens, --budget-flops' in capsys.readouterr().err


def test_with_one_teacher_advice_is_refused_with_the_reason(folder, capsys):
  arguments = ['--student=tiny-0.1m', '--tokens=1536', '--budget-flops=1e12']
  report.main([f'--grid={folder}', '--advise', *arguments])
  assert 'do not support' in capsys.readouterr().out
