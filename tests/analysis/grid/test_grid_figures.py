"""The grid's figures show the table's numbers, all of them, or say what is missing."""

import logging
import xml.etree.ElementTree

import matplotlib.colors
import numpy as np
import pandas as pd
import pytest

from kdjax.analysis.grid import figures as gridfigures
from kdjax.analysis.grid import ink, table_rows
from tests.analysis.grid import grid_example

PNG = b'\x89PNG\r\n\x1a\n'
NOTE = 'alpha not validated'
NAMES = list(gridfigures.FIGURES)
PLAIN = "arm == 'distilled' and scenario == ''"
TWO_SETS = "set in ('in-domain', 'OOD mean') and measure == 'bits_per_byte'"
# What each figure must hold, said apart from the code that selects it; the unigram control is beside in two.
WANTED = {
  'gain_vs_teacher': f'{PLAIN} and {TWO_SETS}',
  'size_by_budget': f'{PLAIN} and validated and {TWO_SETS}',
  'alpha_curves': f"{TWO_SETS} and (({PLAIN}) or (arm == 'unigram' and not validated))",
  'gains_by_set': f"measure in ('bits_per_byte', 'bits_per_byte_fitted', 'accuracy', 'accuracy_norm') and validated and (({PLAIN}) or arm in ('unigram', 'tuned'))",
  'entropy_vs_perplexity': f"{TWO_SETS} and (scenario == '' or arm == 'flop_matched')",
  'gain_per_flop': f"{TWO_SETS} and validated and (({PLAIN}) or arm == 'flop_matched')",
  'equal_flops': f"{TWO_SETS} and validated and arm == 'distilled'",
  'gain_by_difficulty': f"measure.str.startswith('difficulty') and set in ('in-domain', 'OOD mean') and validated and (({PLAIN}) or arm == 'unigram')",
}


@pytest.fixture(scope='module')
def tables():
  return grid_example.tables()


@pytest.fixture(scope='module')
def figures(tables):
  """name -> (the figure, the rows drawn)."""
  table = table_rows.labelled(tables[0])
  return {name: (spec.draw(rows), rows) for name, spec in gridfigures.FIGURES.items() for rows in [spec.select(table)]}


@pytest.fixture(scope='module')
def written(tables, tmp_path_factory):
  return gridfigures.write_all(*tables, tmp_path_factory.mktemp('grid') / 'figures', NOTE)


def whiskers(figure) -> list[tuple[float, float, float]]:
  """(number, low, high) of every point with an error bar, in all panels."""
  found = []
  for axes in figure.axes:
    for container in axes.containers:
      if container[0] is None:
        continue
      i = 0 if container.has_xerr else 1
      for point, bar in zip(container[0].get_xydata(), container[2][0].get_segments(), strict=True):
        found.append((point[i], bar[0][i], bar[1][i]) if len(bar) else (point[i], np.nan, np.nan))
  return sorted(found)


def texts(figure) -> str:
  titles = [figure.get_suptitle(), figure.get_supxlabel()]
  return '\n'.join(titles + [text.get_text() for axes in figure.axes for text in axes.texts])


def test_every_figure_is_a_png_and_an_svg(written):
  assert [path.name for path in written] == [f'{name}{suffix}' for name in NAMES for suffix in ('.png', '.svg')]
  for path in written:
    if path.suffix == '.png':
      assert path.read_bytes().startswith(PNG)
    else:
      assert xml.etree.ElementTree.parse(path).getroot().tag.endswith('svg')
  assert {path.name for path in written[0].parent.iterdir()} == {path.name for path in written}


@pytest.mark.parametrize('name', NAMES)
def test_the_drawn_rows_are_the_tables(name, tables):
  effects, _ = tables
  drawn = gridfigures.select_rows(name, effects)
  own = effects.loc[drawn.index]
  for column, end in (('estimate', ''), ('low', '_low'), ('high', '_high')):
    np.testing.assert_array_equal(drawn[f'drawn{end}'], own[column])
  assert set(drawn.index) == set(effects.query(WANTED[name]).index)


@pytest.mark.parametrize('name', ['gain_vs_teacher', 'gains_by_set', 'equal_flops'])
def test_the_points_on_paper_are_the_drawn_rows(name, figures):
  figure, rows = figures[name]
  np.testing.assert_allclose(
    whiskers(figure), sorted(zip(rows['drawn'], rows['drawn_low'], rows['drawn_high'], strict=True))
  )


def test_alpha_curves_hold_their_rows_and_the_control_in_every_panel(figures):
  figure, rows = figures['alpha_curves']
  repeated = pd.concat([rows[rows['arm'] == 'distilled'], *[rows[rows['arm'] == 'unigram']] * len(grid_example.PARAMS)])
  wanted = sorted(zip(repeated['drawn'], repeated['drawn_low'], repeated['drawn_high'], strict=True))
  np.testing.assert_allclose(whiskers(figure), wanted)


