"""Folders of an earlier version (commit a3af8ec, October 2026) are resumed, evaluated and reported.

The archive holds a run and a grid of that version, made with its own commands, the config files in it, and the tables it printed
(`expected`). Compiled programs, trackers' files and the grid's checkpoints were removed, to keep it small:

    python -m kdjax.train --config=config.py --workdir=run
    python -m kdjax.grid run --config=grid_config.py --workdir=grid
    python -m kdjax.report --grid=grid
"""

import json
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pandas as pd
import pytest

from kdjax import evaluate, grid, report, train
from kdjax.runs.folder import RunFolder
from kdjax.runs.metrics import read_metrics
from kdjax.teachers import frozen
from tests import small

ARCHIVE = pathlib.Path(__file__).with_name('folders_of_a3af8ec.tar.xz')
ARMS = ('baseline', 'distilled')
CELL = 'tiny-0.1m-1.536k_lm_s44-'  # of the grid; it needs no teacher
RESULTS = [
  'bits_per_byte',
  'bits_per_byte_fitted',
  'temperature',
  'top1',
  'entropy',
  'ece',
  'kl_to_teacher',
  'agreement',
]


@pytest.fixture
def old(tmp_path, monkeypatch) -> pathlib.Path:
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(tmp_path, filter='data')
  monkeypatch.chdir(tmp_path)
  return tmp_path


def load(student: pathlib.Path) -> tuple[list[np.ndarray], list[dict[str, float]]]:
  """(weights of the newest checkpoint, metrics)."""
  _, weights, _ = frozen.load_saved(RunFolder(student), small.mesh())
  return [np.asarray(leaf) for leaf in jax.tree.leaves(weights)], read_metrics(student)


def assert_same_results(old: pathlib.Path) -> None:
  """results.csv is what the old version wrote, up to the last digits, which depend on the processor."""
  key = ['arm', 'set', 'step']
  found, expected = (pd.read_csv(old / name).set_index(key) for name in ('run/results.csv', 'expected/results.csv'))
  assert list(found.index) == list(expected.index)
  np.testing.assert_allclose(found[RESULTS], expected[RESULTS], rtol=1e-3, atol=1e-6)


def test_a_run_is_resumed_from_its_checkpoint(old):
  students = [old / 'run' / 'students' / arm for arm in ARMS]
  finished = [load(student) for student in students]
  for student in students:
    shutil.rmtree(student / 'checkpoints' / '12')
    shutil.rmtree(student / 'results')
    status = json.loads((student / 'status.json').read_text())
    (student / 'status.json').write_text(json.dumps(status | {'state': 'preempted', 'step': 8}))
  (old / 'run' / 'table.txt').unlink()
  train.main(['--config=config.py', '--workdir=run'])
  for (weights, metrics), (old_weights, old_metrics) in zip(map(load, students), finished, strict=True):
    assert [line['step'] for line in metrics] == list(range(1, 13))
    for line, old_line in zip(metrics, old_metrics, strict=True):
      np.testing.assert_allclose(line['loss'], old_line['loss'], rtol=1e-5)
    for leaf, old_leaf in zip(weights, old_weights, strict=True):
      np.testing.assert_allclose(leaf, old_leaf, rtol=1e-4, atol=1e-6)
  assert_same_results(old)


def test_a_run_is_evaluated(old):
  for results in old.glob('run/students/*/results'):
    shutil.rmtree(results)
  evaluate.main(['--workdir=run'])
  assert_same_results(old)


def test_a_grid_is_resumed_and_reported(old, capsys):
  (cell,) = old.glob(f'grid/cells/{CELL}*')
  shutil.rmtree(cell)
  shutil.rmtree(next(old.glob(f'grid/jobs/{CELL}*')))
  grid.main(['status', '--config=grid_config.py', '--workdir=grid'])
  # The pilot of this version has the unigram control's alpha as well: two cells more.
  assert '22 done, 0 running, 0 stopped, 0 failed, 3 missing' in capsys.readouterr().out
  grid.main(['run', '--config=grid_config.py', '--workdir=grid'])
  assert cell.is_dir(), 'the cell has another id now'
  report.main(['--grid=grid'])
  tables = [pd.read_csv(old / name) for name in ('grid/report/effects.csv', 'expected/effects.csv')]
  key = ['student', 'teacher', 'alpha', 'arm', 'scenario', 'validated', 'set', 'group', 'measure', 'cells']
  found, expected = (table.set_index(key).sort_index() for table in tables)
  same = found.index.intersection(expected.index)
  lost = expected.index.difference(found.index)
  assert len(same) > 200
  assert set(lost.get_level_values('arm')) <= {'unigram'}
  for column in ('value', 'baseline', 'estimate'):
    np.testing.assert_allclose(found.loc[same, column], expected.loc[same, column], rtol=1e-3, atol=1e-5)
