"""docs/STATISTICS.md contains the tables of the committed simulation results, and the results satisfy the bounds that the page states."""

import itertools
import json
import pathlib

import pytest

from benchmarks import statistics

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'STATISTICS.md'


@pytest.fixture(scope='module')
def tables():
  return json.loads(statistics.FILE.read_text())


def test_the_pages_tables_are_the_committed_results(tables):
  text, expected = PAGE.read_text(), statistics.markdown(tables)
  assert list(expected) == ['false', 'power', 'advice']
  for name, table in expected.items():
    between = text.split(f'<!-- {name} -->')[1].split(f'<!-- /{name} -->')[0]
    assert between.strip() == table


def test_false_verdicts_stay_below_the_stated_bound(tables):
  for row in tables['false']:
    if row['seeds'] in (1, 2):
      assert row['family'] == 0
    elif row['grids'] >= statistics.GRIDS:
      assert row['highest of a test'] <= 0.06 and row['family'] <= 0.06, row
  headline = [row for row in tables['false'] if row['grids'] >= statistics.GRIDS]
  assert {row['seeds'] for row in headline} == {5, 10} and len({row['regime'] for row in headline}) == 3


def test_power_at_the_mde_is_what_the_mde_promises(tables):
  headline = [row for row in tables['power'] if row['grids'] >= statistics.GRIDS]
  assert {(row['test'], row['seeds']) for row in headline} == set(
    itertools.product(statistics.alternatives(5, 'mixed'), (5, 10))
  )
  for row in headline:
    assert 0.75 <= row['power'] <= 0.85, row


def test_the_advisor_chooses_well_and_refuses_where_no_teacher_helps(tables):
  rows = {row['surface']: row for row in tables['advice']}
  assert rows.keys() == statistics.SURFACES.keys()
  for surface, row in rows.items():
    assert row['grids'] >= statistics.GRIDS
    if surface in ('no gain', 'harm'):
      assert row['refused'] >= 0.95, row
    else:
      assert row['median regret'] <= 0.1 and row['refused'] <= 0.05, row


def test_a_grid_is_drawn_the_same_again():
  assert statistics.verdicts(3, 'mixed', statistics.no_effect, 0) == statistics.verdicts(
    3, 'mixed', statistics.no_effect, 0
  )
  assert statistics.regret('interior', 1) == statistics.regret('interior', 1)