def test_the_heat_maps_cells_are_the_drawn_rows(figures):
  figure, rows = figures['size_by_budget']
  for axes, name in zip(figure.axes, table_rows.SETS, strict=False):
    wanted = rows[rows['set'] == name].pivot(index='teacher_params', columns='teacher_tokens', values='estimate')
    np.testing.assert_allclose(axes.images[0].get_array(), wanted)
    shown = [text.get_text() for text in axes.texts]
    for row in rows[rows['set'] == name].itertuples():
      assert sum(f'{row.estimate:+.4f}' in text and f'α {row.alpha:g}' in text for text in shown) == 1


def test_entropy_is_paired_with_the_same_arms_likelihood(tables, figures):
  effects, _ = tables
  figure, rows = figures['entropy_vs_perplexity']
  entropy = effects[effects['measure'] == 'entropy'].set_index(['arm', 'scenario', 'cells', 'set'])
  for row in rows.itertuples():
    assert row.at == entropy.loc[(row.arm, row.scenario, row.cells, row.set), 'estimate']
  points = np.concatenate(
    [
      points.get_offsets()
      for axes in figure.axes
      for points in axes.collections
      if len(points.get_offsets()) and hasattr(points, 'get_sizes') and len(points.get_sizes())
    ]
  )
  np.testing.assert_allclose(sorted(map(tuple, points)), sorted(zip(rows['at'], rows['drawn'], strict=True)))


def test_gain_per_flop_is_the_gain_over_the_flops_that_are_counted(tables):
  effects, _ = tables
  drawn = gridfigures.select_rows('gain_per_flop', effects)
  own = drawn[drawn['arm'] == 'distilled']
  trained = own['counted'] == 'logits+pretraining'
  flops = own['logits_flops'] + own['pretraining_flops'] * trained
  np.testing.assert_allclose(own['per_flop'] * flops, own['estimate'])
  np.testing.assert_allclose(own['per_flop_low'] * flops, own['low'])
  np.testing.assert_allclose(own['at'], own['student_flops'] + flops)
  assert trained.sum() * 2 == len(own) == 4 * 8


def test_a_frontier_has_no_point_that_a_cheaper_one_beats():
  points = pd.DataFrame({'at': [3.0, 1.0, 2.0, 2.0, 4.0], 'drawn': [-0.1, 0.0, -0.3, -0.2, -0.4]})
  assert table_rows.frontier(points).values.tolist() == [[1.0, 0.0], [2.0, -0.3], [4.0, -0.4]]


def test_spread_moves_no_more_than_needed_and_stays_inside():
  np.testing.assert_allclose(ink.spread([0.1, 0.5, 0.9], 0.2), [0.1, 0.5, 0.9])
  np.testing.assert_allclose(ink.spread([0.5, 0.5, 0.9], 0.2), [0.4, 0.6, 0.9])
  np.testing.assert_allclose(ink.spread([0.0, 0.0, 1.0], 0.2), [0.0, 0.2, 1.0])
  assert len(ink.spread([], 0.2)) == 0


@pytest.mark.parametrize('name', NAMES)
def test_a_figure_says_its_note_its_seeds_and_what_its_intervals_are_over(name, tables):
  effects, contrasts = tables
  spec = gridfigures.FIGURES[name]
  figure = gridfigures.render(
    spec, spec.select(table_rows.labelled(effects)), contrasts, NOTE, 'tiny-0.3m, 512k tokens'
  )
  said = ' '.join(texts(figure).split())
  assert f'Note: {NOTE}' in said
  assert '5 fresh seeds an arm, 95% intervals over seeds and documents' in said
  for row in contrasts[contrasts['contrast'].isin(spec.contrasts)].itertuples():
    assert (f'{row.question} ({row.set}) {row.verdict}' in said) or row.detail


def test_every_axis_of_gains_names_its_unit_and_baseline(figures):
  for name, (figure, _) in figures.items():
    labels = ' '.join(' '.join((axes.get_xlabel(), axes.get_ylabel())) for axes in figure.axes if axes.get_visible())
    labels = ' '.join(labels.split())
    unit = 'nats per token' if name == 'gain_by_difficulty' else 'bits per byte'
    assert unit in labels and 'LM-only student' in labels and '(below 0: better)' in labels, name


def test_one_seed_is_told():
  effects, _ = grid_example.tables()
  text = gridfigures.evidence(effects.assign(n_seeds=1, over='documents', validated=False))
  assert '1 seed an arm, 95% intervals over documents alone, with no variance between seeds' in text


