"""The harness command on whole experiments, and the model that it gives to the harness."""

import collections
import dataclasses
import json
import pathlib
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest

from kdjax import evaluate, train
from kdjax.analysis import table
from kdjax.config import MeshConfig
from kdjax.data.tokenizer import Tokenizer
from kdjax.errors import UserError
from kdjax.models import build
from kdjax.runs.folder import RunFolder
from kdjax.runtime import sharding
from kdjax.scoring import job as jobs
from kdjax.scoring import results
from kdjax.storage.paths import read_json, write_json
from kdjax.teachers import by_name, frozen
from tests import tiny
from tests.scoring import lm_eval_tasks
from tests.teachers.huggingface.folders import MODELS, random_params

pytest.importorskip('lm_eval', reason='the harness is not installed (the [lm-eval] extra)')
from kdjax import harness

LONGEST = 128


@pytest.fixture(scope='module')
def opened() -> by_name.OpenModel:
  config = dataclasses.replace(MODELS['LlamaForCausalLM'], vocab_size=257, max_seq_len=LONGEST)
  return by_name.OpenModel(build(config), random_params(config), Tokenizer(), 'random')


def model(opened, devices: int = 1, **options) -> harness.Model:
  mesh = sharding.make_mesh(MeshConfig(1, devices, 1), jax.devices()[:devices])
  return harness.Model(opened, mesh, **options)


def asked(context: str, **settings) -> SimpleNamespace:
  return SimpleNamespace(args=(context, {'until': [], 'max_gen_toks': 12} | settings))


SAMPLED = {'do_sample': True, 'temperature': 1.5}


# Sampled answers.


def test_repeated_requests_are_independent_draws(opened):
  requests = [asked('once', **SAMPLED)] * 16
  answers = model(opened, batch_size=4).generate_until(requests)
  assert len(set(answers)) == 16
  assert model(opened, batch_size=4).generate_until(requests) == answers
  assert not set(model(opened, batch_size=4, seed=1).generate_until(requests)) & set(answers)


def test_answers_depend_on_neither_the_batch_size_nor_the_order_nor_the_devices(opened):
  requests = [asked(f'{k} ' * (1 + 2 * k), **SAMPLED) for k in range(6) for _ in range(3)]
  answers = model(opened, batch_size=16).generate_until(requests)
  by_request = collections.defaultdict(set)
  for request, answer in zip(requests, answers, strict=True):
    by_request[request.args[0]].add(answer)
  assert all(len(found) == 3 for found in by_request.values())
  for devices, batch_size in ((1, 7), (4, 8)):
    assert model(opened, devices, batch_size=batch_size).generate_until(requests) == answers
  order = np.random.default_rng(0).permutation(len(requests))
  again = model(opened, batch_size=4).generate_until([requests[i] for i in order])
  for i, answer in zip(order, again, strict=True):
    assert answer in by_request[requests[i].args[0]]
  assert sorted(again) == sorted(answers)


def test_a_part_of_the_requests_gets_the_same_answers(opened):
  """As with --limit."""
  requests = [asked(f'{k}', **SAMPLED) for k in range(8)]
  assert model(opened).generate_until(requests[:3]) == model(opened).generate_until(requests)[:3]


def test_draws_come_as_often_as_the_models_probabilities_say(opened):
  requests = [asked('once', max_gen_toks=1, **SAMPLED)] * 2000
  found = collections.Counter(model(opened, batch_size=64).generate_until(requests))
  tokens = np.frombuffer(b'once', np.uint8)[None].astype(np.int32)
  tokens = np.concatenate([[[256]], tokens], axis=1)
  logits = (opened.model.hidden(opened.params, tokens)[0, -1] @ opened.model.head(opened.params))[:257]
  shares = np.asarray(jax.nn.softmax(logits / 1.5), np.float64)
  for byte in np.argsort(-shares[:128])[:20]:
    share = shares[byte]
    assert abs(found[chr(byte)] / 2000 - share) < 4.5 * np.sqrt(share * (1 - share) / 2000)


