"""Each task and filter gives one result, with the harness's numbers, its normalisation and the right chance level."""

import collections
import hashlib
import math

import numpy as np
import pytest

from kdjax.runs.folder import RunFolder
from kdjax.scoring import results
from tests.scoring import lm_eval_tasks

pytest.importorskip('lm_eval', reason='the harness is not installed (the [lm-eval] extra)')
import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from kdjax.scoring import harness_results

CHOICES = [f' {"ä" * n}' for n in (1, 5, 9, 2, 3, 4)]


class Hashed(LM):
  """A model whose answers are hashes of the requests."""

  def loglikelihood(self, requests, disable_tqdm=False):
    return [(-1 - 30 * _hash(*request.args), _hash('greedy', *request.args) < 0.5) for request in requests]

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    return [-len(request.args[0]) * _hash(*request.args) for request in requests]

  def generate_until(self, requests, disable_tqdm=False):
    """Repeated requests get different answers."""
    asked = collections.Counter()
    out = []
    for request in requests:
      context = request.args[0]
      number = int(3 * _hash(context, asked[context]))
      out.append(f'so 7 #### {number}' if _hash('strict', context, asked[context]) < 0.5 else f'perhaps {number}')
      asked[context] += 1
    return out


def _hash(*values) -> float:
  return int(hashlib.sha256(repr(values).encode()).hexdigest()[:8], 16) / 2**32


def items(n: int = 40, lengths=(2, 3, 4, 5), targets: bool = False):
  rng = np.random.default_rng(0)
  for i in range(n):
    size = int(rng.choice(lengths))
    right = (
      [int(r) for r in rng.permutation(size)[: int(rng.integers(1, size))]] if targets else int(rng.integers(size))
    )
    yield {
      'context': f'question {i}',
      'choices': [str(c) for c in rng.permutation(CHOICES)[:size]],
      'answer': right,
      'target': str(i % 3),
    }