def test_a_teacher_has_one_colour_in_all_figures_and_settings():
  drawn = pd.concat([gridfigures.select_rows(name, grid_example.tables(2)[0]) for name in NAMES])
  teachers = drawn[drawn['teacher'] != ''].groupby('teacher')
  assert (teachers['colour'].nunique() == 1).all() and (teachers['marker'].nunique() == 1).all()
  assert teachers['colour'].first().nunique() == len(grid_example.PARAMS)
  assert all(matplotlib.colors.is_color_like(colour) for colour in drawn['colour'])


def test_several_settings_get_files_of_their_own(tmp_path, monkeypatch):
  monkeypatch.setattr(ink, 'save', lambda figure, path: path)
  names = [path.name for path in gridfigures.write_all(*grid_example.tables(2), tmp_path, '')]
  assert len(set(names)) == len(names) == 2 * 2 * len(NAMES)
  assert 'alpha_curves-tiny-1m-512k-tokens-of-120k-distinct.svg' in names


def test_without_a_validated_alpha_the_middle_declared_one_is_shown_and_starred(tables):
  effects = tables[0][~tables[0]['validated']]
  table = table_rows.labelled(effects)
  for name in ('size_by_budget', 'gains_by_set', 'gain_per_flop'):
    spec = gridfigures.FIGURES[name]
    rows = spec.select(table)
    assert set(rows['alpha']) == {0.4}
    said = texts(gridfigures.render(spec, rows, pd.DataFrame(), '', ''))
    assert gridfigures.UNVALIDATED in ' '.join(said.split())


def test_other_uses_of_a_teacher_are_not_mixed_with_it(tables):
  effects = tables[0].query("arm == 'distilled' and scenario == ''")
  hot = effects.assign(temperature=2.0, cells=effects['cells'] + '-T2', estimate=effects['estimate'] + 1)
  both = pd.concat([effects, hot], ignore_index=True)
  assert set(table_rows.labelled(both)['variant']) == {'', 'T2'}
  for name in ('gain_vs_teacher', 'size_by_budget', 'alpha_curves', 'gains_by_set', 'entropy_vs_perplexity'):
    drawn = gridfigures.select_rows(name, both)
    assert len(drawn) == 2 * len(gridfigures.select_rows(name, effects))
    assert ((drawn['temperature'] == 2) == drawn['source'].str.endswith('T2')).all()


def test_what_is_missing_is_told_and_listed(tmp_path, tables, caplog, monkeypatch):
  monkeypatch.setattr(ink, 'save', lambda figure, path: path)
  effects = tables[0].query("arm != 'flop_matched' and scenario == ''")
  with caplog.at_level(logging.WARNING):
    paths = gridfigures.write_all(effects, tables[1], tmp_path, '')
  (line,) = gridfigures.list_missing(effects)
  assert 'Equal tokens against equal FLOPs' in line and 'controls.flop_matched' in line
  assert line in caplog.text
  assert len(paths) == 2 * len(NAMES)
  spec = gridfigures.FIGURES['equal_flops']
  assert 'Not drawn: no students were compared at equal FLOPs' in ' '.join(
    texts(gridfigures.render(spec, effects[:0], tables[1], '', '')).split()
  )


def test_no_ood_set(tables):
  effects = tables[0].query("group in ('in-domain', 'downstream')")
  for name, spec in gridfigures.FIGURES.items():
    rows = spec.select(table_rows.labelled(effects))
    said = texts(gridfigures.render(spec, rows, pd.DataFrame(), '', ''))
    assert name == 'gains_by_set' or 'not scored' in said


def test_an_empty_table_is_panels_that_say_so(tmp_path):
  paths = gridfigures.write_all(pd.DataFrame(), pd.DataFrame(), tmp_path, '')
  assert len(paths) == 2 * len(NAMES)
  assert len(gridfigures.list_missing(pd.DataFrame())) == len(NAMES)
  assert all(gridfigures.select_rows(name, pd.DataFrame()).empty for name in NAMES)


@pytest.mark.filterwarnings('error::RuntimeWarning')
def test_intervals_without_end_are_points(tables):
  effects = tables[0].assign(low=-np.inf, high=np.inf)
  for spec in gridfigures.FIGURES.values():
    figure = spec.draw(spec.select(table_rows.labelled(effects)))
    assert not np.isfinite([row[1:] for row in whiskers(figure)]).any()
    figure.canvas.draw()


def test_the_same_numbers_give_the_same_files(tables, tmp_path):
  spec = gridfigures.FIGURES['equal_flops']
  rows = spec.select(table_rows.labelled(tables[0]))
  for suffix in ('.png', '.svg'):
    first, second = (ink.save(spec.draw(rows), tmp_path / f'{i}{suffix}').read_bytes() for i in range(2))
    assert first == second