@pytest.mark.parametrize(
  ('settings', 'drawn'),
  [
    ({'do_sample': True, 'temperature': 1.0}, True),
    ({'temperature': 1.0}, True),  # as in lm_eval's own models
    ({'do_sample': False, 'temperature': 1.0}, False),
    ({'do_sample': True, 'temperature': 0.0}, False),
    ({'do_sample': True, 'temperature': 1.0, 'top_k': 1}, False),
    ({'temperature': None}, False),
    ({}, False),
  ],
)
def test_whether_answers_are_drawn_is_as_for_the_harness_own_models(settings, drawn, opened):
  answers = model(opened).generate_until([asked('once', **settings)] * 4)
  assert len(set(answers)) == (4 if drawn else 1)


@pytest.mark.parametrize('name', ['max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens'])
def test_a_tasks_number_of_tokens_has_several_names(name, opened):
  request = SimpleNamespace(args=('once', {name: 5}))
  (whole,) = model(opened).generate_until([asked('once', max_gen_toks=60)])
  (answer,) = model(opened).generate_until([request])
  assert whole.startswith(answer.rstrip('\ufffd')) and 0 < len(answer) <= 5


@pytest.mark.parametrize(
  ('settings', 'line'),
  [
    ({'num_beams': 4}, 'the task asks for num_beams=4, which is not supported; give --gen-kwargs num_beams=1'),
    ({'repetition_penalty': 1.2}, 'asks for repetition_penalty=1.2'),
    ({'max_gen_toks': 0}, 'asks for max_gen_toks=0'),
    ({'max_gen_toks': 500}, f'asks for 500 tokens, but the context holds {LONGEST}'),
    ({'temperature': 'warm'}, 'cannot be read'),
    ({'do_sample': True, 'temperature': -1.0}, 'temperature: must be 0'),
  ],
)
def test_settings_that_cannot_be_followed_are_refused(settings, line, opened):
  with pytest.raises(UserError, match=line):
    model(opened).generate_until([asked('once', **settings)])
  assert model(opened).generate_until([asked('once', num_beams=1, repetition_penalty=1.0)])


def test_an_answer_ends_before_a_stop_whether_it_is_text_or_a_special_token(opened):
  (whole,) = model(opened).generate_until([asked('once', max_gen_toks=40)])
  stop = whole[5:7]
  (answer,) = model(opened).generate_until([asked('once', max_gen_toks=40, until=[stop])])
  assert answer == whole[: whole.index(stop)]
  one = model(opened)
  one._special = {104: '<|stop|>'}
  assert one._decode([97, 98, 104, 99], ['<|stop|>']) == 'ab' and one._has_stopped([97, 104], ['<|stop|>'])
  assert one._decode([97, 98, 104, 99], ['c']) == 'abhc' and not one._has_stopped([97, 104], ['c'])


def test_a_continuation_without_tokens_and_a_window_that_is_too_long_are_refused(opened):
  with pytest.raises(UserError, match=r"the continuation '' has no tokens; correct that item"):
    model(opened).loglikelihood([SimpleNamespace(args=('once', ''))], disable_tqdm=True)
  with pytest.raises(UserError, match=f"--max-length 500: must be from 0 to the model's limit of {LONGEST} tokens"):
    model(opened, max_length=500)


# Whole experiments.


