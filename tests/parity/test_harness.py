"""The real lm-evaluation-harness on a kdjax model, and its own `hf` model on the same weights exported: the same answers."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest

from kdjax import harness, train
from kdjax.config import MeshConfig
from kdjax.models.decoder import Model as Decoder
from kdjax.runtime import sharding
from kdjax.scoring import harness_results
from kdjax.teachers import by_name, huggingface
from kdjax.teachers.huggingface import Source
from tests import tiny
from tests.models import stories

if os.environ.get('KDJAX_REQUIRE_PARITY') == '1':
  import lm_eval
  from lm_eval.models.huggingface import HFLM
  from lm_eval.tasks import TaskManager
else:
  lm_eval = pytest.importorskip('lm_eval', reason='the harness is not installed (the [parity] extra)')
  pytest.importorskip('torch', reason='torch is not installed (the [parity] extra)')
  from lm_eval.models.huggingface import HFLM
  from lm_eval.tasks import TaskManager

from tests.parity import trained

pytestmark = pytest.mark.skipif(
  not stories.FOLDER.exists(), reason=f'the stories260K model is not here ({stories.FOLDER})'
)
WORDS = [
  'once',
  'upon',
  'a',
  'time',
  'there',
  'was',
  'little',
  'girl',
  'named',
  'Lily',
  'she',
  'loved',
  'to',
  'play',
  'outside',
  'in',
  'the',
  'park',
  'with',
  'her',
  'mom',
  'and',
  'dog',
  'ball',
]
MULTIPLE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}, {{metric: acc_mutual_info}}]
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
"""
GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["."], do_sample: false, max_gen_toks: 40}}
metric_list: [{{metric: exact_match}}]
filter_list:
  - name: first-letter
    filter: [{{function: regex, regex_pattern: "([a-z])"}}, {{function: take_first}}]
  - name: last-letter
    filter: [{{function: regex, regex_pattern: "([a-z])", group_select: -1}}, {{function: take_first}}]
