"""Edge cases in which evaluation numbers are easily wrong: ties, fits on scored data, weights, cuts, unfinished teachers."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pandas as pd
import pytest

from kdjax.analysis.table import Cell
from kdjax.data.build import _cut
from kdjax.data.corpus import prepare
from kdjax.errors import UserError
from kdjax.runs.folder import RunFolder
from kdjax.scoring import choices, results
from kdjax.scoring import job as jobs
from tests import tiny
from tests.small import mesh

ITEMS = [
  {'good': 'Cats sleep.', 'bad': 'Cats sleeps.'},
  {'good': 'Dogs bark.', 'bad': 'Dogs barks.'},
  {'context': 'He sat', 'choices': [' down.', ' blue.', ' up.'], 'answer': 1},
]


def read(tmp_path, *records) -> list[choices.Item]:
  file = tmp_path / 'items.jsonl'
  file.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return choices.read_choices(str(file))


def test_a_pair_whose_sentences_are_equally_likely_is_not_right(tmp_path):
  """The good sentence always comes first: if a tie counted for the first, a model that knows nothing would be right."""
  items = read(tmp_path, *ITEMS)
  logprobs = np.array([-3.0, -3.0, -2.0, -2.5, -4.0, -4.0, -4.0])
  table = choices._table(items, logprobs, np.ones(7, int), np.zeros(7, bool))
  assert list(table['predicted']) == [1, 0, 0] and list(table['correct']) == [0.0, 1.0, 0.0]
  assert list(table['correct'] == 1) == list(table['margin'] > 0)
  lengths = np.array([len(text.encode()) for item in items for text in item.continuations])
  even = choices._table(items, -1.0 * lengths, np.ones(7, int), np.zeros(7, bool))
  assert list(even['predicted_norm']) == [1, 1, 0]


def test_a_tasks_files_have_no_weights(tmp_path):
  read(tmp_path, *ITEMS)
  file = tmp_path / 'items.jsonl'
  for source in (f'{file}@0.5', f'{file}@0.9,{file}@0.1'):
    with pytest.raises(UserError, match='a task uses all items of its files; remove the weights'):
      choices.read_choices(source)
  with pytest.raises(UserError, match=r'^eval\.tasks\.mine: .*remove the weights'):
    choices.read_tasks({'mine': f'{file}@0.5'})
  assert len(choices.read_choices(f'{file}, {file}')) == 3


@pytest.fixture
def experiment(main_job, tmp_path):
  shutil.copytree(main_job / 'runs', tmp_path / 'runs')
  (folder,) = (tmp_path / 'runs').glob('tiny-*')
  job = jobs.find_job(folder)
  return job, prepare(job.config.data, job.config.eval, job.config.runs, False)


def test_no_temperature_is_fitted_on_what_it_is_scored_on(experiment):
  job, corpus = experiment
  on, baseline = mesh(), RunFolder(job.folder / 'students' / 'baseline')
  with jax.set_mesh(on):
    both = jobs.score_missing(job, [(baseline, tiny.STEPS)], corpus, on, False, sets=(jobs.VALIDATION, jobs.IN_DOMAIN))
  (scored, meta), (test, test_meta) = sorted(
    (results.read_result(task.file) for task in both), key=lambda found: found[1]['set'] != jobs.VALIDATION
  )
  assert 'nll_fitted' not in scored and math.isnan(meta['temperature']) and meta['fitted_on'] == 0
  assert 'nll_fitted' in test and test_meta['fitted_on'] == len(scored) > 0
  assert not set(scored['doc']) & set(test['doc'])


def test_a_teacher_that_still_trains_can_be_scored(experiment, tmp_path):
  """A job with --watch scores each checkpoint of a trunk, including those before the students' teacher."""
  job, corpus = experiment
  teacher = dataclasses.replace(job.config.teacher, run=str(job.teacher.path), step=99)
  early = dataclasses.replace(job, config=dataclasses.replace(job.config, teacher=teacher))
  on = mesh()
  shutil.rmtree(job.teacher.results)
  with jax.set_mesh(on):
    (task,) = jobs.score_missing(early, [(job.teacher, tiny.STEPS // 2)], corpus, on, False, sets=(jobs.IN_DOMAIN,))
    assert task.file.exists()
    with pytest.raises(UserError, match='has no checkpoint of step 99'):
      jobs.score_missing(early, [(job.students[0], tiny.STEPS)], corpus, on, False)


def test_the_perplexity_of_a_model_that_has_diverged_is_infinite():
  cell = Cell(pd.DataFrame({'nll': [1e6], 'tokens': [10.0], 'bytes': [30]}), {})
  assert cell.perplexity == math.inf
  assert Cell(pd.DataFrame({'nll': [23.0], 'tokens': [10.0]}), {}).perplexity == pytest.approx(math.exp(2.3))


@pytest.mark.parametrize('text', ['héllo', '日本語', '😀 smile', 'e\u0301a', 'plain'])
def test_a_cut_text_ends_with_a_whole_character_and_is_never_empty(text):
  for n in range(1, len(text.encode()) + 2):
    cut = _cut(text, n)
    assert text.startswith(cut) and cut
    assert len(cut.encode()) <= max(n, len(text[0].encode()))
    assert len(cut) == len(text) or len(text[: len(cut) + 1].encode()) > n
  assert _cut(text, 0) == text
