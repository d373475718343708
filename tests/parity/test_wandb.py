"""Weights & Biases, offline: nothing is sent, and what would be sent is in a file."""

import os
import pathlib

import pytest

from kdjax import train
from tests import tiny

if os.environ.get('KDJAX_REQUIRE_PARITY') == '1':
  import wandb
else:
  wandb = pytest.importorskip('wandb', reason='wandb is not installed (the [wandb] extra)')


def test_the_students_of_a_cohort_are_runs_side_by_side(tmp_path, monkeypatch):
  told = []
  original = wandb.init

  def init(**settings):
    run = original(**settings)
    told.append((settings, run))
    log = run.log
    monkeypatch.setattr(run, 'log', lambda values: told.append((settings['name'], values)) or log(values))
    return run

  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  monkeypatch.setattr(wandb, 'init', init)
  config = tiny.config(tmp_path, **{'student.arms': ('baseline', 'unigram'), 'trackers': ('wandb', 'csv')})
  experiment = train.run(config, progress=False)
  names = [f'{experiment.name}/{arm}' for arm in ('baseline', 'unigram')]
  begun = [settings for settings, run in told if isinstance(settings, dict)]
  assert [settings['name'] for settings in begun] == names
  assert len({settings['id'] for settings in begun}) == 2
  assert begun[1]['config']['arm'] == 'unigram'
  for name in names:
    values = [value for key, value in told if key == name]
    assert [value['step'] for value in values] == list(range(1, tiny.STEPS + 1))
    assert all('ce' in value for value in values)
  assert list(pathlib.Path(experiment / 'students/baseline').rglob('*.wandb'))  # what `wandb sync` would send
