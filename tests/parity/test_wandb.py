"""Weights & Biases, offline: nothing is sent, and what would be sent is in a file."""

import os
import pathlib
import subprocess
import sys

import pytest

from kdjax import train
from tests import tiny
from tests.commands import REPO

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


@pytest.mark.parametrize(
  ('variables', 'says'),
  [
    ({}, 'trackers: wandb has no API key; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline'),
    ({'WANDB_API_KEY': 'short'}, 'trackers: wandb cannot be used ('),
    ({'WANDB_API_KEY': ' ' * 40}, 'trackers: wandb '),
    ({'WANDB_API_KEY': '0' * 40, 'WANDB_BASE_URL': 'http://127.0.0.1:9'}, 'trackers: wandb cannot be used ('),
    ({'WANDB_MODE': 'nonsense'}, 'trackers: wandb cannot be used ('),
    ({'WANDB_MODE': 'disabled'}, ''),
    ({'WANDB_MODE': 'offline'}, ''),
  ],
)
def test_what_wandb_itself_says_of_its_key_is_one_line_at_the_start(tmp_path, variables, says):
  """Runs in its own process: wandb reads the environment only once."""
  code = 'from kdjax.runs import trackers\nfrom kdjax.errors import UserError\ntry: trackers.check_trackers(["wandb"])\nexcept UserError as e: print(e)'
  clean = {name: value for name, value in os.environ.items() if not name.startswith('WANDB_')}
  done = subprocess.run(
    [sys.executable, '-c', code], env=clean | {'HOME': str(tmp_path), 'NETRC': str(tmp_path / 'netrc'), 'PYTHONPATH': str(REPO)} | variables,
    capture_output=True, text=True, timeout=200, check=True, cwd=tmp_path,
  )  # fmt: skip
  assert len(done.stdout.splitlines()) == bool(says) and done.stdout.startswith(says), done.stderr