"""
TASKS = ['small_choices', 'small_rolling', 'small_texts']


@pytest.fixture(scope='module')
def tasks(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('tasks')
  rng = np.random.default_rng(0)
  text = lambda n: ' '.join(rng.choice(WORDS, n))
  items = [
    {
      'context': text(int(rng.integers(1, 60))),
      'choices': [' ' + text(int(n)) for n in rng.integers(1, 9, size)],
      'answer': int(rng.integers(size)),
      'target': str(rng.choice(list('tsye'))),
    }
    for size in rng.integers(2, 5, 60)
  ]
  for item in items[::3]:
    item['choices'] = [choice.replace('a', 'é') for choice in item['choices'][:1]] + item['choices'][1:]
  items[0]['context'] = text(700)  # longer than the window: its beginning is left out
  (folder / 'items.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in items))
  for name, template in (('small_choices', MULTIPLE), ('small_rolling', ROLLING), ('small_texts', GENERATE)):
    (folder / f'{name}.yaml').write_text(template.format(name=name, data=folder / 'items.jsonl'))
  (folder / 'without_data.yaml').write_text(MULTIPLE.format(name='without_data', data=folder / 'none.jsonl'))
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """A trained model as kdjax exports it: an import and an export of the real one."""
  home = tmp_path_factory.mktemp('models')
  source = Source(trained.stories_folder(home / 'stories'))
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  huggingface.export(source.model, source.load(mesh), source.tokenizer, home / 'exported')
  return home / 'exported'


def evaluated(model, tasks, names):
  manager = TaskManager(include_path=str(tasks), include_defaults=False)
  return lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)


def opened(folder, mesh) -> by_name.OpenModel:
  return by_name.open_model(str(folder), mesh)


@pytest.fixture(scope='module')
def theirs(folder, tasks):
  model = HFLM(pretrained=str(folder), device='cpu', dtype='float32', batch_size=8)
  assert model.max_length == 512
  return evaluated(model, tasks, TASKS)


@pytest.fixture(scope='module', params=[1, 4], ids=['one device', 'four devices'])
def ours(request, folder, tasks):
  mesh = sharding.make_mesh(MeshConfig(1, request.param, 1), jax.devices()[: request.param])
  with jax.set_mesh(mesh):
    model = harness.Model(opened(folder, mesh), mesh, batch_size=8)
    assert model.max_length == 512
    return evaluated(model, tasks, TASKS)


def samples(answer, task):
  return sorted(answer['samples'][task], key=lambda sample: sample['doc_id'])


def test_log_likelihoods_and_accuracies_are_the_harness_own(ours, theirs):
  for one, other in zip(samples(ours, 'small_choices'), samples(theirs, 'small_choices'), strict=True):
    a, b = (np.array([float(resp[0][0]) for resp in sample['resps']]) for sample in (one, other))
    assert np.abs(a - b).max() < 1e-3
    assert [resp[0][1] for resp in one['resps']] == [resp[0][1] for resp in other['resps']]
    assert one['acc'] == other['acc'] and one['acc_norm'] == other['acc_norm']
  for name in ('acc,none', 'acc_norm,none', 'acc_bytes,none', 'acc_mutual_info,none'):
    assert ours['results']['small_choices'][name] == theirs['results']['small_choices'][name]
  assert 0.1 < ours['results']['small_choices']['acc,none'] < 0.9


def test_whole_texts_have_the_same_likelihood(ours, theirs):
  for one, other in zip(samples(ours, 'small_rolling'), samples(theirs, 'small_rolling'), strict=True):
    a, b = one['resps'][0][0], other['resps'][0][0]
    assert abs(a - b) < 1e-3 * max(1, abs(b) / 100)
  a, b = (x['results']['small_rolling']['bits_per_byte,none'] for x in (ours, theirs))
  assert abs(a - b) < 1e-5


def test_generations_are_the_same_text(ours, theirs):
  one, other = ([s['resps'][0][0] for s in samples(answer, 'small_texts')] for answer in (ours, theirs))
  assert one == other
  assert len(set(one)) > 20 and all('.' not in text for text in one)


def test_each_filter_scores_the_same(ours, theirs):
  names = ('first-letter', 'last-letter')
  for name in names:
    known = theirs['results']['small_texts'][f'exact_match,{name}']
    assert ours['results']['small_texts'][f'exact_match,{name}'] == known > 0
  matches = lambda name: [s['exact_match'] for s in samples(theirs, 'small_texts') if s['filter'] == name]
  assert matches(names[0]) != matches(names[1])


def test_the_experiments_items_are_what_the_harness_reports_of_its_own_model(ours, theirs):
  """Compares accuracy, normalised accuracy and chance of each task and filter."""
  mine, other = ({one.name: one for one in harness_results.read_items(answer)} for answer in (ours, theirs))
  assert (
    mine.keys()
    == other.keys()
    == {'lm-eval-small_choices', *(f'lm-eval-small_texts:{n}-letter' for n in ('first', 'last'))}
  )
  for name, one in mine.items():
    assert one.facts == other[name].facts
    assert one.table.equals(other[name].table)
    known = theirs['results'][one.facts['task']]
    assert one.table['correct'].mean() == pytest.approx(known[f'{one.facts["metric"]},{one.facts["filter"]}'])
  choices = mine['lm-eval-small_choices']
  assert choices.table['correct_norm'].mean() == pytest.approx(theirs['results']['small_choices']['acc_norm,none'])
  assert choices.facts['normalised'] == 'per character' and set(choices.table['chance'].round(3)) == {0.5, 0.333, 0.25}


def test_few_programs_serve_all_requests(folder, tasks):
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  from kdjax.scoring import likelihood

  likelihood._token_values.clear_cache()
  with jax.set_mesh(mesh):
    evaluated(harness.Model(opened(folder, mesh), mesh, batch_size=8), tasks, ['small_choices'])
  assert likelihood._token_values._cache_size() <= 6  # lengths 16 ... 512


def test_a_tasks_results_stand_in_the_experiments_table(tasks, tmp_path, capsys):
  config = tiny.config(tmp_path / 'home', **{'student.arms': ('baseline', 'distilled')})
  experiment = train.run(config, progress=False)
  capsys.readouterr()
  argv = [
    str(experiment),
    '--tasks',
    'small_choices,small_rolling',
    '--include-path',
    str(tasks),
    '--no-defaults',
    '--fsdp',
    '1',
    '--replica',
    '8',
  ]
  harness.main([*argv, '--output', str(tmp_path / 'out.json')])
  out = capsys.readouterr().out
  assert 'lm-eval-small_choices' in out
  assert set(json.loads((tmp_path / 'out.json').read_text())) == {'teacher', 'baseline', 'distilled'}
  text = (experiment / 'table.txt').read_text()
  assert 'lm-eval-small_choices' in text and 'accuracy (per character normalised)' in text
  (chance,) = (line.split()[1] for line in text.splitlines() if line.startswith('chance'))
  assert 0.25 < float(chance) < 0.5
  rows = (experiment / 'results.csv').read_text()
  assert rows.count('lm-eval-small_choices') == 3 and 'small_rolling' not in rows
  # The eval job keeps them.
  train.run(config, progress=False)
  assert 'lm-eval-small_choices' in (experiment / 'table.txt').read_text()


def test_mistakes_are_one_line(folder, tasks, capsys):
  for argv, line in (
    (
      ['--tasks', 'none_such'],
      f'unknown tasks: none_such; the readable YAML files in {tasks} define small_choices',
    ),
    (['--tasks', ','], '--tasks is empty'),
    (['--tasks', 'small_choices', '--include-path', 'nowhere'], '--include-path nowhere: no such folder'),
    (['--tasks', 'small_choices', '--limit', '0'], 'must be at least 1, got 0'),
    (['--tasks', 'small_choices', '--step', '5'], 'is a Hugging Face folder: it has no steps; leave --step out'),
    (['--tasks', 'without_data'], 'the task without_data cannot be loaded (FileNotFoundError: '),
    (
      ['--tasks', 'small_texts', '--gen-kwargs', 'max_gen_toks=600'],
      'the task asks for 600 tokens, but the context holds 512',
    ),
  ):
    with pytest.raises(SystemExit) as e:
      harness.main([str(folder), '--include-path', str(tasks), '--no-defaults', '--fsdp', '1', '--replica', '8', *argv])
    assert e.value.code == 2
    assert line in capsys.readouterr().err.strip().splitlines()[-1]
  assert isinstance(opened(folder, sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])).model, Decoder)