@pytest.fixture(scope='module')
def tasks(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('tasks')
  rng = np.random.default_rng(0)
  text = lambda n: ' '.join(rng.choice(['tea', 'inn', 'oat', 'stone'], n))
  items = [
    {'context': text(3), 'choices': [f' {text(n)}' for n in (1, 2, 3)], 'answer': int(rng.integers(3)), 'target': '1'}
    for _ in range(12)
  ]
  lm_eval_tasks.write(folder, 'mymc_a', items, lm_eval_tasks.MULTIPLE_CHOICE)
  lm_eval_tasks.write(folder, 'mymc_b', items, lm_eval_tasks.MULTIPLE_CHOICE)
  short = lm_eval_tasks.GENERATE['generation_kwargs'] | {'max_gen_toks': 4}
  fields = {'generation_kwargs': short, 'filter_list': lm_eval_tasks.FILTERS}
  lm_eval_tasks.write(folder, 'numbers', items, lm_eval_tasks.GENERATE | fields)
  return folder


@pytest.fixture(scope='module')
def trunk(tmp_path_factory) -> pathlib.Path:
  """An experiment whose teacher is an intermediate checkpoint of a longer run."""
  home = tmp_path_factory.mktemp('trunk')
  tokens = tiny.FIELDS['teacher.tokens']
  fields = {'teacher.trunk': (tokens, 2 * tokens), 'student.arms': ('baseline', 'distilled')}
  return pathlib.Path(train.run(tiny.config(home, **fields), progress=False))


@pytest.fixture
def experiment(trunk, tmp_path) -> pathlib.Path:
  shutil.copytree(trunk.parent, tmp_path / 'runs')
  return tmp_path / 'runs' / trunk.name


def run(tasks, *argv) -> None:
  harness.main([str(arg) for arg in (*argv, '--include-path', tasks, '--no-defaults', '--fsdp', 1, '--replica', 8)])


def read_task(folder: pathlib.Path, arm: str, name: str, step: int = 0):
  return results.read_result(folder / read_json(folder / jobs.file_name(step))[arm][name])


def test_the_teacher_is_the_one_that_the_students_learned_from(experiment, tasks, monkeypatch, capsys):
  teacher = jobs.find_job(experiment).teacher
  assert (teacher.path / 'checkpoints' / str(tiny.STEPS)).exists()  # the newest of the trunk
  weights = {}
  opened = lambda path, *args: weights.setdefault(path, by_name.open_model(path, *args))
  monkeypatch.setattr(harness, 'by_name', SimpleNamespace(open_model=opened))
  run(tasks, experiment, '--tasks', 'mymc_*', '--limit', '0.5')
  out = capsys.readouterr().out
  _, meta = read_task(experiment, 'teacher', 'lm-eval-mymc_a')
  assert meta['step'] == tiny.STEPS // 2 and meta['items'] == 6
  frame = pd.read_csv(experiment / 'results.csv').set_index(['arm', 'set'])
  steps = frame.loc['teacher']['step']
  assert set(steps) == {tiny.STEPS // 2} and {'in-domain', 'lm-eval-mymc_a', 'lm-eval-mymc_b'} <= set(steps.index)
  assert f'in {tiny.STEPS // 2} steps of {tiny.STEPS}' in out
  (used,) = (one.params for path, one in weights.items() if path == str(teacher.path))
  assert is_of_step(used, teacher, tiny.STEPS // 2) and not is_of_step(used, teacher, tiny.STEPS)


def is_of_step(params, run: RunFolder, step: int) -> bool:
  """Whether weights are those of a checkpoint of a run."""
  mesh = jax.make_mesh((1, 1, 1), sharding.AXES, devices=jax.devices()[:1])
  wanted = frozen.load_saved(run, mesh, step)[1]
  return all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(wanted)))


def test_a_teacher_named_at_a_step_is_evaluated_at_that_step(experiment, trunk, tasks, tmp_path, monkeypatch):
  """As with teacher.run=TRUNK and teacher.step=N: the trunk has newer checkpoints."""
  teacher, step = jobs.find_job(experiment).teacher, tiny.STEPS // 2
  fields = {'teacher.run': str(teacher.path), 'teacher.step': step, 'student.arms': ('distilled',)}
  places = tiny.write_text(trunk.parents[1]) | {'data.cache': str(trunk.parent / 'stores')}
  folder = pathlib.Path(train.run(tiny.config(tmp_path, **fields, **places), progress=False))
  used, open_model = {}, by_name.open_model
  opened = lambda path, *args: used.setdefault(path, open_model(path, *args))
  monkeypatch.setattr(harness, 'by_name', SimpleNamespace(open_model=opened))
  run(tasks, folder, '--tasks', 'mymc_a')
  _, meta = read_task(folder, 'teacher', 'lm-eval-mymc_a')
  assert meta['step'] == used[str(teacher.path)].step == step
  params = used[str(teacher.path)].params
  assert is_of_step(params, teacher, step) and not is_of_step(params, teacher, tiny.STEPS)


def test_a_named_steps_results_are_in_that_steps_table_alone(experiment, tasks, capsys):
  before = (experiment / 'table.txt').read_text(), read_json(experiment / 'evaluation.json')
  run(tasks, experiment, '--tasks', 'mymc_a', '--step', 8)
  out = capsys.readouterr().out
  assert ((experiment / 'table.txt').read_text(), read_json(experiment / 'evaluation.json')) == before
  assert f'{experiment}, step 8' in out and 'No text set has been scored yet: python -m kdjax.evaluate' in out
  for arm, step in (('teacher', tiny.STEPS // 2), ('baseline', 8), ('distilled', 8)):
    assert read_task(experiment, arm, 'lm-eval-mymc_a', 8)[1]['step'] == step
  assert f'1,024 tokens in 8 steps of {tiny.STEPS}' in out
  # The eval job adds the text sets of the same step and keeps these results.
  evaluate.main([f'--workdir={experiment}', '--step=8'])
  out = capsys.readouterr().out
  assert 'lm-eval-mymc_a' in out and 'bits/byte less the baseline' in out and ', step 8' in out
  frame = pd.read_csv(experiment / 'results-step8.csv')
  assert set(frame[frame['arm'] == 'distilled']['step']) == {8}
  run(tasks, experiment, '--tasks', 'mymc_b', '--step', 8)
  assert {'in-domain', 'lm-eval-mymc_a', 'lm-eval-mymc_b'} <= read_json(experiment / 'evaluation-step8.json')[
    'baseline'
  ].keys()


def test_the_newest_table_is_of_one_step(experiment, tasks, capsys):
  """Text sets scored at an earlier step are omitted until the eval job has scored the newest step."""
  known = read_json(experiment / 'evaluation.json')
  evaluate.main([f'--workdir={experiment}', '--step=8'])
  old = read_json(experiment / 'evaluation-step8.json')
  write_json(experiment / 'evaluation.json', old)
  run(tasks, experiment, '--tasks', 'mymc_a')
  sets = read_json(experiment / 'evaluation.json')
  assert sets['distilled'].keys() == {'lm-eval-mymc_a'} and sets['teacher'].keys() > {'lm-eval-mymc_a'}
  assert 'No text set has been scored yet' in capsys.readouterr().out
  evaluate.main([f'--workdir={experiment}'])
  again = read_json(experiment / 'evaluation.json')
  assert again == {arm: files | {'lm-eval-mymc_a': sets[arm]['lm-eval-mymc_a']} for arm, files in known.items()}


def test_filters_have_columns_of_their_own_and_replace_what_was_averaged(experiment, tasks, capsys):
  run(tasks, experiment, '--tasks', 'numbers')
  names = ['lm-eval-numbers:flexible-extract', 'lm-eval-numbers:strict-match']
  assert all(name in capsys.readouterr().out or name in (experiment / 'table.txt').read_text() for name in names)
  # As written by earlier versions: each item once for each filter.
  for arm, files in (known := read_json(experiment / 'evaluation.json')).items():
    tables = [results.read_result(experiment / files[name]) for name in names]
    meta = tables[0][1] | {'set': 'lm-eval-numbers'}
    target = results.result_path(RunFolder(experiment / 'old' / arm).results, meta['step'], 'lm-eval-numbers', 'abc')
    results.write_result(target, pd.concat([found for found, _ in tables], ignore_index=True), meta)
    files['lm-eval-numbers'] = str(target.relative_to(experiment))
  write_json(experiment / 'evaluation.json', known)
  text = table.write_table(experiment)
  (columns,) = (line.split() for line in text.splitlines() if line.startswith('accuracy'))
  assert columns == ['accuracy', *names]
  run(tasks, experiment, '--tasks', 'numbers')
  assert 'lm-eval-numbers' not in read_json(experiment / 'evaluation.json')['baseline']


def test_tables_name_what_each_accuracy_is_normalised_by(experiment, tasks, capsys):
  run(tasks, experiment, '--tasks', 'mymc_a,numbers')
  text = (experiment / 'table.txt').read_text()
  plain, normalised = (part.splitlines() for part in text.split('\n\n') if part.startswith('accuracy'))
  assert plain[0].split() == ['accuracy', 'lm-eval-numbers:flexible-extract', 'lm-eval-numbers:strict-match']
  assert [cell.strip() for cell in normalised[0].split('  ') if cell.strip()] == [
    'accuracy (per character normalised)',
    'lm-eval-mymc_a',
  ]
  assert any(line.startswith('distilled less the baseline, per character') for line in normalised)
  frame = pd.read_csv(experiment / 'results.csv').set_index(['arm', 'set'])
  row = frame.loc[('baseline', 'lm-eval-mymc_a')]
  assert row['normalised'] == 'per character' and row['chance'] == pytest.approx(1 / 3)
  (baseline,) = (line for line in normalised if line.startswith('baseline  '))
  assert f'{row["accuracy"]:.3f} ({row["accuracy_norm"]:.3f})' in baseline
  assert np.isnan(frame.loc[('baseline', 'lm-eval-numbers:strict-match'), 'accuracy_norm'])


def test_nothing_is_added_where_one_model_could_not_be_scored(experiment, tasks, monkeypatch):
  before = read_json(experiment / 'evaluation.json')
  opened = by_name.open_model

  def fail(path, *args):
    if path.endswith('distilled'):
      raise UserError('its weights are gone')
    return opened(path, *args)

  monkeypatch.setattr(harness, 'by_name', SimpleNamespace(open_model=fail))
  with pytest.raises(SystemExit):
    run(tasks, experiment, '--tasks', 'mymc_a')
  assert read_json(experiment / 'evaluation.json') == before


@pytest.mark.parametrize(
  ('argv', 'names'),
  [
    (['RUN', '--tasks', 'a,b'], ['a', 'b']),
    (['--tasks', 'a,', 'b', 'RUN'], ['a', 'b']),
    (['--tasks', 'a, b', '--limit', '2', 'RUN'], ['a', 'b']),
    (['--fsdp', '1', 'RUN', '--tasks', 'a'], ['a']),
    (['--no-defaults', '--tasks=a', 'RUN'], ['a']),
    (['RUN', '--tasks', 'a', 'b', '--step', '3'], ['a', 'b']),
  ],
)
def test_a_run_and_the_names_of_tasks_come_in_any_order(argv, names, monkeypatch, capsys):
  found = []
  monkeypatch.setattr(harness, 'run', lambda args, mesh: found.append(harness._split_model(args)))
  harness.main([*argv, '--replica', '8', '--fsdp', '1'] if '--fsdp' not in argv else [*argv, '--replica', '8'])
  assert found == [(names, 'RUN')]


def test_the_answers_of_one_run_are_written_as_json(experiment, tasks, tmp_path):
  out = tmp_path / 'out.json'
  run(tasks, '--output', out, '--tasks', 'mymc_a,', 'mymc_b', experiment / 'students' / 'baseline')
  assert set(json.loads(out.read_text())['baseline']) == {'mymc_a', 'mymc_b'}


@pytest.mark.parametrize(
  ('argv', 'line'),
  [
    (['--tasks', 'mymc_c'], 'error: unknown tasks: mymc_c (did you mean mymc_'),
    (['--tasks', 'mymc_a', '--limit', '-1'], '--limit: must be at least 1, got -1'),
    (['--tasks', 'mymc_a', '--seed', '99999999999999999999'], '--seed: must be below 4,294,967,296'),
    (['--tasks', 'mymc_a', 'mymc_b', '--step'], 'argument --step: expected one argument'),
    (['--tasks', 'mymc_a', '--step', '7'], 'has no checkpoint of step 7; it has 8, 12'),
    (
      ['--tasks', 'mymc_a', '--max-length', '99999'],
      "error: --max-length 99999: must be from 0 to the model's limit of 8192",
    ),
  ],
)
def test_mistakes_are_one_line(argv, line, trunk, tasks, capsys):
  with pytest.raises(SystemExit) as e:
    run(tasks, trunk, *argv)
  assert e.value.code == 2
  assert line in capsys.readouterr().err.strip().splitlines()[-1]
