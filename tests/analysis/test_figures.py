"""The figure shows the table's numbers."""

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from kdjax.analysis import figures, table
from kdjax.runs.metrics import read_metrics
from kdjax.scoring import job as jobs
from tests.analysis import experiment

PNG = b'\x89PNG\r\n\x1a\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return experiment.write(tmp_path_factory.mktemp('figure'))


def axes():
  return matplotlib.figure.Figure().subplots()


def test_the_figure_is_a_png_in_the_runs_folder(folder):
  path = figures.write_figure(folder)
  assert path == folder / 'run.png'
  assert path.read_bytes().startswith(PNG)
  image = matplotlib.image.imread(path)
  assert image.shape[0] > 300 and image.shape[1] > 1000
  assert image[..., :3].std() > 0.05
  assert not list(folder.glob('*.tmp*'))


def test_the_plotted_differences_are_the_tables(folder):
  cells = table.load_cells(jobs.find_job(folder))
  on = axes()
  figures._forest(on, cells)
  plotted = []
  for container in on.containers:
    point, _, (bar,) = container
    (x,), ((low, _), (high, _)) = point.get_xdata(), bar.get_segments()[0]
    plotted.append((x, low, high))
  wanted = [
    tuple(interval[:3])
    for column in ('nll', 'nll_fitted')
    for sets in table.differences(cells, column).values()
    for interval in sets.values()
  ]
  np.testing.assert_allclose(sorted(plotted), sorted(wanted))
  labels = [label.get_text() for label in on.get_yticklabels()]
  assert labels == ['in-domain', 'far', 'further', 'OOD mean']


def test_each_difference_stands_at_its_sets_row(folder):
  cells = table.load_cells(jobs.find_job(folder))
  on = axes()
  figures._forest(on, cells)
  names = [label.get_text() for label in on.get_yticklabels()]
  found = table.differences(cells)['distilled']
  for container in on.containers:
    (x,), (y,) = container[0].get_xdata(), container[0].get_ydata()
    if np.isclose(x, [interval.estimate for interval in found.values()]).any():
      assert x == pytest.approx(found[names[round(y)]].estimate)


def test_the_validation_curves_are_differences_to_the_baseline(folder):
  curves = {arm: read_metrics(folder / 'students' / arm) for arm in ('baseline', 'distilled', 'unigram')}
  on = axes()
  figures._validation(on, curves)
  lines = {line.get_label(): line for line in on.get_lines()}
  assert lines.keys() == curves.keys()
  for arm, line in lines.items():
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 13))
    np.testing.assert_allclose(line.get_ydata(), experiment.ARMS[arm], atol=1e-12)


def test_without_a_baseline_the_validation_curves_are_plain(folder):
  curves = {'distilled': read_metrics(folder / 'students' / 'distilled')}
  on = axes()
  figures._validation(on, curves)
  np.testing.assert_allclose(on.get_lines()[0].get_ydata(), 5 - np.arange(1, 13) / 10 - 0.05)


def test_curves_of_unlike_length_are_drawn(folder):
  """A killed arm may have fewer records than the baseline, or more."""
  curves = {arm: read_metrics(folder / 'students' / arm) for arm in ('baseline', 'distilled')}
  for arm in curves:
    on = axes()
    figures._validation(on, curves | {arm: curves[arm][:5]})
    assert [len(line.get_xdata()) for line in on.get_lines()][1] == 5
    figures._training(axes(), curves | {arm: []})


def test_the_training_curve_is_an_average_of_neighbours(folder):
  records = [{'step': s, 'ce': float(s)} for s in range(1, 401)]
  on = axes()
  figures._training(on, {'baseline': records})
  line = on.get_lines()[0]
  np.testing.assert_allclose(line.get_xdata(), line.get_ydata())
  assert len(line.get_xdata()) == figures.SMOOTHING
  assert np.mean(line.get_ydata()) == pytest.approx(200.5)


@pytest.mark.parametrize('arms', [('baseline',), ('teacher', 'distilled')])
def test_a_figure_without_differences(tmp_path, arms):
  assert figures.write_figure(experiment.write(tmp_path, arms)).read_bytes().startswith(PNG)
