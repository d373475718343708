"""Tasks are found as by the harness's command line, and limits mean the same."""

import argparse

import pytest

from kdjax.errors import UserError
from tests.scoring import lm_eval_tasks

pytest.importorskip('lm_eval', reason='the harness is not installed (the [lm-eval] extra)')
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager

from kdjax.scoring import harness_tasks

ITEMS = [{'context': 'a', 'choices': [' b', ' cc'], 'answer': 0}] * 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tasks')
  for name in ('mymc_a', 'mymc_b', 'other', 'lonely'):
    tag = {} if name == 'lonely' else {'tag': ['tagged']}
    lm_eval_tasks.write(folder, name, ITEMS, lm_eval_tasks.MULTIPLE_CHOICE | tag)
  lm_eval_tasks.write_group(folder, 'group', ['mymc_a', 'other'])
  lm_eval_tasks.write_group(folder, 'overlap', ['mymc_a', 'mymc_b'])
  return folder


def find(folder, *texts):
  return harness_tasks.find_tasks(harness_tasks.parse_names(texts), str(folder), defaults=False)


@pytest.mark.parametrize(
  'texts',
  [
    ['mymc_*'],
    ['mymc_?'],
    ['*mc_[ab]'],
    ['mymc_a,mymc_b'],
    ['mymc_b', 'mymc_a'],
    ['group'],
    ['tagged'],
    ['mymc_a', 'mymc_*'],
    ['lonely', 'group'],
    ['tagged', 'lonely'],
  ],
)
def test_names_patterns_groups_and_tags_are_those_of_the_harness(texts, folder, monkeypatch):
  monkeypatch.setattr('lm_eval.tasks.TaskManager', lambda **fields: TaskManager(**fields, include_defaults=False))
  theirs = EvaluatorConfig(tasks=list(texts), include_path=str(folder))
  manager = theirs.process_tasks()
  ours = find(folder, *texts)
  assert set(manager.load(theirs.tasks)['tasks']) == set(ours.manager.load(ours.specs)['tasks'])
  assert ours.specs == theirs.tasks


@pytest.mark.parametrize('name', ['plain', 'my [v1]', 'a,b', '[ab]'])
def test_a_file_or_folder_of_any_name_is_found(tmp_path, name):
  home = tmp_path / name
  home.mkdir()
  (tmp_path / 'elsewhere').mkdir()
  lm_eval_tasks.write(tmp_path, 'odd', ITEMS, lm_eval_tasks.MULTIPLE_CHOICE)
  file = (tmp_path / 'odd.yaml').rename(home / 'odd.yaml')  # its data stay: the datasets library takes no brackets
  for spec in (f'{home}/odd.yaml', f'{home}/*.yaml', str(home)):
    assert find(tmp_path / 'elsewhere', spec).specs == [str(file)], spec
  assert find(home, f'{home}/odd.yaml, odd').specs == [str(file)]


def test_a_home_folder_that_is_not_there_is_an_unknown_task(folder, monkeypatch, tmp_path):
  with pytest.raises(UserError, match=r'unknown tasks: ~nobody-such/x\.yaml'):
    find(folder, '~nobody-such/x.yaml')
  monkeypatch.setenv('HOME', str(folder))
  assert find(folder, '~/mymc_a.yaml').specs == [str(folder / 'mymc_a.yaml')]


def test_commas_and_blanks_separate_names(folder):
  assert harness_tasks.parse_names([' a , b,', ',c,,', 'a', 'd e']) == ['a', 'b', 'c', 'd e']
  assert find(folder, ' mymc_a , mymc_b ,').specs == ['mymc_a', 'mymc_b']


def test_yaml_files_and_folders_of_them_are_tasks(folder, tmp_path):
  lm_eval_tasks.write(tmp_path, 'elsewhere', ITEMS, lm_eval_tasks.MULTIPLE_CHOICE)
  for spec in (str(tmp_path / 'elsewhere.yaml'), str(tmp_path / '*.yaml'), str(tmp_path)):
    assert find(folder, spec).specs == [str(tmp_path / 'elsewhere.yaml')]


def test_what_a_group_or_tag_holds_is_evaluated_once(folder):
  assert find(folder, 'mymc_a', 'group').specs == ['group']
  assert find(folder, 'm*', 'tagged').specs == ['tagged']
  assert find(folder, 'group', 'other', 'lonely').specs == ['group', 'lonely']
  with pytest.raises(UserError, match=r'group and overlap share mymc_a; name one of the two'):
    find(folder, 'group', 'overlap')


@pytest.mark.parametrize(
  ('texts', 'line'),
  [
    (
      ['mymc_x'],
      r'unknown tasks: mymc_x \(did you mean mymc_[ab] or mymc_[ab]\?\); the readable YAML files in',
    ),
    (['zzz*', 'mymc_a'], r'unknown tasks: zzz\*; .* define group, lonely, mymc_a, mymc_b, other, overlap, tagged'),
    (['groop, qqq'], r'unknown tasks: groop \(did you mean group\?\), qqq; '),
    (['none.yaml'], 'unknown tasks: none.yaml'),
    ([' , '], '--tasks is empty'),
  ],
)
def test_an_unknown_task_is_one_line_with_those_that_are_near(texts, line, folder):
  with pytest.raises(UserError, match=line) as e:
    find(folder, *texts)
  assert '\n' not in str(e.value)


def test_a_task_without_items_or_that_runs_code_is_refused(folder, tmp_path):
  fields = lm_eval_tasks.GENERATE | {'unsafe_code': True}
  lm_eval_tasks.write(tmp_path, 'code', [{'context': 'a', 'target': 'b'}], fields)
  with pytest.raises(UserError, match='the task code runs code that the model writes'):
    find(tmp_path, 'code')
  assert harness_tasks.find_tasks(['code'], str(tmp_path), False, unsafe=True).specs == ['code']
  filtered = lm_eval_tasks.MULTIPLE_CHOICE | {'task': 'empty', 'test_split': 'test[:0]'}
  lm_eval_tasks.write(tmp_path, 'empty', ITEMS, filtered)
  with pytest.raises(UserError, match='the task empty'):
    find(tmp_path, 'empty')
  (tmp_path / 'broken.yaml').write_text('task: broken\ndataset_path: json\noutput_type: nonsense\n')
  with pytest.raises(UserError, match='the task broken cannot be loaded'):
    find(tmp_path, 'broken')


@pytest.mark.parametrize('text', ['0.5', '0.34', '1.0', '1', '10.0', '2', '2.7', '0.001', '5e-1'])
def test_a_limit_is_a_share_below_one_and_else_a_number(text):
  class Task:
    eval_docs = range(7)

  ours = harness_tasks.parse_limit(text)
  assert get_sample_size(Task, ours) == get_sample_size(Task, float(text))
  assert isinstance(ours, int) == (float(text) >= 1)


@pytest.mark.parametrize('text', ['0', '-1', '-0.5', 'nan', 'inf'])
def test_a_limit_that_means_nothing_is_refused(text):
  with pytest.raises(argparse.ArgumentTypeError, match='must be at least 1, got'):
    harness_tasks.parse_limit(text)
