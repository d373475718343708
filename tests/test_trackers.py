import csv
import dataclasses
import sys

import pytest

from kdjax import config as config_lib
from kdjax import trackers, train
from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.metrics import MetricWriter, read_metrics
from kdjax.run import RunFolder
from tests import tiny


def rows(folder) -> list[dict[str, str]]:
  with open(folder / 'metrics.csv', newline='') as f:
    return list(csv.DictReader(f))


def test_a_csv_has_a_row_a_step_and_a_column_for_each_name_whenever_it_comes(tmp_path):
  writer = MetricWriter(tmp_path, 0, ['csv'])
  writer.write(1, {'ce': 2.5})
  writer.write(2, {'ce': 2.25, 'validation_ce': 3.0})
  writer.write(3, {'ce': 2.0})
  writer.close()
  assert rows(tmp_path) == [
    {'step': '1', 'ce': '2.5', 'validation_ce': ''},
    {'step': '2', 'ce': '2.25', 'validation_ce': '3.0'},
    {'step': '3', 'ce': '2.0', 'validation_ce': ''},
  ]
  assert not (tmp_path / 'tensorboard').exists()


def test_a_csv_goes_on_after_a_kill_without_what_came_after_the_checkpoint(tmp_path):
  writer = MetricWriter(tmp_path, 0, ['csv'])
  for step in range(1, 8):
    writer.write(step, {'ce': float(step)})
  writer.flush()
  writer.close()
  with (tmp_path / 'metrics.csv').open('a') as f:
    f.write('8')  # cut
  writer = MetricWriter(tmp_path, 4, ['csv', 'tensorboard'])
  writer.write(5, {'ce': 50.0})
  writer.close()
  assert [(row['step'], row['ce']) for row in rows(tmp_path)] == [
    ('1', '1.0'),
    ('2', '2.0'),
    ('3', '3.0'),
    ('4', '4.0'),
    ('5', '50.0'),
  ]
  assert [record['step'] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_run_has_the_trackers_of_its_config(tmp_path):
  fields = {'student.arms': ('baseline', 'unigram'), 'trackers': ('csv',)}
  experiment = train.run(tiny.config(tmp_path, **fields), progress=False)
  for arm in ('baseline', 'unigram'):
    run = RunFolder(experiment / 'students' / arm)
    assert [int(row['step']) for row in rows(run.path)] == list(range(1, tiny.STEPS + 1))
    assert not (run.path / 'tensorboard').exists()


def test_trackers_do_not_define_a_run():
  config = Config()
  assert 'trackers' not in str(train.training.experiment(dataclasses.replace(config, trackers=('csv',))))


def test_mistakes_are_said_before_the_training(monkeypatch, tmp_path):
  for names in (('tensorbord',), ('csv', 'csv')):
    assert 'trackers: must be different ones of tensorboard, csv, wandb' in ' '.join(
      config_lib.problems(dataclasses.replace(Config(), trackers=names))
    )
  assert not [p for p in config_lib.problems(dataclasses.replace(Config(), trackers=())) if 'trackers' in p]
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match=r"wandb is not installed; run: pip install 'kdjax\[wandb\]'"):
    train.run(tiny.config(tmp_path, trackers=('wandb',)), progress=False)
  trackers.check(('csv', 'tensorboard'))
