import csv
import dataclasses
import sys
import types

import pytest

from kdjax import config as config_lib
from kdjax import grid, train
from kdjax.config import Config
from kdjax.errors import UserError
from kdjax.runs import trackers
from kdjax.runs.folder import RunFolder
from kdjax.runs.metrics import MetricWriter, read_metrics
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
  assert 'trackers' not in str(train.experiments.experiment_identity(dataclasses.replace(config, trackers=('csv',))))


def test_mistakes_are_said_before_the_training(monkeypatch, tmp_path):
  for names, said in (
    (('tensorbord',), "trackers: unknown value 'tensorbord'; known: tensorboard, csv, wandb"),
    (('csv', 'csv'), 'trackers: csv, csv names one twice'),
  ):
    assert list(config_lib.problems(dataclasses.replace(Config(), trackers=names))) == [said]
  assert not [p for p in config_lib.problems(dataclasses.replace(Config(), trackers=())) if 'trackers' in p]
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match=r"wandb is not installed; run: pip install 'kdjax\[wandb\]'"):
    train.run(tiny.config(tmp_path, trackers=('wandb',)), progress=False)
  trackers.check_trackers(('csv', 'tensorboard'))


class FakeWandb:
  """The parts of wandb that kdjax uses before a run."""

  class Error(Exception): ...

  def __init__(self, mode='online', answer=True):
    self.mode, self.answer, self.asked = mode, answer, []

  def setup(self):
    if isinstance(self.mode, Exception):
      raise self.mode
    return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

  def login(self, key=None, verify=False, prompt=True):
    self.asked.append((verify, prompt))
    if isinstance(self.answer, Exception):
      raise self.answer
    return self.answer

  def init(self, **settings):
    raise self.Error('no network\nmore')


@pytest.mark.parametrize(
  ('wandb', 'says'),
  [
    (
      FakeWandb(answer=False),
      'trackers: wandb has no API key; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline',
    ),
    (
      FakeWandb(answer=FakeWandb.Error('API key must have\n40+ characters')),
      'trackers: wandb cannot be used (API key must have 40+ characters); run',
    ),
    (
      FakeWandb(mode=ValueError('1 validation error\nmode')),
      'trackers: wandb cannot be used (1 validation error mode); run',
    ),
  ],
)
def test_wandb_without_a_good_key_is_one_line_before_anything_is_built(wandb, says, monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  for make in (lambda: train.run(tiny.config(tmp_path, trackers=('wandb',)), progress=False),
               lambda: grid.run(tiny.grid(tmp_path, base={'trackers': ('wandb',)}), tmp_path / 'grid', progress=False)):  # fmt: skip
    with pytest.raises(UserError) as e:
      make()
    assert str(e.value).startswith(says) and '\n' not in str(e.value)
  assert not (tmp_path / 'runs').exists() and not (tmp_path / 'grid').exists()


@pytest.mark.parametrize('mode', ['offline', 'dryrun', 'disabled'])
def test_a_mode_of_wandb_that_needs_no_key_is_not_asked_for_one(mode, monkeypatch):
  wandb = FakeWandb(mode, answer=False)
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  trackers.check_trackers(('wandb',))
  assert wandb.asked == []


def test_wandb_is_asked_without_a_prompt_and_on_the_process_that_tracks_alone(monkeypatch):
  wandb = FakeWandb()
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  trackers.check_trackers(('wandb',))
  assert wandb.asked == [(True, False)]
  monkeypatch.setattr(trackers.jax, 'process_index', lambda: 1)
  trackers.check_trackers(('wandb',))
  assert len(wandb.asked) == 1
  wandb.login = lambda key=None, verify=False: True  # older versions have no prompt=
  monkeypatch.setattr(trackers.jax, 'process_index', lambda: 0)
  trackers.check_trackers(('wandb',))


def test_a_run_that_wandb_does_not_begin_is_one_line(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'wandb', FakeWandb())
  with pytest.raises(UserError, match=r'^trackers: wandb cannot be used \(no network more\); run'):
    trackers.Wandb(tmp_path, 0, {'id': 'a', 'name': 'b', 'group': 'c'})