@pytest.fixture
def evaluate(tmp_path):
  def evaluate(fields, the_items, name='task', code='', **options):
    lm_eval_tasks.write(tmp_path, name, list(the_items), fields, code)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    answer = lm_eval.simple_evaluate(
      Hashed(), tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    return answer, list(harness_results.read_items(answer))

  return evaluate


def with_metrics(*names: str):
  metrics = [{'metric': name, 'aggregation': 'mean', 'higher_is_better': True} for name in names]
  return lm_eval_tasks.MULTIPLE_CHOICE | {'metric_list': metrics}


def assert_same_means(answer, found, norm: str = ''):
  for one in found:
    known, facts = answer['results'][one.facts['task']], one.facts
    assert one.table['correct'].mean() == pytest.approx(known[f'{facts["metric"]},{facts["filter"]}'])
    if norm:
      assert one.table['correct_norm'].mean() == pytest.approx(known[f'{norm},{facts["filter"]}'])
    else:
      assert one.table['correct_norm'].isna().all()
    assert not one.table['doc'].duplicated().any()


@pytest.mark.parametrize(
  ('metrics', 'norm', 'label'),
  [
    (('acc', 'acc_norm'), 'acc_norm', 'per character'),
    (('acc', 'acc_bytes'), 'acc_bytes', 'per byte'),
    (('acc_bytes', 'acc_norm', 'acc'), 'acc_norm', 'per character'),
    (('acc',), '', ''),
  ],
)
def test_the_normalised_accuracy_is_labelled_by_what_it_divides_by(metrics, norm, label, evaluate):
  answer, found = evaluate(with_metrics(*metrics), items())
  assert [one.name for one in found] == ['lm-eval-task']
  assert_same_means(answer, found, norm)
  assert found[0].facts['normalised'] == label


def test_characters_and_bytes_are_not_the_same(evaluate):
  mixed = [dict(item, choices=[f' {"ä" * 4}', f' {"a" * 6}']) for item in items(lengths=(2,))]
  answer, _ = evaluate(with_metrics('acc', 'acc_norm', 'acc_bytes'), mixed)
  assert answer['results']['task']['acc_norm,none'] != answer['results']['task']['acc_bytes,none']


@pytest.mark.parametrize('metrics', [('acc',), ('acc', 'acc_mutual_info'), ('acc_mutual_info',), ('acc', 'acc_norm')])
def test_chance_counts_each_choice_once_however_it_is_scored(metrics, evaluate):
  the_items = list(items())
  _, (found,) = evaluate(with_metrics(*metrics), the_items)
  assert found.facts['metric'] == metrics[0]
  assert list(found.table['chance']) == pytest.approx([1 / len(item['choices']) for item in the_items])
  written = [sum(len(choice.encode()) for choice in item['choices']) for item in the_items]
  assert [value for (value,) in found.table['bytes']] == written


def test_chance_of_several_right_answers_is_their_share(evaluate):
  the_items = list(items(targets=True))
  _, (found,) = evaluate(with_metrics('acc'), the_items)
  assert list(found.table['chance']) == pytest.approx([len(i['answer']) / len(i['choices']) for i in the_items])
  assert found.table['correct'].mean() > 0


def test_chance_is_what_guessing_gets(evaluate):
  """A model of hashes guesses: over many items its accuracy is the chance level."""
  for targets in (False, True):
    _, (found,) = evaluate(
      with_metrics('acc', 'acc_mutual_info') if not targets else with_metrics('acc'), items(1500, targets=targets)
    )
    n, chance = len(found.table), found.table['chance'].mean()
    assert abs(found.table['correct'].mean() - chance) < 4 * math.sqrt(chance * (1 - chance) / n)


def test_one_context_for_each_choice_has_the_same_chance(evaluate):
  """Like winogrande: the same text is scored after different contexts."""
  fields = with_metrics('acc') | {'doc_to_text': 'answer', 'doc_to_target': 'target'}
  the_items = list(items(lengths=(2, 3)))
  _, (found,) = evaluate(fields, the_items)
  assert list(found.table['chance']) == pytest.approx([1 / len(item['choices']) for item in the_items])


def test_a_task_that_scores_by_code_of_its_own_has_no_known_chance_and_no_known_normalisation(evaluate):
  code = "def score(doc, results):\n  return {'acc': float(results[0][1]), 'acc_norm': 0.5}\n"
  answer, found = evaluate(with_metrics('acc', 'acc_norm'), items(), code=code)
  assert_same_means(answer, found, 'acc_norm')
  assert found[0].table['chance'].isna().all() and found[0].facts['normalised'] == "by the task's own rule"


def test_each_filter_is_a_result_of_its_own(evaluate):
  answer, found = evaluate(lm_eval_tasks.GENERATE | {'filter_list': lm_eval_tasks.FILTERS}, items())
  assert [one.name for one in found] == ['lm-eval-task:strict-match', 'lm-eval-task:flexible-extract']
  assert_same_means(answer, found)
  strict, flexible = (one.table['correct'] for one in found)
  assert set(strict) == set(flexible) == {0.0, 1.0} and strict.mean() != flexible.mean()
  assert all((one.table['chance'] == 0).all() for one in found)


def test_votes_of_repeated_answers_are_results_of_their_own(evaluate):
  votes = [
    {'name': 'score-first', 'filter': [{'function': 'regex', 'regex_pattern': '([0-9]+)'}, {'function': 'take_first'}]},
    {
      'name': 'maj@5',
      'filter': [
        {'function': 'regex', 'regex_pattern': '([0-9]+)'},
        {'function': 'majority_vote'},
        {'function': 'take_first'},
      ],
    },
  ]
  answer, found = evaluate(lm_eval_tasks.GENERATE | {'filter_list': votes, 'repeats': 5}, items())
  assert [one.name for one in found] == ['lm-eval-task:score-first', 'lm-eval-task:maj@5']
  assert_same_means(answer, found)
  for one in found:
    assert len(one.table) == 40


def test_what_is_no_mean_over_items_is_no_accuracy(evaluate, caplog):
  rolling = {
    'output_type': 'loglikelihood_rolling',
    'doc_to_text': '',
    'doc_to_target': '{{context}}',
    'metric_list': [{'metric': 'word_perplexity'}, {'metric': 'bits_per_byte'}],
  }
  with caplog.at_level('INFO', 'kdjax'):
    assert not evaluate(rolling, items())[1]
  assert 'task: no per-item accuracy' in caplog.text
  median = lm_eval_tasks.MULTIPLE_CHOICE | {
    'metric_list': [{'metric': 'acc', 'aggregation': 'median', 'higher_is_better': True}]
  }
  assert not evaluate(median, items())[1]


def test_a_text_that_is_right_where_it_is_greedy_has_no_chance(evaluate):
  """As lambada."""
  fields = {
    'output_type': 'loglikelihood',
    'doc_to_text': '{{context}}',
    'doc_to_target': ' {{target}}',
    'metric_list': [{'metric': 'acc', 'aggregation': 'mean', 'higher_is_better': True}],
  }
  answer, found = evaluate(fields, items())
  assert_same_means(answer, found)
  assert (found[0].table['chance'] == 0).all()


def test_result_files_hold_the_items_and_name_the_filter(evaluate, tmp_path):
  _, found = evaluate(lm_eval_tasks.GENERATE | {'filter_list': lm_eval_tasks.FILTERS}, items(), limit=0.5)
  run = RunFolder(tmp_path / 'run')
  files = [harness_results.write_items(run, 8, one, {'seed': 1}) for one in found]
  assert len(set(files)) == 2 and all('/' not in file.name and '-step8-' in file.name for file in files)
  for file, one in zip(files, found, strict=True):
    table, meta = results.read_result(file)
    assert list(table['correct']) == list(one.table['correct']) and len(table) == 20
    assert (meta['set'], meta['filter'], meta['seed'], meta['step']) == (one.name, one.facts['filter'], 1, 8)
    assert meta['accuracy'] == one.table['correct'].mean() and math.isnan(meta['accuracy_norm'])
